"""Every family at once: transformers' own model inside vLLM, whose encoder Foveate's probe reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
    TransformersMultiModalMoEForCausalLM,
)
from vllm.model_executor.models.transformers.multimodal import MultiModalMixin
from vllm.multimodal import MULTIMODAL_REGISTRY

from foveate.serve.vllm.before import dropping
from foveate.serve.vllm.model import Pruning, Taken
from foveate.serve.vllm.processor import Shortening
from foveate.serve.vllm.rooms import Brought, Method
from foveate.serve.vllm.shards import EngineProbe


class Processor(Shortening, MultiModalProcessor):
    """The processor of the transformers backend, with fewer places for each picture."""


class ReadByHooks(Pruning):
    """A model whose encoder is transformers', which Foveate's hooks read and shorten."""

    @property
    def _looked_at(self) -> Any:
        """What holds encoder and projector where transformers' base model has them."""
        raise NotImplementedError

    @property
    def _view(self) -> Any:
        """The model as the families look at it."""
        return SimpleNamespace(config=self.config, base_model=self._looked_at, generate=None)  # type: ignore[attr-defined]

    @contextmanager
    def _reading(self, needs: frozenset[str], before: Sequence[Method], told: Brought) -> Iterator[Taken]:
        family = self._foveate.outline.family
        probe = EngineProbe(self._view, family, needs)
        probe.install()
        try:
            if not before:
                yield lambda: (probe.take(), None)
                return
            with dropping(self._view, family, before, probe, told) as stages:

                def taken() -> Any:
                    left = stages.take()
                    return probe.take(None if left is None else left.full), left

                yield taken
        finally:
            probe.remove()

    def _project(self, encoded: Tensor) -> Tensor:
        return self._foveate.outline.family.project(self._view, encoded)


class _Backend(ReadByHooks):
    """What both classes of the backend share."""

    @property
    def _looked_at(self) -> Any:
        return self.model  # type: ignore[attr-defined]

    def _forward_flat(self, *arguments: Any, **options: Any) -> Any:
        # The backend's own step would take three axes for granted, since the engine keeps them.
        return super(MultiModalMixin, self).forward(*arguments, **options)


_register = MULTIMODAL_REGISTRY.register_processor(
    Processor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)


@_register
class FoveateForConditionalGeneration(_Backend, TransformersMultiModalForCausalLM):
    """A model of any family, dense."""


@_register
class FoveateMoEForConditionalGeneration(_Backend, TransformersMultiModalMoEForCausalLM):
    """A model of any family whose decoder has experts."""
