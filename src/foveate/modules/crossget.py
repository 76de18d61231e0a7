"""CrossGET's cross tokens of the image side: one learned vector per encoder block, added to a copy of CLS.

Shapes: B images, E encoder width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.modules import storage

FOLDER = "crossget"
"""Where cross tokens that ship beside a model lie in its folder."""

WHAT = "cross tokens of CrossGET"


@strict
class CrossGETConfig(storage.ModulesConfig):
    """The shape of the encoder that the cross tokens were trained for.

    Attributes:
        width: E, its hidden size.
        blocks: how many it has.
    """

    model_type = "foveate_crossget"

    width: int = 1024
    blocks: int = 24

    def check_shape(self) -> None:
        """Refuse a width or number of blocks that no encoder has; FoveateError."""
        storage.check_range("width", self.width, storage.WIDEST)
        storage.check_range("blocks", self.blocks, storage.DEEPEST)


class CrossGETTokens(PreTrainedModel):
    """The vectors of all blocks; zero before training."""

    config_class = CrossGETConfig
    base_model_prefix = "tokens"
    main_input_name = "token"

    def __init__(self, config: CrossGETConfig) -> None:
        super().__init__(config)
        config.check_shape()
        self.tokens = nn.Parameter(torch.zeros(config.blocks, config.width))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, CrossGETTokens):
            nn.init.zeros_(module.tokens)

    def forward(self, token: Tensor, block: int) -> Tensor:
        """(B, E) -> (B, E), the cross token that enters block `block`, in its own dtype."""
        return token + self.tokens[block].to(token.device, token.dtype)

    def check(self, vision: Any) -> None:
        """Refuse another encoder, by its configuration.

        Raises:
            FoveateError: another width or number of blocks.
        """
        storage.check_encoder("hidden_size", WHAT, self.config.width, vision.hidden_size)
        storage.check_encoder("num_hidden_layers", WHAT, self.config.blocks, vision.num_hidden_layers)


def load(path: str | Path) -> CrossGETTokens:
    """Trained cross tokens from a folder, a hub id, or `mini`; safetensors only.

    Raises:
        FoveateError: nothing is there, it holds something else, or it is damaged or incomplete.
    """
    return storage.read(CrossGETTokens, storage.find(path, FOLDER), WHAT)


def save(tokens: CrossGETTokens, folder: str | Path) -> Path:
    """Write cross tokens, ready for `load`."""
    return storage.write(tokens, folder)
