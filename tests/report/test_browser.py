"""The page in a real browser, where one is installed: nothing leaves, and nothing of a model's text runs."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import made
import pytest

from steerguard.report.sweep_page import page
from steerguard.sweeping.result_file import of

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--virtual-time-budget=2000",
)  # fmt: skip
HOSTILE = '<img src="http://127.0.0.1:9/asked-for"><script>document.title="ran"</script>'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed: apt-get install chromium"),
]


def opened(folder: Path, text: str) -> tuple[str, set[str]]:
    """The page's elements after it was opened, and the addresses that it asked for."""
    file, log = folder / "page.html", folder / "net.json"
    file.write_text(text, encoding="utf-8")
    command = [str(BROWSER), *QUIET, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    record: dict[str, Any] = json.loads(log.read_text(encoding="utf-8"))
    kind = record["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    begun = [event["params"] for event in record["events"] if event["type"] == kind and "url" in event.get("params", {})]
    # what the browser asks for on its own account (updates, its clock) has no page as its origin
    return done.stdout, {params["url"] for params in begun if params["initiator"] != "not an origin"}


def hostile() -> str:
    record = made.small()
    record["trait"]["title"] = HOSTILE
    for arm in record["test"]["arms"]:
        for row in arm["rows"]:
            row |= {"text": HOSTILE, "note": HOSTILE, "tokens": None}
    return page(of(record))


def test_no_request_leaves(tmp_path: Path) -> None:
    elements, asked = opened(tmp_path, hostile())
    assert "</html>" in elements and "Worst scenarios first" in elements
    assert "<img" not in elements and "<script" not in elements and "<title>ran" not in elements
    assert asked == set()


def test_a_request_would_be_seen(tmp_path: Path) -> None:
    """The negation: without our escaping and our policy the same text asks, and runs."""
    elements, asked = opened(tmp_path, f"<!doctype html><title>quiet</title><body>{HOSTILE}</body>")
    assert "http://127.0.0.1:9/asked-for" in asked
    assert "<title>ran</title>" in elements


def test_the_policy_alone_lets_nothing_out(tmp_path: Path) -> None:
    """The second wall: were a text not escaped, the page's policy would still let it neither ask nor run."""
    text = hostile().replace("</main>", f"{HOSTILE}</main>")
    elements, asked = opened(tmp_path, text)
    assert "<img" in elements and "<title>ran" not in elements
    assert asked == set()
