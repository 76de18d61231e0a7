"""Carries small tensors between the host, where prompts are planned, and the device that has the tokens.

What the host reads waits until the device has done all that it was given; what the host writes does not wait. So what
is only to be refused is counted on the device, and read together with what has to be read anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from foveate.core import FoveateError


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


def on_host(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of integers or bools on the host, as they are; all with one wait for the device."""
    if len(values) < 2:
        return [value.detach().cpu() for value in values]
    device = next((value.device for value in values if value.device.type != "cpu"), values[0].device)
    flat = torch.cat([value.detach().flatten().to(device, torch.int64) for value in values]).cpu()
    parts = flat.split([value.numel() for value in values])
    return [part.view(value.shape).to(value.dtype) for part, value in zip(parts, values, strict=True)]


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, which takes it up in its turn."""
    # The copy is made from a buffer of the driver's own, so that `values` may change as soon as this returns.
    return values.to(device, non_blocking=device.type == "cuda")
