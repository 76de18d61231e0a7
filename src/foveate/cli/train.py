"""`foveate train`: `mini` here, the model which ships with Foveate, by its recipe; learned methods beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli import train_crossget, train_dynamicvit, train_finetune, train_lvpruning
from foveate.cli.errors import in_options
from foveate.core import usage

app = typer.Typer(
    help="Train the shipped model, the modules of a learned method, or a model that is pruned meanwhile.",
    rich_markup_mode=None,
    no_args_is_help=False,
)


@app.callback()
def _group() -> None:
    """Train the shipped model, or the modules of a learned method."""


@app.command("mini")
def mini(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of the run: states, log, and the model in mini/.")
    ],
    max_seconds: Annotated[
        float, typer.Option(metavar="S", help="Stop after S seconds, with everything saved.")
    ] = 3600,
    device: Annotated[str, typer.Option(metavar="D", help="auto (a GPU if there is one), cpu, cuda.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    start: Annotated[str | None, typer.Option(metavar="MODEL", help="Weights to start from: mini or a folder.")] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Pictures per step; 128 on a GPU, 16 on a CPU.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of weights, pictures and questions.")] = 0,
) -> None:
    """Train mini on scenes, from nothing or from given weights, and print the folder of the finished model."""
    from foveate.cli.output import stderr
    from foveate.core import FoveateError
    from foveate.inference.loading import find, find_device
    from foveate.paths import folder_target

    with usage():
        folder_target(out)
        if max_seconds <= 0:
            raise FoveateError(f"--max-seconds {max_seconds:g} leaves no time; it must be above 0")
        if batch is not None and batch < 1:
            raise FoveateError(f"--batch {batch} is below 1 picture; the smallest is 1")
        source = find(start) if start is not None else None
        place = find_device(device)

    from foveate.scenes.recipe import train_mini

    console = stderr()

    def report(line: dict[str, Any]) -> None:
        console.print(
            "  ".join(f"{name} {_figure(value)}" for name, value in line.items()), markup=False, soft_wrap=True
        )

    with in_options(mini):
        finished = train_mini(
            out,
            max_seconds=max_seconds,
            start=source,
            device=place,
            batch=batch,
            resume=resume,
            seed=seed,
            progress=report,
        )
    typer.echo(finished)


app.command("lvpruning")(train_lvpruning.command)
app.command("dynamicvit")(train_dynamicvit.command)
app.command("crossget")(train_crossget.command)
app.command("finetune")(train_finetune.command)


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
