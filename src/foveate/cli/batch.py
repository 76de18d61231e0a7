"""`foveate batch`: answers a file of questions about pictures, each once, also when it is killed in between."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.errors import in_options
from foveate.core import UsageError, usage
from foveate.inference.loading import Clip, Device, Dtype, Trust


def command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Rows of id, image(s), question: .jsonl or .parquet.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Answers, in any order: .jsonl or .parquet.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="mini, a folder, or a hub id.")],
    prune: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="name:field=value,...; stages joined by +; none.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Rows that are asked together.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer, in tokens.")] = 64,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with OUT; rows that are in it stay.")] = False,
    clip: Clip = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Answer every row of IN with MODEL; id, answer, tokens and milliseconds go to OUT, and so does a row's fault."""
    with in_options(command):
        _run(
            source,
            target,
            model,
            prune,
            batch=batch,
            max_new_tokens=max_new_tokens,
            resume=resume,
            clip=clip,
            device=device,
            dtype=dtype,
            trust=trust_remote_code,
        )


def _run(
    source: Path,
    target: Path,
    model: str,
    prune: list[str] | None,
    *,
    batch: int,
    max_new_tokens: int,
    resume: bool,
    clip: str | None,
    device: str,
    dtype: str,
    trust: bool,
) -> None:
    """Everything behind the options."""
    from foveate.batch.journal import check_output, journal
    from foveate.batch.rows import check_file, check_ids
    from foveate.cli.output import working
    from foveate.inference.loading import load

    with usage():
        spec = _spec(prune)
        for name, value in (("batch", batch), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise UsageError(f"{name}={value} leaves nothing to do; the smallest is 1")
        source, target = check_file(source), check_output(target, resume)
        count = check_ids(source)
    told = {"model": model, "prune": spec, "max_new_tokens": max_new_tokens, "dtype": dtype, "clip": clip}
    with journal(target, {"rows": _digest(source), **told}, resume) as written:
        if len(written.done) < count:
            with working(f"loading {model}"):
                loaded = load(model, device=device, dtype=dtype, trust_remote_code=trust)
            _answer(loaded, source, spec, written, count, batch=batch, max_new_tokens=max_new_tokens, clip=clip)
        written.finish()
        faults = sum("error" in row for row in written.rows())
    typer.echo(f"{count} rows in {target}" + (f", {faults} of them with an error" if faults else ""), err=True)


def _spec(prune: list[str] | None) -> str:
    """The spec in its one spelling."""
    from foveate.spec import format, parse_stages

    if prune is not None and len(prune) > 1:
        raise UsageError(f"batch takes one --prune, not {len(prune)}; join stages with +")
    return "none" if prune is None or prune[0] == "none" else format(parse_stages(prune[0]))


def _digest(source: Path) -> str:
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _answer(loaded: Any, source: Path, spec: str, written: Any, count: int, **options: Any) -> None:
    """Ask what has no answer yet; progress with its rate and the time left goes to stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from foveate.batch.rows import rows_of
    from foveate.batch.work import answers
    from foveate.cli.output import stderr
    from foveate.spec import parse_stages

    stages = () if spec == "none" else parse_stages(spec)
    left = (row for row in rows_of(source) if row.id not in written.done)
    rate = TextColumn("{task.fields[rate]:.1f} rows/s")
    columns = (BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=stderr(), refresh_per_second=2) as progress:
        task = progress.add_task("rows", total=count, completed=len(written.done), rate=0.0)
        for made in answers(loaded, left, stages, folder=source.parent, **options):
            written.add(made)
            progress.advance(task, len(made))
            progress.update(task, rate=progress.tasks[0].speed or 0.0)
