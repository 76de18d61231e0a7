"""The handle: what `prune` installs on a model, from its start to its stop, and how all is undone."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from foveate.core import FoveateError, Method
from foveate.families import family_of
from foveate.families.shapes import ModelShape
from foveate.runtime.calls import Calls
from foveate.runtime.compiled import Compiled
from foveate.runtime.decoder.evict import Evictor
from foveate.runtime.decoder.layers import stages_of
from foveate.runtime.decoder.probe import DecoderProbe
from foveate.runtime.encoder.joint_space import JointSpace
from foveate.runtime.encoder.probe import Probe
from foveate.runtime.encoder.tower import TowerStages
from foveate.runtime.forwards import Forwards
from foveate.runtime.generating import Generating
from foveate.runtime.prefill import Prefill
from foveate.runtime.seams import check_seams
from foveate.runtime.uncopied import Uncopied
from foveate.spec import format as format_spec
from foveate.trace import Trace

_STARTING = threading.Lock()


class Handle(Uncopied):
    """Pruning installed on one model, from start() to stop(); also a context manager that gives the trace.

    Works for stock generate(), for the image-text-to-text pipeline, and for direct calls of the model or of its base
    model, also from inside one another (of a logits processor, say). Prompts without a picture run as they are. Other
    ways into the model are refused. Parameters, configuration and methods of the model are the same after stop() as
    before start().
    """

    def __init__(
        self,
        model: Any,
        parts: Sequence[Method],
        shape: ModelShape,
        compiled: Compiled,
        joint_space: JointSpace | None = None,
        short_outputs: bool = False,
    ) -> None:
        self.model = model
        self.parts = tuple(parts)
        self._started = False  # has ever been
        self._compiled = compiled
        self.trace = Trace()
        self.family = family_of(model)
        decoder = model.get_decoder()
        stages = stages_of(self.parts, len(decoder.layers))
        self._probe = Probe(model, self.family, {need for part in parts for need in part.needs})
        evicting = [part for part in self.parts if part.site == "cache"]
        evictor = Evictor(evicting[0], decoder.layers) if evicting else None
        self._decoder_probe = DecoderProbe(decoder.layers, stages, everywhere=bool(evicting))
        if evictor is not None:
            evictor.listen(self._decoder_probe)
        inside = [part for part in self.parts if part.site in ("pixels", "tower")]
        self._tower = TowerStages(model, self.family, inside, self._probe, lambda: calls.mine)
        self._calls = calls = Calls(model, self.trace, stages, self._probe, self._tower, self._decoder_probe, evictor)
        prefill = Prefill(
            model, self.family, self.parts, shape, self._probe, self._tower, calls, joint_space, short_outputs
        )
        self._forwards = Forwards(model, self.family, decoder.layers, calls, prefill)
        self._generating = Generating(model, self.family, calls, prefill, self._forwards.await_step)
        # Nothing that lives on holds a handle that is not at work, so that it is collected as soon as it is lost.
        self._unused = weakref.finalize(self, _warn_unused, self.parts, type(model).__name__)

    @property
    def active(self) -> bool:
        """Whether it prunes the model now."""
        return self._calls.active

    def __repr__(self) -> str:
        state = "at work" if self.active else "stopped" if self._started else "not started"
        return _told(self.parts, type(self.model).__name__, state)

    def start(self) -> Handle:
        """Install pruning on the model.

        Raises:
            FoveateError: this or another handle is already at work on the model, or the installed transformers runs it
                in another way than pruning counts on.
        """
        self.discard()
        with _STARTING:
            other = handle_of(self.model)
            if other is self:
                raise FoveateError("this handle already prunes this model; stop() it first")
            if other is not None:
                raise FoveateError(
                    f"another handle already prunes this model: {other!r}. stop() it first, by foveate.restore(model) "
                    "where it is out of reach, or give several methods as a list"
                )
            self._generating.check()
            try:
                self._compiled.install(self._calls, self._forwards.entered)
                check_seams(self.model, self.model.get_decoder().layers)
                self._install()
            except BaseException:
                self._uninstall()
                raise
        return self

    def _install(self) -> None:
        self.model._foveate_handle = self
        self._generating.install()
        self._forwards.install()
        self._tower.check_alone()
        # The probe's hook on a block runs before the stage's hook on the next one, so both see the same tokens.
        self._probe.install()
        self._tower.install()
        self._decoder_probe.install()
        self._calls.active = self._started = True

    def stop(self) -> None:
        """Take pruning off the model, once a call that another thread is making has returned.

        Caches that it pruned refuse to work until start() is called again. A handle that is not at work warns: nothing
        is changed then.

        Raises:
            FoveateError: a call of the model is running, and stop() comes from inside it (of a logits processor, say).
        """
        if self.active:
            with self._calls.alone():
                self._uninstall()
            return
        other = handle_of(self.model)
        more = "" if other is None else f"; {other!r} is, and foveate.restore(model) stops it"
        warnings.warn(f"{self!r} is not at work, so stop() changes nothing{more}", UserWarning, stacklevel=2)

    def _uninstall(self) -> None:
        self._probe.remove()
        self._tower.remove()
        self._decoder_probe.remove()
        self._calls.active = False
        self._forwards.remove()
        self._generating.remove()
        self._compiled.remove()
        vars(self.model).pop("_foveate_handle", None)

    def discard(self) -> None:
        """Nobody is going to start it, which else is worth a warning when it is lost."""
        self._unused.detach()

    def __enter__(self) -> Trace:
        self.start()
        return self.trace

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.active:  # else somebody has stopped it before
            self.stop()


def handle_of(model: Any) -> Handle | None:
    """The handle that prunes a model now."""
    found: Handle | None = getattr(model, "_foveate_handle", None)
    return found


def _told(parts: Sequence[Method], model: str, state: str) -> str:
    return f"<Handle of {format_spec(tuple(parts))} on {model}: {state}>"


def _warn_unused(parts: Sequence[Method], model: str) -> None:
    warnings.warn(
        f"{_told(parts, model, 'not started')} was made and never started, so nothing was pruned; use "
        "`with foveate.prune(...):`, or start() it",
        UserWarning,
        stacklevel=2,
    )
