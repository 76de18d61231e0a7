"""Carries small tensors between the host, where prompts are planned, and the device that has the tokens.

What the host reads waits until the device has done all that it was given; what the host writes does not wait. So what
is only to be refused is counted on the device, and read together with what has to be read anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias, TypeVar, overload

import torch
from torch import Tensor

from foveate.core import FoveateError

T = TypeVar("T")
Steps: TypeAlias = Generator[Sequence[Tensor], Sequence[Tensor], T]
"""What yields tensors, is sent the same on the host, and comes to a T; `taken` takes them."""


class Complaints:
    """What has been found wrong so far, counted on the device by the words for it."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    def add(self, count: Tensor, words: str) -> None:
        """Note so many faults; `words` has {} where their number is to stand."""
        self._counts[words] = self._counts[words] + count if words in self._counts else count

    def counts(self) -> list[Tensor]:
        """The numbers to be read, and handed to `refuse`."""
        return list(self._counts.values())

    def refuse(self, counts: Sequence[Tensor]) -> None:
        """Forget what was noted, and raise the first of it.

        Args:
            counts: on the host.

        Raises:
            FoveateError: something was wrong.
        """
        words, self._counts = list(self._counts), {}
        for text, count in zip(words, counts, strict=True):
            if count.item():
                raise FoveateError(text.replace("{}", str(count.item())))


_OPEN: ContextVar[Complaints | None] = ContextVar("complaints", default=None)


@contextmanager
def noting(complaints: Complaints) -> Iterator[None]:
    """In here, what `refuse_any` would raise is noted, for whoever reads it later.

    Raises:
        FoveateError: something was noted that made what comes after it fail.
    """
    token = _OPEN.set(complaints)
    try:
        yield
    except Exception:
        complaints.refuse(on_host(complaints.counts()))
        raise
    finally:
        _OPEN.reset(token)


def refuse_any(count: Tensor, words: str) -> None:
    """Refuse faults that were counted on the device: at once, or where they are read together with others.

    Args:
        count: (), how many there are.
        words: the error, with {} where their number is to stand.

    Raises:
        FoveateError: there are some.
    """
    complaints = _OPEN.get() or Complaints()
    complaints.add(count, words)
    if _OPEN.get() is None:
        complaints.refuse(on_host(complaints.counts()))


class Unread(Sequence[Tensor]):
    """Rows of which only the device knows how long they are: read together with others, or once somebody looks at one.

    Args:
        index: (B, N).
        stays: (B, N) bool, which of them are in the rows; there or on the host.
        beside: what else is to be read, and handed to `look`, which may refuse it.
    """

    def __init__(
        self,
        index: Tensor,
        stays: Tensor,
        beside: Sequence[Tensor] = (),
        look: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> None:
        self._index, self._stays, self._beside, self._look = index, stays, beside, look
        self._read: list[Tensor] | None = None

    def unread(self) -> list[Tensor]:
        """What the host has to know, to be handed to `rows`."""
        there = [self._stays] if self._stays.device == self._index.device else []
        return [self._index, *self._beside, *there]

    def rows(self, read: Sequence[Tensor]) -> list[Tensor]:
        """B rows (K_b,) on the host, with what was read.

        Raises:
            FoveateError: `look` does.
        """
        if self._look is not None:
            self._look(read[1 : 1 + len(self._beside)])
        stays = read[-1] if len(read) > 1 + len(self._beside) else self._stays
        self._read = [row[mine] for row, mine in zip(read[0], stays, strict=True)]
        return self._read

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> list[Tensor]: ...
    def __getitem__(self, place: int | slice) -> Tensor | list[Tensor]:
        return (self.rows(on_host(self.unread())) if self._read is None else self._read)[place]


def of_cpu(values: Tensor) -> Tensor:
    """A tensor of a CPU as one of the host, which nobody waits for."""
    return values.detach().cpu()


def read_together(lists: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """`on_host` of several lists; all with one wait for the device."""
    read = iter(on_host([value for values in lists for value in values]))
    return [[next(read) for _ in values] for values in lists]


def taken(steps: Sequence[Steps[T]]) -> list[T]:
    """What each of these comes to; a round of all their questions waits once for the device."""
    found: dict[int, T] = {}
    sent: dict[int, Sequence[Tensor] | None] = dict.fromkeys(range(len(steps)))
    while sent:
        asked: dict[int, Sequence[Tensor]] = {}
        for number, values in sent.items():
            try:
                asked[number] = next(steps[number]) if values is None else steps[number].send(values)
            except StopIteration as end:
                found[number] = end.value
        sent = dict(zip(asked, read_together(list(asked.values())), strict=True))
    return [found[number] for number in range(len(steps))]


def on_host(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the host, as they are; all with one wait for the device."""
    if len(values) < 2:
        return [value.detach().cpu() for value in values]
    device = next((value.device for value in values if value.device.type != "cpu"), values[0].device)
    flat = torch.cat([_whole(value.detach()).flatten().to(device, torch.int64) for value in values]).cpu()
    parts = flat.split([value.numel() for value in values])
    return [_as(part.view(value.shape), value.dtype) for part, value in zip(parts, values, strict=True)]


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _whole(values: Tensor) -> Tensor:
    """Whole numbers that have the same bits; what are none yet."""
    return values.contiguous().view(_BITS[values.element_size()]) if values.is_floating_point() else values


def _as(whole: Tensor, dtype: torch.dtype) -> Tensor:
    """What `_whole` was given."""
    return whole.to(_BITS[dtype.itemsize]).view(dtype) if dtype.is_floating_point else whole.to(dtype)


def beside(values: Tensor, other: Tensor) -> Tensor:
    """A host tensor where another one is, on the host or on a device."""
    return on_device(values, other.device)


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, which takes it up in its turn."""
    # The copy is made from a buffer of the driver's own, so that `values` may change as soon as this returns.
    return values.to(device, non_blocking=device.type == "cuda")
