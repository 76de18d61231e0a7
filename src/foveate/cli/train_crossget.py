"""`foveate train crossget`: train the cross tokens of CrossGET for a model that stays frozen."""

from __future__ import annotations

from typing import Annotated

import typer

from foveate.cli.errors import in_options
from foveate.cli.train_learned import (
    SCENES,
    Batch,
    Data,
    Epochs,
    HalfPrecision,
    Images,
    LogSteps,
    MaxSeconds,
    Micro,
    Mix,
    Model,
    Out,
    Pool,
    Rate,
    Resume,
    SaveSteps,
    Seed,
    Start,
    Steps,
    run,
)
from foveate.inference.loading import Device, Dtype, Trust

MINI = {"rate": 1e-2, "batch": 16, "micro": 16, "steps": 1000, "budgets": "144,64,32"}

Budgets = Annotated[str | None, typer.Option(metavar="K,K,...", help="Each step leaves one of them, such as 144,0.1.")]


def command(
    out: Out,
    model: Model = "mini",
    data: Data = SCENES,
    images: Images = None,
    rate: Rate = None,
    batch: Batch = None,
    micro: Micro = None,
    epochs: Epochs = 1,
    steps: Steps = None,
    budgets: Budgets = None,
    start: Start = None,
    mix: Mix = None,
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
    """Train CrossGET's cross tokens and print their folder; the model stays frozen."""
    given = dict(locals())  # every option by its name
    own = MINI if model == "mini" and data == SCENES else {}
    from foveate.train import crossget

    with in_options(command):
        run(given, own, crossget.Settings, lambda loaded, settings: None, crossget.train_crossget, pixels=True)
