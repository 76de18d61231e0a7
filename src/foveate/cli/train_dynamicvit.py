"""`foveate train dynamicvit`: train the predictors of DynamicViT for a model that stays frozen."""

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
    Micro,
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
from foveate.inference.loading import Device, Dtype, Trust

MINI = {
    "rate": 1e-3,
    "batch": 16,
    "micro": 16,
    "steps": 1000,
    "budgets": "0.7/0.49/0.343,144/144/144,64/64/64,32/32/32",
    "decision_clip": 0.05,
}

Budgets = Annotated[
    str | None, typer.Option(metavar="K/K/K,...", help="Each step draws one, such as 0.7/0.49/0.343,32/32/32.")
]
LikenessWeight = Annotated[
    float | None, typer.Option(metavar="W", help="Of what is said being as without pruning; 0.5.")
]
TokenWeight = Annotated[float | None, typer.Option(metavar="W", help="Of kept tokens being as without pruning; 0.5.")]
HintWeight = Annotated[float | None, typer.Option(metavar="W", help="Of hints where things are; scenes.")]


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
    likeness_weight: LikenessWeight = None,
    token_weight: TokenWeight = None,
    hint_weight: HintWeight = None,
    budgets: Budgets = None,
    start: Start = None,
    mix: Mix = None,
    ratio_loss: RatioKind = "mse",
    decision_clip: DecisionClip = None,
    bf16: HalfPrecision = True,
    pool: Pool = 4096,
    save_steps: SaveSteps = 500,
    log_steps: LogSteps = 10,
    max_seconds: MaxSeconds = None,
    seed: Seed = 0,
    resume: Resume = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Train DynamicViT's predictors and print their folder; the model stays frozen."""
    given = dict(locals())  # every option by its name
    own = _own_settings(given) if model == "mini" and data == SCENES else {}
    from foveate.train import dynamicvit

    with in_options(command):
        run(given, own, dynamicvit.Settings, _prepare, dynamicvit.train_dynamicvit, pixels=True)


def _own_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Those of `mini`; who asks for one set of ratios gets no budgets."""
    alone = given["ratios"] is not None and given["budgets"] is None
    return {name: value for name, value in MINI.items() if not (alone and name == "budgets")}


def _prepare(model: Any, settings: Any) -> None:
    from foveate.families import family_of
    from foveate.runtime.encoder.soften import check_softens_encoder
    from foveate.train.softened import check_trains

    check_softens_encoder(model)
    check_trains(model)
    if model.device.type == "cpu":  # takes masks with gradients in half the time
        model.get_decoder().set_attn_implementation("eager")
        tower: Any = family_of(model).tower_of(model)[0]
        tower.set_attn_implementation("eager")
