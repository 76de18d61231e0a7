"""`foveate train finetune`: tune a model's decoder and projector by adapters while its visual tokens are pruned."""

from __future__ import annotations

from typing import Annotated

import typer

from foveate.cli.errors import in_options
from foveate.cli.train_learned import (
    SCENES,
    Batch,
    Data,
    Epochs,
    Images,
    LogSteps,
    MaxSeconds,
    Micro,
    Mix,
    Model,
    Pool,
    Rate,
    Resume,
    SaveSteps,
    Seed,
    Steps,
    run,
)
from foveate.cli.train_lvpruning import Checkpointing
from foveate.core import usage
from foveate.inference.loading import Device, Dtype, Trust

MINI = {"rate": 3e-4, "batch": 16, "micro": 16, "steps": 900, "dropout": 0.0, "bf16": False}

Out = Annotated[str, typer.Option(metavar="FOLDER", help="Folder of the run; the adapter ends in adapter/ in it.")]
Prune = Annotated[str, typer.Option(metavar="SPEC", help="How tokens are pruned meanwhile, and then.")]
Rank = Annotated[int, typer.Option(metavar="R", help="Of the adapters.")]
Alpha = Annotated[float, typer.Option(metavar="A", help="What adapters add is scaled by A / R.")]
Dropout = Annotated[float | None, typer.Option(metavar="P", help="Of what adapters read; 0.05, and 0 for mini.")]
Half = Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bfloat16; not for mini.")]


def command(
    out: Out,
    prune: Prune,
    model: Model = "mini",
    data: Data = SCENES,
    images: Images = None,
    rate: Rate = None,
    batch: Batch = None,
    micro: Micro = None,
    epochs: Epochs = 1,
    steps: Steps = None,
    rank: Rank = 128,
    alpha: Alpha = 256.0,
    dropout: Dropout = None,
    mix: Mix = None,
    checkpointing: Checkpointing = None,
    bf16: Half = None,
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
    """Tune a model while its tokens are pruned, and print the folder of the adapter; its own weights stay.

    foveate eval --adapter FOLDER --prune SPEC asks the tuned model.
    """
    given = dict(locals())  # every option by its name
    own = MINI if model == "mini" and data == SCENES else {}
    from foveate.inference.adapters import check_peft
    from foveate.train import finetune

    with in_options(command):
        with usage():
            check_peft()
        kind, train, learns_in = finetune.Settings, finetune.finetune, finetune.check_learns_in
        run(given, own, kind, lambda loaded, settings: None, train, pixels=True, learns_in=learns_in)
