"""What a decoder must compute when tokens leave between its blocks or from its cache: no hook, no cache, no padding.

One conversation at a time is recomputed from its first token at every step. Nothing is ever shortened: a token that has
left is a key that nobody sees in deeper blocks, an entry that was evicted is a key that later queries of that KV head
do not see. Attention is an own softmax. Shapes: T tokens so far, H heads, Hkv KV heads, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from models import tiny
from references import reference
from torch import Tensor

from foveate.core import Block, Method, Selection, Signals
from foveate.runtime.seams import CACHE


@dataclass(eq=False)
class _Picture:
    tokens: Tensor  # (N,) places in the conversation of what came into the decoder
    index: Tensor  # (N,) their original indices
    original: int
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(eq=False)
class _Call:
    """What one call of the model brings: tokens from `first` on."""

    first: int
    pictures: list[_Picture]
    text: Tensor  # places of what is not visual


class Conversation:
    """A row of its own, with its stages inside the decoder and its cache."""

    def __init__(self, model: Any, methods: Sequence[Method] = (), *, renumber: bool = False) -> None:
        self.model, self.decoder, self.renumber = model, model.model.language_model, renumber
        parts = [part for method in methods for part in method.parts()]
        self.layers = list(self.decoder.layers)
        self.stages = [
            (depth, number, part)
            for part in parts
            if part.site == "layer"
            for number, depth in enumerate(part.depths(len(self.layers)))
        ]
        self.evicting = next((part for part in parts if part.site == "cache"), None)
        self.embeddings = torch.empty(0, model.config.get_text_config().hidden_size)
        self.positions = torch.empty(0, dtype=torch.int64)
        self.next_position = 0
        self.pictured = False  # of text alone nothing is evicted
        heads = model.config.get_text_config().num_key_value_heads
        self.alive = [torch.empty(0, dtype=torch.bool) for _ in self.layers]  # (T,) tokens that a block runs on
        self.seen = [torch.empty(heads, 0, 0, dtype=torch.bool) for _ in self.layers]  # (Hkv, T, T)
        self.held: list[list[list[int]]] = [[[] for _ in range(heads)] for _ in self.layers]  # places, ascending
        self.score: list[list[dict[int, float]]] = [[{} for _ in range(heads)] for _ in self.layers]
        self.left = [0 for _ in self.layers]  # entries that the latest prompt left
        self.merged: dict[int, list[tuple[Tensor, Tensor]]] = {}  # before a block: places and what stands there
        self.inputs: list[Tensor] = []  # what entered each block
        self.logits = torch.empty(0)  # (T, V) of the latest call

    # -- what comes in --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prompt(self, ids: Tensor, pixel_values: Tensor | None = None, kept: Sequence[Tensor] | None = None) -> Tensor:
        """(V,) what follows ids (S,) of which only the `kept` tokens of each picture enter the decoder."""
        short = reference.shorten(self.model, ids, pixel_values, kept)
        first = self.embeddings.shape[0]
        visual = ids[short.columns] == self.model.config.image_token_id
        places = first + torch.arange(visual.numel())
        starts = (ids == self.model.config.image_token_id).nonzero().squeeze(-1)[:: tiny.TOKENS].tolist()
        pictures = []
        for start in starts:
            mine = visual & (short.columns >= start) & (short.columns < start + tiny.TOKENS)
            pictures.append(_Picture(places[mine], short.columns[mine] - start, tiny.TOKENS))
        self.pictured = self.pictured or bool(pictures)
        self._append(short.embeddings, short.positions + self.next_position)
        self.next_position += ids.numel()
        return self._run(_Call(first, pictures, places[~visual]))

    @torch.no_grad()
    def follow(self, token: Tensor) -> Tensor:
        """(V,) what follows one more token."""
        first = self.embeddings.shape[0]
        self._append(self.model.get_input_embeddings()(token)[None], torch.tensor([self.next_position]))
        self.next_position += 1
        return self._run(_Call(first, [], torch.tensor([first])))

    def answer(
        self, ids: Tensor, pixels: Tensor | None, answer: Tensor, kept: Sequence[Tensor] | None = None
    ) -> Tensor:
        """(M, V) what predicts each token of a given answer (M,)."""
        found = [self.prompt(ids, pixels, kept)]
        if self.evicting is None and answer.numel() > 1:
            return torch.cat([found[0][None], self._follow_all(answer[:-1])])
        found.extend(self.follow(token) for token in answer[:-1])
        return torch.stack(found)

    @torch.no_grad()
    def _follow_all(self, tokens: Tensor) -> Tensor:
        """(M, V) after each of some tokens: where nothing is evicted they may come at once."""
        first = self.embeddings.shape[0]
        places = torch.arange(tokens.numel())
        self._append(self.model.get_input_embeddings()(tokens), self.next_position + places)
        self.next_position += tokens.numel()
        self._run(_Call(first, [], first + places))
        return self.logits[first:]

    def entries(self, number: int) -> list[list[int]]:
        """What each KV head of a block holds, as places in the conversation."""
        return self.held[number]

    def _append(self, embeddings: Tensor, positions: Tensor) -> None:
        self.embeddings = torch.cat([self.embeddings, embeddings])
        self.positions = torch.cat([self.positions, positions])
        new, total = embeddings.shape[0], self.embeddings.shape[0]
        for number, seen in enumerate(self.seen):
            wider = torch.zeros(seen.shape[0], total, total, dtype=torch.bool)
            wider[:, : total - new, : total - new] = seen
            self.seen[number] = wider
            self.alive[number] = torch.cat([self.alive[number], torch.ones(new, dtype=torch.bool)])

    # -- what the decoder does ------------------------------------------------------------------------------------

    def _run(self, call: _Call) -> Tensor:
        hidden = self.embeddings
        self.inputs = []
        for number in range(len(self.layers)):
            for places, rows in self.merged.get(number, []):
                hidden = hidden.index_copy(0, places, rows)
            if call.pictures:
                for depth, stage, part in self.stages:
                    if depth == number:
                        hidden = self._stage(number, stage, part, hidden, call)
            self.inputs.append(hidden)
            self._look(number, call.first)
            hidden = self._block(number, hidden)
            self._remember(number, call)
        self.logits = self.model.lm_head(self.decoder.norm(hidden))
        return self.logits[self.alive[-1].nonzero()[-1, 0]]

    def _rotary(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        positions = self.positions
        if self.renumber:
            positions = (self.alive[number].long().cumsum(0) - 1).clamp(min=0)
        cos, sin = self.decoder.rotary_emb(self.embeddings[None], position_ids=positions[None])
        return positions, cos, sin

    def _block(self, number: int, hidden: Tensor) -> Tensor:
        positions, cos, sin = self._rotary(number)
        group = self.layers[number].self_attn.num_key_value_groups
        seen = self.seen[number].repeat_interleave(group, dim=0)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return self.layers[number](
            hidden[None],
            attention_mask=mask[None],
            position_ids=positions[None],
            position_embeddings=(cos, sin),
            **{CACHE: None},
            use_cache=False,
        )[0]

    def _window(self, number: int) -> int | None:
        return reference._window(self.decoder.config, number)

    def _visible(self, number: int, first: int) -> Tensor:
        """(Hkv, T - first, T): what the new queries may see: entries that are held, and new ones before them."""
        alive = self.alive[number]
        total = alive.numel()
        places = torch.arange(total)
        old = torch.zeros(len(self.held[number]), total, dtype=torch.bool)
        for head, held in enumerate(self.held[number]):
            old[head, held] = True
        new = alive & (places >= first)
        own = places[first:, None]
        visible = (old | new)[:, None, :] & (places[None] <= own)[None]
        window = self._window(number)
        if window is not None:
            visible &= (own - places[None] < window)[None]
        visible |= ((places[None] == own) & ~alive[first:, None])[None]  # what has left must see something
        return visible

    def _look(self, number: int, first: int) -> None:
        self.seen[number][:, first:] = self._visible(number, first)

    def attention(self, number: int, hidden: Tensor, seen: Tensor, queries: Tensor) -> Tensor:
        """(H, Q, T) of some places, in float64; `seen` is (Hkv, Q, T)."""
        asking, keys = self._projected(number, hidden)
        group = self.layers[number].self_attn.num_key_value_groups
        keys = keys.repeat_interleave(group, dim=0)
        logits = (asking[:, queries] @ keys.transpose(1, 2)).double() * self.layers[number].self_attn.scaling
        logits = logits.masked_fill(~seen.repeat_interleave(group, dim=0), -torch.inf)
        weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
        return weights / weights.sum(dim=-1, keepdim=True)

    def _projected(self, number: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(H, T, d), (Hkv, T, d) after rotary embedding."""
        layer = self.layers[number]
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        _, cos, sin = self._rotary(number)
        found = []
        for name in ("q", "k"):
            states = getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
            if hasattr(attention, f"{name}_norm"):
                states = getattr(attention, f"{name}_norm")(states)
            states = states.transpose(0, 1)
            low, high = states.chunk(2, dim=-1)
            found.append(states * cos[0] + torch.cat([-high, low], dim=-1) * sin[0])
        return found[0], found[1]

    # -- stages ---------------------------------------------------------------------------------------------------

    def _stage(self, number: int, stage: int, part: Method, hidden: Tensor, call: _Call) -> Tensor:
        last = int(self.alive[number].nonzero()[-1, 0])  # before any picture of this call has lost a token
        if number and stage_reads_behind(part):
            last = int(self.alive[number - 1].nonzero()[-1, 0])
        choices = [self._ask(number, stage, part, hidden, picture, call, last) for picture in call.pictures]
        for picture, selection in zip(call.pictures, choices, strict=True):
            kept = selection.indices[0]
            stays = torch.isin(picture.index, kept)
            for deep in range(number, len(self.layers)):
                self.alive[deep][picture.tokens[~stays]] = False
            if selection.features is not None:
                where = torch.stack([picture.tokens[picture.index == one].squeeze(0) for one in kept])
                self.merged.setdefault(number, []).append((where, selection.features[0]))
                hidden = hidden.index_copy(0, where, selection.features[0])
            picture.tokens, picture.index = picture.tokens[stays], picture.index[stays]
        return hidden

    def _ask(
        self, number: int, stage: int, part: Any, hidden: Tensor, picture: _Picture, call: _Call, last: int
    ) -> Selection:
        name = type(part).__name__
        if name == "FastV":
            count = part.keep if isinstance(part.keep, int) else max(1, round(picture.original * part.keep))
            count = min(count, picture.index.numel())
            return _highest(picture.index, self._behind(number, last)[:, 0, picture.tokens], count)
        if name == "PyramidDrop":
            keep = part.keep[stage]
            count = keep if isinstance(keep, int) else max(1, int(picture.original * keep))
            count = min(count, picture.index.numel())
            return _highest(picture.index, self._ahead(number, hidden, last, call)[:, 0, picture.tokens], count)
        decoder = Block(
            hidden=hidden[picture.tokens][None],
            text_query=self._behind(number, *call.text.tolist())[:, :, picture.tokens][None].float(),
            last_query=self._behind(number, last)[:, 0, picture.tokens][None].float(),
        )
        signals = Signals(
            original=picture.original,
            index=picture.index[None],
            stage=stage,
            memory=picture.memory.setdefault(id(part), {}),
            features=self.embeddings[picture.tokens][None],
            decoder=decoder,
            text=self.embeddings[call.text][None],
            text_mask=torch.ones(1, call.text.numel(), dtype=torch.bool),
            after_image=(call.text > picture.tokens.max())[None],
        )
        left = picture.index.numel()
        if name == "SparseVLM" and left < part.count(picture.original)[stage]:  # after an adaptive stage: a ceiling
            part = dataclasses.replace(part, keep=tuple(min(count, left) for count in part.count(picture.original)))
        return part.select(signals)  # type: ignore[return-value]

    def _behind(self, number: int, *queries: int) -> Tensor:
        """(H, Q, T) attention of the block that has just run."""
        asking = torch.tensor(queries)
        return self.attention(number - 1, self.inputs[number - 1], self.seen[number - 1][:, asking], asking)

    def _ahead(self, number: int, hidden: Tensor, last: int, call: _Call) -> Tensor:
        """(H, 1, T) attention that the next block would pay, on the tokens that are still there."""
        visible = self._visible(number, call.first)[:, [last - call.first]]
        return self.attention(number, hidden, visible, torch.tensor([last]))

    # -- cache ----------------------------------------------------------------------------------------------------

    def _remember(self, number: int, call: _Call) -> None:
        new = (call.first + self.alive[number][call.first :].nonzero().squeeze(-1)).tolist()
        first_prompt = not self.held[number][0]
        window = self._window(number)
        for held in self.held[number]:
            held.extend(new)
            if window is not None:
                del held[: max(0, len(held) - (window - 1))]
        if self.evicting is None:
            return
        prompt = first_prompt or len(self.embeddings) - call.first > 1
        if prompt:
            self.left[number] = len(self.held[number][0])
        name = type(self.evicting).__name__
        if name == "H2O":
            self._count(number, new)
            if not self.pictured:
                return
            heavy, recent = _h2o_budget(self.evicting, self.left[number])
            for head, held in enumerate(self.held[number]):
                self.held[number][head] = _heavy_and_recent(held, self.score[number][head], heavy, recent)
        elif prompt and self.pictured:
            assert name == "SnapKV"
            self._snap(number, new)

    def _count(self, number: int, new: list[int]) -> None:
        """Attention received so far, one number per entry and KV head."""
        asking = torch.tensor(new)
        weights = self.attention(number, self.inputs[number], self.seen[number][:, asking], asking)
        group = self.layers[number].self_attn.num_key_value_groups
        received = weights.unflatten(0, (-1, group)).sum(dim=2).mean(dim=1)  # (Hkv, T)
        for head, held in enumerate(self.held[number]):
            before = self.score[number][head]
            self.score[number][head] = {one: before.get(one, 0.0) + float(received[head, one]) for one in held}

    def _snap(self, number: int, new: list[int]) -> None:
        part: Any = self.evicting
        left = self.left[number]
        if isinstance(part.capacity, int):
            capacity, window = part.capacity, part.window
        else:
            capacity = max(1, int(left * part.capacity))
            window = part.window if part.window < capacity else max(1, capacity // 2)
        if left <= capacity:
            return
        asking = torch.tensor(new[-window:])
        for head, held in enumerate(self.held[number]):
            places = torch.tensor(held)
            seen = torch.zeros(len(self.held[number]), asking.numel(), len(self.embeddings), dtype=torch.bool)
            seen[:, :, places] = places[None] <= asking[:, None]
            weights = self.attention(number, self.inputs[number], seen, asking)
            group = self.layers[number].self_attn.num_key_value_groups
            older = held[: len(held) - asking.numel()]
            looked = weights[head * group : (head + 1) * group, :, older].sum(dim=1).mean(dim=0).numpy()
            half = part.kernel // 2
            padded = numpy.pad(looked, half)
            smooth = numpy.array([padded[at : at + part.kernel].mean() for at in range(len(older))])
            best = numpy.argsort(-smooth, kind="stable")[: capacity - window]
            self.held[number][head] = sorted([older[at] for at in best] + new[-window:])


def stage_reads_behind(part: Method) -> bool:
    """Whether a method reads the block that has run, rather than the one to come."""
    return type(part).__name__ != "PyramidDrop"


def _highest(index: Tensor, attention: Tensor, count: int) -> Selection:
    """(N,), (H, N): the highest on average over heads; the lowest index wins a tie."""
    order = numpy.argsort(-attention.mean(dim=0).numpy(), kind="stable")[:count]
    return Selection([index[torch.from_numpy(numpy.sort(order))]])


def _h2o_budget(part: Any, prompt: int) -> tuple[int, int]:
    recent = part.recent if isinstance(part.recent, int) else max(1, int(prompt * part.recent))
    if isinstance(part.heavy, int):
        return part.heavy, recent
    if isinstance(part.recent, float) and part.heavy + part.recent == 1.0:
        return prompt - recent, recent
    return max(1, int(prompt * part.heavy)), recent


def _heavy_and_recent(held: list[int], score: dict[int, float], heavy: int, recent: int) -> list[int]:
    if len(held) <= heavy + recent:
        return held
    older = held[: len(held) - recent]
    best = sorted(older, key=lambda one: (-score[one], one))[:heavy]
    return sorted(best) + held[len(held) - recent :]
