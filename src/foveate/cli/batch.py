"""`foveate batch`: answers a file of questions about pictures, each once, also when it is killed in between."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.errors import in_options
from foveate.cli.serve import Route, check_engine, check_unused
from foveate.core import UsageError, usage
from foveate.inference.loading import Clip, Device, Dtype, Trust


def command(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="IN", help="Rows of id, image(s), question: .jsonl or .parquet.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Answers, in any order: .jsonl or .parquet.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="mini, a folder, or a hub id.")],
    prune: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="name:field=value,...; stages joined by +; none.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Rows that are asked together.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer, in tokens.")] = 64,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Answer on Ray: of a cluster, auto, or local to start one here."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="With --ray: models at once.", show_default="a GPU each, else 1")
    ] = None,
    engine: Annotated[str | None, typer.Option(metavar="E", help="vllm; transformers without it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with OUT; rows that are in it stay.")] = False,
    clip: Clip = None,
    route: Route = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Answer every row of IN with MODEL; id, answer, tokens and milliseconds go to OUT, and so does a row's fault.

    With --engine vllm, further options are those of its engine (--max-model-len, --tensor-parallel-size, ...).
    """
    with in_options(command):
        _check_engine(engine, context.args, route, device)
        _run(
            source,
            target,
            model,
            prune,
            engine=engine,
            given=context.args,
            route=route,
            batch=batch,
            max_new_tokens=max_new_tokens,
            ray=ray,
            workers=workers,
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
    engine: str | None,
    given: list[str],
    route: str | None,
    batch: int,
    max_new_tokens: int,
    ray: str | None,
    workers: int | None,
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
    from foveate.inference.loading import find, load

    with usage():
        spec = _spec(prune)
        _check_counts(batch, max_new_tokens, ray, workers)
        source, target = check_file(source), check_output(target, resume)
        count = check_ids(source)
        options = _options(model, spec, batch, clip, dtype, trust, route, given) if engine else {}
    told = {"model": model, "prune": spec, "max_new_tokens": max_new_tokens, "dtype": dtype, "clip": clip}
    told |= {"engine": engine} if engine else {}
    with journal(target, {"rows": _digest(source), **told}, resume) as written:
        if len(written.done) < count:
            asking: dict[str, Any] = {"batch": batch, "max_new_tokens": max_new_tokens, "clip": clip}
            place: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust}
            if engine:
                made = _with_vllm(source, spec, max_new_tokens, options, written, ray, workers)
            elif ray is None:
                with working(f"loading {model}"):
                    loaded = load(model, **place)
                made = _here(loaded, source, spec, written, **asking)
            else:
                from foveate.batch.on_ray import Work, answers_on_ray

                find(model)  # a name with a fault is told before a cluster is asked
                work = Work(source, model, spec, place, **asking)
                made = answers_on_ray(work, written.done, address=ray, workers=workers)
            _write(made, written, count)
        written.finish()
        faults = sum("error" in row for row in written.rows())
    typer.echo(f"{count} rows in {target}" + (f", {faults} of them with an error" if faults else ""), err=True)


def _check_counts(batch: int, max_new_tokens: int, ray: str | None, workers: int | None) -> None:
    """Refuse numbers that leave nothing to do, and workers of no cluster."""
    for name, value in (("batch", batch), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise UsageError(f"{name}={value} leaves nothing to do; the smallest is 1")
    if workers is not None and ray is None:
        raise UsageError("--workers belongs to --ray; leave it out, or add that")
    if workers is not None and workers < 1:
        raise UsageError(f"workers={workers} leaves nobody to answer; the smallest is 1")
    if ray is not None:
        from foveate.batch.on_ray import check_installed

        check_installed()


def _spec(prune: list[str] | None) -> str:
    """The spec in its one spelling."""
    from foveate.spec import format, parse_stages

    if prune is not None and len(prune) > 1:
        raise UsageError(f"batch takes one --prune, not {len(prune)}; join stages with +")
    return "none" if prune is None or prune[0] == "none" else format(parse_stages(prune[0]))


def _check_engine(engine: str | None, given: list[str], route: str | None, device: str) -> None:
    """Refuse an engine that is not known, and what belongs to one of the two ways alone."""
    check_engine(engine)
    if engine is None:
        check_unused(given, "batch", {"--route": route})
    elif device != "auto":
        raise UsageError(
            f"--device {device} belongs to batches without an engine; vLLM takes the device it is built for"
        )


def _options(
    model: str, spec: str, batch: int, clip: str | None, dtype: str, trust: bool, route: str | None, given: list[str]
) -> dict[str, Any]:
    """Arguments of vLLM's engine."""
    from foveate.inference.loading import find
    from foveate.serve.vllm import options
    from foveate.serve.vllm.command_line import engine_arguments

    usual: dict[str, Any] = {"max_num_seqs": batch, "disable_log_stats": True}
    usual |= {} if dtype == "auto" else {"dtype": dtype}
    usual |= {"trust_remote_code": True} if trust else {}
    return options(find(model), spec, clip=clip, route=route, **{**usual, **engine_arguments(given)})


def _with_vllm(
    source: Path,
    spec: str,
    max_new_tokens: int,
    options: dict[str, Any],
    written: Any,
    ray: str | None,
    workers: int | None,
) -> Any:
    """The answers of vLLM, in this process or on a cluster."""
    from foveate.batch.requests import Engine
    from foveate.batch.rows import rows_of

    engine = Engine(source, spec, max_new_tokens, options)
    if ray is not None:
        from foveate.batch.on_ray_vllm import answers_on_ray_vllm

        return answers_on_ray_vllm(engine, written.done, address=ray, workers=workers)
    from foveate.batch.on_vllm import VllmAnswers

    left = (row for row in rows_of(source) if row.id not in written.done)
    return VllmAnswers(engine).answers(left)


def _digest(source: Path) -> str:
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _here(loaded: Any, source: Path, spec: str, written: Any, **options: Any) -> Any:
    """The answers of this process to what has none yet."""
    from foveate.batch.rows import rows_of
    from foveate.batch.work import answers
    from foveate.spec import parse_stages

    stages = () if spec == "none" else parse_stages(spec)
    left = (row for row in rows_of(source) if row.id not in written.done)
    return answers(loaded, left, stages, folder=source.parent, **options)


def _write(made: Any, written: Any, count: int) -> None:
    """Write answers as they come; progress with its rate and the time left goes to stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from foveate.cli.output import stderr

    rate = TextColumn("{task.fields[rate]:.1f} rows/s")
    columns = (BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=stderr(), refresh_per_second=2) as progress:
        task = progress.add_task("rows", total=count, completed=len(written.done), rate=0.0)
        for answers in made:
            progress.advance(task, written.add(answers))
            progress.update(task, rate=progress.tasks[0].speed or 0.0)
