"""`foveate reproduce`: a paper's table, its figures beside those that are computed and measured here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core import FoveateError, UsageError, usage
from foveate.inference.loading import Device, Dtype, Trust

if TYPE_CHECKING:
    from foveate.report.tables import Column
    from foveate.reproduce.asked import Asked
    from foveate.reproduce.tables import Table

SCENES = "scenes"


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Such as fopru-table2; without one all are listed.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="M", help="Folder or hub id of the table's model, or 'PAPER NAME=M' for one of several."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with a folder of questions.jsonl for each data set.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="scenes", help="Drawn scenes in place of the data: the table's shape for any model."),
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="METHOD=DIR", help="Trained weights of a method, such as lvpruning.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="SPEC=DIR", help="Adapter of rows that are fine-tuned under a spec.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the commands and their GPU hours instead.")] = False,
    hardware: Annotated[str, typer.Option(metavar="H", help="GPU of --dry-run.")] = "a100-40gb",
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="Questions of each data set.", show_default="all, of scenes 500")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="B", help="Questions answered at once.")] = 16,
    seed: Annotated[int, typer.Option(metavar="N", help="Of scenes.")] = 0,
    times: Annotated[bool, typer.Option(help="Take times, where the table has some.")] = True,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where answers are written down, NAME.json and NAME.md; tables can share it."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Run a paper's table or figure and print its figures beside those of this machine, cell by cell."""
    from foveate.inference.processes import check_alone
    from foveate.reproduce import tables

    if name is None:
        _list()
        return
    with usage():
        check_alone("reproduce")
        table = tables.table(name)
        place = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        shape = _shape(tasks, data)
        asked = _asked(table, model or [], weights or [], adapter or [], data, shape=shape, dry_run=dry_run)
        asked = _run_of(asked, samples, batch, seed, out, resume, times, place)
    _head(table)
    if dry_run:
        _dry_run(table, asked, data, hardware)
    elif shape:
        _scenes(table, asked)
    else:
        _cells(table, asked)


def _shape(tasks: str | None, data: Path | None) -> bool:
    if tasks is None:
        return False
    if tasks != SCENES:
        raise FoveateError(f"--tasks {tasks} is not known here; scenes stand in for the table's data, or give --data")
    if data is not None:
        raise FoveateError("--tasks scenes draws its own questions; leave out --data, or --tasks")
    return True


def _asked(
    table: Table, model: list[str], weights: list[str], adapter: list[str], data: Path | None, **kinds: bool
) -> Asked:
    """Models, weights, adapters and data as the user named them."""
    from foveate.inference.adapters import check_asked
    from foveate.paths import checked
    from foveate.reproduce.asked import Asked, models_of, pairs
    from foveate.reproduce.tables import checkpoints
    from foveate.spec import parse_stages

    models = models_of(model, table, shape=kinds["shape"] or kinds["dry_run"])
    if kinds["shape"] and not kinds["dry_run"] and set(models) != {""}:
        raise UsageError("--tasks scenes asks one model for all rows; write --model mini")
    tuned = [checkpoints()[row.model].tuned for row in table.rows if row.runs]
    if data is not None and not checked(data).is_dir():
        raise FoveateError(f"--data {data} is no folder")
    adapters = pairs("--adapter", adapter, [spec for spec in tuned if spec])
    if not kinds["dry_run"]:
        for spec, folder in adapters.items():
            check_asked(folder, [parse_stages(spec)])
    return Asked(
        models=models,
        adapters=adapters,
        weights=pairs("--weights", weights, [row.weights for row in table.rows if row.weights]),
        data=data,
    )


def _run_of(
    asked: Asked,
    samples: int | None,
    batch: int,
    seed: int,
    out: Path | None,
    resume: bool,
    times: bool,
    place: dict[str, Any],
) -> Asked:
    """The same with how it is run."""
    import dataclasses

    from foveate.paths import folder_target

    for name, value in (("samples", samples), ("batch", batch)):
        if value is not None and value < 1:
            raise FoveateError(f"--{name} {value} measures nothing; the smallest is 1")
    if resume and out is None:
        raise FoveateError("--resume goes on with the run in --out, and there is none")
    if out is not None:
        folder_target(out)
    asked = dataclasses.replace(asked, samples=samples, batch=batch, seed=seed, place=place)
    return dataclasses.replace(asked, out=out, resume=resume, times=times)


def _list() -> None:
    from foveate.cli.output import show
    from foveate.report.tables import Column
    from foveate.reproduce import tables

    rows = [vars(tables.table(name)) for name in tables.names()]
    show([Column(key, key, left=True) for key in ("name", "paper", "source", "about")], rows)


def _head(table: Table) -> None:
    from foveate.cli.output import stdout

    note = f" Its numbers: {table.note}." if table.note else ""
    stdout().print(f"{table.paper}, {table.source}: {table.about} ({table.url}).{note}", markup=False, soft_wrap=True)


def _dry_run(table: Table, asked: Asked, data: Path | None, hardware: str) -> None:
    from foveate.cli.output import stdout
    from foveate.reproduce.hours import Places, jobs

    places = Places(str(data or "DATA"), asked.models, asked.adapters, asked.weights, asked.samples)
    with usage():
        found = jobs(table, places, hardware)
    console = stdout()
    for job in found:
        bound = "at most " if job.bounded else ""
        told = "" if job.hours is None else f"  # {job.questions} questions, {bound}{job.hours:.2g} h"
        console.print(job.command + told, markup=False, soft_wrap=True)
    hours = sum(job.hours or 0.0 for job in found)
    untold = " Training, and what is only timed, is not counted." if any(job.hours is None for job in found) else ""
    console.print(
        f"{hours:.3g} hours of one {hardware} by the cost model, one question at a time.{untold}"
        if found
        else "Nothing to run: every cell is computed.",
        markup=False,
        soft_wrap=True,
    )


def _cells(table: Table, asked: Asked) -> None:
    """The table on its own data, as far as it is there."""
    from foveate.cli.output import counting, show, stderr
    from foveate.reproduce import folders

    with usage():
        data = folders.read(table, asked)
    console = stderr()

    def tell(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    for one in dict.fromkeys(row.model for row in table.rows if row.runs):
        adapter = f" with {asked.adapter(one)}" if asked.adapter(one) else ""
        typer.echo(f"{one}: {asked.source(one)}{adapter}")
    with counting("answers", folders.total(table, asked, data)) as progress:
        cells = folders.run(table, asked, data, tell, progress)
    rows = [{**vars(cell), "difference": cell.difference} for cell in cells]
    show(_cell_columns(), rows)
    if asked.out is not None:
        _write(asked.out, table, _cell_columns(), rows)


def _scenes(table: Table, asked: Asked) -> None:
    """The table's rows on scenes, and its computed cells."""
    from foveate.cli.output import counting, show, stderr
    from foveate.reproduce import folders, shape
    from foveate.reproduce.cells import COST

    console = stderr()

    def tell(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    with counting("answers", shape.total(table, asked)) as progress:
        rows = shape.run(table, asked, tell, progress)
    columns = _shape_columns(table, rows)
    show(columns, rows)
    for row in rows:
        if row.get("why"):
            typer.echo(f"{row['row']}: - ({row['why']})")
    computed = [cell for cell in folders.run(table, asked, {}, tell, lambda count: None) if cell.how == "computed"]
    if any(column.measure in COST for column in table.columns) and computed:
        show(_cell_columns(), [{**vars(cell), "difference": cell.difference} for cell in computed])
    if asked.out is not None:
        _write(asked.out, table, columns, rows)


def _number(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"


def _cell_columns() -> list[Column]:
    from foveate.report.tables import Column

    return [
        Column("row", "row", left=True),
        Column("column", "column", left=True),
        Column("paper", "paper", _number),
        Column("here", "here", _number),
        Column("difference", "difference", lambda value: f"{value:+.3g}"),
        Column("how", "how", left=True),
    ]


def _shape_columns(table: Table, rows: list[dict[str, Any]]) -> list[Column]:
    """The rows' columns; of what the paper prints the mean, since its data sets have no scenes of their own."""
    from foveate.report.tables import Column
    from foveate.reproduce.cells import CURVE, TIMES
    from foveate.scenes.questions import KINDS

    def share(value: Any) -> str:
        return f"{value:.1%}"

    beside = [column.title for column in table.columns if column.measure in TIMES + CURVE]
    kinds = [*KINDS] if any("accuracy" in row for row in rows) else []
    wanted = [
        Column("row", "row", left=True),
        Column("spec", "scenes with", left=True),
        Column("paper_share", "paper, of unpruned", share),
        Column("share", "scenes, of unpruned", share),
        Column("accuracy", "all", share),
        Column("interval", "95 %", lambda ends: f"{ends[0]:.1%}-{ends[1]:.1%}"),
        *(Column(kind, kind, share) for kind in kinds),
        Column("tokens", "tokens", _number),
        Column("equivalent_tokens", "equivalent", _number),
        Column("prefill_flops_share", "prefill FLOPs", lambda value: f"{value:.0%}"),
        Column("kv_bytes_share", "KV bytes", lambda value: f"{value:.0%}"),
        *(Column(title, title, _number) for title in beside),
    ]
    return [column for column in wanted if any(row.get(column.key) is not None for row in rows)]


def _write(out: Path, table: Table, columns: list[Column], rows: list[dict[str, Any]]) -> None:
    """The figures as JSON, and the table as Markdown, by the table's name."""
    import shlex
    import sys

    from foveate.report.tables import markdown
    from foveate.runs import make_folder, write_json, write_text

    command_line = shlex.join(["foveate", *sys.argv[1:]])
    folder = make_folder(out)
    write_json(folder / f"{table.name}.json", {"command": command_line, "name": table.name, "rows": rows})
    write_text(folder / f"{table.name}.md", f"# {table.paper}, {table.source}\n\n{markdown(columns, rows)}\n")
