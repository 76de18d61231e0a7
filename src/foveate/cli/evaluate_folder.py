"""`foveate eval --tasks FOLDER`: the questions of a local folder, for the unpruned model, rivals and baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.core import UsageError, usage

if TYPE_CHECKING:
    from foveate.evaluate.left_out import LeaveOut
    from foveate.evaluate.local_task import Folder
    from foveate.evaluate.looks import Shown
    from foveate.inference.processes import Processes
    from foveate.report.tables import Column

ROWS, TABLE = "rows.json", "rows.md"


def run_folder(
    folder: Path,
    model: str | None,
    given: dict[str, Any],
    place: dict[str, Any],
    among: Processes,
    *,
    samples: int | None,
    out: Path | None,
    resume: bool,
    longest: int | None,
    sampling: dict[str, Any],
) -> None:
    """Answer or go on answering, print the table, and write the rows beside the answers.

    Args:
        given: specs, batch and clip, and how many questions are timed and pictures shown.
        place: how the model is loaded, with its adapter.
        among: processes that share the questions; the first prints and writes.
        longest: new tokens of an answer.
        sampling: `frames` and `fps` of videos.
    """
    from foveate.cli.evaluate_looks import check_few
    from foveate.cli.output import working
    from foveate.evaluate import scenes_task
    from foveate.inference.adapters import check_asked, load_tuned
    from foveate.paths import checked
    from foveate.runs import check_run

    longest = 32 if longest is None else longest
    with usage():
        if model is None or out is None:
            lacking = "--model" if model is None else "--out"
            raise UsageError(f"Missing option '{lacking}'; a folder of questions needs both")
        _check_counts({"samples": samples, "batch": given["batch"], "max-new-tokens": longest})
        check_few(given)
        rivals = scenes_task.parse_rivals(given["prune"])
        check_asked(place["adapter"], rivals.values(), any_spec=place["any_spec"])
        task = _task(folder, samples, given)
        if among.first:
            check_run(out, resume)
        out = checked(out)

    from foveate.evaluate import folder_rows, folder_run

    found: list[Any] = []

    def check(processor: Any) -> None:
        with usage():
            found.append(folder_run.sampler_of(processor, task, **sampling))

    with working(f"loading {model}"):
        loaded = load_tuned(model, check_processor=check, **place)
    everyone, beside, missing = folder_rows.with_baselines(loaded.model, loaded.processor, rivals, task)
    settings = {"batch": given["batch"], "max_new_tokens": longest, "clip": given["clip"], **sampling}
    settings |= {"name": loaded.name, "out": out, "resume": resume, "leave_out": _leaving(rivals, everyone, missing)}
    lines = _answered(loaded, task, dict(everyone), among, **settings)
    if among.first:
        shown = _looked_at(task, max(given["timed"], given["pictures"]), found[0])
        _show(loaded, task, lines, (everyone, beside, missing), shown, given, out=out, longest=longest)


def _task(folder: Path, samples: int | None, given: dict[str, Any]) -> Folder:
    from foveate.evaluate import local_task

    task = local_task.read(folder, samples)
    if task.videos and given["pictures"]:
        raise UsageError(f"--pictures {given['pictures']} are of pictures, and these questions are about videos")
    return task


def _check_counts(counts: dict[str, int | None]) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value} measures nothing; the smallest is 1")


def _leaving(named: Any, everyone: dict[str, Any], missing: dict[str, str]) -> LeaveOut:
    """What lets a baseline that does not fit a picture go, with its reason, and no rival that the user named."""

    def leave_out(spec: str, why: str) -> bool:
        if spec in named:
            return False
        missing[spec] = why
        del everyone[spec]
        return True

    return leave_out


def _looked_at(task: Any, count: int, sampler: Any) -> list[Shown]:
    """The first questions of a folder, which are timed or seen."""
    from foveate.evaluate.folder_run import load_shown
    from foveate.evaluate.looks import Shown

    asked = task.questions[:count]
    return [Shown(load_shown(task, one, sampler), one.prompt, one.answers[0]) for one in asked]


def _show(
    loaded: Any,
    task: Any,
    lines: Any,
    rivals: tuple[Any, Any, Any],
    shown: list[Shown],
    given: dict[str, Any],
    *,
    out: Path,
    longest: int,
) -> None:
    """Print the table of what was answered, and write it.

    Args:
        rivals: what `with_baselines` found.
        shown: questions, as many as are timed or seen.
        given, longest: as `run_folder` has them.
    """
    from foveate.cli.evaluate_looks import timed_and_seen
    from foveate.cli.output import show, stderr
    from foveate.evaluate import folder_rows

    everyone, beside, missing = rivals
    rows = folder_rows.rows(lines, task, batch=given["batch"], beside=beside)
    seen = timed_and_seen(loaded, rows, everyone, shown, given, longest)
    show(columns(), [flat(row) for row in rows], title=f"{loaded.name}: {len(task.questions)} questions of {task.path}")
    for spec, why in missing.items():
        stderr().print(f"{spec}: - ({why})", highlight=False, markup=False)
    _write(out, loaded.name, task, rows, seen)


def _answered(loaded: Any, task: Any, everyone: dict[str, Any], among: Processes, **settings: Any) -> Any:
    """The answers of everyone; the first process counts its own."""
    from foveate.cli.output import counting, note_precision
    from foveate.evaluate.folder_run import answer_folder, asks

    if among.first:
        note_precision(loaded.model)
    total = len(everyone) * len(asks(task)) // among.count
    with counting("answers", total, seen=among.first) as progress:
        options = {"progress": progress, "among": among, **settings}
        return answer_folder(loaded.model, loaded.processor, task, everyone, **options)


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its difference from the unpruned model, and from its best baseline, as entries of its own."""
    against = row["against"]
    baselines = {name: found for name, found in against.items() if name != "none"}
    nearest = min(baselines, key=lambda name: baselines[name]["mean"], default=None)
    return {
        **row,
        "unpruned": against.get("none"),
        "baseline": None if nearest is None else {"name": nearest, **baselines[nearest]},
    }


def columns() -> list[Column]:
    """The columns of the table."""
    from foveate.cli.evaluate_looks import time_columns
    from foveate.report.tables import Column

    def points(found: Any) -> str:
        return f"{100 * found['mean']:+.1f} (p {found['p']:.2g})"

    return [
        Column("method", "method", left=True),
        Column("accuracy", "all", lambda value: f"{value:.1%}"),
        Column("interval", "95 %", lambda ends: f"{ends[0]:.1%}-{ends[1]:.1%}"),
        Column("unpruned", "from unpruned", points),
        Column("baseline", "from its best baseline", lambda found: f"{points(found)} {found['name']}"),
        Column("tokens", "tokens", lambda value: f"{value:.4g}"),
        Column("equivalent_tokens", "equivalent", lambda value: f"{value:.4g}"),
        Column("prefill_flops_share", "prefill FLOPs", lambda value: f"{value:.0%}"),
        Column("kv_bytes_share", "KV bytes", lambda value: f"{value:.0%}"),
        *time_columns(),
    ]


def _write(out: Path, model: str, task: Any, rows: list[dict[str, Any]], seen: list[dict[str, Any]]) -> None:
    """The rows as JSON, and as a Markdown table with what each benchmark reports below it."""
    from foveate.report.tables import Column, markdown
    from foveate.runs import write_json, write_text

    head = {"model": model, "task": str(task.path), "data": task.digest, "questions": len(task.questions)}
    write_json(out / ROWS, {**head, "rows": rows, **({"pictures": seen} if seen else {})})
    parts = [markdown(columns(), [flat(row) for row in rows])]
    for kind in rows[0]["measures"]:
        found = [{"method": row["method"], **row["measures"][kind]} for row in rows]
        names = [name for name in found[0] if name != "method"]
        shown = [Column(name, name, lambda value: f"{value:.4g}") for name in names]
        parts.append(f"## {kind}\n\n" + markdown([Column("method", "method", left=True), *shown], found))
    write_text(out / TABLE, "\n\n".join([f"# {model}: {len(task.questions)} questions", *parts]) + "\n")
