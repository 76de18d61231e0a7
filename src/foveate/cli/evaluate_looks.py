"""What `foveate eval` does besides answering: time a few answers, and write down what is kept of a few pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from foveate.core import UsageError

if TYPE_CHECKING:
    from foveate.core import Method
    from foveate.evaluate.looks import Shown
    from foveate.inference.loading import Loaded
    from foveate.report.tables import Column


def check_few(given: Mapping[str, Any], lacking: str | None = None) -> None:
    """Refuse numbers below 0, and pictures without a file for them.

    Args:
        given: `timed` and `pictures`.
        lacking: the option that names the file, where it was not given.
    """
    for name in ("timed", "pictures"):
        if given[name] < 0:
            raise UsageError(f"--{name} {given[name]} is no number of questions; the smallest is 0")
    if given["pictures"] and lacking:
        raise UsageError(f"--pictures {given['pictures']} are put into the file of {lacking}; name one")


def timed_and_seen(
    loaded: Loaded,
    rows: Sequence[dict[str, Any]],
    rivals: Mapping[str, Sequence[Method]],
    shown: Sequence[Shown],
    given: Mapping[str, Any],
    longest: int,
) -> list[dict[str, Any]]:
    """Put times into the rows of the rivals, and return what is seen of pictures.

    Args:
        rivals: stages by spec, the unpruned model among them.
        shown: questions, as many as are timed or seen.
        given: `timed`, `pictures` and `clip`.
        longest: new tokens of an answer.
    """
    from foveate.cli.output import working
    from foveate.evaluate.looks import looks
    from foveate.evaluate.times import answer_times

    model, processor, settings = loaded.model, loaded.processor, {"max_new_tokens": longest, "clip": given["clip"]}
    if given["timed"]:
        prompts = [(one.image, one.question) for one in shown[: given["timed"]]]
        with working("timing answers"):
            times = answer_times(model, processor, prompts, rivals, **settings)
        for row in rows:
            row |= times.get(row["method"], {})
    if not given["pictures"]:
        return []
    with working("looking at pictures"):
        return looks(model, processor, shown[: given["pictures"]], rivals, **settings)


def time_columns() -> list[Column]:
    """The columns of measured times."""
    from foveate.report.tables import Column

    return [
        Column("first_token_ms", "first token ms", lambda value: f"{value:.3g}"),
        Column("whole_ms", "answer ms", lambda value: f"{value:.3g}"),
    ]
