"""Families on vLLM's own kernels whose encoder alone is transformers', so that patches can leave before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.multimodal import MULTIMODAL_REGISTRY

from foveate.serve.vllm.in_tree import Qwen3VLProcessor
from foveate.serve.vllm.transformers_backend import ReadByHooks


class Qwen3VLEncoder(Qwen3VLVisionModel):
    """transformers' encoder, called as vLLM calls its own, with weights of the same names.

    A device has all of it, however many share the decoder.
    """

    def forward(self, hidden_states: Tensor, grid_thw: Any, **options: Any) -> Tensor:
        """(M, D + D * deeper blocks): what deeper blocks of the decoder add stands behind each token."""
        sizes = torch.as_tensor(grid_thw, device=hidden_states.device)
        made = super().forward(hidden_states.to(self.dtype), grid_thw=sizes, return_dict=True, **options)
        return torch.cat([made.pooler_output, *made.deepstack_features], dim=-1)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class FoveateQwen3VLOnStockEncoder(ReadByHooks, Qwen3VLForConditionalGeneration):
    """Qwen3-VL: vLLM's transformers backend would leave out what deeper blocks take of a picture."""

    # What a picture is chosen by are the pixels that transformers' encoder is given.
    supports_mm_device_do_normalize = False

    visual: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if isinstance(self.visual, StageMissingLayer):
            return
        with self._mark_tower_model(vllm_config, {"image", "video"}), no_init_weights():
            self.visual = Qwen3VLEncoder._from_config(
                self.config.vision_config, attn_implementation="sdpa", dtype=torch.get_default_dtype()
            ).eval()

    @property
    def _looked_at(self) -> Any:
        return self
