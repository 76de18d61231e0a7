"""`foveate eval`: how many questions a model answers, unpruned and with each rival method, on the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.core import UsageError, usage
from foveate.inference.loading import Adapter, AnySpec, Clip, Device, Dtype, Trust

Every = Annotated[
    str | None,
    typer.Option(metavar="K/K/...", help="Every method at each of these budgets too, such as 144/64/32/16."),
]
Samples = Annotated[
    int | None,
    typer.Option(metavar="N", help="Questions; of a folder the first ones.", show_default="500, of a folder all"),
]
Ceiling = Annotated[
    bool,
    typer.Option("--ceiling", help="Add the row that keeps the tokens of the object asked about, from its box."),
]
Append = Annotated[
    Path | None,
    typer.Option(
        metavar="F",
        help="Put the rows into this file of --json instead; model, task, samples and seed are those of the file. "
        "A --prune that is there is measured anew, of --every only what is missing.",
    ),
]
Prune = Annotated[
    list[str] | None,
    typer.Option(metavar="SPEC", help="A rival; repeat it for more. The unpruned model comes first."),
]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where the answers about a folder are written down, and the rows.")
]

Pages = Annotated[
    bool, typer.Option("--pages", help="Objects are stamped on pages: letters, text, tables, boxes, screens.")
]
Jpeg = Annotated[
    int | None, typer.Option(metavar="Q", help="Of --pages: their quality as JPEG, 1 to 95.", show_default="lossless")
]
Tasks = Annotated[
    list[str] | None, typer.Option("--tasks", metavar="TASK", help="scenes, or a folder with questions.jsonl.")
]
Longest = Annotated[
    int | None, typer.Option(metavar="N", help="Longest answer about a folder, in tokens.", show_default="32")
]
Frames = Annotated[
    int | None,
    typer.Option(metavar="N", help="Frames of each video.", show_default="as the model's processor samples them"),
]
Fps = Annotated[float | None, typer.Option("--fps", metavar="F", help="Frames of each second of a video, instead.")]
Timed = Annotated[
    int,
    typer.Option(metavar="N", help="Questions whose answers are timed, each by itself, all rivals in turns; 0: none."),
]
Pictures = Annotated[
    int,
    typer.Option(
        metavar="N", help="Put the first N pictures, and what every rival keeps of them, into the rows' file as well."
    ),
]


def command(
    model: Annotated[str | None, typer.Option("--model", metavar="M", help="mini, a folder, or a hub id.")] = None,
    adapter: Adapter = None,
    any_spec: AnySpec = False,
    tasks: Tasks = None,
    prune: Prune = None,
    every: Every = None,
    samples: Samples = None,
    batch: Annotated[int, typer.Option(metavar="B", help="Questions answered at once.")] = 16,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of pictures and questions.", show_default="0")] = None,
    clip: Clip = None,
    timed: Timed = 3,
    pictures: Pictures = 0,
    ceiling: Ceiling = False,
    pages: Pages = False,
    jpeg: Jpeg = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="F", help="Write the rows to this file too.")
    ] = None,
    append: Append = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    max_new_tokens: Longest = None,
    frames: Frames = None,
    fps: Fps = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Answer the same questions unpruned and with each rival, and print accuracy, tokens and cost.

    Several processes share the questions: torchrun --nproc_per_node 2 -m foveate eval ...
    """
    from foveate.inference.processes import joined, own_device

    place: dict[str, Any] = {"device": own_device(device), "dtype": dtype, "trust_remote_code": trust_remote_code}
    place["any_spec"] = any_spec
    rivals = {"prune": prune or [], "batch": batch, "clip": clip, "timed": timed, "pictures": pictures}
    of_scenes = {"every": every, "seed": seed, "ceiling": ceiling or None, "json": json_file, "append": append}
    of_scenes |= {"pages": pages or None, "jpeg": jpeg}
    of_folders = {"out": out, "resume": resume or None, "max-new-tokens": max_new_tokens, "frames": frames, "fps": fps}
    folder = folder_of(tasks)
    if folder is None:
        from foveate.cli.evaluate_scenes import run

        _refuse(of_folders, "a folder of questions; --tasks names one")
        named = None if adapter is None else str(adapter)
        wanted = {"model": model, "adapter": named, "task": _task(tasks), "samples": samples, "seed": seed}
        files = {"json_file": json_file, "append": append}
        run(wanted, rivals, place, joined(), every=every, ceiling=ceiling, pages=pages, jpeg=jpeg, **files)
    else:
        from foveate.cli.evaluate_folder import run_folder

        _refuse(of_scenes, "--tasks scenes")
        place["adapter"] = adapter
        options: dict[str, Any] = {"samples": samples, "out": out, "resume": resume, "longest": max_new_tokens}
        options["sampling"] = {"frames": frames, "fps": fps}
        run_folder(folder, model, rivals, place, joined(), **options)


def folder_of(tasks: list[str] | None) -> Path | None:
    """The folder that --tasks names, or None where it names tasks."""
    from foveate.paths import checked

    if tasks is None or len(tasks) != 1:
        return None
    with usage():
        folder = checked(tasks[0])
    return folder if tasks[0] and folder.is_dir() else None


def _refuse(options: dict[str, Any], what: str) -> None:
    """Options that are of another kind of task."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"--{name} is of {what}")


def _task(tasks: list[str] | None) -> str | None:
    """The task that was named, or None."""
    from foveate.evaluate import task_names

    with usage():
        return None if tasks is None else task_names(tasks)[0]
