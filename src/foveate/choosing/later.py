"""Answers of a method that merges in one block after the other: what they say is read once, behind the last of them.

Until then the numbers of tokens and patches stay where the hidden states are; what was answered wrongly does no harm
there, and is refused when it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from foveate.core import Selection
from foveate.ops.device import Complaints


class Later:
    """What has been answered so far."""

    def __init__(self) -> None:
        self.complaints = Complaints()
        self._answers: list[tuple[Selection, list[Tensor], int, str]] = []

    def add(self, selection: Selection, original: int, name: str) -> Selection:
        """Note an answer for images of `original` tokens; the same with numbers that can be used before it is read."""
        features = selection.features and [rows.new_empty(0) for rows in selection.features]  # those of a block go
        numbers = dataclasses.replace(selection, features=features, scores=None)
        self._answers.append((numbers, selection.unread(), original, name))
        indices = [kept.clamp(0, original - 1) for kept in selection.indices]
        groups = selection.groups and [
            group.clamp(-1, kept.numel() - 1) for group, kept in zip(selection.groups, indices, strict=True)
        ]
        return dataclasses.replace(selection, indices=indices, groups=groups)

    def unread(self) -> list[list[Tensor]]:
        """What the host has to know, to be handed to `refuse`."""
        return [self.complaints.counts(), *(values for _, values, _, _ in self._answers)]

    def refuse(self, read: Sequence[Sequence[Tensor]]) -> None:
        """Forget what was noted, and raise the first of what was wrong in it.

        Raises:
            FoveateError: as `Selection.check` does.
        """
        answers, self._answers = self._answers, []
        for (selection, _, original, name), values in zip(answers, read[1:], strict=True):
            selection.checked(values, original, name)
        self.complaints.refuse(read[0])
