"""`foveate eval`: how many questions a model answers, unpruned and with each rival method, on the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.errors import usage
from foveate.cli.loading import Clip, Device, Dtype, Trust

if TYPE_CHECKING:
    from foveate.evaluate.tables import Column


def command(
    model: Annotated[str, typer.Option("--model", metavar="M", help="mini, a folder, or a hub id.")],
    tasks: Annotated[list[str], typer.Option("--tasks", metavar="TASK", help="scenes.")],
    prune: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="A rival; repeat it for more. The unpruned model comes first."),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Questions, each about a picture of its own.")] = 500,
    batch: Annotated[int, typer.Option(metavar="B", help="Questions answered at once.")] = 16,
    seed: Annotated[int, typer.Option(metavar="N", help="Of pictures and questions.")] = 0,
    clip: Clip = None,
    ceiling: Annotated[
        bool,
        typer.Option("--ceiling", help="Add the row that keeps the tokens of the object asked about, from its box."),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="F", help="Write the rows to this file too.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Answer the same questions unpruned and with each rival, and print accuracy, tokens and cost."""
    from foveate.cli.output import check_target, show, stderr, working, write_json

    with usage():
        from foveate.evaluate import scenes_task, task_names

        names = task_names(tasks)
        if json_file is not None:
            check_target(json_file, (".json",))
        scenes_task.check(samples=samples, batch=batch, seed=seed)
        rivals = scenes_task.parse_rivals(prune or [])

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from foveate.cli.loading import load

    console = stderr()
    with working(f"loading {model}"):
        loaded = load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        answers = bar.add_task("answers", total=(len(rivals) + ceiling) * samples)
        rows = scenes_task.evaluate(
            loaded.model,
            loaded.processor,
            list(rivals.values()),
            samples=samples,
            batch=batch,
            seed=seed,
            ceiling=ceiling,
            clip=clip,
            progress=lambda count: bar.advance(answers, count),
        )
    table = [row.to_dict() for row in rows]
    show(_columns(), table, title=f"{model}: {samples} questions of {names[0]}, seed {seed}")
    if json_file is not None:
        write_json(json_file, {"model": model, "task": names[0], "samples": samples, "seed": seed, "rows": table})


def _columns() -> list[Column]:
    from foveate.evaluate.tables import Column
    from foveate.scenes.questions import KINDS

    def share(value: Any) -> str:
        return f"{value:.1%}"

    return [
        Column("method", "method", left=True),
        Column("accuracy", "all", share),
        Column("interval", "95 %", lambda ends: f"{ends[0]:.1%}-{ends[1]:.1%}"),
        *(Column(kind, kind, share) for kind in KINDS),
        Column("tokens", "tokens", lambda value: f"{value:.4g}"),
        Column("prefill_flops_share", "prefill FLOPs", lambda value: f"{value:.0%}"),
        Column("kv_bytes_share", "KV bytes", lambda value: f"{value:.0%}"),
    ]
