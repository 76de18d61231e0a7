"""Rivals that nobody named and that turn out, while they answer, not to fit a picture: left out, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from foveate.core import FoveateError
from foveate.inference.processes import Processes

LeaveOut: TypeAlias = Callable[[str, str], bool]
"""Told a spec that was refused while it answered, and why; whether the others go on without it."""

Value = TypeVar("Value")


@dataclass
class LeftOut:
    """Who is left out so far.

    Attributes:
        leave_out: decides; without it every refusal is an error.
        why: the reasons, by spec.
    """

    leave_out: LeaveOut | None = None
    why: dict[str, str] = field(default_factory=dict)

    def tried(self, spec: str, run: Callable[[], Value]) -> list[Value]:
        """What a rival gives, alone in a list; nothing of one that is left out.

        Raises:
            FoveateError: it is refused, and the others do not go on without it.
        """
        if spec in self.why:
            return []
        try:
            return [run()]
        except FoveateError as error:
            if self.leave_out is None or not self.leave_out(spec, str(error)):
                raise
            self.why[spec] = str(error)
            return []

    def share(self, among: Processes) -> None:
        """Take over, in the first process, whom the others have left out."""
        for spec, why in among.gathered([*self.why.items()]):
            if spec not in self.why and self.leave_out is not None:
                self.leave_out(spec, why)
                self.why[spec] = why
