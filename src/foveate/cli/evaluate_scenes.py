"""`foveate eval --tasks scenes`: the same drawn questions for the unpruned model and each rival."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.core import usage

if TYPE_CHECKING:
    from foveate.evaluate.left_out import LeaveOut
    from foveate.evaluate.looks import Shown
    from foveate.evaluate.scenes_task import Paper, Row
    from foveate.inference.loading import Loaded
    from foveate.inference.processes import Processes
    from foveate.report.tables import Column


def run(
    wanted: dict[str, Any],
    given: dict[str, Any],
    place: dict[str, Any],
    among: Processes,
    *,
    every: str | None,
    ceiling: bool,
    pages: bool,
    jpeg: int | None,
    json_file: Path | None,
    append: Path | None,
) -> None:
    """Answer, print the table, and write the rows where they are wanted.

    Args:
        wanted: model, adapter, task, samples and seed as the user gave them, None where not.
        given: specs, batch and clip, and how many questions are timed and pictures shown.
        place: how the model is loaded, and whether one with an adapter may be pruned by any spec.
        among: processes that share the questions; the first prints and writes.
    """
    from foveate.cli.output import show, stderr, working

    with usage():
        from foveate.cli.evaluate_looks import check_few, timed_and_seen
        from foveate.evaluate import scenes_task
        from foveate.inference.adapters import check_asked, load_tuned

        check_few(given, "--json" if json_file is None else None)
        asked, found = _asked(wanted, json_file, append)
        on = _paper(pages, jpeg)
        scenes_task.check(samples=asked["samples"], batch=given["batch"], seed=asked["seed"])
        rivals = scenes_task.parse_rivals(given["prune"])
        check_asked(asked.get("adapter"), rivals.values(), any_spec=place["any_spec"])
        budgets = _budgets(every)
        if append is not None:
            _check_append(append, found, asked, budgets, bool(rivals.keys() - {"none"} or budgets or ceiling), on)

    console = stderr()
    with working(f"loading {asked['model']}"):
        loaded = load_tuned(asked["model"], asked.get("adapter"), **place)
    named = [*rivals]
    unreached = _add_every(rivals, budgets, loaded, asked["model"], found)
    sizes = {name: asked[name] for name in ("samples", "seed")}
    settings = {"batch": given["batch"], "clip": given["clip"], "ceiling": ceiling, "on": on}
    settings["leave_out"] = _leaving(named, rivals, unreached)
    rows = _answered(loaded, rivals, among, **sizes, **settings)
    if not among.first:
        return
    table = [row.to_dict() for row in rows]
    seen = timed_and_seen(loaded, table, rivals, _shown(given, asked["seed"], on), given, scenes_task.LONGEST)
    show(
        _columns(),
        table,
        title="{model}: {samples} questions of {task}, seed {seed}".format(**{**asked, "model": loaded.name}),
    )
    for entry in unreached:
        budget = "/".join(map(str, entry["keep"]))
        console.print(f"{entry['method']} at {budget}: - ({entry['why']})", highlight=False, markup=False)
    _write(json_file, append, asked, table, budgets, unreached, seen, on)


def _shown(given: dict[str, Any], seed: int, on: Paper | None) -> list[Shown]:
    """The first questions of the task."""
    from foveate.evaluate.looks import Shown
    from foveate.evaluate.scenes_task import draw_samples

    drawn = draw_samples(max(given["timed"], given["pictures"]), seed=seed, on=on)
    return [Shown(sample.image, sample.question, sample.answer) for sample in drawn]


def _asked(
    wanted: dict[str, Any], json_file: Path | None, append: Path | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What is asked, with what was left open filled in, and the file that rows are put into."""
    from foveate.core import FoveateError
    from foveate.evaluate import results
    from foveate.paths import file_target

    given = {name: value for name, value in wanted.items() if value is not None}
    if append is not None:
        if json_file is not None:
            raise FoveateError("--json writes a new file and --append adds to one; give one of them")
        found = results.read(file_target(append, (".json",)))
        results.check_same(append, {"adapter": None, **found}, given)
        return {name: found[name] for name in wanted if name in found}, found
    if json_file is not None:
        file_target(json_file, (".json",))
    for option, name in (("--model", "model"), ("--tasks", "task")):
        if name not in given:
            such = "mini" if name == "model" else "scenes"
            raise FoveateError(f"Missing option '{option}'; such as {option} {such}")
    return {"samples": 500, "seed": 0, **given}, None


def _paper(pages: bool, jpeg: int | None) -> Paper | None:
    """The pages that objects are stamped on, or None."""
    from foveate.core import FoveateError
    from foveate.evaluate.scenes_task import Paper

    if jpeg is not None and not pages:
        raise FoveateError(f"--jpeg {jpeg} is about pages; give --pages with it")
    return Paper(jpeg) if pages else None


def _check_append(
    file: Path, found: Any, asked: dict[str, Any], budgets: list[int], some: bool, on: Paper | None
) -> None:
    """Refuse what cannot be added to a file, before a model is loaded."""
    from foveate.core import FoveateError
    from foveate.evaluate import results, scenes_task, task_names

    if not some:
        raise FoveateError("--append adds rows, and no --prune, --every or --ceiling asks for one")
    task_names([asked["task"]])
    results.check_budgets(file, found, budgets)
    asked["data"] = scenes_task.digest(asked["samples"], seed=asked["seed"], on=on)
    results.check_same(file, found, asked)


def _write(
    json_file: Path | None,
    append: Path | None,
    asked: dict[str, Any],
    table: list[dict[str, Any]],
    budgets: list[int],
    unreached: list[dict[str, Any]],
    seen: list[dict[str, Any]],
    on: Paper | None,
) -> None:
    """Write the file that was asked for, or put the rows into it."""
    from foveate.cli.output import stderr
    from foveate.evaluate import results, scenes_task
    from foveate.runs import write_json

    command = shlex.join(["foveate", *sys.argv[1:]])
    if append is not None:
        replaced = results.append(append, table, asked=asked, command=command, budgets=budgets, unreached=unreached)
        for name in replaced:
            stderr().print(f"{append}: the row of {name} gave way to this one", highlight=False, markup=False)
    if json_file is not None:
        data = scenes_task.digest(asked["samples"], seed=asked["seed"], on=on)
        more: dict[str, Any] = {"every": budgets, "unreached": unreached} if budgets else {}
        more |= {"pictures": seen} if seen else {}
        write_json(json_file, {"command": command, **asked, "data": data, "rows": table, **more})


def _answered(loaded: Loaded, rivals: dict[str, Any], among: Processes, **settings: Any) -> list[Row]:
    """The rows of the table; the first process counts its own answers."""
    from foveate.cli.output import counting, note_precision
    from foveate.evaluate.scenes_task import evaluate

    if among.first:
        note_precision(loaded.model)
    total = (len(rivals) + settings["ceiling"]) * settings["samples"] // among.count
    with counting("answers", total, seen=among.first) as progress:
        options = {"progress": progress, "among": among, **settings}
        return evaluate(loaded.model, loaded.processor, list(rivals.values()), **options)


def _budgets(text: str | None) -> list[int]:
    """The token counts of --every."""
    from foveate.core import FoveateError

    if text is None:
        return []
    counts = text.split("/")
    if not all(count.isdigit() and int(count) > 0 for count in counts):
        raise FoveateError(f"--every {text!r} is no list of token counts; write 144/64/32/16")
    return [int(count) for count in counts]


def _add_every(
    rivals: dict[str, Any], budgets: list[int], loaded: Loaded, model: str, found: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Add every method that drops visual tokens at each budget to `rivals`, but for rows that `found` has.

    Returned is what cannot be reached: method, the budgets for one reason, and that reason.
    """
    from foveate import methods, spec
    from foveate.core import FoveateError
    from foveate.evaluate.catalogue import at
    from foveate.evaluate.results import rows_of
    from foveate.families import family_of
    from foveate.inference.resizing import check_runnable
    from foveate.scenes.generator import SIZE

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
                check_runnable(loaded.model, loaded.processor, (made,), [(SIZE, SIZE)])
            except FoveateError as error:
                unreached.setdefault((name, str(error)), []).append(keep)
            else:
                if found is None or spec.format(made) not in rows_of(found):
                    rivals[spec.format(made)] = (made,)
    return [{"method": name, "keep": keeps, "why": why} for (name, why), keeps in unreached.items()]


def _leaving(named: list[str], rivals: dict[str, Any], unreached: list[dict[str, Any]]) -> LeaveOut:
    """What lets a method of --every go that does not fit the pictures, with its reason; none that the user named."""
    from foveate.methods import name_of

    def leave_out(spec: str, why: str) -> bool:
        if spec in named or spec not in rivals:
            return False
        method = rivals.pop(spec)[0]
        keep = method.keep[-1] if isinstance(method.keep, tuple) else method.keep
        unreached.append({"method": name_of(method), "keep": [keep], "why": why})
        return True

    return leave_out


def _columns() -> list[Column]:
    from foveate.cli.evaluate_looks import time_columns
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
        *time_columns(),
    ]
