"""`foveate eval`: how many questions a model answers, unpruned and with each rival method, on the same samples."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core import usage
from foveate.inference.loading import Clip, Device, Dtype, Trust

if TYPE_CHECKING:
    from foveate.evaluate.scenes_task import Row
    from foveate.inference.loading import Loaded
    from foveate.report.tables import Column


def command(
    model: Annotated[str, typer.Option("--model", metavar="M", help="mini, a folder, or a hub id.")],
    tasks: Annotated[list[str], typer.Option("--tasks", metavar="TASK", help="scenes.")],
    prune: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="A rival; repeat it for more. The unpruned model comes first."),
    ] = None,
    every: Annotated[
        str | None,
        typer.Option(metavar="K/K/...", help="Every method at each of these budgets too, such as 144/64/32/16."),
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
    from foveate.cli.output import show, stderr, working
    from foveate.paths import file_target
    from foveate.runs import write_json

    with usage():
        from foveate.evaluate import scenes_task, task_names

        names = task_names(tasks)
        if json_file is not None:
            file_target(json_file, (".json",))
        scenes_task.check(samples=samples, batch=batch, seed=seed)
        rivals = scenes_task.parse_rivals(prune or [])
        budgets = _budgets(every)

    from foveate.inference.loading import load

    console = stderr()
    with working(f"loading {model}"):
        loaded = load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    unreached = _add_every(rivals, budgets, loaded, model)
    asked = {"samples": samples, "seed": seed}
    rows = _answered(loaded, rivals, console, **asked, batch=batch, ceiling=ceiling, clip=clip)
    table = [row.to_dict() for row in rows]
    show(_columns(), table, title=f"{model}: {samples} questions of {names[0]}, seed {seed}")
    for entry in unreached:
        budget = "/".join(map(str, entry["keep"]))
        console.print(f"{entry['method']} at {budget}: - ({entry['why']})", highlight=False, markup=False)
    if json_file is not None:
        command = shlex.join(["foveate", *sys.argv[1:]])
        more = {} if every is None else {"every": budgets, "unreached": unreached}
        write_json(json_file, {"command": command, "model": model, "task": names[0], **asked, "rows": table, **more})


def _answered(loaded: Loaded, rivals: dict[str, Any], console: Any, *, samples: int, **settings: Any) -> list[Row]:
    """The rows of the table, with a bar of the answers given so far where somebody looks."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from foveate.evaluate.scenes_task import evaluate

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        answers = bar.add_task("answers", total=(len(rivals) + settings["ceiling"]) * samples)
        return evaluate(
            loaded.model,
            loaded.processor,
            list(rivals.values()),
            samples=samples,
            progress=lambda count: bar.advance(answers, count),
            **settings,
        )


def _budgets(text: str | None) -> list[int]:
    """The token counts of --every."""
    from foveate.core import FoveateError

    if text is None:
        return []
    counts = text.split("/")
    if not all(count.isdigit() and int(count) > 0 for count in counts):
        raise FoveateError(f"--every {text!r} is no list of token counts; write 144/64/32/16")
    return [int(count) for count in counts]


def _add_every(rivals: dict[str, Any], budgets: list[int], loaded: Loaded, model: str) -> list[dict[str, Any]]:
    """Add every method that drops visual tokens at each budget to `rivals`.

    Returned is what cannot be reached: method, the budgets for one reason, and that reason.
    """
    from foveate import methods, spec
    from foveate.core import FoveateError
    from foveate.evaluate.catalogue import at
    from foveate.families import family_of
    from foveate.prune import check_prunable

    if not budgets:
        return []
    unreached: dict[tuple[str, str], list[int]] = {}
    folder = Path(loaded.model.name_or_path)  # weights of trained methods may lie beside the model's own
    height, width = family_of(loaded.model).grid(loaded.model.config)
    for name in methods.names():
        if {part.site for part in methods.get(name).example().parts()} == {"cache"}:
            continue
        for keep in budgets:
            try:
                made = at(name, keep, height * width, model if (folder / name).is_dir() else None)
                check_prunable(loaded.model, made, processor=loaded.processor)
            except FoveateError as error:
                unreached.setdefault((name, str(error)), []).append(keep)
            else:
                rivals[spec.format(made)] = (made,)
    return [{"method": name, "keep": keeps, "why": why} for (name, why), keeps in unreached.items()]


def _columns() -> list[Column]:
    from foveate.report.tables import Column
    from foveate.scenes.questions import KINDS

    def share(value: Any) -> str:
        return f"{value:.1%}"

    return [
        Column("method", "method", left=True),
        Column("accuracy", "all", share),
        Column("interval", "95 %", lambda ends: f"{ends[0]:.1%}-{ends[1]:.1%}"),
        *(Column(kind, kind, share) for kind in KINDS),
        Column("tokens", "tokens", lambda value: f"{value:.4g}"),
        Column("equivalent_tokens", "equivalent", lambda value: f"{value:.4g}"),
        Column("prefill_flops_share", "prefill FLOPs", lambda value: f"{value:.0%}"),
        Column("kv_bytes_share", "KV bytes", lambda value: f"{value:.0%}"),
    ]
