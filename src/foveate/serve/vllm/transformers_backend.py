"""Every family at once: transformers' own model inside vLLM, whose encoder Foveate's probe reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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

from foveate.serve.vllm.model import Pruning
from foveate.serve.vllm.processor import Shortening
from foveate.serve.vllm.rooms import Block
from foveate.serve.vllm.shards import EngineProbe


class Processor(Shortening, MultiModalProcessor):
    """The processor of the transformers backend, with fewer places for each picture."""


class _Backend(Pruning):
    """What both classes of the backend share."""

    @property
    def _view(self) -> Any:
        """The model as the families look at it."""
        return SimpleNamespace(config=self.config, base_model=self.model, generate=None)  # type: ignore[attr-defined]

    @contextmanager
    def _reading(self, needs: frozenset[str]) -> Iterator[Callable[[], Mapping[int | str, Block]]]:
        probe = EngineProbe(self._view, self._foveate.outline.family, needs)
        probe.install()
        try:
            yield probe.take
        finally:
            probe.remove()

    def _project(self, encoded: Tensor) -> Tensor:
        return self._foveate.outline.family.project(self._view, encoded)

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
