"""`foveate demo`: one picture, four questions, three ways; everything it prints is measured while it runs."""

from __future__ import annotations

import functools
import random
import statistics
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core import usage
from foveate.inference.loading import Device, Dtype

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table

    from foveate.inference.latency import Latency
    from foveate.inference.loading import Loaded
    from foveate.scenes.questions import Question
    from foveate.trace import Trace

RIVALS = {
    "unpruned": None,
    "FoPru rank 25 %": "fopru:keep=0.25",
    "FoPru row 25 %": "fopru:keep=0.25,strategy=row",
}
TURNS = 9  # timed calls of each rival, taking turns
STEPS = 16  # tokens that each timed call decodes
SCALE = 2  # the picture is drawn larger than the model sees it


@dataclass
class Outcome:
    """What one rival answered, kept and took."""

    answers: list[str] = field(default_factory=list)
    trace: Trace | None = None
    latency: Latency | None = None
    choosing: list[float] = field(default_factory=list)  # milliseconds of each timed call


def command(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where scene.png and kept.png go; made if it is not there.")
    ] = Path("demo"),
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Answer questions about a picture with mini, unpruned and with FoPru at 25 %, and show what each kept and took."""
    from foveate.paths import folder_target

    with usage():
        folder_target(out)

    from foveate.cli.output import note_precision, show_table, working
    from foveate.inference.loading import load
    from foveate.inference.pictures import save_image
    from foveate.runs import make_folder
    from foveate.scenes import generator

    with working("loading mini") as status:
        loaded = load("mini", device=device, dtype=dtype)
        scenes = generator.demo()
        picture, questions = scenes.image(0), _questions(scenes)
        outcomes = {name: Outcome() for name in RIVALS}
        status.update("answering")
        for name, outcome in outcomes.items():
            _answer(loaded, picture, questions, RIVALS[name], outcome)
        status.update("taking times")
        _time(loaded, picture, outcomes)
    note_precision(loaded.model)
    out = make_folder(out)
    save_image(picture, out / "scene.png")
    _draw(picture, outcomes, out / "kept.png")
    show_table(_table(questions, outcomes))
    where = f"{loaded.model.device}, {str(loaded.model.dtype).removeprefix('torch.')}"
    typer.echo(f"Times: medians of {TURNS} calls of generate() taking turns, on {where}.")
    typer.echo("mini is small: it misreads one digit in six, more in a full picture or where much is pruned.")
    typer.echo(f"The picture: {out / 'scene.png'}  What was kept: {out / 'kept.png'}")


def _questions(scenes: Any) -> list[Question]:
    """Four questions about the demo picture, each of another kind, the first about its dog if it has one."""
    from foveate.scenes.questions import questions

    asked = sorted(questions(scenes, 0, random.Random(0)), key=lambda one: "dog" not in one.text)
    last = asked[::-1]
    pick = {"color": asked, "digit": last, "count": asked, "describe": asked}
    return [next(one for one in order if one.kind == kind) for kind, order in pick.items()]


def _pruned(loaded: Loaded, spec: str | None) -> Any:
    from foveate.prune import prune

    return nullcontext() if spec is None else prune(loaded.model, spec, processor=loaded.processor)


def _answer(
    loaded: Loaded, picture: Image.Image, questions: list[Question], spec: str | None, outcome: Outcome
) -> None:
    from foveate.inference.answers import answer

    with _pruned(loaded, spec) as outcome.trace:
        for question in questions:
            outcome.answers += answer(loaded.model, loaded.processor, [picture], [question.text])


def _time(loaded: Loaded, picture: Image.Image, outcomes: dict[str, Outcome]) -> None:
    from foveate.inference.answers import encode
    from foveate.inference.latency import interleaved, timed

    inputs = encode(loaded.model, loaded.processor, [[picture]], ["describe"])

    def run(name: str) -> Latency:
        with _pruned(loaded, RIVALS[name]) as trace:
            latency = timed(loaded.model, inputs, max_new_tokens=STEPS, full=True)[1]
        if trace is not None:
            outcomes[name].choosing.append(trace.milliseconds)
        return latency

    rivals = {name: functools.partial(run, name) for name in outcomes}
    for name, latency in interleaved(rivals, repeats=TURNS).items():
        outcomes[name].latency = latency


def _table(questions: list[Question], outcomes: dict[str, Outcome]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from foveate.scenes.scoring import score

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in outcomes:
        table.add_column(name, justify="left")
    table.add_column("truth", justify="left")
    for title, costs in _costs(outcomes).items():
        table.add_row(title, *costs, style="bold" if title == "visual tokens" else None)
    table.add_section()
    for number, question in enumerate(questions):
        cells: list[Text] = []
        for outcome in outcomes.values():
            answer = outcome.answers[number]
            right = score(question.kind, answer, question.answer) == 1.0
            cells.append(Text(answer, style="green" if right else "red"))
        table.add_row(Text(question.text, style="italic"), *cells, Text(question.answer))
    return table


def _costs(outcomes: dict[str, Outcome]) -> dict[str, list[str]]:
    """Tokens, operations, bytes and times: one line each, one cell for each rival."""
    from foveate.trace import readable

    full = next(outcome.trace for outcome in outcomes.values() if outcome.trace is not None)
    lines: dict[str, list[str]] = {}

    def add(title: str, cell: str) -> None:
        lines.setdefault(title, []).append(cell)

    for outcome in outcomes.values():
        trace, latency = outcome.trace, outcome.latency
        assert latency is not None and latency.per_token_ms is not None
        budget = full.unpruned if trace is None else trace.budget
        before, after = full.images[0].original, full.images[0].original if trace is None else trace.images[0].after
        add("visual tokens", str(before) if trace is None else f"{before} -> {after}")
        add("prefill FLOPs", readable(budget.prefill_flops, "FLOPs"))
        add("KV cache", readable(budget.kv_bytes, "B"))
        add("choosing", "-" if trace is None else f"{statistics.median(outcome.choosing):.1f} ms")
        add("first token", f"{latency.first_token_ms:.1f} ms")
        add("per token", f"{latency.per_token_ms:.1f} ms")
    return lines


def _draw(picture: Image.Image, outcomes: dict[str, Outcome], target: Path) -> None:
    """The picture and what each rival kept of it, side by side with a caption below."""
    from PIL import Image, ImageDraw, ImageFont

    from foveate.inference.pictures import save_image
    from foveate.report.draw import draw

    side, gap, caption = picture.width * SCALE, 24, 56
    large = picture.resize((side, side), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (len(outcomes) * (side + gap) - gap, side + caption), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=30)
    for number, (name, outcome) in enumerate(outcomes.items()):
        left = number * (side + gap)
        trace = outcome.trace
        sheet.paste(large if trace is None else draw(large, trace), (left, 0))
        kept = "every token" if trace is None else f"{trace.images[0].after} of {trace.images[0].original} tokens"
        pen.text((left + side / 2, side + caption / 2 + 4), f"{name}: {kept}", fill="black", font=font, anchor="mm")
    save_image(sheet, target)
