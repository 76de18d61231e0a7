"""`foveate train lvpruning`: train the decision modules of LVPruning for a model that stays frozen."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foveate.cli.errors import in_options
from foveate.cli.train_learned import (
    SCENES,
    Batch,
    CausalWeight,
    Data,
    DecisionClip,
    Epochs,
    HalfPrecision,
    Images,
    Layers,
    LogSteps,
    MaxSeconds,
    Mix,
    Model,
    Out,
    Pool,
    Rate,
    RatioKind,
    Ratios,
    RatioWeight,
    Resume,
    SaveSteps,
    Seed,
    Start,
    Steps,
    run,
)
from foveate.core import usage
from foveate.inference.loading import Device, Dtype, Trust

# For `mini` on scenes: a model a thousandth the size takes larger steps, and fewer of them; scenes' hints alone teach.
MINI = {
    "rate": 5e-4,
    "batch": 16,
    "steps": 3000,
    "budgets": "0.5/0.3/0.1,0.25/0.15/0.08,64/64/64,32/32/32",
    "causal_weight": 0.0,
    "hint_weight": 1.0,
    "even_weight": 0.5,
    "classes": True,
    "decision_clip": 0.05,
    "visual_share": 0.25,
}

HintWeight = Annotated[float | None, typer.Option(metavar="W", help="Of hints which tokens are asked about; scenes.")]
EvenWeight = Annotated[float | None, typer.Option(metavar="W", help="Of how much is to be spread evenly; scenes.")]
Classes = Annotated[bool | None, typer.Option(help="Take tokens evenly in each class that hints teach; scenes.")]
Budgets = Annotated[
    str | None, typer.Option(metavar="K/K/K,...", help="Each step draws one, such as 0.5/0.3/0.1,32/32/32.")
]
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


def command(
    out: Out,
    model: Model = "mini",
    data: Data = SCENES,
    images: Images = None,
    layers: Layers = None,
    ratios: Ratios = None,
    rate: Rate = None,
    batch: Batch = None,
    micro: Micro = None,
    epochs: Epochs = 1,
    steps: Steps = None,
    causal_weight: CausalWeight = None,
    ratio_weight: RatioWeight = None,
    hint_weight: HintWeight = None,
    even_weight: EvenWeight = None,
    classes: Classes = None,
    budgets: Budgets = None,
    start: Start = None,
    mix: Mix = None,
    ratio_loss: RatioKind = "mse",
    decision_clip: DecisionClip = None,
    anneal: Anneal = None,
    visual_share: VisualShare = None,
    answers: Annotated[bool, typer.Option("--answers", help="Let the modules read the answers too.")] = False,
    checkpointing: Checkpointing = None,
    bf16: HalfPrecision = True,
    pool: Pool = 4096,
    save_steps: SaveSteps = 500,
    log_steps: LogSteps = 10,
    check_steps: CheckSteps = None,
    check_rows: CheckRows = 100,
    above_random: AboveRandom = None,
    max_seconds: MaxSeconds = None,
    seed: Seed = 0,
    resume: Resume = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Train LVPruning's decision modules and print their folder; the model stays frozen.

    Several processes: torchrun -m foveate train lvpruning ..., or accelerate launch with a file of examples/lvpruning.
    """
    given = dict(locals())  # every option by its name
    own = _own_settings(given) if model == "mini" and data == SCENES else {}
    from foveate.train import lvpruning

    with in_options(command):
        with usage():
            checked = _checked(check_steps, check_rows, above_random, data)
        run(given, own, lvpruning.Settings, _prepare, lvpruning.train_lvpruning, checked=checked)


def _prepare(model: Any, settings: Any) -> None:
    from foveate.train.softened import check_trains

    check_trains(model, bool(settings.checkpointing))
    if model.device.type == "cpu":
        model.get_decoder().set_attn_implementation("eager")  # takes masks with gradients in half the time


def _own_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Those of `mini`; who asks for one set of ratios gets no budgets, nor what needs them."""
    alone = given["ratios"] is not None and given["budgets"] is None
    needs_budgets = ("budgets", "causal_weight", "even_weight")
    return {name: value for name, value in MINI.items() if not (alone and name in needs_budgets)}


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
