"""Reads a vision encoder's attention and hidden states while it runs: only named blocks, only what a method needs."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.core import Block, FoveateError, names_of
from foveate.families import Family, Tower
from foveate.ops.padding import joined
from foveate.ops.scores import attention_sums, row_attention
from foveate.runtime.choose import JOINT, TOKEN_AXIS
from foveate.runtime.seams import CACHE
from foveate.runtime.uncopied import Uncopied

PROBE = "foveate_probe"
"""Name under which the observing attention is registered. It stays registered: transformers cannot take it back."""

_SUMS = names_of(Block, room="encoder", attention="sums")
_OF_CLS = names_of(Block, of="cls")
FIELDS = names_of(Block, room="encoder")
LATEST = "latest"
"""Name of the block that has run last where a stage inside the encoder acts."""
OF_COMPANION = names_of(Block, of="companion")
"""What that block shows of a token that runs beside CLS."""


def tower_needs(needs: Iterable[str]) -> dict[str, set[str]]:
    """{"read": {"received"}} from ("tower.read.received", "features"): the fields wanted of each encoder block."""
    wanted: dict[str, set[str]] = {}
    for need in needs:
        room, _, rest = need.partition(".")
        if room == "tower":
            block, _, name = rest.partition(".")
            wanted.setdefault(block, set()).add(name)
    return wanted


def with_joint(needs: Iterable[str]) -> set[str]:
    """Needs, and what CLIP's head maps into the joint space where they speak of that: what the projector reads."""
    given = set(needs)
    return {*given, "tower.read.hidden"} if given.intersection(JOINT) else given


def missing_signals(needs: Iterable[str], tower: Tower) -> list[str]:
    """Which of a method's tower signals this encoder cannot give: CLS fields of an encoder without CLS.

    One that is not described gives none.
    """
    return [
        f"tower.{block}.{name}"
        for block, names in tower_needs(needs).items()
        for name in sorted(names)
        if name not in (FIELDS + OF_COMPANION if block == LATEST else FIELDS)
        or (name in _OF_CLS + OF_COMPANION and tower.summary == 0)
        or not tower.known
    ]


def block_number(name: str, read: int, blocks: int) -> int:
    """0-based encoder block of a name in `needs`: "read", "last", "8", or "8/24", block 8 of 24 in proportion.

    Raises:
        FoveateError: the name is none of these, or names a block that this encoder does not have.
    """
    block, _, of = name.partition("/")
    if name in {"read", "last"}:
        return read if name == "read" else blocks - 1
    if not block.isdigit() or not (of.isdigit() or name == block):
        raise FoveateError(f"encoder block {name!r} is no number; write 8, '8/24', 'read' or 'last'")
    number = int(block) if not of else min(blocks - 1, round(int(block) * blocks / int(of)))
    if not 0 <= number < blocks:
        raise FoveateError(f"encoder block {number} is outside 0..{blocks - 1}")
    return number


class Observed(Uncopied):
    """One attention module under observation, from install() to remove()."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.config: Any = None  # the module's own, while the probe's is in its place
        self.implementation = ""

    def install(self) -> None:
        """Give this module a configuration of its own that names the probe; nothing else is touched."""
        self.config = self.attention.config
        self.implementation = self.config._attn_implementation
        config = copy.copy(self.config)
        config._attn_implementation_internal = PROBE
        self.attention.config = config
        self.attention._foveate_watch = self

    def remove(self) -> None:
        """Put the module back as it was; nothing to do for one that is not observed."""
        if self.config is not None:
            self.attention.config, self.config = self.config, None
            del self.attention._foveate_watch

    def attend(self, queries: Tensor, *rest: Any, **options: Any) -> Any:
        """The attention that the model would have run."""
        eager = getattr(sys.modules[type(self.attention).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager)
        return function(self.attention, queries, *rest, **options)

    def read_attention(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
    ) -> None:
        """Note what this call's queries and keys (B, H, L, d) say."""
        raise NotImplementedError(f"{type(self).__name__} reads nothing")


class Watch(Observed):
    """One encoder block under observation, its attention and its output.

    Attributes:
        summary: leading tokens that are no patches; a token may run beside CLS for a while.
        listener: told the queries, keys, mask and scale of every call.
    """

    def __init__(self, block: nn.Module, attention: Any, fields: set[str], summary: int) -> None:
        super().__init__(attention)
        self.block, self.fields, self.summary = block, fields, summary
        self.listener: Callable[[Tensor, Tensor, Tensor | None, float], None] | None = None
        self.seen: dict[str, list[Tensor]] = {name: [] for name in fields}
        self._hook: Any = None

    def install(self) -> None:
        """Start observing the block."""
        super().install()
        self._hook = self.block.register_forward_hook(self._read_output)

    def remove(self) -> None:
        """Stop; the block is as it was."""
        if self.config is not None:
            self._hook.remove()
        super().remove()

    @torch.no_grad()
    def read_attention(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
    ) -> None:
        """Note what this call's queries and keys (B, H, CLS + N, d) say about each patch."""
        if self.listener is not None:
            self.listener(queries, keys, mask, scale)
        patches = slice(self.summary, None)
        valid, bias = key_mask(mask, keys.shape[0])
        if self.fields.intersection(_SUMS):
            sums = attention_sums(queries, keys, scale, self.summary, valid, bias)
            for name in self.fields.intersection(_SUMS):
                self.seen[name].append(getattr(sums, name))
        if "cls_attention" in self.fields:
            probabilities = row_attention(queries[:, :, :1], keys, scale, valid, bias)
            self.seen["cls_attention"].append(probabilities[:, :, 0, patches])
        for name, value in (("keys", keys[:, :, patches]), ("key_cls", keys[:, :, 0]), ("query_cls", queries[:, :, 0])):
            if name in self.fields:
                self.seen[name].append(value)

    def _read_output(self, block: nn.Module, arguments: Any, output: Any) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        if "hidden" in self.fields:
            self.seen["hidden"].append(hidden[:, self.summary :])
        if "cls" in self.fields:
            self.seen["cls"].append(hidden[:, 0])

    def take(self) -> Block:
        """What was seen since the last call, images along the first axis, and forget it."""
        taken = {name: joined(values) for name, values in self.seen.items() if values}
        self.seen = {name: [] for name in self.fields}
        return Block(**taken)

    def latest(self) -> Block:
        """What was seen in the latest encoding."""
        return Block(**{name: values[-1] for name, values in self.seen.items() if values})


class PackedWatch(Watch):
    """One block of an encoder that runs the patches of all pictures as one sequence, each attending to itself.

    What it shows has one row: the pictures' patches behind each other. A picture is told from the next by the calls
    that its attention makes, by the bounds that flash attention is given, or by the mask.
    """

    bounds: list[int] | None = None  # of the pictures, in the call at hand
    bias: Callable[[], Tensor | None] | None = None  # asks for what is added to the logits of each key, (N,)
    _begun: int = 0  # keys of the calls that the block has made since its attention began
    _added: Tensor | None = None  # that of the call at hand

    def __init__(self, block: nn.Module, attention: Any, fields: set[str], summary: int) -> None:
        super().__init__(block, attention, fields, summary)
        self._run: dict[str, slice] = {}  # what the latest run of the block has shown, in as many calls as it made

    def weighed(self, mask: Tensor | None, keys: Tensor) -> Tensor | None:
        """The mask of a call on some of the patches, (1, H, n, d), with what weighs them."""
        bias = None if self.bias is None else self.bias()
        self._added = None
        if bias is None:
            self._begun = 0
            return mask
        count = keys.shape[2]
        self._added = bias[self._begun : self._begun + count][None]
        self._begun = (self._begun + count) % bias.numel()
        added = self._added[:, None, None]
        if mask is None:
            return added
        if mask.dtype == torch.bool:
            return added.expand(mask.shape).masked_fill(~mask, torch.finfo(added.dtype).min)
        return (mask + added).clamp(min=torch.finfo(added.dtype).min)

    @torch.no_grad()
    def read_attention(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
    ) -> None:
        """Note what this call's queries and keys (1, H, N, d) say about each patch."""
        if self.listener is not None:
            self.listener(queries, keys, mask, scale)
        bounds = _segments(mask) if self.bounds is None else self.bounds
        bounds = [0, keys.shape[2]] if bounds is None else bounds
        for start, end in pairwise(bounds):
            if self.fields.intersection(_SUMS):
                added = None if self._added is None else self._added[:, start:end].float()
                sums = attention_sums(queries[:, :, start:end], keys[:, :, start:end], scale, 0, None, added)
                for name in self.fields.intersection(_SUMS):
                    self.seen[name].append(getattr(sums, name))
        if "keys" in self.fields:
            self.seen["keys"].append(keys)

    def _read_output(self, block: nn.Module, arguments: Any, output: Any) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        if "hidden" in self.fields:
            self.seen["hidden"].append(hidden if hidden.ndim == 3 else hidden[None])
        before = {name: self._run[name].stop if name in self._run else 0 for name in self.seen}
        self._run = {name: slice(before[name], len(values)) for name, values in self.seen.items()}

    def take(self) -> Block:
        """What was seen since the last call, in one row, and forget it."""
        taken = {name: torch.cat(values, dim=TOKEN_AXIS[name]) for name, values in self.seen.items() if values}
        self.seen, self._run = {name: [] for name in self.fields}, {}
        return Block(**taken)

    def latest(self) -> Block:
        """What was seen in the latest encoding, in one row."""
        found = {name: self.seen[name][run] for name, run in self._run.items()}
        return Block(**{name: torch.cat(values, dim=TOKEN_AXIS[name]) for name, values in found.items() if values})


def _segments(mask: Tensor | None) -> list[int] | None:
    """Bounds of the squares along the diagonal of a (1, 1, N, N) mask, outside which it is closed."""
    if mask is None:
        return None
    square = mask[0, 0]
    open_ = square if square.dtype == torch.bool else square > torch.finfo(square.dtype).min / 2
    first = open_.int().argmax(dim=-1)  # of each row, the first patch of its picture
    starts: list[int] = first.unique_consecutive().tolist()
    return [*starts, square.shape[0]]


def key_mask(mask: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Which keys are no padding, (B, N) bool, and what is added to the logits of the others, (B, N); None for nothing.

    Args:
        mask: (B, N), or (B or 1, 1, 1, N) bool or additive.

    Raises:
        FoveateError: the mask differs from query to query.
    """
    if mask is None:
        return None, None
    if mask.ndim == 4 and mask.shape[2] > 1 and bool((mask != mask[:, :, :1]).any()):
        raise FoveateError("this encoder masks each patch in its own way, so attention sums cannot be read from it")
    keys = mask if mask.ndim == 2 else mask[:, 0, 0]
    if not keys.is_floating_point():
        return keys.bool().expand(batch, -1), None
    open_ = keys > torch.finfo(keys.dtype).min / 2
    return open_.expand(batch, -1), keys.float().masked_fill(~open_, 0.0).expand(batch, -1)


class Probe:
    """Observes the encoder blocks that the methods need, from install() to remove()."""

    def __init__(self, model: Any, family: Family, needs: Iterable[str]) -> None:
        tower, row = family.tower_of(model)
        blocks = family.blocks_of(model)
        read = family.read_block(model)
        self._model = model
        self._shared: Any = None  # an Encoding whose probe sees for this one
        self._blocks, self._row = blocks, row
        self._watches: dict[int, Watch] = {}
        self._of_videos: dict[int, Watch] = {}  # the same blocks of an encoder that only videos pass through
        self._video_blocks = None if family.video_tower is None else family.blocks_of(model, "video")
        self._names: dict[str, int] = {}
        self._whole: dict[str, int] = {}  # where attention is read for a name whose own block sees windows only
        whole = row.whole(tower.config) if row.whole is not None else None
        for name, fields in tower_needs(with_joint(needs)).items():
            if name == LATEST:
                continue  # whoever runs the stages says which block that is
            self._names[name] = number = block_number(name, read, len(blocks))
            sums = fields.intersection(_SUMS)
            if whole is not None and number not in whole and sums:
                self._whole[name] = _nearest(number, whole)
                self.watch(self._whole[name], sums)
                fields = fields - sums
            self.watch(number, fields)

    def watch(self, number: int, fields: Iterable[str]) -> Watch:
        """Observe a block, and more of it than so far where it is observed already; before install()."""
        if number not in self._watches:
            block = self._blocks[number]
            kind = PackedWatch if self._row.packed else Watch
            self._watches[number] = kind(block, getattr(block, self._row.attention), set(), self._row.summary)
        watch = self._watches[number]
        watch.fields.update(fields)
        watch.seen.update({name: [] for name in watch.fields - watch.seen.keys()})
        return watch

    def lead(self, tokens: int) -> None:
        """From now on this many leading tokens are no patches."""
        for watch in self._watches.values():
            watch.summary = tokens

    def install(self) -> None:
        """Start observing."""
        _register()
        self._shared = getattr(self._model, "_foveate_encoding", None)
        if self._shared is not None:
            self._check_shared(self._shared.probe)
            return
        if self._video_blocks is not None:
            for number, watch in self._watches.items():
                block = self._video_blocks[number]
                attention = getattr(block, self._row.attention)
                self._of_videos[number] = Watch(block, attention, set(watch.fields), self._row.summary)
        for watch in self.observers:
            watch.install()

    def _check_shared(self, other: Probe) -> None:
        """Refuse a shared encoding of which less is read than is needed here."""
        for number, watch in self._watches.items():
            read = other._watches[number].fields if number in other._watches else set()
            if not watch.fields <= read:
                lacking = ", ".join(f"tower.{number}.{field}" for field in sorted(watch.fields - read))
                raise FoveateError(
                    f"the encoding that is shared here shows no {lacking}; give share_encoding() the needs of every "
                    "method that will run"
                )

    def remove(self) -> None:
        """Stop observing; the encoder is as it was."""
        for watch in self.observers:
            watch.remove()
        self._of_videos.clear()

    @property
    def observers(self) -> list[Watch]:
        """Whatever holds something of the encoding in progress."""
        return [*self._watches.values(), *self._of_videos.values()]

    def peek(self, depth: int, at: Callable[[Block, int], Block]) -> dict[int | str, Block]:
        """Blocks before block `depth`, by number and by name, as the encoding in progress has shown them.

        Args:
            at: what to make of a block, given its number.
        """
        seen: dict[int | str, Block] = {
            number: at(watch.latest(), number) if number < depth else Block() for number, watch in self._watches.items()
        }
        numbers: dict[int | str, int] = {number: number for number in self._watches}
        numbers.update(self._names)
        return {name: block for name, block in self._named(seen).items() if numbers[name] < depth}

    def _named(self, seen: dict[int | str, Block]) -> dict[int | str, Block]:
        """Blocks by number, and by the names that methods have for them."""
        named: dict[int | str, Block] = {name: seen[number] for name, number in self._names.items()}
        for name, number in self._whole.items():
            sums = {field: getattr(seen[number], field) for field in _SUMS}
            named[name] = dataclasses.replace(named[name], **sums)
            if name.isdigit():  # a method may write the block's number as a number, too
                seen = {**seen, int(name): named[name]}
        return {**seen, **named}

    def runs(self, name: str) -> int:
        """The last block that has to run before everything wanted of a named one is known."""
        return max(self._names[name], self._whole.get(name, 0))

    def take(self, at: Callable[[Block, int], Block] | None = None) -> dict[int | str, Block]:
        """Blocks by number and by name, B = the images encoded since the last call, in order.

        Args:
            at: what to make of a block, given its number.
        """
        if self._shared is not None:
            return self._of(self._shared.take())
        seen: dict[int | str, Block] = {}
        for number in self._watches:
            block = self._taken(number)
            seen[number] = block if at is None else at(block, number)
        return self._named(seen)

    def _taken(self, number: int) -> Block:
        """What was seen of a block, in the encoder of videos where pictures did not come."""
        seen = self._watches[number].take()
        if number not in self._of_videos:
            return seen
        of_videos = self._of_videos[number].take()
        return of_videos if all(value is None for value in vars(seen).values()) else seen

    def _of(self, shared: dict[int | str, Block]) -> dict[int | str, Block]:
        """Of what another probe saw, what this one would have."""
        seen: dict[int | str, Block] = {}
        for number, watch in self._watches.items():
            whole = shared.get(number, Block())
            seen[number] = Block(**{name: getattr(whole, name) for name in watch.fields})
        return self._named(seen)


def _nearest(number: int, whole: Sequence[int]) -> int:
    """The last of the blocks that see everything up to `number`, or the first one behind it."""
    before = [block for block in whole if block <= number]
    return max(before) if before else min(whole)


def _register() -> None:
    if PROBE not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(PROBE, _attend)
        # Without its twin an unknown name would get no mask at all.
        AttentionMaskInterface.register(PROBE, sdpa_mask)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    watch: Observed = module._foveate_watch
    mask = watch.weighed(attention_mask, key) if isinstance(watch, PackedWatch) else attention_mask
    output = watch.attend(query, key, value, mask, **options)
    scale = options.get("scaling")
    more = {"softcap": options["softcap"]} if options.get("softcap") else {}
    if isinstance(watch, PackedWatch):
        bounds = options.get("cu_seq_lens_q")
        watch.bounds = None if bounds is None else bounds.tolist()
    watch.read_attention(query, key, attention_mask, query.shape[-1] ** -0.5 if scale is None else scale, **more)
    return output


# ---------------------------------------------------------------------------------------------------------------------
# decoder


@dataclass(frozen=True, eq=False)
class Seen:
    """Queries and keys of one decoder block's prefill. R rows, H heads, Hkv of keys, L queries, C keys, d width."""

    queries: Tensor  # (R, H, L, d) after rotary embedding
    keys: Tensor  # (R, Hkv, C, d), cached ones first
    mask: Tensor | None  # (R or 1, 1, L, C) bool or additive, (R, C), or None for causal
    scale: float
    past: int  # C - L
    softcap: float | None = None

    def signals(self, needs: set[str], rows: Tensor, visual: Tensor, words: Tensor, last: Tensor) -> dict[str, Tensor]:
        """The signals of B images.

        Args:
            rows: (B,) row of each image.
            visual: (B, N) places of its tokens among the L queries.
            words: (B, T) places of its row's text.
            last: (B,) place of its row's last token.
        """
        found: dict[str, Tensor] = {}
        if "last_query" in needs:
            found["last_query"] = self._attention(rows, last[:, None], visual)[:, :, 0]
        if "text_query" in needs:
            found["text_query"] = self._attention(rows, words, visual)
        for name, places in (("keys", visual), ("text_keys", words)):
            if name in needs:
                keys = self.keys[rows]
                index = (places + self.past)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[-1])
                found[name] = keys.gather(2, index)
        return found

    @torch.no_grad()
    def _attention(self, rows: Tensor, asking: Tensor, visual: Tensor) -> Tensor:
        """(B, H, Q, N) probabilities of Q queries per image on its visual tokens; keys are not repeated for groups."""
        queries, keys = self.queries[rows], self.keys[rows]
        index = asking[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[-1])
        queries = queries.gather(2, index).unflatten(1, (keys.shape[1], -1))  # (B, Hkv, G, Q, d)
        logits = torch.einsum("bkgqd,bkcd->bkgqc", queries * self.scale, keys).flatten(1, 2).float()
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = self._masked(logits, rows, asking)
        columns = (visual + self.past)[:, None, None, :].expand(*logits.shape[:3], -1)
        return logits.softmax(dim=-1).gather(3, columns)

    def _masked(self, logits: Tensor, rows: Tensor, asking: Tensor) -> Tensor:
        columns = torch.arange(logits.shape[-1], device=logits.device)
        if self.mask is not None and self.mask.ndim == 4:
            mask = self.mask.expand(self.keys.shape[0], *self.mask.shape[1:])[rows, 0]  # (B, L, C)
            mask = mask.gather(1, asking[..., None].expand(-1, -1, mask.shape[-1]))[:, None]
            return logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
        future = columns[None, None, :] > (asking + self.past)[..., None]
        logits = logits.masked_fill(future[:, None], -torch.inf)
        if self.mask is not None:
            logits = logits.masked_fill(~self.mask[rows].bool()[:, None, None, :], -torch.inf)
        return logits


class _DecoderWatch(Observed):
    """One decoder block's attention under observation; keeps queries and keys only while it is open.

    A mask may be None (plain causal), (R or 1, 1, L, C) or, for flash attention, (R, C).
    """

    def __init__(self, attention: Any) -> None:
        super().__init__(attention)
        self.open, self.stub = False, False
        self.past = 0  # entries of earlier prompts among the keys
        self.listener: Callable[..., None] | None = None
        self.seen: Seen | None = None

    def remove(self) -> None:
        """Stop; the block is as it was."""
        super().remove()
        self.seen = None

    def attend(self, queries: Tensor, *rest: Any, **options: Any) -> Any:
        """The attention that the model would have run; nothing while only queries and keys are wanted."""
        if self.stub:
            return queries.transpose(1, 2), None
        return super().attend(queries, *rest, **options)

    def read_attention(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
    ) -> None:
        """Tell the listener, and keep queries and keys while a stage waits for them."""
        if self.listener is not None and not self.stub:
            self.listener(queries, keys, mask, scale, softcap)
        if self.open:
            length = self.past + queries.shape[2]  # a static cache hands over its empty slots as well
            mask = mask if mask is None else mask[..., :length]
            self.seen = Seen(queries, keys[:, :, :length], mask, scale, self.past, softcap)


class DecoderProbe:
    """Observes single decoder blocks during a prefill, and asks a block ahead for its queries and keys."""

    def __init__(self, layers: Any, stages: Iterable[Any], everywhere: bool = False) -> None:
        self._layers = layers
        self._behind: set[int] = set()
        ahead: set[int] = set()
        for stage in stages:
            needs = {need.partition(".")[2] for need in stage.part.needs if need.startswith("decoder.")}
            if needs & {"last_query", "text_query", "keys", "text_keys"}:
                self._behind.add(stage.depth - 1)
            if "next_query" in needs:
                ahead.add(stage.depth)
        watched = set(range(len(layers))) if everywhere else self._behind | ahead
        self._watches = {number: _DecoderWatch(layers[number].self_attn) for number in sorted(watched)}

    def install(self) -> None:
        """Start observing."""
        if self._watches:
            _register()
        for watch in self._watches.values():
            watch.install()

    def remove(self) -> None:
        """Stop observing; the decoder is as it was."""
        for watch in self._watches.values():
            watch.remove()

    @property
    def observers(self) -> list[_DecoderWatch]:
        """Whatever holds something of the prefill in progress."""
        return list(self._watches.values())

    def open(self, cached: Callable[[int], int]) -> None:
        """A prefill begins: the blocks behind the stages keep what they compute until they are closed.

        Args:
            cached: entries of earlier prompts that a layer holds.
        """
        for number, watch in self._watches.items():
            watch.open, watch.past = number in self._behind, cached(number)

    def close(self, number: int | None = None) -> None:
        """A stage has begun (or the prefill has ended): nothing more is kept of its block."""
        for one, watch in self._watches.items():
            if number is None or one == number:
                watch.open = False
            if number is None:
                watch.seen = None

    def on_attention(self, number: int, listener: Callable[..., None]) -> None:
        """Call `listener(number, queries, keys, mask, scale, softcap)` whenever this block attends."""
        self._watches[number].listener = partial(listener, number)

    def seen(self, number: int) -> Seen | None:
        """Queries and keys of a block, if it is observed."""
        watch = self._watches.get(number)
        return watch.seen if watch is not None else None

    @torch.no_grad()
    def look_ahead(self, number: int, hidden: Tensor, options: dict[str, Any]) -> Seen:
        """Queries and keys that block `number` would compute of (R, L, D) hidden states, by its own norm and weights.

        The block's attention runs without cache and without attending; keys of an earlier prompt come from the cache.
        """
        layer, watch = self._layers[number], self._watches[number]
        cache: Any = options.get(CACHE)
        options = {name: value for name, value in options.items() if name not in {CACHE, "use_cache"}}
        mask, was_open, past = options.pop("attention_mask", None), watch.open, watch.past
        watch.open, watch.stub, watch.past = True, True, 0
        try:
            layer.self_attn(layer.input_layernorm(hidden), attention_mask=None, **options)
        finally:
            watch.open, watch.stub, watch.past = was_open, False, past
        new = watch.seen
        assert new is not None
        watch.seen = None
        keys = torch.cat([cache.layers[number].keys[:, :, :past], new.keys], dim=2) if past else new.keys
        mask = mask if mask is None else mask[..., : keys.shape[2]]
        return Seen(new.queries, keys, mask, new.scale, past, new.softcap)
