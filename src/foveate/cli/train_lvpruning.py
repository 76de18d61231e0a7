"""`foveate train lvpruning`: train the decision modules of LVPruning for a model that stays frozen."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from foveate.cli.errors import in_options
from foveate.core import usage
from foveate.inference.loading import Device, Dtype, Trust

if TYPE_CHECKING:
    from foveate.inference.loading import Loaded

SCENES = "scenes"

# For `mini` on scenes: a model a thousandth the size takes larger steps, and fewer of them; scenes' hints alone teach.
MINI = {
    "rate": 5e-4,
    "batch": 16,
    "steps": 3000,
    "budgets": "0.5/0.3/0.1,0.25/0.15/0.08,64/64/64,32/32/32",
    "causal_weight": 0.0,
    "hint_weight": 1.0,
    "even_weight": 0.5,
    "decision_clip": 0.05,
    "visual_share": 0.25,
}

CausalWeight = Annotated[float | None, typer.Option(metavar="W", help="Of the loss of the answers; 1.")]
RatioWeight = Annotated[float | None, typer.Option(metavar="W", help="Of the loss of the kept shares; 2.")]
HintWeight = Annotated[float | None, typer.Option(metavar="W", help="Of hints which tokens are asked about; scenes.")]
EvenWeight = Annotated[float | None, typer.Option(metavar="W", help="Of how much is to be spread evenly; scenes.")]
Budgets = Annotated[
    str | None, typer.Option(metavar="K/K/K,...", help="Each step draws one, such as 0.5/0.3/0.1,32/32/32.")
]
Mix = Annotated[
    str | None, typer.Option(metavar="MIX", help="Kinds of questions on scenes: even, or count=2,digit=1,...")
]
Start = Annotated[str | None, typer.Option(metavar="FOLDER", help="Modules to start from; mini for those shipped.")]
DecisionClip = Annotated[float | None, typer.Option(metavar="C", help="Cut the gradient of one decision; 0 is never.")]
Anneal = Annotated[float | None, typer.Option(metavar="S", help="Share of the steps in which the ratios fall from 1.")]
VisualShare = Annotated[
    float | None, typer.Option(metavar="S", help="Look at a random share of each picture's tokens; cheaper.")
]
Micro = Annotated[
    int | None, typer.Option(metavar="N", help="Rows per process at once; as many as fit a card of 80 GB.")
]
Checkpointing = Annotated[
    bool | None, typer.Option(help="Recompute blocks for their gradients: less memory, more time. Where it is needed.")
]
CheckSteps = Annotated[
    int | None, typer.Option(metavar="N", help="Steps between exams on held-out scenes, beside random and uniform.")
]
CheckRows = Annotated[int, typer.Option(metavar="N", help="Questions of an exam, kinds balanced.")]
AboveRandom = Annotated[
    str | None, typer.Option(metavar="KIND", help="Stop where two exams find this kind below random.")
]
MaxSeconds = Annotated[float | None, typer.Option(metavar="S", help="Stop after S seconds, with everything saved.")]


def command(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the run; the modules end in lvpruning/.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="mini, a folder, or a hub id.")] = "mini",
    data: Annotated[str, typer.Option(metavar="DATA", help="scenes, or LLaVA's instruction JSON.")] = SCENES,
    images: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the JSON's pictures are.")] = None,
    layers: Annotated[str | None, typer.Option(metavar="L/L/L", help="Blocks before each module.")] = None,
    ratios: Annotated[str | None, typer.Option(metavar="R/R/R", help="Shares to aim at; 0.5/0.3/0.1.")] = None,
    rate: Annotated[float | None, typer.Option(metavar="R", help="Peak learning rate; 2e-6, mini has its own.")] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Rows per step over all processes; 64.")] = None,
    micro: Micro = None,
    epochs: Annotated[int, typer.Option(metavar="N", help="Passes over the data.")] = 1,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Stop after N steps; scenes need it.")] = None,
    causal_weight: CausalWeight = None,
    ratio_weight: RatioWeight = None,
    hint_weight: HintWeight = None,
    even_weight: EvenWeight = None,
    budgets: Budgets = None,
    start: Start = None,
    mix: Mix = None,
    ratio_loss: Annotated[str, typer.Option(metavar="KIND", help="mse or huber.")] = "mse",
    decision_clip: DecisionClip = None,
    anneal: Anneal = None,
    visual_share: VisualShare = None,
    answers: Annotated[bool, typer.Option("--answers", help="Let the modules read the answers too.")] = False,
    checkpointing: Checkpointing = None,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16.")] = True,
    pool: Annotated[int, typer.Option(metavar="N", help="Different pictures of scenes.")] = 4096,
    save_steps: Annotated[int, typer.Option(metavar="N", help="Steps between checkpoints.")] = 500,
    log_steps: Annotated[int, typer.Option(metavar="N", help="Steps between two lines of the log.")] = 10,
    check_steps: CheckSteps = None,
    check_rows: CheckRows = 100,
    above_random: AboveRandom = None,
    max_seconds: MaxSeconds = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of modules, order, noise and scenes.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Train LVPruning's decision modules and print their folder; the model stays frozen.

    Several processes: torchrun -m foveate train lvpruning ..., or accelerate launch with a file of examples/lvpruning.
    """
    given = dict(locals())  # every option by its name
    own = _own_settings(given) if model == "mini" and data == SCENES else {}
    from foveate.inference.loading import load
    from foveate.paths import folder_target
    from foveate.runs import check_run

    with in_options(command):
        with usage():
            folder_target(out)
            _check(data, images, own, steps, max_seconds)
            settings = _settings({**own, **{name: value for name, value in given.items() if value is not None}})
            asked = _Asked(pool, _mix(mix, data), _checked(check_steps, check_rows, above_random, data))
        if int(os.environ.get("RANK", "0")) == 0:
            check_run(out, resume)
        check = partial(_check_dtype, model, dtype)
        loaded = load(model, device=_own(device), dtype=dtype, trust_remote_code=trust_remote_code, check=check)
        _train(loaded, data, images, out, settings, asked, resume=resume, max_seconds=max_seconds)


def _own_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Those of `mini`; who asks for one set of ratios gets no budgets, nor what needs them."""
    alone = given["ratios"] is not None and given["budgets"] is None
    needs_budgets = ("budgets", "causal_weight", "even_weight")
    return {name: value for name, value in MINI.items() if not (alone and name in needs_budgets)}


def _own(device: str) -> str:
    """Of several processes each has a GPU of its own."""
    import torch

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device != "auto" or not several or not torch.cuda.is_available():
        return device
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


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


def _check_dtype(name: str, dtype: str, config: Any) -> None:
    """Refuse numbers that cannot be trained with before weights and data are read."""
    import torch

    from foveate.core import FoveateError
    from foveate.runtime.decoder.soften import check_softens_in

    try:
        check_softens_in(getattr(torch, dtype) if dtype != "auto" else config.dtype)
    except FoveateError as error:
        stored = f"{name} is stored as float16, and " if dtype == "auto" else ""
        raise FoveateError(f"{stored}{error}") from error


def _settings(given: dict[str, Any]) -> Any:
    """The settings that options name; what is not among them keeps the paper's value."""
    from foveate.core import FoveateError
    from foveate.train.lvpruning import Settings

    known = {field.name for field in dataclasses.fields(Settings)}
    values = {name: value for name, value in given.items() if name in known}
    for name, kind in (("layers", int), ("ratios", float)):
        if name in values:
            try:
                values[name] = tuple(kind(part) for part in values[name].split("/"))
            except ValueError as error:
                raise FoveateError(f"{error}; write --layers 1/8/16 and --ratios 0.5/0.3/0.1") from error
    if "budgets" in values:
        values["budgets"] = tuple(_budget(one) for one in values["budgets"].split(","))
    values["decision_clip"] = values.get("decision_clip") or None
    return Settings(**values)


def _budget(text: str) -> tuple[int | float, ...]:
    from foveate.core import FoveateError

    try:
        return tuple(int(part) if part.isdigit() else float(part) for part in text.split("/"))
    except ValueError as error:
        raise FoveateError(f"{error}; write --budgets 0.5/0.3/0.1,32/32/32") from error


def _joined(budget: tuple[int | float, ...]) -> str:
    return "/".join(map(str, budget))


def _listed(budgets: tuple[tuple[int | float, ...], ...]) -> str:
    return ", ".join(map(_joined, budgets))


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


class _Asked(NamedTuple):
    """What scenes are asked."""

    pool: int
    mix: dict[str, float] | None  # None is as the scenes have it
    checked: int  # held-out questions of an exam; 0 is none


def _checked(steps: int | None, rows: int, kind: str | None, data: str) -> int:
    """Held-out questions of an exam."""
    from foveate.core import FoveateError, did_you_mean
    from foveate.scenes.questions import KINDS

    if kind is not None and kind not in KINDS:
        raise FoveateError(f"--above-random: unknown kind of question {kind!r}; {did_you_mean(kind, KINDS)}")
    if kind is not None and steps is None:
        raise FoveateError("--above-random is judged in exams; give --check-steps, such as --check-steps 200")
    if steps is None:
        return 0
    if data != SCENES:
        raise FoveateError("--check-steps asks held-out scenes; an instruction file has none")
    if rows < 1:
        raise FoveateError(f"--check-rows {rows} judges nothing; the smallest is 1")
    return rows


def _scenes(loaded: Loaded, settings: Any, asked: _Asked) -> tuple[Any, list[Any]]:
    """Rows to train on, and those of other pictures to judge by, of every kind as many."""
    from foveate.scenes.packing import MIX
    from foveate.scenes.questions import KINDS
    from foveate.train.scene_questions import SceneQuestions

    model, processor, seed = loaded.model, loaded.processor, settings.seed
    mix = MIX if asked.mix is None else asked.mix
    rows = SceneQuestions(model, processor, settings.steps * settings.batch, pool=asked.pool, seed=seed, mix=mix)
    if not asked.checked:
        return rows, []
    even = dict.fromkeys(KINDS, 1.0)
    held_out = SceneQuestions(model, processor, asked.checked, pool=asked.checked, seed=seed, mix=even, split="test")
    return rows, [held_out[number] for number in range(asked.checked)]


def _train(
    loaded: Loaded,
    data: str,
    images: Path | None,
    out: Path,
    settings: Any,
    asked: _Asked,
    *,
    resume: bool,
    max_seconds: float | None,
) -> None:
    from foveate.cli.output import stderr
    from foveate.families import family_of
    from foveate.train.conversations import Conversations
    from foveate.train.lvpruning import train_lvpruning
    from foveate.train.softened import check_trains

    console = stderr()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    def report(line: dict[str, Any]) -> None:
        say("  ".join(f"{name} {value:.4g}" for name, value in line.items()))

    check_trains(loaded.model, bool(settings.checkpointing))
    if loaded.model.device.type == "cpu":
        loaded.model.get_decoder().set_attn_implementation("eager")  # takes masks with gradients in half the time
    rows: Any
    held_out: list[Any] = []
    if data == SCENES:
        rows, held_out = _scenes(loaded, settings, asked)
    else:
        assert images is not None
        token = family_of(loaded.model).image_token_id(loaded.model.config)
        rows = Conversations(data, images, loaded.processor, token, report=say)
        say(f"{len(rows)} entries; left out: {rows.skipped}")
        if rows.skipped.missing:
            say(f"missing pictures: {', '.join(rows.skipped.missing[:20])}")
    aims = f"budgets {_listed(settings.budgets)}" if settings.budgets else f"ratios {_joined(settings.ratios)}"
    say(f"learning rate {settings.rate:g}, batch {settings.batch}, {aims}")
    options: dict[str, Any] = {"name": loaded.name, "resume": resume, "max_seconds": max_seconds, "held_out": held_out}
    folder = train_lvpruning(loaded.model, rows, out, settings, **options, report=report, tell=say)
    if data != SCENES and rows.skipped.broken:
        say(f"broken pictures: {', '.join(rows.skipped.broken)}")
    typer.echo(folder)
