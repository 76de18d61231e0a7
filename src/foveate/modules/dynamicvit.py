"""DynamicViT's predictors: small networks between encoder blocks that score keeping each patch.

Shapes: B images, N patches left, E encoder width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core import FoveateError
from foveate.modules import storage

FOLDER = "dynamicvit"
"""Where predictors that ship beside a model lie in its folder."""

WHAT = "predictors of DynamicViT"


@strict
class DynamicViTConfig(storage.ModulesConfig):
    """The shape of the predictors, and of the encoder that they were trained for.

    Attributes:
        width: E, its hidden size, a multiple of 4.
        blocks: how many it has.
        layers: blocks that run before each predictor.
    """

    model_type = "foveate_dynamicvit"

    width: int = 1024
    blocks: int = 24
    layers: list[int] | tuple[int, ...] = (6, 12, 18)

    def check_shape(self) -> None:
        """Refuse a width that cannot be halved twice, and depths outside the encoder; FoveateError."""
        storage.check_range("width", self.width, storage.WIDEST)
        if self.width % 4:
            raise FoveateError(f"width={self.width} cannot be halved twice; the predictors need a multiple of 4")
        storage.check_range("blocks", self.blocks, storage.DEEPEST)
        storage.check_layers(self.layers, self.blocks)


class Predictor(nn.Module):
    """The predictor of one stage (equations 1 to 4): each patch beside the mean of all, to two log-probabilities."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.score = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, patches: Tensor, policy: Tensor) -> Tensor:
        """(B, N, E) and (B, N) weights, 0 for a patch that has left -> (B, N, 2): for keeping, for dropping.

        The second half of the channels is replaced by its mean over the patches, weighted by the policy.
        """
        mixed = self.local(patches)
        local, common = mixed.chunk(2, dim=-1)
        weights = policy[..., None]
        common = (common * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
        scores: Tensor = self.score(torch.cat([local, common.expand_as(local)], dim=-1))
        return scores


class DynamicViTPredictors(PreTrainedModel):
    """The predictors of all stages of one encoder."""

    config_class = DynamicViTConfig
    base_model_prefix = "stages"
    main_input_name = "patches"
    _no_split_modules = ("Predictor",)

    def __init__(self, config: DynamicViTConfig) -> None:
        super().__init__(config)
        config.check_shape()
        self.stages = nn.ModuleList(Predictor(config.width) for _ in config.layers)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, stage: int, patches: Tensor, policy: Tensor | None = None) -> Tensor:
        """Scores of one stage, in float32 where the patches are. (B, N, E), (B, N) -> (B, N, 2): keeping, dropping."""
        if self.device != patches.device:
            self.to(patches.device)
        policy = torch.ones(patches.shape[:2], device=patches.device) if policy is None else policy
        scores: Tensor = self.stages[stage](patches.float(), policy.float())
        return scores

    def check(self, vision: Any) -> None:
        """Refuse another encoder, by its configuration.

        Raises:
            FoveateError: another width or number of blocks.
        """
        storage.check_encoder("hidden_size", WHAT, self.config.width, vision.hidden_size)
        storage.check_encoder("num_hidden_layers", WHAT, self.config.blocks, vision.num_hidden_layers)


def build(config: DynamicViTConfig, seed: int = 0) -> DynamicViTPredictors:
    """Untrained predictors of a shape; the global random state stays as it is."""
    return storage.seeded(DynamicViTPredictors, config, seed)


def load(path: str | Path) -> DynamicViTPredictors:
    """Trained predictors from a folder, a hub id, or `mini`, in float32; safetensors only.

    Raises:
        FoveateError: nothing is there, it holds something else, or it is damaged or incomplete.
    """
    return storage.read(DynamicViTPredictors, storage.find(path, FOLDER), WHAT).float()


def save(predictors: DynamicViTPredictors, folder: str | Path) -> Path:
    """Write predictors, ready for `load`."""
    return storage.write(predictors, folder)
