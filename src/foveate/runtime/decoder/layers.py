"""Shortens the sequence between decoder layers: which rows a deep layer sees, its masks, and what its cache holds.

Coordinates: `columns` count the entries of layer 0 (the prompt after the input site, then every later token); a group
of deep layers holds some of them. Shapes: R rows (beams included), S' new tokens at layer 0, E entries cached before,
n entries of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foveate.choosing.choose import Outcome, choose_inside
from foveate.choosing.images import Image
from foveate.choosing.record import Stopwatch
from foveate.choosing.signals import Depth
from foveate.choosing.timeline import Group, Timeline, group_of
from foveate.choosing.widen import speakers
from foveate.core import Block, FoveateError, Method
from foveate.ops.device import on_device
from foveate.runtime.decoder.probe import DecoderProbe, QueriesAndKeys
from foveate.runtime.seams import CACHE
from foveate.runtime.shortened import Shortened


@dataclass(frozen=True)
class Stage:
    """One stage of one part inside the decoder."""

    part: Method
    number: int
    depth: int  # decoder blocks that run at full length before it


def stages_of(parts: Sequence[Method], layers: int) -> list[Stage]:
    """Every stage inside the decoder, by depth; stages of one depth in the order of their parts."""
    stages = [
        Stage(part, number, depth)
        for part in parts
        if part.site == "layer"
        for number, depth in enumerate(part.depths(layers))
    ]
    return sorted(stages, key=lambda stage: stage.depth)


@dataclass(frozen=True, eq=False)
class Left:
    """New tokens of layer 0 that are still there, and which are no padding: (R, n) on the device and on the host."""

    rows: Tensor
    valid: Tensor
    host_rows: Tensor
    host_valid: Tensor

    @property
    def unpadded(self) -> bool:
        """None of them is padding."""
        return bool(self.host_valid.all())


@dataclass(eq=False)
class Descent:
    """One prefill on its way down the decoder, with the stages that are still to come.

    Attributes:
        call: its context.
        decoder: the model's, with layers and a last norm.
    """

    call: Shortened
    stages: list[Stage]
    decoder: Any
    probe: DecoderProbe
    memories: dict[int, dict[tuple[int, ...], dict[str, Any]]] = field(default_factory=dict)
    speaking: list[Tensor | None] = field(default_factory=list)  # of each layer: who speaks in the places of layer 0
    left: Left | None = None  # new tokens of layer 0 that are still there; None while all are
    prompt: Left = field(init=False)  # all of them
    behind: Left | None = None  # as the block behind ran on them
    _shared: dict[Any, Any] = field(default_factory=dict)  # what layers of one group share

    def __post_init__(self) -> None:
        plan = self.call.plan.repeat(self.call.repeats)
        columns = torch.arange(plan.valid.shape[1]).expand(plan.valid.shape)
        self.prompt = Left(on_device(columns, plan.valid.device), plan.valid, columns, plan.host.valid)
        # Where an earlier prompt changed what the cache holds, this one's groups must change as well.
        self.probe.open(self._cached)
        self._boundaries = {stage.depth for stage in self.stages} | {group.first for group in self.call.earlier}

    def before_layer(self, number: int, hidden: Tensor, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What layer `number` gets to see in place of what the model hands it. (R, n, D) in, (R, n', D) out."""
        self.behind = self.left
        while self.stages and self.stages[0].depth == number:
            if self.call.earlier:  # a stage may look ahead, by what this layer held before and what has come this far
                self._note_group(number)
            self.call.stopwatches.append(Stopwatch(hidden.device))
            with self.call.stopwatches[-1]:
                hidden = self._run(self.stages.pop(0), number, hidden, options)
            if self.left is not None:
                self._note_group(number)
        if number in self._boundaries and self.call.earlier:
            self._note_group(number)
        if self.call.timeline.group(number) is not None:
            options = self.narrow(number, options)
        if self.left is not None and self.left is not self.behind:
            self.speaking.append(speakers(self.left.rows, self.left.valid, self.prompt.rows.shape[1]))
        else:
            self.speaking.append(self.speaking[-1] if self.speaking else None)
        return hidden, options

    def add(self, hidden: Tensor, visual: Tensor, features: Tensor) -> Tensor:
        """Features (V, D) of the visual tokens of layer 0, which (R, S') marks, added to those that are still there."""
        assert self.left is not None
        whole = hidden.new_zeros(*visual.shape, hidden.shape[-1])
        whole = whole.masked_scatter(visual.to(hidden.device)[..., None], features.to(hidden))
        return hidden + _take(whole, self.left.rows) * self.left.valid[..., None]

    # -- choosing -------------------------------------------------------------------------------------------------

    def _run(self, stage: Stage, number: int, hidden: Tensor, options: dict[str, Any]) -> Tensor:
        view = _View(self, stage, number, hidden, options)
        self.probe.close(stage.depth - 1)
        rows = [self.call.rows_of(image) for image in self.call.images]
        memory = self.memories.setdefault(id(stage.part), {})
        at = Depth(stage.number, stage.depth, memory, view.block)
        outcomes = choose_inside(stage.part, self.call.images, hidden, {}, self.call.prompt, at)
        before = [image.index for image in self.call.images]
        self.call.images = [outcome.tokens for outcome in outcomes]
        return self._drop(hidden, rows, view.places, before, outcomes)

    def _drop(
        self,
        hidden: Tensor,
        rows: Sequence[slice],
        places: Sequence[Tensor],
        before: Sequence[Tensor],
        outcomes: Sequence[Outcome[Image]],
    ) -> Tensor:
        """Take out the tokens that no image kept, and write merged ones where their representative stood.

        Args:
            rows: of each image.
            places: (N,) of its tokens in these rows, before the stage; on the host.
            before: (N,) their original indices.
        """
        stays = torch.ones(hidden.shape[:2], dtype=torch.bool)
        if any(outcome.features is not None for outcome in outcomes):
            hidden = hidden.clone()
        for outcome, row, place, index in zip(outcomes, rows, places, before, strict=True):
            kept = outcome.tokens.index
            stays[row, place[~torch.isin(index, kept)]] = False
            if outcome.features is not None:
                at = place[_inverse(index, torch.ones_like(index, dtype=torch.bool))[kept]]
                hidden[row, on_device(at, hidden.device)] = outcome.features
        if bool(stays.all()):
            return hidden
        # Padding leaves as well: a short row must not keep the batch as long as it was.
        before_it = self.present()
        stays &= before_it.host_valid
        chosen, filled = _right_aligned(stays)
        rows_left, valid = before_it.host_rows.gather(1, chosen), before_it.host_valid.gather(1, chosen) & filled
        device = hidden.device
        self.left = Left(on_device(rows_left, device), on_device(valid, device), rows_left, valid)
        return _take(hidden, on_device(chosen, device))

    def _note_group(self, number: int) -> None:
        """Write what layers from `number` on will hold into the timeline, where later calls read it."""
        columns, valid = self._past(group_of(self.call.earlier, number))
        new, reach = self.present(), self.call.entries + self.call.plan.index.shape[1]
        kept, valid = torch.cat([columns, new.rows + self.call.entries], dim=1), torch.cat([valid, new.valid], dim=1)
        # Of what is cached the device alone knows.
        group = Group(number, kept, valid, reach, unpadded=None if self.call.entries else new.unpadded)
        self.call.timeline.groups = [*(one for one in self.call.timeline.groups if one.first < number), group]

    def present(self) -> Left:
        """New tokens of layer 0 that are still there."""
        return self.prompt if self.left is None else self.left

    def _cached(self, number: int) -> int:
        """Entries of earlier prompts that layer `number` still holds."""
        held = self._past(group_of(self.call.earlier, number))[0].shape[1]
        window = window_of(self.decoder.layers[number])
        return held if window is None else min(held, window - 1)

    def _past(self, group: Group | None) -> tuple[Tensor, Tensor]:
        """Columns (R, E') and validity of what this layer's cache held before the prompt."""
        device, rows = self.prompt.valid.device, self.prompt.valid.shape[0]
        if group is not None:
            return group.columns(self.call.entries), group.valid_columns(self.call.entries)
        columns = torch.arange(self.call.entries, device=device).expand(rows, -1)
        return columns, self.call.timeline.valid[:, : self.call.entries]

    # -- narrowing ------------------------------------------------------------------------------------------------

    def narrow(self, number: int, options: dict[str, Any]) -> dict[str, Any]:
        """A deep layer's own rows of the rotary embeddings and of the mask."""
        group = self.call.timeline.group(number)
        assert group is not None
        options = dict(options)
        rotary, mask = options.get("position_embeddings"), options.get("attention_mask")
        rows, window = self.present().rows, window_of(self.decoder.layers[number])
        if rotary is not None and self.left is not None:
            options["position_embeddings"] = self._once(
                ("rotary", id(rotary), id(group)), (rotary, group), lambda: _gather_rotary(rotary, rows)
            )
        width = fit_static_layer(options.get(CACHE), number, group.reach - group.kept.shape[1])
        if width is not None:
            group.fill(width, options[CACHE].layers[0].max_cache_len)
        options["attention_mask"] = self._once(
            ("mask", id(mask), id(group), window, width),
            (mask, group),
            lambda: narrow_mask(mask, rows, group, group.reach, window=window, width=width, past=self.call.entries),
        )
        return options

    def _once(self, key: tuple[Any, ...], source: Any, make: Any) -> Any:
        """Layers of one group are handed the same tensors; what is made of them is made once."""
        if key not in self._shared:
            self._shared[key] = (source, make())  # the source is held so that its id stays its own
        return self._shared[key][1]


class _View:
    """The images at one stage: where their tokens stand in the current rows, and the decoder signals on demand."""

    def __init__(self, descent: Descent, stage: Stage, number: int, hidden: Tensor, options: dict[str, Any]) -> None:
        self.descent, self.stage, self.number, self.hidden, self.options = descent, stage, number, hidden, options
        self.places = [self._places(image, image.columns[image.index]) for image in descent.call.images]

    def _places(self, image: Image, columns: Tensor) -> Tensor:
        """Where columns of the caller's prompt, in the image's row, stand in the current rows; on the host."""
        descent, plan = self.descent, self.descent.call.plan.host
        at_layer_0 = _inverse(plan.index[image.row], plan.filled[image.row])[columns]
        if descent.left is None:
            return at_layer_0
        row = descent.call.rows_of(image).start
        return _inverse(descent.left.host_rows[row], descent.left.host_valid[row])[at_layer_0]

    def block(self, group: Sequence[int], needs: set[str]) -> Block:
        """Decoder signals of some images that have the same number of present tokens."""
        call = self.descent.call
        images = [call.images[number] for number in group]
        device = self.hidden.device
        host_rows = torch.tensor([call.rows_of(image).start for image in images])
        host_visual = torch.stack([self.places[number] for number in group])
        text = [self._places(image, call.prompt.is_text[image.row].nonzero().squeeze(-1)) for image in images]
        host_words = nn.utils.rnn.pad_sequence(text, batch_first=True)
        rows, visual, words = (on_device(places, device) for places in (host_rows, host_visual, host_words))
        ends = torch.tensor([[one.numel() - 1] for one in text])
        fields: dict[str, Tensor] = {}
        hidden = self.hidden[rows]
        if "hidden" in needs:
            fields["hidden"] = _take(hidden, visual)
        if "text_hidden" in needs:
            fields["text_hidden"] = _take(hidden, words)
        if "normed" in needs:
            fields["normed"] = self.descent.decoder.norm(_take(hidden, visual))
        if "text_normed" in needs:
            fields["text_normed"] = self.descent.decoder.norm(_take(hidden, words))
        seen = self.descent.probe.seen(self.stage.depth - 1)
        if seen is not None:
            visual_then, words_then = (
                on_device(self._as_seen(host_rows, places), device) for places in (host_visual, host_words)
            )
            last = self._asking(images, self._last(rows, self.descent.behind), words_then, ends)
            fields.update(seen.signals(needs, rows, visual_then, words_then, last))
        if "next_query" in needs:
            last = self._asking(images, self._last(rows, self.descent.left), words, ends)
            fields["next_query"] = self._look_ahead().signals({"last_query"}, rows, visual, words, last)["last_query"]
        return Block(**fields)

    def _look_ahead(self) -> QueriesAndKeys:
        """The next block's queries and keys, with its own rows of masks and rotary embeddings as they stand now."""
        descent, options = self.descent, self.options
        if descent.call.timeline.group(self.number) is not None:
            options = descent.narrow(self.number, options)
        return descent.probe.look_ahead(self.number, self.hidden, options)

    def _as_seen(self, rows: Tensor, places: Tensor) -> Tensor:
        """(B, P) places in the current rows, as places in the rows of the block behind: a stage of this depth may
        have shortened them since. All of it on the host."""
        left, before = self.descent.left, self.descent.behind
        if left is None or left is before:
            return places
        columns = left.host_rows[rows].gather(1, places)
        if before is None:
            return columns
        of_rows = zip(rows.tolist(), columns, strict=True)
        found = [_inverse(before.host_rows[row], before.host_valid[row])[one] for row, one in of_rows]
        return torch.stack(found).clamp(min=0)  # what fills up short texts may stand for nothing

    def _asking(self, images: Sequence[Image], last: Tensor, words: Tensor, ends: Tensor) -> Tensor:
        """(B,) place of the token that is about to answer: the last one, or of the question where an answer follows.

        Args:
            words: (B, T) places of the text that may be read.
            ends: (B, 1) on the host: which of them is the last.
        """
        taught = self.descent.call.prompt.taught
        if taught is None or not taught.any():
            return last
        asking = words.gather(1, on_device(ends.clamp(min=0), words.device))[:, 0]
        return torch.where(on_device(taught[[image.row for image in images]], last.device), asking, last)

    def _last(self, rows: Tensor, left: Left | None) -> Tensor:
        """(B,) place of the last token of each row that is no padding."""
        valid = (self.descent.prompt if left is None else left).valid
        places = torch.arange(valid.shape[1], device=valid.device)
        return places.where(valid[rows], -1).amax(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# masks


def decode_mask(timeline: Timeline, number: int, layer: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """A later token's mask for a deep layer: one column for each entry that the layer holds."""
    group = timeline.group(number)
    if group is None:
        return options
    cache, mask = options[CACHE], options.get("attention_mask")
    if group.static is not None:
        return {**options, "attention_mask": _static_mask(group, cache, mask)}
    if mask is None and group.unpadded and window_of(layer) is None:
        return options
    length = int(cache.get_seq_length())  # layer 0 has this call's tokens already
    new = length - int(timeline_length(cache, number, group))
    rows = None if mask is None else torch.arange(new, device=mask.device)
    mask = narrow_mask(mask, rows, group, length, window=window_of(layer), width=None, past=length - new)
    return {**options, "attention_mask": mask}


def timeline_length(cache: Any, number: int, group: Group) -> int:
    """Layer-0 entries that were there before this call, told from what the deep layer holds."""
    return int(cache.layers[number].get_seq_length()) - group.kept.shape[1] + group.reach


def narrow_mask(
    mask: Tensor | None,
    rows: Tensor | None,
    group: Group,
    length: int,
    *,
    window: int | None,
    width: int | None,
    past: int,
) -> Tensor | None:
    """The model's mask on the rows and columns that a deep layer has.

    Args:
        mask: (R or 1, 1, Q, C) bool or additive, (R, C) for flash attention, or None for plain causal attention.
        rows: (R, n) or (n,) the layer's new tokens, counted from the first new one.
        length: entries of layer 0, this call's tokens included.
        window: sliding window of this layer; its cache then holds the last window - 1 of the group's entries.
        width: columns of a static cache, filled up with False.
        past: entries of layer 0 before this call.
    """
    columns, valid = group.columns(length), group.valid_columns(length)
    cut = 0
    if window is not None:
        before = columns.shape[1] - (rows.shape[-1] if rows is not None else 1)
        cut = max(0, before - (window - 1))
        columns, valid = columns[:, cut:], valid[:, cut:]
    if mask is None:
        open_ = group.unpadded and cut == 0 and width is None
        return None if open_ else _causal(group, rows, past, columns, valid, window, width)
    if mask.ndim == 2:
        return mask.gather(1, columns) * valid.to(mask.dtype)
    offset = max(past - window + 1, 0) if window is not None and width is None else 0
    outside = (columns < offset) | ~valid
    batch = columns.shape[0]
    mask = mask.expand(batch, *mask.shape[1:])
    if rows is not None:
        index = rows.expand(batch, -1)[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
        mask = mask.gather(2, index)
    index = (columns - offset).clamp(min=0, max=mask.shape[-1] - 1)[:, None, None, :]
    mask = mask.gather(3, index.expand(-1, *mask.shape[1:3], -1))
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    mask = mask.masked_fill(outside[:, None, None, :], closed)
    mask = _open_dead_rows(mask)
    if width is not None:
        mask = nn.functional.pad(mask, (0, width - mask.shape[-1]), value=closed)
    return mask


def _causal(
    group: Group,
    rows: Tensor | None,
    past: int,
    columns: Tensor,
    valid: Tensor,
    window: int | None,
    width: int | None,
) -> Tensor:
    """The mask that plain causal attention stands for, on the columns of a ragged group. (R, 1, n, C) bool."""
    at = columns[:, -1:] if rows is None else rows.expand(columns.shape[0], -1) + past
    allowed = (columns[:, None, :] <= at[:, :, None]) & valid[:, None, :]
    if window is not None:
        allowed &= at[:, :, None] - columns[:, None, :] < window
    mask = _open_dead_rows(allowed[:, None])
    return mask if width is None else nn.functional.pad(mask, (0, width - mask.shape[-1]))


def _open_dead_rows(mask: Tensor) -> Tensor:
    """Let re-padding attend to everything: its result is never read, but a row without any key would be NaN."""
    if mask.dtype == torch.bool:
        return mask | ~mask.any(dim=-1, keepdim=True)
    dead = (mask <= torch.finfo(mask.dtype).min).all(dim=-1, keepdim=True)
    return mask.masked_fill(dead, 0.0)


def _static_mask(group: Group, cache: Any, mask: Tensor | None) -> Tensor:
    """A static layer's mask while decoding, in operations that a graph can hold. (R, 1, Q, width)."""
    assert group.static is not None and group.blocked is not None
    blocked = group.blocked[:, None, None, :]
    if mask is None:  # one new token: everything up to the last entry of layer 0
        return (group.static < cache.layers[0].cumulative_length)[:, None, None, :] & ~blocked
    mask = mask.expand(group.static.shape[0], *mask.shape[1:])
    mask = mask.gather(3, group.static[:, None, None, :].expand(-1, *mask.shape[1:3], -1))
    return mask.masked_fill(blocked, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


# ---------------------------------------------------------------------------------------------------------------------
# small parts


def window_of(layer: nn.Module) -> int | None:
    """The sliding window of a decoder layer's attention; None where it sees everything."""
    attention: Any = getattr(layer, "self_attn", None)
    config = getattr(attention, "config", None)
    # Most decoders write the window on each attention; Mistral reads it from the configuration of all of them.
    by_config = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    window = getattr(attention, "sliding_window", by_config)
    return int(window) if window else None


def fit_static_layer(cache: Any, number: int, removed: int) -> int | None:
    """Give a deep layer of a static cache its own, smaller length; the columns it then has, None for a dynamic cache.

    Raises:
        FoveateError: the layer was allocated for a shorter sequence, or slides.
    """
    layer = cache.layers[number] if cache is not None and len(cache.layers) > number else None
    if layer is None or not getattr(layer, "is_compileable", False):
        return None
    slides = next((one for one in (0, number) if getattr(cache.layers[one], "is_sliding", False)), None)
    if slides is not None:
        raise FoveateError(
            f"layer {slides} slides, and a static sliding cache cannot hold a pruned prompt; use a dynamic cache"
        )
    needed = cache.layers[0].max_cache_len - removed
    if not layer.is_initialized:
        layer.max_cache_len = needed
    if layer.max_cache_len < needed:
        raise FoveateError(
            f"layer {number} of this static cache was allocated for {layer.max_cache_len} entries and needs {needed}; "
            "use a new cache"
        )
    return int(layer.max_cache_len)


def _right_aligned(stays: Tensor) -> tuple[Tensor, Tensor]:
    """(R, L) bool -> (R, n) positions of the True ones, the last one last, and which are no re-padding; on the host."""
    counts = stays.sum(dim=1)
    longest = int(counts.max())
    order = torch.argsort(stays.long(), dim=1, stable=True)[:, stays.shape[1] - longest :]
    filled = torch.arange(longest) >= (longest - counts)[:, None]
    return order, filled


def _inverse(index: Tensor, filled: Tensor) -> Tensor:
    """Where each value of `index` stands, as a table; -1 for values that do not occur. On the host."""
    table = torch.full((int(index.max()) + 1,), -1)
    table[index[filled]] = torch.arange(index.numel())[filled]
    return table


def _take(hidden: Tensor, places: Tensor) -> Tensor:
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


def _gather_rotary(embeddings: Any, rows: Tensor) -> Any:
    """cos and sin, each (..., R or 1, L, d), on (R, n) rows."""

    def gather(values: Tensor) -> Tensor:
        values = values.expand(*values.shape[:-3], rows.shape[0], *values.shape[-2:])
        index = rows.to(values.device)[..., None].expand(*values.shape[:-3], *rows.shape, values.shape[-1])
        return values.gather(-2, index)

    return tuple(gather(values) for values in embeddings)
