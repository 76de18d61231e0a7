"""What the commands share that train modules of learned methods: options, the model, its rows, how a run is told."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core import usage

if TYPE_CHECKING:
    from foveate.inference.loading import Loaded

SCENES = "scenes"

Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the run; the modules end in a folder in it.")]
Model = Annotated[str, typer.Option(metavar="MODEL", help="mini, a folder, or a hub id.")]
Data = Annotated[str, typer.Option(metavar="DATA", help="scenes, or LLaVA's instruction JSON.")]
Images = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the JSON's pictures are.")]
Layers = Annotated[str | None, typer.Option(metavar="L/L/L", help="Blocks before each module.")]
Ratios = Annotated[str | None, typer.Option(metavar="R/R/R", help="Shares to aim at; the paper's.")]
Rate = Annotated[float | None, typer.Option(metavar="R", help="Peak learning rate; mini has its own.")]
Batch = Annotated[int | None, typer.Option(metavar="N", help="Rows per step over all processes; 64.")]
Micro = Annotated[int | None, typer.Option(metavar="N", help="Rows per process at once; 4, or what divides the batch.")]
Epochs = Annotated[int, typer.Option(metavar="N", help="Passes over the data.")]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Stop after N steps; scenes need it.")]
CausalWeight = Annotated[float | None, typer.Option(metavar="W", help="Of the loss of the answers; 1.")]
RatioWeight = Annotated[float | None, typer.Option(metavar="W", help="Of the loss of the kept shares; 2.")]
RatioKind = Annotated[str, typer.Option(metavar="KIND", help="mse or huber.")]
Mix = Annotated[
    str | None, typer.Option(metavar="MIX", help="Kinds of questions on scenes: even, or count=2,digit=1,...")
]
Start = Annotated[str | None, typer.Option(metavar="FOLDER", help="Modules to start from; mini for those shipped.")]
DecisionClip = Annotated[float | None, typer.Option(metavar="C", help="Cut the gradient of one decision; 0 is never.")]
HalfPrecision = Annotated[bool, typer.Option(help="Compute in bfloat16.")]
Pool = Annotated[int, typer.Option(metavar="N", help="Different pictures of scenes.")]
SaveSteps = Annotated[int, typer.Option(metavar="N", help="Steps between checkpoints.")]
LogSteps = Annotated[int, typer.Option(metavar="N", help="Steps between two lines of the log.")]
MaxSeconds = Annotated[float | None, typer.Option(metavar="S", help="Stop after S seconds, with everything saved.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of modules, order, noise and scenes.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]


@dataclass(frozen=True)
class Asked:
    """What rows are made of.

    Attributes:
        data, images: as users name them.
        pool: different pictures of scenes.
        mix: how often scenes ask each kind of question; None is as they have it.
        checked: held-out questions of an exam; 0 is none.
        pixels: rows hold pictures, for what acts inside the encoder.
    """

    data: str
    images: Path | None
    pool: int
    mix: dict[str, float] | None
    checked: int = 0
    pixels: bool = False


def run(
    given: dict[str, Any],
    own: dict[str, Any],
    kind: type[Any],
    prepare: Callable[[Any, Any], None],
    train: Callable[..., Path],
    *,
    pixels: bool = False,
    checked: int = 0,
    learns_in: Callable[[Any], None] | None = None,
) -> None:
    """Load the model, make its rows, train and print the folder of the modules.

    Args:
        given: every option of the command by its name.
        own: settings in place of the defaults where the options do not say otherwise.
        kind: of the settings.
        prepare: refuses a model that cannot be trained for, given with the settings, and readies it on a CPU.
        train: of the model, its rows, the run's folder, the settings and further options.
        pixels, checked: as `Asked` has them.
        learns_in: refuses a dtype of the model; None where tokens are masked softly, as learned methods train.

    Raises:
        FoveateError: as the options, the model, its rows and the training have it.
    """
    from foveate.inference.loading import load
    from foveate.inference.processes import own_device
    from foveate.paths import folder_target
    from foveate.runs import check_run

    with usage():
        folder_target(given["out"])
        _check(given["data"], given["images"], own, given["steps"], given["max_seconds"])
        settings = settings_of(kind, {**own, **{name: value for name, value in given.items() if value is not None}})
        mix = _mix(given["mix"], given["data"])
        asked = Asked(given["data"], given["images"], given["pool"], mix, checked, pixels)
    read: list[Any] = []

    def check(config: Any) -> None:
        from foveate.train.conversations import read_entries

        _check_dtype(given["model"], given["dtype"], config, learns_in)
        if asked.data != SCENES:
            assert asked.images is not None
            read.append(read_entries(asked.data, asked.images))

    if int(os.environ.get("RANK", "0")) == 0:
        check_run(given["out"], given["resume"])
    loaded = load(
        given["model"],
        device=own_device(given["device"]),
        dtype=given["dtype"],
        trust_remote_code=given["trust_remote_code"],
        check=check,
    )
    prepare(loaded.model, settings)
    _train(loaded, settings, asked, given, train, read[0] if read else None)


def _check(data: str, images: Path | None, own: dict[str, Any], steps: int | None, max_seconds: float | None) -> None:
    from foveate.core import FoveateError
    from foveate.paths import checked

    try:
        import accelerate  # noqa: F401 - transformers' Trainer needs it
    except ImportError as error:
        raise FoveateError("training needs accelerate; install foveate[train]") from error
    if data == SCENES and images is not None:
        raise FoveateError("--images belongs to an instruction file; scenes draw their own pictures")
    if data != SCENES and images is None:
        raise FoveateError(f"--data {data} needs --images: the folder that its pictures' paths start from")
    if data != SCENES and not checked(data).is_file():
        raise FoveateError(f"--data {data} is no file; give LLaVA's instruction JSON, or scenes")
    if data == SCENES and steps is None and "steps" not in own:
        raise FoveateError("--data scenes never ends; give --steps, such as --steps 3000")
    if max_seconds is not None and max_seconds <= 0:
        raise FoveateError(f"--max-seconds {max_seconds:g} leaves no time; it must be above 0")


def _check_dtype(name: str, dtype: str, config: Any, learns_in: Callable[[Any], None] | None) -> None:
    """Refuse numbers that cannot be trained with before weights and data are read."""
    import torch

    from foveate.core import FoveateError
    from foveate.runtime.decoder.soften import check_softens_in

    try:
        (learns_in or check_softens_in)(getattr(torch, dtype) if dtype != "auto" else config.dtype)
    except FoveateError as error:
        stored = f"{name} is stored as float16, and " if dtype == "auto" else ""
        raise FoveateError(f"{stored}{error}") from error


def settings_of(kind: type[Any], given: dict[str, Any]) -> Any:
    """The settings that options name; what is not among them keeps the paper's value."""
    from foveate.core import FoveateError

    known = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in given.items() if name in known}
    for name, number in (("layers", int), ("ratios", float)):
        if name in values:
            try:
                values[name] = tuple(number(part) for part in values[name].split("/"))
            except ValueError as error:
                raise FoveateError(f"{error}; write --layers 1/8/16 and --ratios 0.5/0.3/0.1") from error
    if "budgets" in values:
        values["budgets"] = tuple(_budget(one) for one in values["budgets"].split(","))
    if "decision_clip" in known:
        values["decision_clip"] = values.get("decision_clip") or None
    return kind(**values)


def _budget(text: str) -> tuple[int | float, ...]:
    from foveate.core import FoveateError

    try:
        return tuple(int(part) if part.isdigit() else float(part) for part in text.split("/"))
    except ValueError as error:
        raise FoveateError(f"{error}; write --budgets 0.5/0.3/0.1,32/32/32") from error


def _mix(text: str | None, data: str) -> dict[str, float] | None:
    """How often each kind of question is asked; None is as the scenes have it."""
    from foveate.core import FoveateError, did_you_mean
    from foveate.scenes.questions import KINDS

    if text is None:
        return None
    if data != SCENES:
        raise FoveateError("--mix belongs to scenes; an instruction file asks what it holds")
    if text == "even":
        return dict.fromkeys(KINDS, 1.0)
    found: dict[str, float] = {}
    for part in text.split(","):
        kind, _, share = part.partition("=")
        if kind not in KINDS:
            raise FoveateError(f"--mix: unknown kind of question {kind!r}; {did_you_mean(kind, KINDS)}")
        try:
            found[kind] = float(share)
        except ValueError as error:
            raise FoveateError(f"--mix: {part!r} has no number; write {kind}=1") from error
        if not 0 <= found[kind] < float("inf"):
            raise FoveateError(f"--mix: {part!r} is below 0 or infinite; the smallest is {kind}=0")
    if not sum(found.values()):
        raise FoveateError("--mix asks nothing; give one kind at least a share above 0")
    return found


def _scenes(loaded: Loaded, settings: Any, asked: Asked) -> tuple[Any, list[Any]]:
    """Rows to train on, and those of other pictures to judge by, of every kind as many."""
    from foveate.scenes.packing import MIX
    from foveate.scenes.questions import KINDS
    from foveate.train.scene_questions import SceneQuestions

    make = partial(SceneQuestions, loaded.model, loaded.processor, seed=settings.seed, pixels=asked.pixels)
    mix = MIX if asked.mix is None else asked.mix
    rows = make(settings.steps * settings.batch, pool=asked.pool, mix=mix)
    if not asked.checked:
        return rows, []
    held_out = make(asked.checked, pool=asked.checked, mix=dict.fromkeys(KINDS, 1.0), split="test")
    return rows, [held_out[number] for number in range(asked.checked)]


def _train(
    loaded: Loaded, settings: Any, asked: Asked, given: dict[str, Any], train: Callable[..., Path], read: Any
) -> None:
    from foveate.cli.output import stderr
    from foveate.families import family_of
    from foveate.train.conversations import Conversations

    console = stderr()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    def report(line: dict[str, Any]) -> None:
        say("  ".join(f"{name} {value:.4g}" for name, value in line.items()))

    rows: Any
    held_out: list[Any] = []
    if asked.data == SCENES:
        rows, held_out = _scenes(loaded, settings, asked)
    else:
        assert asked.images is not None
        token = family_of(loaded.model).image_token_id(loaded.model.config)
        rows = Conversations(asked.data, asked.images, loaded.processor, token, report=say, read=read)
        say(f"{len(rows)} entries; left out: {rows.skipped}")
        if rows.skipped.missing:
            say(f"missing pictures: {', '.join(rows.skipped.missing[:20])}")
    say(f"learning rate {settings.rate:g}, batch {settings.batch}, {settings.asked()}")
    options: dict[str, Any] = {"name": loaded.name, "resume": given["resume"], "max_seconds": given["max_seconds"]}
    options |= {"held_out": held_out} if held_out else {}
    folder = train(loaded.model, rows, given["out"], settings, **options, report=report, tell=say)
    if asked.data != SCENES and rows.skipped.broken:
        say(f"broken pictures: {', '.join(rows.skipped.broken)}")
    typer.echo(folder)
