"""`foveate tune`: the fewest tokens within a wanted drop, and a file that `--prune @FILE` takes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.evaluate import Fps, Frames, folder_of
from foveate.core import UsageError, usage
from foveate.inference.loading import Adapter, AnySpec, Clip, Device, Dtype, Trust

if TYPE_CHECKING:
    from foveate.evaluate.tuning import Search
    from foveate.report.tables import Column

RUN = ".run"
"""Behind the name of the file stands the folder in which answers about a folder are written down."""


Model = Annotated[str | None, typer.Option("--model", metavar="M", help="mini, a folder, or a hub id.")]
Task = Annotated[
    str | None, typer.Option("--task", "--tasks", metavar="TASK", help="scenes, or a folder with questions.jsonl.")
]
Drop = Annotated[float, typer.Option(metavar="POINTS", help="What may be lost of the unpruned model's score, of 100.")]
Cost = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="What a spec may cost of the unpruned prefill's FLOPs.", show_default="any"),
]
Prune = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SPEC",
        help="Try this one and smaller budgets of it; repeat it for more.",
        show_default="every method that runs",
    ),
]
Out = Annotated[Path | None, typer.Option(metavar="F.json", help="The file for --prune @F.json.")]
Samples = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Questions of a search; of scenes as many fresh ones confirm.",
        show_default="400, of a folder all, a third of them fresh",
    ),
]
Longest = Annotated[
    int | None, typer.Option(metavar="N", help="Longest answer about a folder, in tokens.", show_default="32")
]


def command(
    model: Model = None,
    adapter: Adapter = None,
    any_spec: AnySpec = False,
    tasks: Task = None,
    max_drop: Drop = 1.0,
    max_cost: Cost = None,
    prune: Prune = None,
    out: Out = None,
    samples: Samples = None,
    batch: Annotated[int, typer.Option(metavar="B", help="Questions answered at once.")] = 16,
    seed: Annotated[int, typer.Option(metavar="N", help="Of scenes, or of a folder's order.")] = 0,
    clip: Clip = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a search about a folder.")] = False,
    max_new_tokens: Longest = None,
    frames: Frames = None,
    fps: Fps = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Find the method, budget and stages with the fewest tokens that lose no more than --max-drop."""
    place = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    place |= {"adapter": adapter, "any_spec": any_spec}
    given: dict[str, Any] = {"batch": batch, "seed": seed, "clip": clip}
    with usage():
        from foveate.cli.output import stderr
        from foveate.evaluate import scenes_task
        from foveate.evaluate.candidates import joined
        from foveate.evaluate.tuning import QUESTIONS, Search

        _check(model, tasks, out, max_drop, max_cost)
        _check_adapter(adapter, any_spec)
        folder = folder_of([str(tasks)])
        of_folders = {"resume": resume or None, "max-new-tokens": max_new_tokens, "frames": frames, "fps": fps}
        task = _task(str(tasks), folder, of_folders, samples)
        scenes_task.check(samples=samples or 1, batch=batch, seed=seed)
        named = joined(scenes_task.parse_rivals(prune or []))
        run = None if folder is None else _run_folder(Path(str(out)), resume)
    given |= {"max_new_tokens": max_new_tokens or 32, "resume": resume, "frames": frames, "fps": fps}
    ask, tried = _asker(str(model), task, named, given, place, samples or QUESTIONS, run)
    search = Search(ask, max_drop / 100, max_cost, told=lambda text: stderr().print(text, markup=False))
    search.run(tried)
    asked = {"model": model, "task": tasks, "max_drop": max_drop, "max_cost": max_cost}
    _finish(search, Path(str(out)), asked | ({} if adapter is None else {"adapter": str(adapter)}))


def _check(model: str | None, tasks: str | None, out: Path | None, drop: float, cost: float | None) -> None:
    from foveate.core import FoveateError
    from foveate.inference.processes import check_alone
    from foveate.paths import file_target

    check_alone("tune")
    for option, value in (("--model", model), ("--task", tasks), ("--out", out)):
        if value is None:
            raise UsageError(f"Missing option '{option}'")
    if not 0 <= drop < 100:
        raise FoveateError(f"--max-drop {drop:g} is no number of points from 0 to 100")
    if cost is not None and not 0 < cost <= 1:
        raise FoveateError(f"--max-cost {cost:g} is no share of the unpruned prefill above 0 and up to 1")
    file_target(str(out), (".json",))


def _check_adapter(adapter: Path | None, any_spec: bool) -> None:
    """Refuse an adapter whose model may be pruned by one spec alone: a search tries others."""
    from foveate.core import FoveateError
    from foveate.inference.adapters import check_asked, read_record

    check_asked(adapter, (), any_spec=any_spec)
    if adapter is not None and not any_spec:
        raise FoveateError(
            f"the model's adapter was tuned under {read_record(adapter)['prune']}, and a search prunes it by others; "
            "say --any-spec, or ask it by foveate eval"
        )


def _task(tasks: str, folder: Path | None, of_folders: dict[str, Any], samples: int | None) -> Any:
    """The questions of a folder, or None for scenes."""
    from foveate.evaluate import local_task, task_names
    from foveate.evaluate.askers import check_folder
    from foveate.evaluate.tuning import QUESTIONS, sizes

    if folder is not None:
        found = local_task.read(folder, samples)
        check_folder(found)
        return found
    task_names([tasks])
    for name, value in of_folders.items():
        if value is not None:
            raise UsageError(f"--{name} is of a folder of questions; --task names one")
    sizes(QUESTIONS if samples is None else samples)
    return None


def _run_folder(out: Path, resume: bool) -> Path:
    from foveate.core import FoveateError

    run = out.with_name(out.name + RUN)
    if run.exists() and not resume:
        raise FoveateError(f"{run} holds a search already; go on with it by --resume, or give another --out")
    if resume and not run.exists():
        raise FoveateError(f"{run} holds no search to go on with; start it without --resume")
    return run


def _asker(
    model: str,
    task: Any,
    named: dict[str, Any],
    given: dict[str, Any],
    place: dict[str, Any],
    samples: int,
    run: Path | None,
) -> tuple[Any, dict[str, Any]]:
    """Who asks the model, and the candidates by spec.

    Args:
        task: the questions of a folder, or None for scenes.
        named: candidates that the user names; none for all that run.
        run: where answers about a folder are written down.
    """
    from foveate.cli.output import note_precision, stderr, working
    from foveate.evaluate.askers import OfFolder, OfScenes
    from foveate.evaluate.candidates import candidates
    from foveate.evaluate.folder_run import check_rival, sampler_of
    from foveate.inference.adapters import load_tuned
    from foveate.inference.resizing import check_runnable
    from foveate.runs import make_folder
    from foveate.scenes.generator import SIZE

    def check_processor(processor: Any) -> None:
        if task is not None:
            sampler_of(processor, task, given["frames"], given["fps"])

    with working(f"loading {model}"):
        loaded = load_tuned(model, check_processor=check_processor, **place)
    note_precision(loaded.model)

    def check(stages: Any) -> None:
        of = (loaded.model, loaded.processor, stages)
        if task is None:
            check_runnable(*of, [(SIZE, SIZE)], clip=given["clip"])
        else:
            check_rival(*of, task, given["clip"])

    def leave_out(spec: str, why: str) -> bool:
        stderr().print(f"{spec}: - ({why})", highlight=False, markup=False)
        return True

    tried = named or candidates(loaded.model, model, check)
    fits = None if named else leave_out  # what a user names is refused
    if run is None:
        return OfScenes(
            loaded, samples, leave_out=fits, **{key: given[key] for key in ("batch", "seed", "clip")}
        ), tried
    make_folder(run)
    return OfFolder(loaded, task, model, run, leave_out=fits, **given), tried


def _finish(search: Search, out: Path, asked: dict[str, Any]) -> None:
    """Print what is worth its tokens, and write the spec with its evidence.

    Raises:
        FoveateError: nothing holds what was wanted; the nearest is named.
    """
    from foveate.cli.output import show, stderr
    from foveate.core import FoveateError
    from foveate.runs import write_json

    rows = search.rows()
    shown = [row for row in rows if row["front"] or row["fresh"] is not None]
    show(columns(), shown, title=f"{asked['model']}: within {asked['max_drop']:g} points of unpruned")
    if search.found is None:
        best = max(rows, key=lambda row: (row["fresh"] or row["drop"])["mean"])
        lost = (best["fresh"] or best["drop"])["mean"]
        raise FoveateError(
            f"no spec that was tried holds within {asked['max_drop']:g} points on fresh questions; the nearest is "
            f"{best['spec']} at {100 * lost:+.1f}; give a larger --max-drop"
        )
    command = shlex.join(["foveate", *sys.argv[1:]])
    write_json(out, {"prune": search.found, "command": command, **asked, "rows": shown})
    stderr().print(f"{search.found}; --prune @{out} takes it", highlight=False, markup=False)


def columns() -> list[Column]:
    """The columns of the table."""
    from foveate.report.tables import Column

    def points(found: Any) -> str:
        low, high = found["interval"]
        return f"{100 * found['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}, p {found['p']:.2g})"

    return [
        Column("spec", "spec", left=True),
        Column("equivalent_tokens", "equivalent", lambda value: f"{value:.4g}"),
        Column("prefill_flops_share", "prefill FLOPs", lambda value: f"{value:.0%}"),
        Column("questions", "questions"),
        Column("drop", "from unpruned", points),
        Column("fresh", "on fresh ones", points),
    ]
