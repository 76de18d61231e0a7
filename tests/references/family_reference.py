"""What a pruned model of any family must compute: the stock encoder's features, rows shortened by hand."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from models import tiny_calls, tiny_families, tiny_parts
from references import reference
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """One picture as the stock model hands it to the decoder. M placeholders, N of them visual."""

    features: Tensor  # (M, D)
    visual: Tensor  # (N,)
    deep: tuple[Tensor, ...]  # (M, D) each, for the output of the first decoder blocks


@torch.no_grad()
def pictures(model: Any, given: tiny_calls.Call) -> list[Seen]:
    """The pictures of one row; what equals the newline of the model is not visual, nor is a CLS."""
    calls = [list(group) for _, group in groupby(given.pictures[0], key=lambda one: id(one.row))]
    return [seen for call in calls for seen in _of_one_call(model, given, call)]


def _of_one_call(model: Any, given: tiny_calls.Call, together: list[tiny_parts.Picture]) -> list[Seen]:
    lengths = [one.tokens for one in together]
    kind = tiny_families.kind_of(model)
    if together[0].video:
        assert kind.collate_videos is not None
        encode, tensors = model.model.get_video_features, kind.collate_videos(together)
    else:
        encode, tensors = model.model.get_image_features, kind.collate([together], given["input_ids"])
    names = [name for name in inspect.signature(encode).parameters if name in tensors]
    output = encode(**{name: tensors[name] for name in names}, return_dict=True)
    rows = torch.cat(list(output.pooler_output)).split(lengths)
    deep = [torch.cat(list(one)).split(lengths) for one in getattr(output, "deepstack_features", None) or ()]
    newline = getattr(model.model, "image_newline", None)
    found = []
    for number, one in enumerate(rows):
        is_newline = torch.zeros(one.shape[0], dtype=torch.bool) if newline is None else (one == newline).all(dim=1)
        if together[0].video and model.config.model_type == "video_llava":
            is_newline = torch.arange(one.shape[0]) % 17 == 0  # each frame's CLS, which is no patch either
        found.append(Seen(one, (~is_newline).nonzero().squeeze(-1), tuple(block[number] for block in deep)))
    return found


def visual_columns(ids: Tensor, seen: Sequence[Seen]) -> list[Tensor]:
    """Of each picture of a row (S,), the columns of its visual tokens."""
    places = _placeholders(ids).nonzero().squeeze(-1).split([one.features.shape[0] for one in seen])
    return [mine[one.visual] for mine, one in zip(places, seen, strict=True)]


def _placeholders(ids: Tensor) -> Tensor:
    return (ids == tiny_parts.IMAGE) | (ids == tiny_parts.VIDEO)


def project(model: Any, encoded: Tensor) -> Tensor:
    """(K, E) -> (K, D), where a projector takes single tokens."""
    if model.config.model_type == "paligemma":
        encoded = model.model.vision_tower.post_layernorm(encoded)
    if model.config.model_type == "video_llama_3":
        return model.model.projector(model.model.vision_model.post_layernorm(encoded))
    if model.config.model_type == "deepseek_vl":
        return model.model.aligner(model.model.vision_model.post_layernorm(encoded)[None])[0]
    return model.model.multi_modal_projector(encoded[None])[0]


def positions(model: Any, given: tiny_calls.Call) -> Tensor:
    """(S,), or (3, S) where the model counts on three axes."""
    ids = given["input_ids"]
    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(ids.shape[1])
    sizes = {name: given[name] for name in ("image_grid_thw", "video_grid_thw") if name in given}
    return model.model.get_rope_index(ids, given["mm_token_type_ids"], attention_mask=None, **sizes)[0][:, 0]


def groups(model: Any, ids: Tensor, prefix: int | None) -> Tensor | None:
    """(S,) tokens that see each other: those of a picture, or of the whole first prompt."""
    kind = model.config.model_type
    if kind == "paligemma":
        whole = torch.full(ids.shape, -1)
        whole[:prefix] = 0
        return whole
    ahead = getattr(model.get_decoder().config, "use_bidirectional_attention", None) == "vision"
    if kind != "gemma3" and not ahead:
        return None
    visual = ids == tiny_parts.IMAGE
    begins = visual & ~torch.cat([visual.new_zeros(1), visual[:-1]])
    return torch.where(visual, begins.cumsum(0), -1)


def shorten(
    model: Any,
    given: tiny_calls.Call,
    seen: Sequence[Seen],
    kept: Sequence[Tensor],
    merged: Sequence[Tensor | None] | None,
    *,
    extra: Sequence[Tensor | None],
    drops: Sequence[reference.Drop],
    renumber: bool,
    prefix: int | None,
) -> reference.Prompt:
    """One row with only the kept tokens of each of its pictures; see `reference.shorten`."""
    ids = given["input_ids"][0]
    table = model.get_input_embeddings()(ids.masked_fill(_placeholders(ids), tiny_parts.PAD)).detach()
    layers = max((len(one.deep) for one in seen), default=0)
    deep = [torch.zeros_like(table) for _ in range(layers)]
    stays = torch.ones(ids.numel(), dtype=torch.bool)
    source = torch.arange(ids.numel())
    places = _placeholders(ids).nonzero().squeeze(-1).split([one.features.shape[0] for one in seen])
    for number, (mine, one, chosen) in enumerate(zip(places, seen, kept, strict=True)):
        table[mine] = one.features
        for block, rows in zip(deep, one.deep, strict=True):
            block[mine] = rows
        visual = mine[one.visual]
        stays[visual] = False
        stays[visual[chosen]] = True
        # In the order that the method wants, in the places of the kept ones.
        source[visual[chosen].sort().values] = visual[chosen]
        of_no_patch = extra[number]
        if of_no_patch is not None:
            for block in deep:
                block[visual[chosen][of_no_patch]] = 0.0
        stand_in = None if merged is None else merged[number]
        if stand_in is not None:
            table[visual[chosen]] = stand_in
    columns = source[stays]
    axes = positions(model, given)
    left = torch.arange(columns.numel()).expand(*axes.shape[:-1], -1) if renumber else axes[..., columns]
    together = groups(model, ids, prefix)
    return reference.Prompt(
        table[columns],
        columns,
        left,
        columns.numel() if renumber else axes[..., -1:] + 1,
        tuple(drops),
        renumber,
        groups=None if together is None else together[columns],
        deep=tuple(block[columns] for block in deep),
        ids=ids.masked_fill(_placeholders(ids), tiny_parts.PAD)[columns],
    )
