"""The handle: what `prune` installs on a model, from its start to its stop, and how all is undone."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from foveate.core import FoveateError, Method, Trace
from foveate.families import family_of
from foveate.runtime.calls import Calls
from foveate.runtime.evict import Evictor
from foveate.runtime.forwards import Forwards
from foveate.runtime.generating import Generating
from foveate.runtime.joint_space import JointSpace
from foveate.runtime.layers import stages_of
from foveate.runtime.prefill import Prefill
from foveate.runtime.probe import DecoderProbe, Probe
from foveate.runtime.seams import check_seams
from foveate.runtime.tower import TowerStages


class Handle:
    """Pruning installed on one model, from start() to stop(); also a context manager that gives the trace.

    Works for stock generate(), for the image-text-to-text pipeline, and for direct calls of the model. Parameters,
    configuration and methods of the model are the same after stop() as before start().
    """

    def __init__(
        self, model: Any, parts: Sequence[Method], joint_space: JointSpace | None = None, short_outputs: bool = False
    ) -> None:
        self.model = model
        self.parts = tuple(parts)
        self.trace = Trace()
        self.active = False
        self.family = family_of(model)
        decoder = model.get_decoder()
        stages = stages_of(self.parts, len(decoder.layers))
        self._probe = Probe(model, self.family, {need for part in parts for need in part.needs})
        evicting = [part for part in self.parts if part.site == "cache"]
        evictor = Evictor(evicting[0], decoder.layers) if evicting else None
        self._decoder_probe = DecoderProbe(decoder.layers, stages, everywhere=bool(evicting))
        if evictor is not None:
            evictor.listen(self._decoder_probe)
        inside = [part for part in self.parts if part.site == "tower"]
        mine = lambda: self._calls.mine  # noqa: E731 - a question, asked while the encoder runs
        self._tower = TowerStages(model, self.family, inside, self._probe, mine)
        self._calls: Calls = Calls(
            model, self.trace, stages, decoder.layers, self._probe, self._tower, self._decoder_probe, evictor
        )
        prefill = Prefill(model, self.family, self.parts, self._probe, self._tower, self, joint_space, short_outputs)
        self._generating = Generating(model, self.family, self, self._calls, prefill)
        self._forwards = Forwards(model, self.family, decoder.layers, self._calls, prefill)

    def start(self) -> Handle:
        """Install pruning on the model.

        Raises:
            FoveateError: this or another handle is already at work on the model, or the installed transformers runs it
                in another way than pruning counts on.
        """
        other = getattr(self.model, "_foveate_handle", None)
        if other is not None:
            whose = "this handle" if other is self else "another handle"
            raise FoveateError(f"{whose} already prunes this model; stop() it first, or give several methods as a list")
        self._generating.check()
        check_seams(self.model, self.model.get_decoder().layers)
        try:
            self._install()
        except BaseException:
            self.stop()
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
        self.active = True

    def stop(self) -> None:
        """Take pruning off the model. Caches it pruned refuse to work until start() is called again."""
        if getattr(self.model, "_foveate_handle", None) is not self:
            return
        self._probe.remove()
        self._tower.remove()
        self._decoder_probe.remove()
        self.active = False
        self._forwards.remove()
        self._generating.remove()
        del self.model._foveate_handle
        self._calls.forget()

    def __enter__(self) -> Trace:
        self.start()
        return self.trace

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()
