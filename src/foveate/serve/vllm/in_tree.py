"""Families on vLLM's own kernels: what their encoders compute is read before the attention that they all share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from foveate.serve.vllm.model import Pruning, Taken
from foveate.serve.vllm.processor import Shortening
from foveate.serve.vllm.rooms import Brought, Method, PackedWatch
from foveate.serve.vllm.shards import EngineProbe, GatheringPackedWatch, GatheringWatch


class _Hooked:
    """Goes before a watch: reads what a block hands to vLLM's attention, in place of transformers'."""

    attention: Any
    block: Any
    bounds: list[int] | None
    _hooks: tuple[Any, ...] = ()

    def install(self) -> None:
        """Start observing the block."""
        shared = self.attention.attn
        self._hooks = (
            self.block.register_forward_hook(self._read_output),
            shared.register_forward_pre_hook(self._read_call, with_kwargs=True),
        )

    def remove(self) -> None:
        """Stop; the block is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def _read_output(self, block: Any, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(self, PackedWatch) and hidden.ndim == 3:
            hidden = hidden.transpose(0, 1)  # vLLM's packed encoders have the patches first
        super()._read_output(block, arguments, hidden)  # type: ignore[misc]

    def _read_call(self, attention: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = dict(zip(("query", "key", "value", "cu_seqlens"), arguments, strict=False)) | options
        queries, keys = (_by_head(given[name], attention) for name in ("query", "key"))
        if isinstance(self, PackedWatch):
            bounds = given.get("cu_seqlens")
            self.bounds = None if bounds is None else bounds.tolist()
        self.read_attention(queries, keys, None, attention.scale)  # type: ignore[attr-defined]


def _by_head(states: Tensor, attention: Any) -> Tensor:
    """(B, N, H * d) or (B, N, H, d) of this device's heads -> (B, H, N, d)."""
    states = states if states.ndim == 4 else states.unflatten(-1, (attention.num_heads, -1))
    return states.transpose(1, 2)


class _HookedWatch(_Hooked, GatheringWatch):
    """One block of an encoder that runs pictures apart."""


class _HookedPackedWatch(_Hooked, GatheringPackedWatch):
    """One block of an encoder that runs the patches of all pictures as one sequence."""


class _HookedProbe(EngineProbe):
    """A probe of an encoder on vLLM's kernels."""

    kinds = (_HookedWatch, _HookedPackedWatch)


class _InTree(Pruning):
    """What the classes share. `_blocks` gives the blocks that the encoder has."""

    def _blocks(self) -> Iterable[Any]:
        raise NotImplementedError

    @contextmanager
    def _reading(self, needs: frozenset[str], before: Sequence[Method], told: Brought) -> Iterator[Taken]:
        if before:
            raise RuntimeError("an encoder on vLLM's kernels runs on all of its patches")
        outline = self._foveate.outline
        vision = outline.config.vision_config
        many = getattr(vision, "num_hidden_layers", None) or vision.depth
        blocks = list(self._blocks())
        # An encoder may stop behind the block that the projector reads; its numbers count all the same.
        blocks += [None] * (many - len(blocks))
        tower = SimpleNamespace(config=vision)
        _put(tower, outline.tower.blocks, blocks)
        base = SimpleNamespace()
        _put(base, outline.family.tower, tower)
        view = SimpleNamespace(config=outline.config, base_model=base, generate=None)
        probe = _HookedProbe(view, outline.family, needs)
        probe.install()
        try:
            yield lambda: (probe.take(), None)
        finally:
            probe.remove()


def _put(holder: Any, path: str, value: Any) -> None:
    """Set an attribute at the end of a dotted path, with what is missing on the way."""
    *way, last = path.split(".")
    for name in way:
        if not hasattr(holder, name):
            setattr(holder, name, SimpleNamespace())
        holder = getattr(holder, name)
    setattr(holder, last, value)


class LlavaProcessor(Shortening, LlavaMultiModalProcessor):
    """LLaVA-1.5's, with fewer places for each picture."""


@MULTIMODAL_REGISTRY.register_processor(LlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder)
class FoveateLlavaForConditionalGeneration(_InTree, LlavaForConditionalGeneration):
    """LLaVA-1.5."""

    # Checkpoints of a newer transformers name the parts of a CLIP without the module that vLLM keeps around them.
    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_regex={re.compile(r"^vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."}
    )

    def _blocks(self) -> Iterable[Any]:
        return self.vision_tower.vision_model.encoder.layers

    def _project(self, encoded: Tensor) -> Tensor:
        return self.multi_modal_projector(encoded[None])[0]


class Qwen2_5_VLProcessor(Shortening, Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's, with fewer places for each picture."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class FoveateQwen2_5_VLForConditionalGeneration(_InTree, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""

    def _blocks(self) -> Iterable[Any]:
        return self.visual.blocks


class Qwen3VLProcessor(Shortening, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's, with fewer places for each picture."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class FoveateQwen3VLForConditionalGeneration(_InTree, Qwen3VLForConditionalGeneration):
    """Qwen3-VL: what deeper blocks of the decoder add of a picture is shortened with it."""

    def _blocks(self) -> Iterable[Any]:
        return self.visual.blocks


class InternVLProcessor(Shortening, InternS1MultiModalProcessor):
    """InternVL's, with fewer places for each picture."""


@MULTIMODAL_REGISTRY.register_processor(
    InternVLProcessor, info=InternS1ProcessingInfo, dummy_inputs=InternS1DummyInputsBuilder
)
class FoveateInternVLForConditionalGeneration(_InTree, InternS1ForConditionalGeneration):
    """InternVL in transformers' format."""

    def _blocks(self) -> Iterable[Any]:
        return self.vision_tower.encoder.layer
