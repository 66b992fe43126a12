"""Guards for people, and for the Hugging Face hub.

What this module knows: how a guard is shown on a terminal and on a model card, and how two files go up to a repository
and one comes down. It asks a guard for its fields and never changes it. All text of a guard may come from a file that
somebody else wrote, so nothing of it reaches a terminal or a page unescaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from steerguard.errors import InputError
from steerguard.files import printable
from steerguard.probe import Probe, ranges
from steerguard.rules import Rule

HUB_FILE = "guard.safetensors"
"""The guard's file in a hub repository; there is one guard to a repository."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Identity(Protocol):
    """What is shown of the model that a guard belongs to. See `guard.ModelIdentity`."""

    @property
    def name(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def weights(self) -> Mapping[str, str]: ...


class Shown(Protocol):
    """What is shown of a guard. See `guard.Guard`."""

    @property
    def name(self) -> str: ...
    @property
    def probes(self) -> Sequence[Probe]: ...
    @property
    def rule(self) -> Rule: ...
    @property
    def model(self) -> Identity: ...
    @property
    def positions(self) -> str: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...
    @property
    def layers(self) -> Sequence[int]: ...
    @property
    def digest(self) -> str: ...


def line(guard: Shown) -> str:
    """One line: `honesty: StTP(12) on layer 26, all positions, for Qwen/Qwen3-8B, AUROC 0.990 held out, digest 01a`."""
    auroc = min(probe.evidence.auroc for probe in guard.probes)
    weak = ", WEAK" if any(probe.evidence.weak for probe in guard.probes) else ""
    return (
        f"{guard.name}: {guard.rule} on {_layers(guard)}, {guard.positions} positions, "
        f"for {printable(guard.model.name)}, AUROC {auroc:.3f} held out{weak}, digest {guard.digest[:12]}"
    )


def describe(guard: Shown) -> str:
    """Several lines of plain text: what is in it, for which model, how well it reads, and from what it was made."""
    lines = [f"{label:<11}{value}" for label, value in _facts(guard)]
    lines += [f"{'evidence' if i == 0 else '':<11}layer {p.layer}: {_evidence(p)}" for i, p in enumerate(guard.probes)]
    lines += ["made from" if guard.provenance else "made from  (nothing recorded)"]
    lines += [f"  {printable(key)}: {_value(value)}" for key, value in guard.provenance.items()]
    return "\n".join(lines)


def card(guard: Shown, repo_id: str) -> str:
    """A Hugging Face model card: YAML front matter and Markdown."""
    title = f"{guard.name}: a steerguard guard for {_markdown(guard.model.name)}"
    table = "\n".join(f"| {label} | {_markdown(value)} |" for label, value in _facts(guard))
    layers = "\n".join(
        f"| {p.layer} | {p.evidence.auroc:.3f} [{p.evidence.auroc_low:.3f}, {p.evidence.auroc_high:.3f}] "
        f"| {p.evidence.cohens_d:.2f} | {p.evidence.split_half:.2f} | {p.evidence.n_pos} + {p.evidence.n_neg} |"
        for p in guard.probes
    )
    record = json.dumps(guard.provenance, indent=2, ensure_ascii=True, sort_keys=True)
    return f"""---
{_front_matter(guard)}
---
# {title}

A direction of the residual stream and the rule that keeps every token on its right side: {guard.rule.summary}.
It steers the model named here and is refused on any other.

| | |
|---|---|
{table}

## Use

```python
import steerguard as sg

model = sg.load({json.dumps(guard.model.name)})
guard = sg.Guard.from_hub({json.dumps(repo_id)})
with model.guarded(guard):
    print(model.generate("Did the audit find anything?")[0].text)
```

## Evidence

How well each direction reads answers that it was not fitted on. That is not how well it steers; see the record below.

| layer | AUROC, 95 % interval | Cohen's d | split-half cosine | answers |
|---|---|---|---|---|
{layers}

## Record

How it was made, as its maker recorded it:

{_indented(record)}
"""


def _front_matter(guard: Shown) -> str:
    """The YAML between the dashes; every JSON text is YAML."""
    facts: dict[str, Any] = {"library_name": "steerguard", "tags": ["steerguard", "activation-steering", "ai-safety"]}
    if _HUB_NAME.fullmatch(guard.model.name):
        facts["base_model"] = guard.model.name
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in facts.items())


def _facts(guard: Shown) -> list[tuple[str, str]]:
    model = guard.model
    return [
        ("guard", guard.name),
        ("rule", f"{guard.rule}: {guard.rule.summary}"),
        ("where", f"{_layers(guard)}, {guard.positions} positions"),
        (
            "model",
            f"{printable(model.name)}: {printable(model.architecture)}, width {model.width}, depth {model.depth}",
        ),
        ("weights", f"fingerprint of {len(model.weights)} parameters"),
        ("digest", guard.digest),
    ]


def _layers(guard: Shown) -> str:
    return f"layer{'s' if len(guard.layers) > 1 else ''} {ranges(list(guard.layers))}"


def _evidence(probe: Probe) -> str:
    return f"{probe.evidence}{', WEAK' if probe.evidence.weak else ''}"


def _value(value: object, limit: int = 300) -> str:
    text = printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= limit else f"{text[:limit]}..."


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", printable(text))


def _indented(text: str) -> str:
    """A Markdown code block that no content can end."""
    return "\n".join(f"    {row}" for row in text.split("\n"))


# -------------------------------------------------------------------------------------------------------- the hub


def upload(
    repo_id: str,
    contents: Mapping[str, bytes],
    *,
    message: str,
    private: bool | None,
    revision: str | None,
    token: str | None,
) -> str:
    """One commit with these files to a repository, created if need be; returns its address. Raises InputError."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in contents.items()]
        return str(api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url)
    except Exception as error:  # the client raises the errors of several libraries; none of them is ours to sort
        raise InputError(f"no guard was uploaded to {repo_id!r}: {_first_line(error)}; see `hf auth whoami`") from error


def download(repo_id: str, *, revision: str | None, token: str | None) -> str:
    """The local path of the guard's file in a repository. Raises InputError."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi(token=token).hf_hub_download(repo_id, HUB_FILE, revision=revision))
    except Exception as error:
        raise InputError(f"no guard was found at {repo_id!r}: {_first_line(error)}; check its name") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return printable(text.split("\n")[0])[:300]
