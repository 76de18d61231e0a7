"""The calls of one model under a handle: which are in progress, on which thread, and what is noted of each."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core import FoveateError
from foveate.ops.device import Complaints
from foveate.runtime.decoder.cache import miscounted
from foveate.runtime.decoder.evict import Evictor
from foveate.runtime.decoder.layers import Descent, Stage
from foveate.runtime.decoder.probe import DecoderProbe
from foveate.runtime.encoder.probe import Probe
from foveate.runtime.encoder.tower import TowerStages
from foveate.runtime.incoming import Told
from foveate.runtime.seams import unfit
from foveate.runtime.shortened import Shortened
from foveate.runtime.uncopied import Uncopied
from foveate.spec import format as format_spec
from foveate.trace import Call, Trace


@dataclass(eq=False)
class Run:
    """One generate() in progress."""

    contains_past: bool  # the caller's ids repeat what the cache already holds
    given: dict[str, Any]
    told: Told = field(default_factory=Told)
    prompt: Tensor | None = None  # (B, S) as the caller gave it
    mask: Tensor | None = None  # (B, S) of that prompt, as generate() prepared it
    repeats: int = 1  # beams or samples of each row
    shortened: Shortened | None = None
    answering: bool = False  # the prompt, or its first piece, has run

    def as_callers(self, ids: Tensor) -> Tensor:
        """(R, L) ids in which generate() has the shortened prompt, with the caller's own in its place."""
        if self.shortened is None or self.prompt is None:
            return ids
        prompt = self.prompt.to(ids.device)
        prompt = prompt.repeat_interleave(ids.shape[0] // prompt.shape[0], dim=0)
        return torch.cat([prompt, ids[:, self.shortened.ids.shape[1] :]], dim=1)


@dataclass(eq=False)
class _Work:
    """One generate() or one direct call in progress, and what it found in progress around it."""

    frame: FrameType | None  # in which it runs; None once it is over
    outer: tuple[Run | None, Shortened | None, Descent | None, Call | None, set[int]]
    aside: list[tuple[Any, dict[str, Any]]]  # what the observers held of the call around it


class Calls(Uncopied):
    """What is going on in one model while its handle is at work.

    A call may come from inside another: of a logits processor, say. What is noted of the outer one is set aside
    meanwhile. One thread at a time has the model.

    Attributes:
        active: the handle is at work.
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
        probe: Probe,
        tower: TowerStages,
        decoder_probe: DecoderProbe,
        evictor: Evictor | None,
    ) -> None:
        self.model, self.trace, self.stages = model, trace, stages
        self.probe, self.tower, self.decoder_probe, self.evictor = probe, tower, decoder_probe, evictor
        self.active = False
        self.run: Run | None = None
        self.direct: Shortened | None = None
        self.descent: Descent | None = None
        self._noted: Call | None = None  # the trace's record of the call in progress
        self._awaited: set[int] = set()  # modules whose next call is a part of what is in progress, by id
        self._works: list[_Work] = []  # the innermost last
        self._thread: int | None = None  # at work on the model
        self._freed = threading.Condition()

    @property
    def shortened(self) -> Shortened | None:
        """What became of the prompt of the call in progress."""
        return self.direct if self.run is None else self.run.shortened

    @property
    def mine(self) -> bool:
        """Whether this thread is the one at work on the model."""
        return self._thread == threading.get_ident()

    # -- one inside another ---------------------------------------------------------------------------------------

    def enter(self, frame: FrameType, run: Run | None = None) -> _Work:
        """A call begins: the model is this thread's, and what it was about is set aside.

        Args:
            frame: in which the call runs, for as long as it does.
            run: of a generate().

        Raises:
            FoveateError: another thread has the model.
        """
        with self._freed:
            if not self.active:
                raise FoveateError("this handle has been stopped while the call began; call again")
            self._bury()
            if self._works and not self.mine:
                raise FoveateError(
                    "another thread is using this pruned model; one call at a time, or one model per thread"
                )
            if not self._works and self.evictor is not None:
                self.evictor.complaints = Complaints()
            aside = [(one, dict(vars(one))) for one in self._observers()] if self._works else []
            outer = (self.run, self.direct, self.descent, self._noted, self._awaited)
            work = _Work(frame, outer, aside)
            self._works.append(work)
            self._thread = threading.get_ident()
        self.run, self.direct, self.descent, self._noted, self._awaited = run, None, None, None, set()
        self.finish()  # pictures may have been encoded by hand
        return work

    def leave(self, work: _Work) -> None:
        """A generate() has ended, well or not, and with it all that it did not live to see the end of."""
        with self._freed:
            while work in self._works:
                self._leave(done=False)  # a prefill that has run is settled by now

    def returned(self, frame: FrameType, failed: bool) -> bool:
        """A module has returned to this frame, or raised: whether a direct call has ended with it."""
        with self._freed:
            works = len(self._works)
            if works and self._works[-1].frame is frame:
                self._leave(done=not failed)
            elif failed:
                self._bury()
            return len(self._works) < works

    def end_step(self, done: bool) -> None:
        """A call of generate()'s own is over; `done`: it has not ended in an error."""
        self._awaited = set()
        if self.run is not None:
            self.run.answering = done
        try:
            self.settle(done)
        finally:
            self.finish()

    def check(self) -> None:
        """Refuse what a method on the cache has done wrong since it was last asked, which waits for the device.

        Raises:
            FoveateError: it keeps what is not there, or its scores are no numbers.
        """
        if self.evictor is not None:
            self.evictor.check()

    def _leave(self, done: bool) -> None:
        try:
            self.settle(done)
            if done:
                self.check()
        finally:
            self._go_back()

    def _go_back(self) -> None:
        """What was noted of the call around this one holds again."""
        self.finish()
        noted, work = self._noted, self._works.pop()
        work.frame = None  # which may hold this, and tensors
        for one, held in work.aside:
            vars(one).update(held)
        self.run, self.direct, self.descent, self._noted, self._awaited = work.outer
        history = self.trace.history
        if noted is not None and history and history[-1] is not noted:  # the outer call ends after those inside it
            history[:] = [*(call for call in history if call is not noted), noted]
        if not self._works:
            self._thread = None
            self._freed.notify_all()

    def _bury(self) -> None:
        """Calls that were interrupted end without a word: an interrupt runs no hook."""
        while self._works and self._works[-1].frame not in self._frames():
            self._leave(done=False)

    def _frames(self) -> list[FrameType]:
        """What the thread at work on the model is in the middle of."""
        frame = sys._current_frames().get(self._thread or 0)
        found = []
        while frame is not None:
            found.append(frame)
            frame = frame.f_back
        return found

    def _observers(self) -> list[Any]:
        """Whatever holds something of the call in progress."""
        return [
            *self.probe.observers,
            *self.tower.observers,
            *self.decoder_probe.observers,
            *([] if self.evictor is None else [self.evictor]),
        ]

    def await_calls(self, *modules: nn.Module) -> None:
        """From now on, the next call of each of these, and no other, is a part of what is in progress."""
        self._awaited = {id(module) for module in modules}

    def is_awaited(self, module: nn.Module) -> bool:
        """Whether this call of a module is a part of what is in progress, and not one that somebody makes."""
        if not self.mine or id(module) not in self._awaited:
            return False
        self._awaited = self._awaited - {id(module)}
        return True

    def answering(self, module: nn.Module | None) -> bool:
        """Whether a call is that of a token of the answer of the generate() in progress.

        Args:
            module: it is called, and might also be by somebody else; None for one inside the decoder.
        """
        run = self.run
        return self.mine and run is not None and run.answering and (module is None or id(module) in self._awaited)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this is open no call is in progress and none begins; it waits for those of other threads.

        Raises:
            FoveateError: one is in progress, and it is this thread's.
        """
        with self._freed:
            self._bury()
            if self._works and self.mine:
                raise FoveateError(
                    "this handle cannot stop while a call of its model is running, from inside that call; stop() it "
                    "when the call has returned"
                )
            while self._works:
                self._freed.wait(timeout=0.1)  # a thread that was killed gives no notice
                self._bury()
            yield

    # -- what is noted of one -------------------------------------------------------------------------------------

    def begin(self, shortened: Shortened) -> None:
        """A shortened prompt is about to enter the decoder: note it, and get ready for the stages inside."""
        if shortened.record is None:
            return
        stages = self.stages if shortened.images else ()
        if stages and shortened.timeline.held:
            raise FoveateError(
                f"{format_spec(stages[0].part)} cannot follow a new image into a cache that "
                f"{format_spec(self.evictor.part) if self.evictor else 'another method'} has evicted from; start "
                "with a new cache"
            )
        self._noted = shortened.noted()
        self.trace.add(self._noted)
        if stages:
            self.descent = Descent(
                call=shortened, stages=list(stages), decoder=self.model.get_decoder(), probe=self.decoder_probe
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
        problem, refusal = None, None
        if done and self.evictor is not None:
            try:
                self.evictor.check()
            except FoveateError as error:
                done, refusal = False, error
        if done and shortened.cache is not None:
            problem = miscounted(shortened.cache, shortened.entries + shortened.fed)
        before, history = self._noted, self.trace.history
        if not done or problem is not None:
            self._noted = None
            history[:] = [call for call in history if call is not before]
        elif self.stages or self.evictor is not None:
            self._noted = shortened.noted()
            history[:] = [self._noted if call is before else call for call in history]
        if problem is not None:
            raise unfit(problem)
        if refusal is not None:
            raise refusal

    def finish(self) -> None:
        """A prefill is over, well or not: nothing of it stays."""
        self.probe.take()
        self.tower.forget()
        if self.descent is not None:
            self.decoder_probe.close()
        self.descent = None
        if self.evictor is not None:
            self.evictor.forget()
