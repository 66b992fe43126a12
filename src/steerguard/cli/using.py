"""The commands that use a guard: `show`, `ask`, `check`, `serve`, `export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from steerguard.cli.shared import (
    Allow,
    BackendName,
    DeviceMap,
    Dtype,
    Engine,
    GuardPath,
    MaxNewTokens,
    ModelOption,
    Overwrite,
    Quantization,
    Seed,
    Temperature,
    TopP,
    app,
    engine_options,
    open_both,
    sampling_of,
)
from steerguard.errors import InputError


@app.command()
def show(guard: GuardPath) -> None:
    """What is in a guard file: from what data, for which model, how chosen."""
    from steerguard.guard import Guard
    from steerguard.report import terminal

    terminal.show_guard(Guard.load(guard))


@app.command()
def ask(
    guard: GuardPath,
    question: Annotated[str, typer.Argument(help="what to ask; `-` reads it from standard input")],
    system: Annotated[str | None, typer.Option(help="the system prompt, such as a malicious one")] = None,
    model: ModelOption = None, allow_mismatch: Allow = [],  # noqa: B006
    temperature: Temperature = 0.6, top_p: TopP = 0.9, seed: Seed = 42, max_new_tokens: MaxNewTokens = 1024,
    backend: BackendName = "hf", dtype: Dtype = "auto", device_map: DeviceMap = None, quantization: Quantization = None,
    engine: Engine = [],  # noqa: B006
) -> None:  # fmt: skip
    """Both answers to one question: unguarded and guarded, each token by its projection."""
    from steerguard.prompts import conversation
    from steerguard.report import terminal

    text = sys.stdin.read().strip() if question == "-" else question.strip()
    if not text:
        raise InputError('the question is empty; ask something, for example: steerguard ask honesty.guard "Who founded it?"')
    options = {"dtype": dtype, "device_map": device_map, "quantization": quantization, **engine_options(engine)}
    loaded_guard, loaded = open_both(guard, model, allow_mismatch, backend, **options)
    sampling = sampling_of(temperature, top_p, seed, max_new_tokens)
    prompt = conversation(system, [text])
    unguarded = loaded.generate(prompt, sampling=sampling)[0]
    guarded = loaded.generate(prompt, guards=loaded_guard, sampling=sampling, trace=True)[0]
    terminal.show_answers(loaded, loaded_guard, unguarded, guarded)


@app.command()
def check(
    guard: GuardPath,
    model: ModelOption = None, allow_mismatch: Allow = [],  # noqa: B006
    backend: BackendName = "hf", dtype: Dtype = "auto", device_map: DeviceMap = None, quantization: Quantization = None,
    engine: Engine = [],  # noqa: B006
    json: Annotated[Path | None, typer.Option(help="also write the result to this file")] = None,
) -> None:  # fmt: skip
    """Is it really steering? Exit 1 if not."""
    from steerguard import checking
    from steerguard.report import terminal

    options = {"dtype": dtype, "device_map": device_map, "quantization": quantization, **engine_options(engine)}
    loaded_guard, loaded = open_both(guard, model, allow_mismatch, backend, **options)
    report = checking.check(loaded, loaded_guard)
    terminal.show_check(report)
    if json is not None:
        from steerguard.files import write_json

        write_json(json, report.as_dict(), overwrite=True)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def serve(
    guards: Annotated[
        list[str] | None, typer.Argument(metavar="GUARD... [-- FLAGS]", help="guard files, all required; flags for vLLM after --")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="a policy file instead of guard files; see docs/serving.md")] = None,
    model: ModelOption = None,
    name: Annotated[str | None, typer.Option(help="what requests call the model; by default the last part of its name")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 is everybody")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="answers that are written side by side")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="requests that may wait; more get a 429")] = 64,
    audit: Annotated[Path | None, typer.Option(help="append a line about each request to this file")] = None,
    audit_text: Annotated[bool, typer.Option("--audit-text", help="prompts and answers go into it, too")] = False,
    backend: BackendName = "hf", dtype: Dtype = "auto", device_map: DeviceMap = None, quantization: Quantization = None,
    engine: Engine = [],  # noqa: B006
) -> None:  # fmt: skip
    """An OpenAI-compatible server under which required guards cannot be asked away.

    --backend hf serves one batch at a time: good for a laptop and for tests. For a crowd, --backend vllm starts vLLM's
    own server with the same policy.
    """
    from steerguard.serve import start

    found = list(guards or [])
    first = next((i for i, word in enumerate(found) if word.startswith("-")), len(found))
    limits = start.Limits(max_tokens=max_tokens, rows=batch, waiting=queue)
    place = start.Place(host, port, name, audit, audit_text)
    options = {"dtype": dtype, "device_map": device_map, "quantization": quantization, **engine_options(engine)}
    start.start([Path(word) for word in found[:first]], policy, model, backend, place, limits, flags=found[first:], **options)


@app.command()
def export(
    guard: GuardPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="the file to write")],
    to: Annotated[str, typer.Option(help="gguf: a llama.cpp control vector")] = "gguf",
    overwrite: Overwrite = False,
) -> None:
    """Write a guard for another tool; refused if the file could not do what the guard does."""
    from steerguard import exchange
    from steerguard.guard import Guard
    from steerguard.report import terminal

    if to != "gguf":
        raise InputError(f"a guard can be exported to gguf, not to {to!r}")
    loaded = Guard.load(guard)
    exchange.export_gguf(loaded, out, overwrite=overwrite)
    layers = ", ".join(map(str, loaded.layers))
    terminal.note(f"{out}: {loaded.rule} on layers {layers}, for {loaded.model.name}")
    terminal.note(f"  llama-server -m MODEL.gguf --control-vector {out}")
    terminal.note("llama.cpp checks nothing but the width: serve it with the model that the guard was made for")
