"""The commands that make something of a model: `demo`, `fit`, `build`, `sweep`, `report`, `recalibrate`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from steerguard.cli.shared import (
    BackendName,
    DeviceMap,
    Dtype,
    Engine,
    GuardPath,
    MaxNewTokens,
    ModelName,
    ModelOption,
    Overrides,
    Overwrite,
    Positions,
    Quantization,
    Seed,
    Temperature,
    TopP,
    app,
    engine_options,
    load_model,
    progressing,
    sampling_of,
)
from steerguard.errors import InputError, OutputExists


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the guard files")] = Path("steerguard-demo"),
    json: Annotated[Path | None, typer.Option(help="also write every figure to this file")] = None,
    picture: Annotated[Path | None, typer.Option(help="also draw an example of each trait to this SVG file")] = None,
    traits: Annotated[list[str], typer.Option("--trait", help="honesty, compassion; both by default")] = [],  # noqa: B006
) -> None:
    """Fit, search and test guards on the bundled model: the whole line in a few minutes on a laptop."""
    from steerguard.organism import demo as organism_demo
    from steerguard.report import terminal

    with progressing() as progress:
        result = organism_demo.run(out, traits=traits or list(organism_demo.TRAITS), progress=progress)
    terminal.show_demo(result)
    if json is not None:
        from steerguard.files import write_json

        write_json(json, result.figures(), overwrite=True)
        terminal.note(f"figures: {json}")
    if picture is not None:
        terminal.draw_examples(result, picture)
        terminal.note(f"picture: {picture}")


@app.command()
def fit(
    model: ModelName,
    trait: Annotated[str, typer.Option("--trait", "-t", help="a bundled trait, or a folder with one of yours")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the answers and the probes")],
    direction: Annotated[str | None, typer.Option(help="logistic (the paper's, the default) or mean-difference")] = None,
    directions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="another tool's vectors (.gguf, .pt, .npy, .safetensors), kept as they are"),
    ] = None,
    directions_layer: Annotated[int | None, typer.Option(min=0, help="the layer of a --directions file of one vector")] = None,
    context: Annotated[str, typer.Option(help="own: read answers under their system prompt; neutral: under none")] = "own",
    allow_weak: Annotated[bool, typer.Option("--allow-weak", help="keep probes that read nothing held out")] = False,
    temperature: Temperature = 0.6, top_p: TopP = 0.9, seed: Seed = 42, max_new_tokens: MaxNewTokens = 1024,
    backend: BackendName = "hf", dtype: Dtype = "auto", device_map: DeviceMap = None, quantization: Quantization = None,
    engine: Engine = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Learn one direction per layer from the model's own answers under both poles of a trait.

    Interrupted, it goes on where it was: the answers are kept in the folder as they come.
    """
    from steerguard import exchange, fitting
    from steerguard.report import terminal
    from steerguard.traits import trait as find_trait

    if directions is not None and direction is not None:
        raise InputError("--directions gives the directions and --direction learns them: pass one of the two")
    if directions is None and directions_layer is not None:
        raise InputError("--directions-layer belongs to --directions: pass the file, or leave it out")
    if (out / fitting.PROBES).exists() and not overwrite:
        raise OutputExists(f"{out / fitting.PROBES} exists; choose another folder with -o, or pass --overwrite")
    chosen = find_trait(trait)
    given = None if directions is None else exchange.read_directions(directions, layer=directions_layer)
    loaded = load_model(model, backend, dtype=dtype, device_map=device_map, quantization=quantization, **engine_options(engine))
    options: dict[str, Any] = {
        "context": context, "sampling": sampling_of(temperature, top_p, seed, max_new_tokens),
        "store": out / fitting.CONTRAST, "allow_weak": allow_weak,
    }  # fmt: skip
    with progressing() as progress:
        if given is not None and directions is not None:
            probes = fitting.fit_statistics(loaded, chosen, given, source=directions.name, progress=progress, **options)
        else:
            options |= {} if direction is None else {"direction": direction}
            probes = fitting.fit(loaded, chosen, progress=progress, **options)
    probes.save(out, overwrite=True)
    terminal.show_fit(probes, out)


@app.command()
def build(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="what `steerguard fit` wrote")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the guard file")],
    layer: Annotated[list[int], typer.Option("--layer", "-l", help="steered layer, 0 the first; repeat for several")],
    rule: Annotated[str, typer.Option("--rule", "-r", help="SwFC, StTP, StMP, Floor, Ceiling, Target, ...")] = "StTP",
    strength: Annotated[float | None, typer.Option("--strength", "-a", help="alpha (tau for Floor and Ceiling)")] = None,
    positions: Positions = "all",
    name: Annotated[str | None, typer.Option(help="what a server calls the guard; by default the trait's name")] = None,
    allow_weak: Annotated[bool, typer.Option("--allow-weak", help="accept a layer whose probe reads nothing held out")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Make a guard file by hand from fitted probes: this rule, this strength, these layers."""
    from steerguard import rules
    from steerguard.fitting import Fit
    from steerguard.report import terminal

    probes = Fit.load(folder)
    guard = probes.guard(rules.rule(rule, strength), layer, positions=positions, name=name, allow_weak=allow_weak)  # type: ignore[arg-type]
    guard.save(out, overwrite=overwrite)
    terminal.note(f"{guard}\n{out}: try `steerguard check {out}`, then `steerguard ask {out} \"...\"`")


@app.command()
def sweep(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="what `steerguard fit` wrote, or a new folder with --recipe")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the guard file of the best setting")] = None,
    recipe: Annotated[str | None, typer.Option(help="a bundled recipe or a YAML file; fits where DIR has no probes")] = None,
    set_: Overrides = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print answers, tokens, hours, judge calls; do nothing")] = False,
    judge: Annotated[list[str], typer.Option(metavar="MODEL@URL", help="a judge's endpoint; repeat for several")] = [],  # noqa: B006
    judge_key_env: Annotated[str | None, typer.Option(help="NAME of the environment variable with the judge's key")] = None,
    screen: Annotated[int | None, typer.Option(min=1, help="try every setting on so many scenarios, the best on all")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="try every n-th layer, then those around the best")] = None,
    trait: Annotated[str | None, typer.Option("--trait", "-t", help="the folder of a trait of yours")] = None,
    beside: Annotated[list[Path], typer.Option(help="a guard of another trait that is on throughout")] = [],  # noqa: B006
    test: Annotated[bool | None, typer.Option("--test/--no-test", help="read and report the test split")] = None,
    backend: Annotated[str | None, typer.Option(help="hf (transformers) or vllm")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16")] = None,
    device_map: DeviceMap = None, quantization: Quantization = None, engine: Engine = [],  # noqa: B006
    report: Annotated[Path | None, typer.Option(help="also write the page, as `steerguard report` does")] = None,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Try every layer, rule and strength, choose an operating point, and test it on scenarios that chose nothing.

    Interrupted, it goes on where it was. Without --recipe: the paper's grid on the probes in DIR.
    """
    from steerguard import recipes
    from steerguard.files import refuse_existing
    from steerguard.recipes.run import open_model, run
    from steerguard.report import terminal

    options = {
        "load.backend": backend, "load.dtype": dtype, "load.device_map": device_map, "load.quantization": quantization,
        "trait": trait, "search.screen": screen, "search.stride": stride, "test": test,
        "beside": [str(path) for path in beside] or None, "load.engine": engine_options(engine) or None,
        "judge.judges": [{"model": one, "key_env": judge_key_env} for one in judge] or None,
    }  # fmt: skip
    given = {key: value for key, value in options.items() if value is not None}
    chosen = recipes.recipe(recipe, set_, given=given) if recipe else recipes.of_fit(folder, set_, given=given)
    if dry_run:
        from steerguard.recipes.plan import planned

        terminal.show_plan(chosen, planned(chosen, folder))
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in (out, report):
        if path is not None:
            refuse_existing(path, overwrite=overwrite)
    with terminal.loading(chosen.model):
        model = open_model(chosen)
    with progressing() as progress:
        outcome = run(chosen, folder, model=model, command=shlex.join(["steerguard", *sys.argv[1:]]), progress=progress)
    terminal.show_sweep(outcome)
    if outcome.sweep.winner is None:
        raise typer.Exit(1)
    if out is not None:
        outcome.sweep.guard.save(out, overwrite=overwrite)
        terminal.note(f"{out}: try `steerguard check {out}`, then `steerguard ask {out} \"...\"`")
    if report is not None:
        from steerguard.report.sweep_page import write_report

        terminal.note(f"page and tables: {', '.join(map(str, write_report(outcome.result, report, overwrite=overwrite)))}")
    else:
        terminal.note(f"to look at it: steerguard report {folder}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="what `steerguard sweep` wrote, or its result.json")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the HTML file; by default report.html in DIR")] = None,
    overwrite: Overwrite = False,
) -> None:
    """One page of a sweep, to look at offline, and its figures as CSV."""
    from steerguard.recipes.run import RESULT
    from steerguard.report import terminal
    from steerguard.report.sweep_page import write_report
    from steerguard.sweeping import result_file

    path = folder / RESULT if folder.is_dir() else folder
    written = write_report(result_file.read(path), out or path.parent / "report.html", overwrite=overwrite)
    for one in written:
        terminal.note(str(one))


@app.command()
def recalibrate(
    guard: GuardPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="the new guard file")],
    model: ModelOption = None,
    trait: Annotated[str | None, typer.Option("--trait", "-t", help="by default the bundled trait that the guard names")] = None,
    benign: Annotated[Path | None, typer.Option(help="a JSON-lines file of benign prompts; by default the bundled ones")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="how many benign prompts are answered, at most")] = 500,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="longest answer; by default as the guard was fitted")] = None,
    store: Annotated[Path | None, typer.Option(help="folder that keeps answers, to go on from where it was")] = None,
    backend: BackendName = "hf", dtype: Dtype = "auto", device_map: DeviceMap = None, quantization: Quantization = None,
    engine: Engine = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Fit a guard to a new checkpoint of its model: the same direction and rule, new statistics, and what changed.

    On its own model it gives a guard the benign reference that drift is told by.
    """
    from dataclasses import replace

    from steerguard import files, recalibrating
    from steerguard.guard import Guard
    from steerguard.report import terminal
    from steerguard.traits import trait as find_trait

    files.refuse_existing(out, overwrite=overwrite)
    old = Guard.load(guard)
    chosen = find_trait(trait or recalibrating.trait_of(old))
    asked = recalibrating.benign_prompts(benign, prompts)
    sampling = recalibrating.sampling_of(old)
    if max_new_tokens is not None:
        sampling = replace(sampling, max_new_tokens=max_new_tokens)
    options = {"dtype": dtype, "device_map": device_map, "quantization": quantization, **engine_options(engine)}
    loaded = load_model(model or old.model.name, backend, **options)
    with progressing() as progress:
        found = recalibrating.recalibrate(old, loaded, chosen, asked, sampling=sampling, store=store, progress=progress)
    found.guard.save(out, overwrite=overwrite)
    terminal.show_recalibrated(found, out)
