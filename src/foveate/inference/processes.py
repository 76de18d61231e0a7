"""Processes that torchrun starts beside each other to share a work: which one this is, and what they tell."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from foveate.core import FoveateError

Value = TypeVar("Value")

_LONGEST = timedelta(days=30)
"""For which the others wait for the slowest; one that fails ends the others through torchrun."""


@dataclass(frozen=True)
class Processes:
    """The place of this process among those that share a work; one alone by default.

    Attributes:
        number: from 0; the first process writes results, and prints.
        count: of all of them.
    """

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.number == 0

    def takes(self, place: int) -> bool:
        """Whether a piece of the work is this process's own, by its place among all."""
        return place % self.count == self.number

    def told(self, make: Callable[[], Value]) -> Value:
        """What the first process makes, in every process; the others wait for it."""
        import torch.distributed

        found = [make() if self.first else None]
        if self.count > 1:
            torch.distributed.broadcast_object_list(found, src=0)
        return found[0]  # type: ignore[return-value]

    def gathered(self, own: Sequence[Value]) -> list[Value]:
        """What all processes have, process by process, in the first; in the others nothing."""
        import torch.distributed

        if self.count == 1:
            return [*own]
        found: list[list[Value]] | None = [[]] * self.count if self.first else None
        torch.distributed.gather_object([*own], found, dst=0)
        torch.distributed.barrier()  # none leaves while another reads
        return [value for each in found or () for value in each]


ALONE = Processes()


def joined() -> Processes:
    """This process among those that torchrun, or accelerate, has started with it, once all of them are there."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    import torch.distributed

    # What they tell each other is small, and none of it on a GPU. The group stays until the process ends: some would
    # still take it down while others look for them in the next.
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=_LONGEST)
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())


def check_alone(command: str) -> None:
    """Refuse several processes where a command does its work in one: each would do all of it, into the same files.

    Raises:
        FoveateError: torchrun, or accelerate, has started this process beside others.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise FoveateError(
            f"foveate {command} works in one process, and {count} were started; start it without torchrun "
            "(foveate eval shares its questions)"
        )


def own_device(device: str) -> str:
    """The GPU of this process where several share a work and none was named; else the device as it was given."""
    import torch

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device != "auto" or not several or not torch.cuda.is_available():
        return device
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
