"""The page itself: what stands where, and what happens when something is chosen, clicked or asked."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio
from gradio.utils import get_upload_folder as upload_folder

from foveate.core import FoveateError
from foveate.inference.loading import Loaded
from foveate.inference.pictures import check_image, load_image
from foveate.page import choices, figures, measurements
from foveate.page.asking import Asked, ask
from foveate.page.seen import WHOLE, Seen, seen

SERVERS = "as the server says"
TITLE = "Foveate: the same answers from fewer visual tokens"
CSS = ".gradio-container {max-width: 1200px !important; margin: auto}"


def guarded(component: Any) -> Any:
    """A component whose files are those that came through this page: no other of the server, and none from elsewhere.

    Gradio checks that only for applications that it starts itself. The file arrives as its path, unread: who opens it
    checks its size and kind first. Events may give such a component a value and no properties: for those Gradio would
    make it anew, and this would be lost.
    """
    move = component.async_move_resource_to_block_cache
    folders = [Path(folder).resolve() for folder in (component.GRADIO_CACHE, upload_folder())]

    async def moved(given: str | Path | None) -> str | None:
        if given is not None and not _lies_in(given, folders):
            raise gradio.Error("this is no file that came through the page; drop one", print_exception=False)
        found: str | None = await move(given)
        return found

    component.async_move_resource_to_block_cache = moved
    component.preprocess = lambda payload: None if payload is None else payload.path
    return component


def _lies_in(given: str | Path, folders: list[Path]) -> bool:
    path = Path(given).resolve()
    return any(path.is_relative_to(folder) for folder in folders)


@dataclass(frozen=True)
class Page:
    """A page for one server.

    Attributes:
        app: the server's gate.
        spec: what it prunes by where a request does not say; "none" for nothing.
        key: that it asks for.
    """

    app: Any
    loaded: Loaded
    spec: str = "none"
    key: str | None = None
    clip: str | None = None

    def blocks(self) -> gradio.Blocks:
        """The page, not yet mounted."""
        with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as made:
            gradio.Markdown(f"# {TITLE}\nModel: `{self.loaded.name}`")
            with gradio.Tab("Ask", id="ask"):
                self._ask()
            with gradio.Tab("Accuracy", id="accuracy"):
                _accuracy()
        return made

    def _ask(self) -> None:
        names = [*([SERVERS] if self.spec != "none" else []), *choices.budgeted(self.loaded, self.clip)]
        state = gradio.State(None, time_to_live=3600)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                picture = guarded(
                    gradio.Image(
                        self._first(),
                        label="Picture: drop one, paste it, or use the camera",
                        sources=["upload", "webcam", "clipboard"],
                        height=320,
                        format="png",
                        elem_id="picture",
                        buttons=[],
                    )
                )
                question = gradio.Textbox(
                    "how many objects ?" if self.loaded.name == "mini" else "What is in this picture?",
                    label="Question",
                    elem_id="question",
                )
                usual = "fopru" if "fopru" in names else names[0]
                method = gradio.Dropdown(names, value=usual, label="Method", elem_id="method")
                share = gradio.Slider(5, 100, 25, step=5, label="Tokens kept, %", elem_id="share")
                device = gradio.Dropdown(
                    choices.devices(), value=choices.device_of(self.loaded.model), label="Predict for", elem_id="device"
                )
                with gradio.Row():
                    button = gradio.Button("Ask", variant="primary", elem_id="go")
                    stop = gradio.Button("Stop", elem_id="stop")
                    if self.loaded.name == "mini":
                        another = gradio.Button("Another picture", elem_id="another")
                        another.click(self._another, outputs=picture, api_visibility="private")
            with gradio.Column(scale=3, min_width=300):
                with gradio.Row():
                    whole = gradio.Textbox(label="Unpruned", lines=3, interactive=False, elem_id="unpruned")
                    pruned = gradio.Textbox(label="Pruned", lines=3, interactive=False, elem_id="pruned")
                told = gradio.Markdown(elem_id="measured")
                foretold = gradio.Markdown(elem_id="predicted")
                look = _Look(state)
        checked = picture.upload(_check, picture, api_visibility="private")
        checked.failure(lambda: None, None, picture, api_visibility="private")
        given = [picture, question, method, share, device]
        runs = [
            event(self.answer, given, [whole, pruned, told, foretold, state, look.stage], api_visibility="private")
            for event in (button.click, question.submit)
        ]
        for run in runs:
            run.success(look.show, look.given, look.shown, api_visibility="private")
        stop.click(None, cancels=runs)
        for event in (method.change, share.change, device.change):
            event(self.predict, [state, method, share, device], foretold, api_visibility="private")

    async def answer(
        self, path: str | None, question: str, method: str, share: float, device: str
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Ask unpruned, then pruned; both answers as they grow, then what was measured and can be looked at."""
        same = gradio.skip()
        with told():
            spec = self.spec if method == SERVERS else choices.spec_at(method, share)
            if path is None:
                raise FoveateError("there is no picture yet: drop one, or take one with the camera")
            if not question.strip():
                raise FoveateError("there is no question yet: ask at least one word")
            shown, data = await asyncio.to_thread(_read, path)
            yield "", "", "", "", None, gradio.Radio([WHOLE], value=WHOLE)
            sides = []
            for place, wanted in enumerate(("none", None if method == SERVERS else spec)):
                async with aclosing(ask(self.app, data, question, wanted, self.key)) as parts:
                    async for side in parts:
                        yield (side.text if place == 0 else same, side.text if place else same, *(same,) * 4)
                sides.append(side)
            found = self._seen(shown, sides[1], spec)
            names = found.names()
            measured = figures.measured((sides[0], sides[1]), found)
            prediction = figures.predicted(self.loaded.model, found, spec, device)
            yield same, same, measured, prediction, found, gradio.Radio(names, value=names[-1])

    def _seen(self, picture: Any, asked: Asked, spec: str) -> Seen:
        job = asked.job
        if job is None or job.call is None:
            raise FoveateError(f"{spec} left the picture whole, so there is nothing to look at")
        return seen(picture, job.call, job.prompt - job.before, spec, self.loaded.processor)

    def predict(self, found: Seen | None, method: str, share: float, device: str) -> str:
        """What the method at this budget would save on a device, for the prompt that was asked last."""
        if found is None:
            return ""
        with told():
            spec = self.spec if method == SERVERS else choices.spec_at(method, share)
            return figures.predicted(self.loaded.model, found, spec, device)

    def _first(self) -> Any:
        """A picture that `mini` knows the objects of; None for other models."""
        if self.loaded.name != "mini":
            return None
        from foveate.scenes import generator

        return generator.demo().image(0)

    @staticmethod
    def _another() -> Any:
        """A further one."""
        from foveate.scenes import generator

        return generator.generate(1, seed=random.randrange(2**20), split="test").image(0)


class _Look:
    """What is looked at after an answer: a stage's picture, and a patch of it."""

    def __init__(self, state: gradio.State) -> None:
        self.stage = gradio.Radio([WHOLE], value=WHOLE, label="Look at", elem_id="stage")
        picture = gradio.Image(
            label="Dropped patches are grey; click one",
            interactive=False,
            height=420,
            format="png",
            elem_id="look",
            buttons=["fullscreen"],
        )
        with gradio.Row():
            row = gradio.Number(0, label="Patch: row, from 1", precision=0, minimum=0, elem_id="row")
            column = gradio.Number(0, label="Patch: column, from 1", precision=0, minimum=0, elem_id="column")
        fate = gradio.Markdown(elem_id="fate")
        self.given, self.shown = [state, self.stage, row, column], [picture, fate]
        for event in (self.stage.input, row.submit, row.blur, column.submit, column.blur):
            event(self.show, self.given, self.shown, api_visibility="private")
        picture.select(self.pick, state, [row, column], api_visibility="private").success(
            self.show, self.given, self.shown, api_visibility="private"
        )

    @staticmethod
    def show(found: Seen | None, name: str, row: int, column: int) -> tuple[Any, str]:
        """A stage's picture, and what became of the patch that row and column name."""
        if found is None:
            return None, ""
        with told():
            patch = (row, column) if row and column else None
            picture = found.drawn(name if name in found.names() else WHOLE, patch)
            if patch is None:
                return picture, ""
            lines = [f"**Patch {patch[0]}, {patch[1]}**", *(f"- {line}" for line in found.fate(*patch))]
            return picture, "\n".join(lines)

    @staticmethod
    def pick(found: Seen | None, event: gradio.SelectData) -> tuple[int, int]:
        """Row and column of the patch that was clicked."""
        if found is None:
            return 0, 0
        with told():
            return found.patch_at(*event.index)


def _accuracy() -> None:
    """A file of `foveate eval --json`, drawn."""
    state = gradio.State([], time_to_live=3600)
    file = guarded(gradio.File(label="A file of foveate eval --json", file_types=[".json"], elem_id="report"))
    wanted = gradio.Dropdown([], multiselect=True, label="Methods", elem_id="methods")
    plot = gradio.LinePlot(
        x="tokens",
        y="accuracy",
        color="method",
        x_title="visual tokens, mean over the decoder's layers",
        y_title="accuracy",
        height=420,
        tooltip="all",
        elem_id="plot",
    )
    figures_shown = gradio.Markdown(elem_id="rows")

    def read(path: str | None) -> tuple[Any, Any]:
        if path is None:
            return [], gradio.Dropdown([], value=[])
        with told():
            found = measurements.points(path)
        names = list(dict.fromkeys(one.method for one in found))
        return found, gradio.Dropdown(names, value=measurements.first_shown(found))

    def draw(found: list[measurements.Point], shown: list[str]) -> tuple[Any, str]:
        import pandas

        columns = ("method", "spec", "tokens", "accuracy")
        rows = [[getattr(one, name) for name in columns] for one in found if one.method in shown]
        return pandas.DataFrame(rows, columns=list(columns)), measurements.table(found, shown)

    file.change(read, file, [state, wanted], api_visibility="private")
    wanted.change(draw, [state, wanted], [plot, figures_shown], api_visibility="private")


def _read(path: str) -> tuple[Any, bytes]:
    """A picture, and the bytes of its file."""
    return load_image(path), Path(path).read_bytes()


def _check(path: str | None) -> None:
    """Refuse a file that is no picture as soon as it has come; who calls this takes it off the page then."""
    if path is not None:
        try:
            check_image(path)
        except FoveateError as error:
            raise gradio.Error(
                _of_file(error, path), duration=None, title="Not a picture", print_exception=False
            ) from error


def _of_file(error: FoveateError, path: str) -> str:
    """The sentence of an error with a file's name where the server's path of it stands."""
    return str(error).replace(path, Path(path).name)


@contextmanager
def told() -> Any:
    """In here, errors of the library reach the reader in their own words."""
    try:
        yield
    except FoveateError as error:
        raise gradio.Error(str(error), duration=None, print_exception=False) from error
