"""Evicts entries from the KV cache, layer by layer and KV head by KV head, and keeps masks in step with what is left.

Coordinates: `ages` count the entries that layer 0 has ever been given (the timeline of the cache). Shapes: R rows
(beams included), H heads, Hkv KV heads, L entries that a layer holds, Q new tokens of a call, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.choosing.timeline import Held, Timeline
from foveate.core import CacheBlock, FoveateError, Method, Signals
from foveate.ops.device import Complaints, noting, on_device, on_host
from foveate.ops.scores import causal_received
from foveate.runtime.decoder import together
from foveate.runtime.decoder.layers import Descent, window_of
from foveate.runtime.decoder.probe import DecoderProbe
from foveate.runtime.seams import CACHE, unfit
from foveate.spec import format as format_spec


@dataclass(eq=False)
class _Heard:
    """What one layer's attention showed in this call."""

    received: Tensor | None = None  # (R, Hkv, L) sums over the call's queries
    asked: together.Asked | None = None  # by a single token, in place of the sums, where no mask is
    queries: Tensor | None = None  # (R, H, Q, d), those of padding first
    asking: list[int] | None = None  # of each row, how many of them are no padding; None where all are


@dataclass(eq=False)
class Evictor:
    """One cache method at work on every layer of a decoder."""

    part: Method
    layers: Sequence[Any]
    descent: Descent | None = None  # of the prefill in progress, where layers see different tokens
    complaints: Complaints = field(default_factory=Complaints)  # what it did wrong, not yet read from the device
    _heard: dict[int, _Heard] = field(default_factory=dict)
    _waiting: list[together.Waiting] = field(default_factory=list)  # layers of the token in progress
    _listening: bool = False  # in this call, whose cache is to lose entries
    _counted: Tensor | None = None  # (R, Q) bool, queries of this call that are no padding; None where all are
    _padded: tuple[int, list[int]] | None = None  # a call's, by the entries before it
    _counts: list[int] = field(default_factory=list)  # of each row, how many they are
    _places: tuple[Timeline, int, Tensor, Tensor] | None = None  # a call's, and which of them are no padding

    def __post_init__(self) -> None:
        # What stays as it is, so that no layer looks it up at each token.
        self._windows = [window_of(layer) for layer in self.layers]
        self._needs = frozenset(self.part.needs)
        self._at_tokens = getattr(self.part, "when", "decode") == "decode"
        self._hears_tokens = self._at_tokens or "cache.scores" in self._needs
        self._alike = self._at_tokens and self._needs == {"cache.scores", "cache.age"}  # all layers' blocks are

    def listen(self, probe: DecoderProbe) -> None:
        """Hear every layer's queries and keys."""
        for number in range(len(self.layers)):
            probe.on_attention(number, self._hear)

    def forget(self) -> None:
        """A call is over."""
        self._heard, self.descent, self._listening, self._padded, self._places = {}, None, False, None, None
        self._waiting = []

    def check(self) -> None:
        """Refuse what the method has done wrong since this was last asked; where it acted, this waits for the device.

        Raises:
            FoveateError: it keeps what is not there, or its scores are no numbers.
        """
        self.complaints.refuse(on_host(self.complaints.counts()))

    # -- before a layer -------------------------------------------------------------------------------------------

    def mask(self, number: int, timeline: Timeline, options: dict[str, Any]) -> dict[str, Any]:
        """The model's mask on the entries that each KV head of this layer holds."""
        held = timeline.held[number]
        mask = options.get("attention_mask")
        new = timeline.seen - timeline.before
        window = self._windows[number]
        if held.order is not None and (new > 1 or not held.unpadded):
            together.in_order(options[CACHE].layers[number], held)
        if held.unpadded and window is None and (mask is None or new == 1):
            return {**options, "attention_mask": None}
        columns, valid = held.ages, held.valid
        fresh = self._fresh(timeline)
        columns = torch.cat([columns, fresh[0][:, None].expand(-1, columns.shape[1], -1)], dim=2)
        valid = torch.cat([valid, fresh[1]], dim=1)[:, None, None, :]
        if mask is None:
            return {**options, "attention_mask": valid}
        if mask.ndim != 4:
            raise FoveateError(
                f"{format_spec(self.part)} holds other entries in each head, which flash attention's padding mask "
                "cannot say; load the model with attn_implementation='sdpa' for padded batches"
            )
        return {**options, "attention_mask": self._per_head(number, mask, columns, valid)}

    def _per_head(self, number: int, mask: Tensor, columns: Tensor, valid: Tensor) -> Tensor:
        mask = mask.expand(columns.shape[0], 1, *mask.shape[2:])
        heads = columns.shape[1]
        index = columns[:, :, None, :].expand(-1, -1, mask.shape[2], -1)
        mask = mask.expand(-1, heads, -1, -1).gather(3, index)
        closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask.masked_fill(~valid, closed)
        group = self.layers[number].self_attn.num_key_value_groups
        return mask.repeat_interleave(group, dim=1)

    def _fresh(self, timeline: Timeline) -> tuple[Tensor, Tensor]:
        """Timeline places (R, Q) of the call's tokens in this layer, and which of them are no padding."""
        if self.descent is not None:
            new = self.descent.present()
            return new.rows + timeline.before, new.valid
        before, rows, latest = timeline.before, timeline.kept.shape[0], self._places
        if latest is None or latest[0] is not timeline or latest[1] != before or latest[2].shape[0] != rows:
            places = torch.arange(before, timeline.seen, device=timeline.kept.device).expand(rows, -1)
            latest = self._places = timeline, before, places, timeline.valid_places(timeline.seen)[:, before:]
        return latest[2:]  # all layers see the same

    def _fresh_counts(self, timeline: Timeline) -> list[int]:
        """Of each row, how many of the call's tokens in this layer are no padding."""
        if self.descent is not None:
            counts: list[int] = self.descent.present().host_valid.sum(dim=1).tolist()
            return counts
        new = timeline.seen - timeline.before
        if not timeline.padded or timeline.before >= timeline.entries:  # what is generated is none
            return [new] * timeline.kept.shape[0]
        if self._padded is None or self._padded[0] != timeline.before:  # all layers see the same
            counts = timeline.valid_places(timeline.seen)[:, timeline.before :].sum(dim=1).tolist()
            self._padded = timeline.before, counts
        return self._padded[1]

    # -- while a layer runs ---------------------------------------------------------------------------------------

    def _hear(
        self, number: int, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float, softcap: float | None
    ) -> None:
        if not self._listening:
            return
        heard = self._heard[number] = _Heard()
        if "cache.window_queries" in self._needs:
            heard.queries = queries
            if self._counted is not None:
                order = torch.argsort(self._counted.long(), dim=1, stable=True)[:, None, :, None]
                heard.queries = queries.gather(2, order.expand(-1, queries.shape[1], -1, queries.shape[-1]))
                heard.asking = self._counts
        if "cache.scores" in self._needs:
            if softcap:
                raise FoveateError(f"{format_spec(self.part)} cannot score a decoder that caps its attention logits")
            if queries.shape[2] == 1 and mask is None and self._counted is None:
                heard.asked = together.Asked(queries, keys, scale)
            else:
                with torch.no_grad():
                    heard.received = causal_received(queries, keys, scale, mask, self._counted)

    # -- after a layer --------------------------------------------------------------------------------------------

    def before_layer(self, number: int, timeline: Timeline, descent: Descent | None) -> None:
        """Note which tokens come, and which of them are padding, whose attention does not count."""
        prompt = timeline.seen - timeline.before > 1
        self.descent, self._listening = descent, prompt or self._hears_tokens
        self._counts, self._counted = self._fresh_counts(timeline), None
        if prompt:
            valid = self._fresh(timeline)[1]
            self._counted = None if min(self._counts) == valid.shape[1] else valid

    def after_layer(self, number: int, timeline: Timeline, layer: Any) -> None:
        """Take into account what this layer has just cached, and evict what is over the budget."""
        heard, held = self._heard.pop(number) if self._listening else _Heard(), timeline.held.get(number)
        if held is not None and self._only_comes(number, held) and _entries(layer) == held.entries + 1:
            held.come(timeline.before)
        elif held is not None and self._waits(number, timeline, layer, held, heard):
            assert heard.asked is not None
            self._waiting.append(together.Waiting(number, layer, held, heard.asked))
        else:
            self._after(number, timeline, layer, heard)
        if number + 1 == len(self.layers) and self._waiting:
            waiting, self._waiting = self._waiting, []
            done = together.alike(waiting, len(self.layers)) and together.evict(waiting, timeline.before, self._asked)
            for one in [] if done else waiting:
                self._after(one.number, timeline, one.layer, _Heard(asked=one.asked))

    @torch.no_grad()
    def _after(self, number: int, timeline: Timeline, layer: Any, heard: _Heard) -> None:
        earlier = timeline.held.get(number)
        if heard.asked is not None:
            heard.received = heard.asked.received()
        if earlier is not None and earlier.order is not None:
            heard.received = together.in_order(layer, earlier, heard.received)
        held = self._grown(number, timeline, earlier, heard)
        kept = _entries(layer)
        slides = self._windows[number] is not None  # and forgets by itself
        if kept > held.entries or (kept < held.entries and not slides):
            raise unfit(f"layer {number} of the cache holds {kept} entries where {held.entries} were planned")
        held.cut(kept)
        timeline.held[number] = held
        prompt = earlier is None or timeline.seen - timeline.before > 1
        if prompt:
            held.prompts = list(held.counts)
        if prompt or self._at_tokens:
            self._evict(layer, held, heard, timeline.pictured)

    def _only_comes(self, number: int, held: Held) -> bool:
        """Whether a layer holds one token more and that is all: no score, nothing to leave or be forgotten."""
        plain = held.order is None and held.scores is None and self._windows[number] is None
        return plain and not self._listening and self.descent is None and set(self._counts) == {1}

    def _waits(self, number: int, timeline: Timeline, layer: Any, held: Held, heard: _Heard) -> bool:
        """Whether what a token drops from this layer is decided together with what it drops from the others."""
        return (
            self._alike
            and heard.asked is not None
            and timeline.seen - timeline.before == 1
            and self._windows[number] is None
            and all(timeline.pictured)
            and together.fits(layer, number, held)
        )

    def _grown(self, number: int, timeline: Timeline, earlier: Held | None, heard: _Heard) -> Held:
        places, valid = self._fresh(timeline)
        attention = self.layers[number].self_attn  # its configuration may speak of other layers' heads
        heads = attention.config.num_attention_heads // attention.num_key_value_groups
        ages = places[:, None].expand(-1, heads, -1)
        scores = heard.received
        if earlier is None:
            return Held(ages, valid, scores, list(self._counts), list(self._counts))
        if scores is not None and earlier.scores is not None:
            scores[..., : earlier.scores.shape[2]].add_(earlier.scores)
        ages, valid = torch.cat([earlier.ages, ages], dim=2), torch.cat([earlier.valid, valid], dim=1)
        counts = [old + new for old, new in zip(earlier.counts, self._counts, strict=True)]
        return Held(ages, valid, scores, counts, earlier.prompts)

    def _evict(self, layer: Any, held: Held, heard: _Heard, pictured: list[bool]) -> None:
        if not any(pictured):
            return
        if not held.unpadded:
            self._compact(layer, held)
        counts, prompts = held.counts, held.prompts
        asking = heard.asking or [0 if heard.queries is None else heard.queries.shape[2]] * len(counts)
        groups: dict[tuple[int, int, int], list[int]] = {}
        for row, key in enumerate(zip(counts, prompts, asking, strict=True)):
            if pictured[row]:
                groups.setdefault(key, []).append(row)
        if len(groups) == 1 and all(pictured) and held.unpadded:
            ((count, prompt, asked),) = groups
            slots = self._select(layer, held, heard, list(range(len(counts))), count, prompt, asked)
            if slots.shape[2] < count:
                self._take(layer, held, slots, None, [slots.shape[2]] * len(counts))
            return
        chosen: dict[int, Tensor] = {}
        for (count, prompt, asked), rows in groups.items():
            positions = self._select(layer, held, heard, rows, count, prompt, asked)
            for place, row in enumerate(rows):
                chosen[row] = positions[place]
        every = torch.arange(held.ages.shape[2], device=held.ages.device).expand(held.ages.shape[1], -1)
        chosen.update({row: every[:, -count:] for row, count in enumerate(counts) if not pictured[row]})
        longest = max(slots.shape[-1] for slots in chosen.values())
        if longest == held.ages.shape[2] and all(chosen[row].shape[-1] == count for row, count in enumerate(counts)):
            return
        kept = [chosen[row].shape[-1] for row in range(len(chosen))]
        every_slot = [torch.nn.functional.pad(chosen[row], (longest - kept[row], 0)) for row in range(len(chosen))]
        filled = torch.arange(longest) >= longest - torch.tensor(kept)[:, None]
        self._take(layer, held, torch.stack(every_slot), on_device(filled, held.valid.device), kept)

    def _select(
        self, layer: Any, held: Held, heard: _Heard, rows: list[int], count: int, prompt: int, asking: int
    ) -> Tensor:
        """(B, Hkv, K) slots that stay in rows that hold `count` entries each, all at the end of their row."""
        total = held.ages.shape[2]
        of = None if len(rows) == held.ages.shape[0] else on_device(torch.tensor(rows), held.ages.device)

        def theirs(values: Tensor, first: int = total - count) -> Tensor:
            values = values if of is None else values[of]
            return values[:, :, first:] if first else values

        ages, window = theirs(held.ages), None
        if heard.queries is not None:  # a later prompt may be shorter than the window
            window = theirs(heard.queries, heard.queries.shape[2] - min(asking, getattr(self.part, "window", 1)))
        block = CacheBlock(
            scores=None if held.scores is None else theirs(held.scores),
            age=ages,
            keys=theirs(layer.keys) if "cache.keys" in self.part.needs else None,
            window_queries=window,
            prompt_length=prompt,
        )
        slots, _ = self._asked(block)
        return slots if total == count else slots + (total - count)

    def _asked(self, block: CacheBlock) -> tuple[Tensor, Tensor]:
        """(B, Hkv, K) entries of a block that stay, ascending, and their ages."""
        ages = block.age
        assert ages is not None
        count = ages.shape[2]
        index = torch.arange(count, device=ages.device).expand(ages.shape[0], -1)
        signals = Signals(original=count, index=index, cache=block)
        lacking = signals.lacking(self.part.needs)
        if lacking:
            raise FoveateError(f"{format_spec(self.part)} reads {', '.join(lacking)}, which no layer's cache shows")
        with noting(self.complaints):
            selection: Any = self.part.select(signals)
        if selection.slots is not None:
            return selection.slots, selection.positions
        if selection.positions is ages:
            return index[:, None].expand_as(ages), ages
        slots = self._found(selection, ages)
        return slots, ages.gather(2, slots)

    def _found(self, selection: Any, ages: Tensor) -> Tensor:
        """Where the positions that somebody's method keeps stand; what stands nowhere is a complaint."""
        wanted = selection.positions.sort(dim=-1).values
        slots = torch.searchsorted(ages.contiguous(), wanted.contiguous()).clamp(max=ages.shape[2] - 1)
        wrong = (ages.gather(2, slots) != wanted).sum() + (wanted[..., 1:] == wanted[..., :-1]).sum()
        words = f"{format_spec(self.part)} keeps a cache entry that is not there, or one twice"
        self.complaints.add(wrong, words)  # a token is not worth a wait for the device: `check` comes later
        return slots

    def _compact(self, layer: Any, held: Held) -> None:
        """Padding out, entries to the right, so that every row's own entries stand at its end."""
        order = torch.argsort(held.valid.long(), dim=1, stable=True)
        longest = max(held.counts)
        order = order[:, order.shape[1] - longest :]
        filled = held.valid.gather(1, order)
        self._take(layer, held, order[:, None].expand(-1, held.ages.shape[1], -1), filled, held.counts)

    def _take(self, layer: Any, held: Held, slots: Tensor, filled: Tensor | None, counts: list[int]) -> None:
        """Keep (R, Hkv, K) slots of everything that has one entry per slot; `filled` is None where none is padding."""
        rows, heads, entries = layer.keys.shape[:3]
        first = torch.arange(0, rows * heads * entries, entries, device=slots.device).view(rows, heads, 1)
        entry = (slots + first).flatten()  # whole entries are copied, where gather() looks at each number
        for name in ("keys", "values"):
            kept = getattr(layer, name).flatten(0, 2).index_select(0, entry)
            setattr(layer, name, kept.view(*slots.shape, -1))
        held.take(slots, filled, counts)


def _entries(layer: Any) -> int:
    """What a layer of the cache holds, an empty one included."""
    return layer.keys.shape[2] if layer.is_initialized else 0
