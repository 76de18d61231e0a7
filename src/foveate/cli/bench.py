"""`foveate bench`: how long answers take, unpruned and with each rival, measured in turns and beside the prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core import UsageError, usage
from foveate.inference.loading import Adapter, AnySpec, Clip, Compiled, Device, Dtype, Trust

if TYPE_CHECKING:
    from foveate.core import Method
    from foveate.evaluate.bench import Result, Setting

Stages = tuple["Method", ...]
Prompts = Callable[[Any], Any]  # a method that scales pictures, or None, to the inputs of a batch


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="mini, a folder, or a hub id.")] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(metavar="PRESET", help="In its place, a well-known shape with random weights; no download."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(metavar="N", help="At most so many blocks of a PRESET's tower and decoder.")
    ] = None,
    adapter: Adapter = None,
    any_spec: AnySpec = False,
    prune: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="A rival; repeat it for more. Unpruned comes first.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="B", help="Prompts at once, one picture each.")] = 1,
    text: Annotated[int, typer.Option(metavar="N", help="Other tokens of a PRESET's prompts.")] = 60,
    answer: Annotated[int, typer.Option(metavar="N", help="Tokens of each answer.")] = 32,
    repeats: Annotated[int, typer.Option(metavar="N", help="Rounds in which all rivals take turns.")] = 5,
    warmup: Annotated[int, typer.Option(metavar="N", help="Rounds before those that count.")] = 1,
    compiled: Compiled = False,
    hardware: Annotated[
        str, typer.Option(metavar="H", help="Predict for auto (this device), none, or a name as in foveate cost.")
    ] = "auto",
    paper_table: Annotated[
        bool, typer.Option("--paper-table", help="Each rival at 75, 50 and 25 %, printed as in FoPru's Table 1.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the results to a file.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="F", help="Draw the results (.png).")] = None,
    clip: Clip = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Time answers of MODEL or of a shape with random weights: first token, each further one, memory, choosing."""
    with usage():
        from foveate.evaluate.bench import Setting
        from foveate.inference.adapters import check_asked
        from foveate.inference.loading import find_device

        setting = Setting(answer=answer, repeats=repeats, warmup=warmup, compiled=compiled)
        _check_model(model, random_weights, adapter)
        _check(layers, random_weights, json_file, plot, {"batch": batch, "text": text})
        rivals, names = _rivals(prune, paper_table, compiled)
        check_asked(adapter, rivals, any_spec=any_spec)
        place = find_device(device)
        predicted_for = _hardware(hardware, place)

    needs = {need for stages in rivals for stage in stages for part in stage.parts() for need in part.needs}
    if random_weights is not None:
        made = _random(random_weights, layers, place, dtype, needs)
        prompts = _random_prompts(made[0], text, batch)
    else:
        where = {"device": str(place), "dtype": dtype, "trust_remote_code": trust_remote_code}
        made, prompts = _loaded(str(model), clip, batch, adapter=adapter, any_spec=any_spec, **where)
    results = _measure(made, prompts, rivals, setting, predicted_for)
    _show(results, names if paper_table else None, predicted_for)
    settings = {"batch": batch, "answer": answer, "model": model or random_weights, "layers": layers}
    settings |= {"adapter": None if adapter is None else str(adapter), "compiled": compiled}
    _keep(results, json_file, plot, {**settings, **_machine(made[0])})


def _check_model(model: str | None, preset: str | None, adapter: Path | None) -> None:
    from foveate.inference.processes import check_alone

    check_alone("bench")
    if (model is None) == (preset is None):
        raise UsageError("give a MODEL or --random-weights PRESET, one of them")
    if preset is not None and adapter is not None:
        raise UsageError("--adapter belongs to a MODEL; random weights have none")


def _keep(results: Sequence[Result], json_file: Path | None, plot: Path | None, head: dict[str, Any]) -> None:
    """Write and draw the results where that is wanted."""
    if json_file is not None:
        from foveate.runs import write_json

        write_json(json_file, {**head, "results": [result.to_dict() for result in results]})
    if plot is not None:
        from foveate.report.bench_figures import bench_figure
        from foveate.report.figures import save_figure

        save_figure(bench_figure(results), plot)


def _check(
    layers: int | None, preset: str | None, json_file: Path | None, plot: Path | None, counts: Mapping[str, int]
) -> None:
    """Refuse, before any work, what could not be built or written."""
    for name, value in counts.items():
        if value < 1:
            raise UsageError(f"--{name} {value} is below 1; the smallest is 1")
    if layers is not None and preset is None:
        raise UsageError("--layers cuts a PRESET short; a MODEL has the layers that it has")
    if preset is not None:
        from foveate.evaluate.bench_model import scaled

        scaled(preset, layers)
    if json_file is not None or plot is not None:
        from foveate.paths import file_target

        if json_file is not None:
            file_target(json_file, (".json",))
        if plot is not None:
            from foveate.report.figures import check_drawing

            file_target(plot, (".png",))
            check_drawing()


def _rivals(specs: list[str] | None, paper_table: bool, compiled: bool) -> tuple[list[Stages], list[str]]:
    """The rivals, and for the paper's table the name of each method, which then stands at each ratio."""
    from foveate.inference.compiling import check_static
    from foveate.inference.resizing import scaling
    from foveate.methods import name_of
    from foveate.report.bench_tables import at_ratios
    from foveate.spec import parse_stages

    given = [parse_stages(spec) for spec in specs or (["fopru"] if paper_table else []) if spec != "none"]
    for stages in given:
        scaling(stages)  # refuses what cannot be joined
        if compiled:
            check_static(stages)
    if not paper_table:
        return given, []
    rivals: list[Stages] = [stages for one in given for stages in at_ratios(one)]
    return rivals, [name_of(stages[0]) for stages in given]


def _hardware(name: str, place: Any) -> Any:
    """The row to predict with, None for none."""
    import torch

    from foveate.cost import hardware, hardware_of

    if name == "none":
        return None
    if name != "auto":
        return hardware(name)
    return hardware_of(torch.cuda.get_device_name(place)) if place.type == "cuda" else hardware("cpu")


def _random(preset: str, layers: int | None, place: Any, dtype: str, needs: set[str]) -> tuple[Any, dict[str, Any]]:
    """A model with random weights, and what `prune` needs besides."""
    import torch

    from foveate.choosing.signals import JOINT
    from foveate.cli.output import working
    from foveate.core import did_you_mean
    from foveate.evaluate.bench_model import random_clip, random_model
    from foveate.inference.loading import DTYPES

    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; {did_you_mean(dtype, DTYPES)}")
    kind = "float32" if place.type == "cpu" else "bfloat16"
    with working(f"building {preset} with random weights"):
        model = random_model(
            preset, layers=layers, device=place, dtype=getattr(torch, kind if dtype == "auto" else dtype)
        )
        joint = needs.intersection(JOINT)
        options = {"clip": random_clip(model), "question": "what color is behind the dog ?"} if joint else {}
    return model, options


def _random_prompts(model: Any, text: int, batch: int) -> Prompts:
    """Prompts about pictures of noise; about smaller ones for a method that scales them."""
    from foveate.evaluate.bench_model import random_inputs

    def made(method: Any) -> Any:
        return random_inputs(model, text=text, batch=batch, keep=None if method is None else method.keep)

    return made


def _loaded(name: str, clip: str | None, batch: int, **place: Any) -> tuple[tuple[Any, dict[str, Any]], Prompts]:
    """A checkpoint with what `prune` needs besides, and prompts about pictures of noise.

    Args:
        place: as `load_tuned` has it.
    """
    from PIL import Image

    from foveate.cli.output import note_precision, working
    from foveate.inference.adapters import load_tuned
    from foveate.inference.answers import encode
    from foveate.inference.resizing import Scaler

    with working(f"loading {name}"):
        loaded = load_tuned(name, **place)
    note_precision(loaded.model)
    picture = Image.effect_noise((672, 672), 90).convert("RGB")
    questions = ["what color is behind the dog ?"] * batch

    def made(method: Any) -> Any:
        if method is None:
            return encode(loaded.model, loaded.processor, [[picture]] * batch, questions)
        return Scaler(loaded.model, loaded.processor, method).encode([[picture]] * batch, questions)

    return (loaded.model, {"processor": loaded.processor, "clip": clip}), made


def _measure(
    made: tuple[Any, dict[str, Any]], prompts: Prompts, rivals: Sequence[Stages], setting: Setting, hardware: Any
) -> list[Result]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from foveate.cli.output import stderr
    from foveate.evaluate.bench import measure

    console = stderr()
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # Drawn between answers alone, so that nothing else runs while one is timed.
    with Progress(*bars, console=console, transient=True, disable=not console.is_terminal, auto_refresh=False) as bar:
        task = bar.add_task("answers", total=(setting.warmup + setting.repeats) * (len(rivals) + 1))

        def progress(count: int) -> None:
            bar.advance(task, count)
            bar.refresh()

        options = {"hardware": hardware, "options": made[1], "smaller": prompts, "progress": progress}
        return measure(made[0], prompts(None), rivals, setting, **options)


def _show(results: Sequence[Result], names: Sequence[str] | None, hardware: Any) -> None:
    from foveate.cli.output import show
    from foveate.evaluate.bench import fit, warnings
    from foveate.report.bench_tables import PAPER_COLUMNS, columns, paper_rows, rows

    if names is not None:
        show(PAPER_COLUMNS, paper_rows(results, names))
    else:
        show(columns(results), rows(results))
    lines = [f"medians of {results[0].runs} rounds, quartiles in brackets"]
    if hardware is not None:
        known = hardware.launch is not None
        lines.append(
            f"predicted for {hardware.name}: "
            + ("with its fitted efficiency and launch time" if known else "the roofline's bound, launches left out")
        )
        found = fit(results, hardware)
        if found is not None and found.efficiency is not None and found.launch is not None:
            lines.append(
                f"nearest to these first tokens: {found.efficiency:.3g} of the roofline's speed, "
                f"{found.launch * 1e6:.3g} us a launch"
            )
    lines += [f"warning: {line}" for line in warnings(results)]
    typer.echo("\n".join(["", *lines]))


def _machine(model: Any) -> dict[str, Any]:
    """The device and the versions behind the figures."""
    import datetime
    import platform

    import torch
    import transformers

    cuda = model.device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(model.device) if cuda else platform.processor() or platform.machine(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
