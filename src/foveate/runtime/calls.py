"""The calls of one model under a handle: which is in progress, on which thread, and what is noted of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveate.core import FoveateError, Trace
from foveate.runtime.cache import miscounted
from foveate.runtime.evict import Evictor
from foveate.runtime.layers import Descent, Stage
from foveate.runtime.prefill import Shortened
from foveate.runtime.probe import DecoderProbe, Probe
from foveate.runtime.seams import unfit
from foveate.runtime.tower import TowerStages
from foveate.spec import format as format_spec


@dataclass(eq=False)
class Run:
    """One generate() in progress."""

    contains_past: bool  # the caller's ids repeat what the cache already holds
    given: dict[str, Any]
    prompt: Tensor | None = None  # (B, S) as the caller gave it
    shortened: Shortened | None = None


class Calls:
    """What is going on in one model while its handle is at work.

    Attributes:
        run: the generate() in progress.
        direct: what became of the prompt of a direct call in progress.
        descent: the prefill in progress, on its way down the decoder, where stages act there.
        evictor: of a method on the cache.
    """

    def __init__(
        self,
        model: Any,
        trace: Trace,
        stages: Sequence[Stage],
        layers: Sequence[nn.Module],
        probe: Probe,
        tower: TowerStages,
        decoder_probe: DecoderProbe,
        evictor: Evictor | None,
    ) -> None:
        self.model, self.trace, self.stages, self.layers = model, trace, stages, layers
        self.probe, self.tower, self.decoder_probe, self.evictor = probe, tower, decoder_probe, evictor
        self.run: Run | None = None
        self.direct: Shortened | None = None
        self.descent: Descent | None = None
        self._lock = threading.Lock()
        self._thread: int | None = None  # at work on the model

    @property
    def shortened(self) -> Shortened | None:
        """What became of the prompt of the call in progress."""
        return self.direct if self.run is None else self.run.shortened

    @property
    def mine(self) -> bool:
        """Whether this thread is the one at work on the model."""
        return self._thread == threading.get_ident()

    def claim(self) -> None:
        """Take the model for this thread until its call is over."""
        with self._lock:
            if self._thread not in (None, threading.get_ident()):
                raise FoveateError(
                    "another thread is using this pruned model; one call at a time, or one model per thread"
                )
            self._thread = threading.get_ident()

    def free(self) -> None:
        """The model is any thread's again."""
        self._thread = None

    def begin(self, shortened: Shortened) -> None:
        """A shortened prompt is about to enter the decoder: note it, and get ready for the stages inside."""
        if shortened.record is None:
            return
        if self.stages and shortened.timeline.held:
            raise FoveateError(
                f"{format_spec(self.stages[0].part)} cannot follow a new image into a cache that "
                f"{format_spec(self.evictor.part) if self.evictor else 'another method'} has evicted from; start "
                "with a new cache"
            )
        self.trace.add(shortened.record())
        if self.stages:
            self.descent = Descent(
                stages=list(self.stages),
                images=shortened.images,
                prompt=shortened.prompt,
                plan=shortened.plan,
                timeline=shortened.timeline,
                probe=self.decoder_probe,
                layers=self.layers,
                norm=self.model.get_decoder().norm,
                entries=shortened.entries,
                repeats=shortened.repeats,
                earlier=shortened.earlier,
                stopwatches=shortened.stopwatches,
            )

    def settle(self, done: bool) -> None:
        """A call has run: what its stages inside the decoder did is known, and the trace says it.

        Args:
            done: it has not ended in an error.

        Raises:
            FoveateError: the cache holds other entries than were planned, whatever transformers did.
        """
        shortened = self.shortened
        if shortened is None or shortened.record is None or shortened.settled:
            return
        shortened.settled = True
        problem = None
        if done and shortened.cache is not None:
            problem = miscounted(shortened.cache, shortened.entries + shortened.fed)
        if not done or problem is not None:
            self.trace.history.pop()
        elif self.stages or self.evictor is not None:
            self.trace.history[-1] = shortened.record()
        if problem is not None:
            raise unfit(problem)

    def finish(self) -> None:
        """A prefill is over, well or not: nothing of it stays."""
        self.probe.take()
        self.tower.forget()
        if self.descent is not None:
            self.decoder_probe.close()
        self.descent = None
        if self.evictor is not None:
            self.evictor.forget()

    def forget(self) -> None:
        """The handle stops."""
        self.run = self.direct = self.descent = self._thread = None
