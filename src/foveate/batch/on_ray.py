"""The same answers from many machines: actors of Ray Data that hold the model, each asked one window of rows."""

from __future__ import annotations

import json
import socket
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from foveate.batch.rows import Id, Row, Window, rows_of, windows
from foveate.batch.work import WINDOW, Answer, answers
from foveate.core import FoveateError, short
from foveate.inference.loading import load
from foveate.spec import parse_stages

LOCAL = "local"


@dataclass(frozen=True)
class Work:
    """What every actor must know.

    Attributes:
        source: the file of rows, at the same path on every machine, as the pictures that it names are.
        model, place: what to load, and arguments of `load`.
        spec: what pictures are pruned by; "none" for nothing.
        batch, max_new_tokens, clip: as `foveate.batch.work.answers` takes them.
    """

    source: Path
    model: str
    spec: str
    place: dict[str, Any]
    batch: int
    max_new_tokens: int
    clip: str | None = None


class Answering:
    """An actor: a model that is asked windows of rows."""

    def __init__(self, work: Work) -> None:
        self.work, self.loaded = work, load(work.model, **work.place)
        self.stages = () if work.spec == "none" else parse_stages(work.spec)

    def __call__(self, given: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        """The answers to each window, a batch at a time, as lines of JSON."""
        work = self.work
        options: dict[str, Any] = {"batch": work.batch, "max_new_tokens": work.max_new_tokens, "clip": work.clip}
        for text in given["window"]:
            for made in answers(
                self.loaded, rows_in(work.source, text), self.stages, folder=work.source.parent, **options
            ):
                yield {"answers": [json.dumps(made)]}


def answers_on_ray(
    work: Work, done: Container[Id], *, address: str, workers: int | None = None
) -> Iterator[list[Answer]]:
    """The answers to rows that are not done, in an order of their own; what a killed actor had is asked again.

    An answer may then come twice, equal both times: whoever writes takes the first.

    Args:
        address: of a Ray cluster, "auto" for the one around here, or "local" to start one on this machine.
        workers: actors; None for one for each GPU of the cluster, or one where there is none.

    Raises:
        FoveateError: there is no such cluster, or an actor fails by an error of its own.
    """
    with connected(address) as ray:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        wanted = workers if workers is not None else max(1, gpus)
        asked = windows_on(ray, work.source, done, work.batch * WINDOW).map_batches(
            Answering,
            fn_constructor_args=(work,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=wanted),
            num_gpus=1 if gpus and work.place["device"] != "cpu" else 0,
            num_cpus=1,
        )
        for row in asked.iter_rows():
            yield json.loads(row["answers"])


def windows_on(ray: Any, source: Path, done: Container[Id], size: int) -> Any:
    """A data set of the windows of rows that are not done, each a block with the column `window`; see `rows_in`.

    Args:
        size: rows of a window.
    """
    made = [json.dumps([one.offset, one.numbers]) for one in windows(source, done, size)]
    return ray.data.from_items([{"window": one} for one in made], override_num_blocks=len(made))


def rows_in(source: Path, window: str) -> Iterator[Row]:
    """The rows of a window, as `windows_on` writes it."""
    offset, numbers = json.loads(window)
    return rows_of(source, Window(offset, tuple(numbers)))


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, joined to a cluster while this is open.

    Raises:
        FoveateError: there is no such cluster, or Ray fails.
    """
    check_installed()
    import ray

    _connect(ray, address)
    try:
        yield ray
    except ray.exceptions.RayError as error:
        raise FoveateError(f"Ray failed: {short(str(error), 400)}") from error
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Join the cluster, or start one; its dashboard and its workers' output stay out of the way."""
    try:
        host, _, port = address.rpartition(":")
        if host and "/" not in address and port.isdigit():
            # Ray itself goes on asking for minutes.
            socket.create_connection((host, int(port)), timeout=10).close()
        more = {"include_dashboard": False} if address == LOCAL else {}
        ray.init(address, log_to_driver=False, logging_level="error", **more)
    except (OSError, ValueError, RuntimeError) as error:
        raise FoveateError(
            f"there is no Ray cluster at {address}: {short(str(error), 200)}; --ray local starts one here"
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False


def check_installed() -> None:
    """Refuse to begin without Ray.

    Raises:
        FoveateError: it is not installed.
    """
    if find_spec("ray") is None:
        raise FoveateError("--ray needs Ray; install foveate[scale]")
