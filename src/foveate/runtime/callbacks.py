"""What generate() calls back sees the caller's prompt: logits processors, stopping criteria, streamers.

That holds for what a caller passes in and for what generate() makes of its configuration (penalties on repetition,
stop strings, prefix functions) alike. Shapes: R rows (beams included), L ids so far, V words.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, MaxLengthCriteria, StoppingCriteria
from transformers.generation import EosTokenCriteria
from transformers.generation.streamers import BaseStreamer

from foveate.runtime.calls import Calls, Run


@dataclass(frozen=True, eq=False)
class View:
    """How one generate() looks to its caller."""

    run: Run
    calls: Calls

    @property
    def removed(self) -> int:
        """By how many tokens the prompt is shorter than the caller's."""
        return 0 if self.run.shortened is None else self.run.shortened.removed

    def begin(self) -> None:
        """The caller's code is about to run: whatever it calls is no step of generate()."""
        self.calls.await_calls()

    def ids(self, ids: Tensor) -> Tensor:
        """Ids that begin with the shortened prompt -> with the caller's, as the caller's code is about to see them."""
        self.begin()
        return self.run.as_callers(ids)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of what makes the processors, in the caller's numbers.

        Lengths in the configuration have been corrected to the shortened prompt, so that they are put back.
        """
        config = copy.copy(given["generation_config"])
        config.max_length += self.removed
        if config.min_length:
            config.min_length += self.removed
        options = dict(given.get("model_kwargs") or {})
        mask = self.run.mask
        if mask is not None:
            options["attention_mask"] = mask.repeat_interleave(self.run.repeats, dim=0)
        return {
            **given,
            "generation_config": config,
            "input_ids_seq_length": given["input_ids_seq_length"] + self.removed,
            "model_kwargs": options,
        }


class Processor(LogitsProcessor):
    """A logits processor that is shown the caller's ids."""

    def __init__(self, processor: Any, view: View) -> None:
        # A list of one, because it knows which processors want more than ids and scores.
        self._one, self._view = LogitsProcessorList([processor]), view

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(R, L) ids and (R, V) scores -> (R, V)."""
        return self._one(self._view.ids(input_ids), scores)


class Criterion(StoppingCriteria):
    """A stopping criterion that is shown the caller's ids."""

    def __init__(self, criterion: Any, view: View) -> None:
        self._criterion, self._view = criterion, view

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Any:
        """(R, L) ids -> (R,) which rows are done."""
        return self._criterion(self._view.ids(input_ids), scores, **more)

    def __getattr__(self, name: str) -> Any:
        # generate() asks criteria for the token that ends an answer.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._criterion, name)


class Streamer(BaseStreamer):
    """Hands a streamer the caller's own prompt in place of the shortened one."""

    def __init__(self, streamer: Any, view: View) -> None:
        self._streamer, self._view, self._first = streamer, view, True

    def put(self, value: Tensor) -> None:
        """The first value is the prompt, later ones are new tokens."""
        first, self._first = self._first, False
        self._view.begin()
        self._streamer.put(self._view.ids(value) if first else value)

    def end(self) -> None:
        """The answer is complete."""
        self._view.begin()
        self._streamer.end()


def shown_criteria(criteria: Any, mine: Sequence[Any], view: View) -> Any:
    """The stopping criteria that generate() has made, shown the caller's ids.

    A longest length is counted, and asked for, in the shortened prompt.

    Args:
        mine: which of them the caller has passed in.
    """
    shown = []
    for one in criteria:
        if type(one) is MaxLengthCriteria:
            by_caller = any(one is other for other in mine)
            shown.append(MaxLengthCriteria(one.max_length - view.removed) if by_caller else one)
        elif type(one) is EosTokenCriteria:  # reads the last token alone
            shown.append(one)
        else:
            shown.append(Criterion(one, view))
    return type(criteria)(shown)


def shown_processors(processors: Any, view: View) -> Any:
    """The logits processors that generate() has made, shown the caller's ids."""
    return type(processors)(Processor(one, view) for one in processors)
