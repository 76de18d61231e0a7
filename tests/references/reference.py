"""What a pruned model must compute, found without the runtime: no hook, no cache, no padding, one row at a time.

Dropped columns are deleted by hand, the mask is written out, positions are those of the unpruned prompt, and every
token of an answer is computed from scratch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.runtime.seams import CACHE


@dataclass(frozen=True, eq=False)
class Drop:
    """What leaves between two decoder blocks: the first `depth` blocks see everything that came in."""

    depth: int
    stay: Tensor  # (n,) columns of the unpruned row
    merged: tuple[Tensor, Tensor] | None = None  # (m,) columns and (m, D) rows that replace what stands there


@dataclass(frozen=True, eq=False)
class Prompt:
    """One shortened row: L tokens of width D."""

    embeddings: Tensor  # (L, D)
    columns: Tensor  # (L,) of the unpruned row
    positions: Tensor  # (L,), or (3, L) where they have several axes
    next_position: int | Tensor  # (3, 1) where positions have several axes
    drops: tuple[Drop, ...] = ()
    renumbered: bool = False  # positions are counted anew wherever tokens leave
    groups: Tensor | None = None  # (L,) tokens of one group see each other, whichever comes first; -1 for none
    deep: tuple[Tensor, ...] = ()  # (L, D) each, added to the output of the first blocks
    ids: Tensor | None = None  # (L,) of the tokens, padding in place of the visual ones


def encode(model: Any, pixel_values: Tensor | None) -> list[Tensor]:
    """(N, E) of each picture: what the projector is to read."""
    if pixel_values is None:
        return []
    tower, config = model.model.vision_tower, model.config
    hidden = tower(pixel_values, output_hidden_states=True).hidden_states[config.vision_feature_layer]
    return list(hidden[:, 1:] if config.vision_feature_select_strategy == "default" else hidden)


def project(model: Any, encoded: Tensor) -> Tensor:
    """(K, E) -> (K, D)."""
    return model.model.multi_modal_projector(encoded[None])[0]


def shorten(
    model: Any,
    ids: Tensor,
    pixel_values: Tensor | None,
    kept: Sequence[Tensor] | None = None,
    merged: Sequence[Tensor | None] | None = None,
    *,
    drops: Sequence[Drop] = (),
    renumber: bool = False,
) -> Prompt:
    """A row of ids (S,) with only the kept tokens of each of its pictures.

    Args:
        kept: original indices, one tensor per picture, in the order in which the tokens go on; None keeps all.
        merged: (K, D) tensors that stand in for the pictures' own tokens.
        renumber: count positions anew, as no correct pruning does.
    """
    features = [project(model, one) for one in encode(model, pixel_values)]
    rows: list[Tensor] = []
    columns: list[int] = []
    column, picture = 0, 0
    while column < ids.numel():
        if ids[column] != model.config.image_token_id:
            rows.append(model.get_input_embeddings()(ids[column]))
            columns.append(column)
            column += 1
            continue
        own = features[picture]
        order = torch.arange(own.shape[0]) if kept is None else kept[picture]
        stand_in = None if merged is None else merged[picture]
        rows.extend(own[order] if stand_in is None else stand_in)
        columns.extend((column + order).tolist())
        column += own.shape[0]
        picture += 1
    assert picture == len(features), "the row has fewer pictures than were given"
    places = torch.tensor(columns)
    positions = torch.arange(places.numel()) if renumber else places
    following = places.numel() if renumber else ids.numel()
    return Prompt(torch.stack(rows), places, positions, following, tuple(drops), renumber)


def decode(
    model: Any,
    prompt: Prompt,
    follow: Tensor,
    words: Tensor | None = None,
    states: list[tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The prompt and M tokens (M, D) that follow it, layer by layer.

    Args:
        words: (M,) ids of what follows, where each layer has an input of its own for each token.
        states: is given what enters the first block, what each gives and the last norm, all with their columns.

    Returns:
        Logits (n + M, V) of what is left after the last block, and the columns (n + M,) of it, -1 for what follows.
    """
    decoder = model.get_decoder()
    more = follow.shape[0]
    hidden = torch.cat([prompt.embeddings, follow])
    axes = prompt.positions.shape[:-1]
    positions = torch.cat([prompt.positions, (prompt.next_position + torch.arange(more)).expand(*axes, -1)], dim=-1)
    groups = torch.full((hidden.shape[0],), -1)
    if prompt.groups is not None:
        groups[: prompt.groups.numel()] = prompt.groups
    deep = [torch.cat([one, torch.zeros(more, one.shape[1])]) for one in prompt.deep]
    own = _own_inputs(decoder, prompt, hidden, words)
    shared: dict[str, Any] = {}
    columns = torch.cat([prompt.columns, torch.full((more,), -1)])
    order = torch.arange(columns.numel())
    states = [] if states is None else states
    states.append((hidden, columns))
    for number, layer in enumerate(decoder.layers):
        for drop in prompt.drops:
            if drop.depth != number:
                continue
            if drop.merged is not None:
                where = (columns[None] == drop.merged[0][:, None]).int().argmax(dim=1)
                hidden = hidden.index_copy(0, where, drop.merged[1])
            stays = torch.isin(columns, drop.stay) | (columns < 0)
            hidden, positions, columns, order = hidden[stays], positions[..., stays], columns[stays], order[stays]
            if prompt.renumbered:
                positions = torch.arange(columns.numel()).expand(*axes, -1)
        window = _window(decoder.config, number)
        one_way = decoder.config.model_type == "gemma4_text" and window is None
        seen = torch.full_like(order, -1) if one_way else groups[order]
        hidden = layer(
            hidden[None],
            attention_mask=_mask(order, window, seen).to(hidden.dtype)[None, None],
            position_ids=None,
            position_embeddings=_rotary(decoder, number, hidden[None], positions.unsqueeze(-2)),
            **{CACHE: None},
            use_cache=False,
            **({} if own is None else {"per_layer_input": own[None, :, number]}),
            **({"shared_kv_states": shared} if hasattr(layer.self_attn, "store_full_length_kv") else {}),
        )[0]
        states.append((hidden, columns))
        if number < len(deep):
            hidden = hidden + deep[number][order]
    states[-1] = (decoder.norm(hidden), columns)
    return model.lm_head(states[-1][0]), columns


def _own_inputs(decoder: Any, prompt: Prompt, hidden: Tensor, words: Tensor | None) -> Tensor | None:
    """(L, layers, p) what each layer is given of each token beside the hidden states; None where it is nothing."""
    if not getattr(decoder.config, "hidden_size_per_layer_input", None):
        return None
    assert prompt.ids is not None and words is not None
    ids = torch.cat([prompt.ids, words])[None]
    return decoder.project_per_layer_inputs(hidden[None], decoder.get_per_layer_inputs(ids, None))[0]


def _rotary(decoder: Any, layer: int, hidden: Tensor, positions: Tensor) -> Any:
    """By kind of layer where a decoder has several."""
    if hasattr(decoder.rotary_emb, "layer_types"):
        return decoder.rotary_emb(hidden, positions, decoder.config.layer_types[layer])
    return decoder.rotary_emb(hidden, position_ids=positions)


def _mask(order: Tensor, window: int | None, groups: Tensor) -> Tensor:
    """(L, L): 0 where the column may be seen, far below 0 where not. `order` counts tokens before the first block."""
    behind = order[:, None] - order[None]
    seen = (behind >= 0) | ((groups[:, None] == groups[None]) & (groups[None] >= 0))
    if window is not None:
        seen &= behind < window
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def _window(config: Any, layer: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    slides = True if kinds is None else kinds[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None


@torch.no_grad()
def answer_logits(model: Any, prompt: Prompt, answer: Tensor) -> Tensor:
    """(M, V): what predicts each token of a given answer (M,)."""
    logits, _ = decode(model, prompt, model.get_input_embeddings()(answer[:-1]), answer[:-1])
    return logits[-answer.numel() :]


@torch.no_grad()
def greedy(model: Any, prompt: Prompt, steps: int) -> Tensor:
    """(steps,) the most likely answer, each token from scratch."""
    answer = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        logits = answer_logits(model, prompt, torch.cat([answer, answer.new_zeros(1)]))
        answer = torch.cat([answer, logits[-1].argmax()[None]])
    return answer


def log_probability(model: Any, prompt: Prompt, answer: Tensor) -> float:
    """Sum over the answer's tokens."""
    logits = answer_logits(model, prompt, answer).log_softmax(dim=-1)
    return float(logits.gather(1, answer[:, None]).sum())


def tower_attention(model: Any, pixel_values: Tensor) -> list[Tensor]:
    """(B, H, CLS + N, CLS + N) of each encoder block, from an eager copy's `output_attentions`."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        return list(tower(pixel_values, output_attentions=True).attentions)


def significance(attention: Tensor, *, skip: int, high: bool = True) -> Tensor:
    """FoPru, equations 1 to 4: (B, H, skip + N, skip + N) -> (B, N)."""
    mean = attention.double().mean(dim=1)[:, skip:, skip:]
    given, received = mean.mean(dim=2), mean.mean(dim=1)
    larger = given.var(dim=1) > received.var(dim=1)
    return torch.where((larger == high)[:, None], given, received)
