"""LVPruning's decision modules: cross-attention from visual tokens to text that scores keeping and removing each.

Shapes: B rows, N visual tokens, T text tokens, C the decoder's width, H heads.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core import FoveateError, short
from foveate.modules import storage

MODEL_TYPE = "foveate_lvpruning"
WHAT = "decision modules"
"""What the modules are called in messages."""

FOLDER = "lvpruning"
"""Where modules that ship beside a model lie in its folder."""

MOST_BLOCKS = 16
"""Cross-attention blocks that a module can have; the paper's has 2."""


MOST_BORDERS = 16
"""Borders between classes of scores that modules can have."""


@strict
class LVPruningConfig(storage.ModulesConfig):
    """The shape of the modules, and of the model that they were trained for.

    Attributes:
        width: C, the decoder's hidden size.
        layers: decoder blocks that run before each module.
        heads, blocks: attention heads, and cross-attention blocks of each module.
        base_type: `model_type` of the model, such as "llava".
        base_layers: blocks of its decoder.
        base_name: what it is called; for people.
        ratios: shares of the visual tokens that training aimed at; inference is free of them.
        answers: whether training let the modules read the answers.
        evenness: whether they have heads that say how much of a budget is to be spread evenly; the paper's have none.
        borders: of a score only counts how many of these it is above, and in each class tokens are taken evenly over
            the picture; the paper's have none, so that the scores themselves are the order.
    """

    model_type = MODEL_TYPE

    width: int = 4096
    layers: list[int] | tuple[int, ...] = (1, 8, 16)
    heads: int = 8
    blocks: int = 2
    base_type: str = "llava"
    base_layers: int = 32
    base_name: str = ""
    ratios: list[float] | tuple[float, ...] = (0.5, 0.3, 0.1)
    answers: bool = False
    evenness: bool = False
    borders: list[float] | tuple[float, ...] = ()

    def check_shape(self) -> None:
        """Refuse modules that cannot be built, and depths outside the decoder; FoveateError."""
        storage.check_range("width", self.width, storage.WIDEST)
        storage.check_range("heads", self.heads, self.width)
        if self.width % self.heads:
            raise FoveateError(f"width={self.width} cannot be shared evenly by heads={self.heads}")
        storage.check_range("blocks", self.blocks, MOST_BLOCKS)
        storage.check_range("base_layers", self.base_layers, storage.DEEPEST)
        storage.check_layers(self.layers, self.base_layers - 1)
        if len(self.layers) != len(self.ratios):
            raise FoveateError(f"{len(self.ratios)} ratios for {len(self.layers)} layers; give one for each")
        if not all(0 < ratio <= 1 for ratio in self.ratios):
            raise FoveateError(f"ratios={short(repr(self.ratios))} are not all shares in (0, 1]")
        if len(self.borders) > MOST_BORDERS or not all(math.isfinite(border) for border in self.borders):
            raise FoveateError(f"borders={short(repr(self.borders))} are not up to {MOST_BORDERS} finite numbers")


class CrossAttention(nn.Module):
    """One block: visual tokens ask the text (eq. 1-3), then a feed-forward network without residual (section 4.1).

    The residual of the attention is the projected query, as eq. 3 prints it. The output matrix is in no equation, but
    the published 0.71 TFLOPs count it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.ffn = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
            nn.LayerNorm(width),
        )

    def forward(self, visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """(B, N, C) and (B, T, C) with mask (B, T), True where a text token counts -> (B, N, C)."""
        query = self.query(visual)
        keys, values = (self._split(project(text)) for project in (self.key, self.value))
        queries = self._split(query)
        scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        read = scores.float().softmax(dim=-1).to(values.dtype) @ values
        output: Tensor = self.ffn(self.out(read.transpose(1, 2).flatten(2)) + query)
        return output

    def _split(self, values: Tensor) -> Tensor:
        """(B, L, C) -> (B, H, L, C / H)."""
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class DecisionModule(nn.Module):
    """The module of one insertion layer: cross-attention blocks, then two scores for each visual token (eq. 4)."""

    def __init__(self, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CrossAttention(width, heads) for _ in range(blocks))
        self.score = nn.Linear(width, 2)

    def forward(self, visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """(B, N, C), (B, T, C), (B, T) -> (B, N, 2): for keeping, for removing."""
        for block in self.blocks:
            visual = block(visual, text, mask)
        # In 16 bits most tokens would share their score with others.
        scores: Tensor = nn.functional.linear(visual.float(), self.score.weight.float(), self.score.bias.float())
        return scores


class EvenShare(nn.Module):
    """How much of a budget an even lattice gets, of the text and the budget alone; the paper has no such thing.

    What is spread over the picture, such as how many things there are, is not found by scoring each token by itself.
    """

    def __init__(self, width: int, hidden: int = 32) -> None:
        super().__init__()
        self.ask = nn.Linear(width, 1)
        self.norm = nn.LayerNorm(width)
        self.answer = nn.Sequential(nn.Linear(width + 1, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def forward(self, text: Tensor, mask: Tensor, budget: Tensor) -> Tensor:
        """(B, T, C) with mask (B, T), and (B,) shares of the original tokens -> (B,) float32, logarithms of odds."""
        weight = self.ask(text).float()[..., 0].masked_fill(~mask, torch.finfo(torch.float32).min).softmax(dim=-1)
        read = self.norm((weight[..., None].to(text.dtype) * text).sum(dim=1))
        odds: Tensor = self.answer(torch.cat([read, budget.log()[:, None].to(read.dtype)], dim=-1))[..., 0]
        return odds.float()


class LVPruningModules(PreTrainedModel):
    """All decision modules of one model."""

    config_class = LVPruningConfig
    base_model_prefix = "stages"
    main_input_name = "visual"
    _no_split_modules = ("DecisionModule",)

    def __init__(self, config: LVPruningConfig) -> None:
        super().__init__(config)
        config.check_shape()
        self.stages = nn.ModuleList(
            DecisionModule(config.width, config.heads, config.blocks) for _ in range(len(config.layers))
        )
        self.even = nn.ModuleList(EvenShare(config.width) for _ in range(len(config.layers) * config.evenness))
        self._placed: dict[tuple[torch.device, torch.dtype], LVPruningModules] = {}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Queries and keys that keep length and angles: a visual token resembles a word before training if it does so
        in the decoder, whose stream both are part of."""
        if isinstance(module, CrossAttention):
            square = torch.empty_like(module.query.weight)
            nn.init.orthogonal_(square)
            module.query.weight.data.copy_(square)
            module.key.weight.data.copy_(square)
            for linear in (module.value, module.out):
                nn.init.xavier_uniform_(linear.weight)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            # The scores begin near 0: about half of the tokens are kept, whatever they are.
            nn.init.xavier_uniform_(module.weight, gain=0.1 if module.out_features == 2 else 1.0)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, stage: int, visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Scores of one stage. (B, N, C), (B, T, C), (B, T) bool -> (B, N, 2) float32: for keeping, for removing."""
        scores: Tensor = self.stages[stage](visual, text, mask)
        return scores

    def even_odds(self, stage: int, text: Tensor, mask: Tensor, budget: Tensor) -> Tensor | None:
        """How much of one stage's budget is to be spread evenly: (B,) float32 logarithms of odds.

        None where the modules have no say in it.

        Args:
            text, mask: (B, T, C) and (B, T).
            budget: (B,) share of the original tokens that the stage is to leave.
        """
        return self.even[stage](text, mask, budget) if self.config.evenness else None

    @torch.no_grad()
    def start_keeping(self, share: float) -> None:
        """Let untrained modules keep about this share of the tokens of each stage."""
        half = math.log(share / (1 - share)) / 2
        for stage in self.stages:
            assert isinstance(stage, DecisionModule)
            stage.score.bias.copy_(torch.tensor([half, -half]))

    def placed(self, device: torch.device, dtype: torch.dtype) -> LVPruningModules:
        """These modules on a device and in a dtype; copies are made once."""
        if self.device == device and self.dtype == dtype:
            return self
        if (device, dtype) not in self._placed:
            copy = type(self)(self.config)
            copy.load_state_dict(self.state_dict())
            self._placed[device, dtype] = copy.eval().requires_grad_(False).to(device, dtype)
        return self._placed[device, dtype]

    def check(self, config: Any) -> None:
        """Refuse a model of another shape than these modules were trained for.

        Raises:
            FoveateError: another `model_type`, width or number of decoder blocks.
        """
        mine, text = self.config, config.get_text_config(decoder=True)
        for name, trained, found in (
            ("model_type", mine.base_type, config.model_type),
            ("hidden_size", mine.width, text.hidden_size),
            ("num_hidden_layers", mine.base_layers, text.num_hidden_layers),
        ):
            if trained != found:
                called = f" ({short(mine.base_name)})" if mine.base_name else ""
                raise FoveateError(
                    f"these decision modules were trained for a model{called} with {name}={trained!r}, not {found!r}; "
                    "load that model, or modules trained for this one"
                )


def for_model(config: Any, *, layers: tuple[int, ...], seed: int = 0, **settings: Any) -> LVPruningModules:
    """Untrained modules, float32, for a model of this configuration; the weights depend on `seed` alone."""
    text = config.get_text_config(decoder=True)
    return build(
        LVPruningConfig(
            width=text.hidden_size,
            layers=list(layers),
            base_type=config.model_type,
            base_layers=text.num_hidden_layers,
            **settings,
        ),
        seed,
    )


def build(config: LVPruningConfig, seed: int = 0) -> LVPruningModules:
    """Untrained modules of a shape; the global random state stays as it is."""
    return storage.seeded(LVPruningModules, config, seed)


def load(path: str | Path) -> LVPruningModules:
    """Trained modules from a folder, a hub id, or `mini`; safetensors only.

    Raises:
        FoveateError: nothing is there, it holds something else, or it is damaged or incomplete.
    """
    return storage.read(LVPruningModules, storage.find(path, FOLDER), WHAT)


def save(modules: LVPruningModules, folder: str | Path, card: str = "") -> Path:
    """Write modules in bfloat16, ready for `load`; every file appears whole, the weights last."""
    half = LVPruningModules(modules.config)
    half.load_state_dict(modules.state_dict())
    return storage.write(half.to(torch.bfloat16), folder, card)
