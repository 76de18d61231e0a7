"""Encoders by hand that are given nothing but the patches of kept tokens: weights, places and products written out.

Shapes: K kept tokens of one picture, G patches behind each, E encoder width, H heads, D decoder width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, silu

SIDE = 2  # patches along a side of one token of a Qwen-VL model


def attended(queries: Tensor, keys: Tensor, values: Tensor, heads: int, groups: Sequence[Sequence[int]]) -> Tensor:
    """(L, E) each; who is in one of the `groups` of rows sees those in it."""
    out = torch.zeros_like(values)
    width = values.shape[1] // heads
    for group in groups:
        rows = torch.tensor(list(group))
        for head in range(heads):
            mine = slice(head * width, (head + 1) * width)
            weights = (queries[rows, mine] @ keys[rows, mine].T / math.sqrt(width)).softmax(dim=-1)
            out[rows, mine] = weights @ values[rows, mine]
    return out


def normed(module: Any, rows: Tensor) -> Tensor:
    """LayerNorm, or RMSNorm where there is no bias."""
    if getattr(module, "bias", None) is not None:
        return layer_norm(rows, (rows.shape[-1],), module.weight, module.bias, module.eps)
    return rows * (rows.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * module.weight


def dense(module: Any, rows: Tensor) -> Tensor:
    return linear(rows, module.weight, module.bias)


def quick(rows: Tensor) -> Tensor:
    return rows * torch.sigmoid(1.702 * rows)


@torch.no_grad()
def llava(model: Any, picture: Tensor, kept: Sequence[int]) -> Tensor:
    """(K, D) of a picture (3, h, w) for LLaVA-1.5 with CLIP's or SigLIP's encoder."""
    tower, config = model.model.vision_tower, model.config
    tower = getattr(tower, "vision_model", tower)
    clip = hasattr(tower.embeddings, "class_embedding")
    convolution, side = tower.embeddings.patch_embedding, tower.config.patch_size
    across = picture.shape[-1] // side
    rows = []
    for token in kept:
        top, left = token // across * side, token % across * side
        patch = picture[:, top : top + side, left : left + side].flatten()
        row = convolution.weight.flatten(1) @ patch
        row = row if convolution.bias is None else row + convolution.bias
        rows.append(row + tower.embeddings.position_embedding.weight[token + clip])
    if clip:
        rows.insert(0, tower.embeddings.class_embedding + tower.embeddings.position_embedding.weight[0])
    hidden = torch.stack(rows)
    hidden = normed(tower.pre_layrnorm, hidden) if clip else hidden
    blocks = tower.encoder.layers
    everyone = [range(len(rows))]
    for block in blocks[: len(blocks) + 1 + config.vision_feature_layer]:
        before, mix = normed(block.layer_norm1, hidden), block.self_attn
        states = (dense(one, before) for one in (mix.q_proj, mix.k_proj, mix.v_proj))
        hidden = hidden + dense(mix.out_proj, attended(*states, tower.config.num_attention_heads, everyone))
        grown = dense(block.mlp.fc1, normed(block.layer_norm2, hidden))
        grown = quick(grown) if tower.config.hidden_act == "quick_gelu" else gelu(grown, approximate="tanh")
        hidden = hidden + dense(block.mlp.fc2, grown)
    projector = model.model.multi_modal_projector
    return dense(projector.linear_2, gelu(dense(projector.linear_1, hidden[clip:])))


def places(grid: tuple[int, int], kept: Sequence[int]) -> list[tuple[int, int]]:
    """Row and column of each of the patches behind some tokens of a picture of `grid` patches, as Qwen-VL has them."""
    across = grid[1] // SIDE
    return [
        (token // across * SIDE + down, token % across * SIDE + right)
        for token in kept
        for down in range(SIDE)
        for right in range(SIDE)
    ]


def turned(rows: Tensor, where: Sequence[tuple[int, int]], heads: int) -> Tensor:
    """(L, E) turned by row and column, half of a head's pairs each."""
    width = rows.shape[1] // heads
    speeds = 10000.0 ** -(torch.arange(0, width // 2, 2) / (width // 2))
    place = torch.tensor(where, dtype=torch.float32)
    angles = torch.cat([place[:, :1] * speeds, place[:, 1:] * speeds], dim=1)  # (L, width / 2)
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
    first, second = rows.unflatten(1, (heads, 2, width // 2)).unbind(dim=2)
    return torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=2).flatten(1)


def mixed(block: Any, hidden: Tensor, where: Sequence[tuple[int, int]], heads: int, groups: Any) -> Tensor:
    queries, keys, values = dense(block.attn.qkv, normed(block.norm1, hidden)).chunk(3, dim=1)
    out = attended(turned(queries, where, heads), turned(keys, where, heads), values, heads, groups)
    return hidden + dense(block.attn.proj, out)


def embedded(tower: Any, pixels: Tensor, kept: Sequence[int]) -> Tensor:
    """(K * G, E) of the rows (P, values) that a processor makes of a picture, those of a token behind each other."""
    rows = torch.cat([pixels[token * SIDE**2 : (token + 1) * SIDE**2] for token in kept])
    embedding = tower.patch_embed.proj
    return linear(rows, embedding.weight.flatten(1), embedding.bias)


@torch.no_grad()
def qwen2_5(model: Any, pixels: Tensor, grid: tuple[int, int], kept: Sequence[int]) -> Tensor:
    """(K, D) of a picture of `grid` patches; most blocks see windows of it."""
    tower, config = model.model.visual, model.model.visual.config
    hidden, where = embedded(tower, pixels, kept), places(grid, kept)
    window = config.window_size // config.patch_size
    windows: dict[tuple[int, int], list[int]] = {}
    for row, (y, x) in enumerate(where):
        windows.setdefault((y // window, x // window), []).append(row)
    for number, block in enumerate(tower.blocks):
        whole = number in config.fullatt_block_indexes
        groups = [range(len(where))] if whole else list(windows.values())
        hidden = mixed(block, hidden, where, config.num_heads, groups)
        inner, mlp = normed(block.norm2, hidden), block.mlp
        hidden = hidden + dense(mlp.down_proj, silu(dense(mlp.gate_proj, inner)) * dense(mlp.up_proj, inner))
    merged = normed(tower.merger.ln_q, hidden).reshape(len(kept), -1)
    return dense(tower.merger.mlp[2], gelu(dense(tower.merger.mlp[0], merged)))


@torch.no_grad()
def qwen3(model: Any, pixels: Tensor, grid: tuple[int, int], kept: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(K, D) of a picture of `grid` patches, and of the blocks whose features join the decoder deeper."""
    tower, config = model.model.visual, model.model.visual.config
    where = places(grid, kept)
    hidden = embedded(tower, pixels, kept) + torch.stack([interpolated(tower, grid, place) for place in where])
    deep = []
    for number, block in enumerate(tower.blocks):
        hidden = mixed(block, hidden, where, config.num_heads, [range(len(where))])
        grown = gelu(dense(block.mlp.linear_fc1, normed(block.norm2, hidden)), approximate="tanh")
        hidden = hidden + dense(block.mlp.linear_fc2, grown)
        if number in config.deepstack_visual_indexes:
            merger = tower.deepstack_merger_list[config.deepstack_visual_indexes.index(number)]
            deep.append(joined(merger, normed(merger.norm, hidden.reshape(len(kept), -1))))
    merged = normed(tower.merger.norm, hidden).reshape(len(kept), -1)
    return joined(tower.merger, merged), tuple(deep)


def joined(merger: Any, rows: Tensor) -> Tensor:
    return dense(merger.linear_fc2, gelu(dense(merger.linear_fc1, rows)))


def interpolated(tower: Any, grid: tuple[int, int], place: tuple[int, int]) -> Tensor:
    """(E,) of the learned table, stretched over the picture's patches corner to corner."""
    side = math.isqrt(tower.pos_embed.weight.shape[0])
    table = tower.pos_embed.weight.unflatten(0, (side, side))
    y, x = (at * (side - 1) / (length - 1) for at, length in zip(place, grid, strict=True))
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, side - 1), min(left + 1, side - 1)
    above = table[top, left] * (1 - x + left) + table[top, right] * (x - left)
    below = table[bottom, left] * (1 - x + left) + table[bottom, right] * (x - left)
    return above * (1 - y + top) + below * (y - top)
