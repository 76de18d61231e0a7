"""The nouns of the library: Method, Scorer, Merger, Signals, Selection, Budget, and the errors they raise.

Shapes are written here, once: B images of one size, N visual tokens, T text tokens, L sequence, K kept, H heads,
D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Keep: TypeAlias = int | float
Grid: TypeAlias = tuple[int, int]
Site: TypeAlias = Literal["tower", "input", "layer", "cache"]


class FoveateError(ValueError):
    """Every error that a user can cause: the message names the value, the limit and the nearest valid choice."""


def short(text: str, most: int = 80) -> str:
    """What a user wrote as a message repeats it: whole up to `most` characters, else without its middle."""
    if len(text) <= most:
        return text
    return f"{text[: most * 2 // 3]}...{text[-(most // 4) :]} ({len(text)} characters)"


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The tail of an error message: the nearest of `choices` to `name`, then all of them."""
    known = sorted(choices)
    near = difflib.get_close_matches(name[:200], known, n=1, cutoff=0.5)  # it takes time in proportion to both
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Choices: {', '.join(known) or 'none'}."


# ---------------------------------------------------------------------------------------------------------------------
# keep


def check_keep(keep: object, name: str = "keep") -> None:
    """Refuse a `keep` that is neither a count of tokens (int >= 1) nor a share of them (float in (0, 1])."""
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        told = short(repr(keep))
        raise FoveateError(f"{name}={told} is neither a number of tokens (int) nor a share of them (float)")
    if isinstance(keep, int):
        if keep < 1:
            raise FoveateError(f"{name}={keep} is below 1 token; the smallest budget is {name}=1")
    elif not (math.isfinite(keep) and 0.0 < keep <= 1.0):
        nearest = 1.0 if keep > 1 else 0.01
        hint = f"; write {round(keep)} without a point for tokens" if math.isfinite(keep) and keep > 1 else ""
        raise FoveateError(f"{name}={keep} is no share in (0, 1]; the nearest is {name}={nearest}{hint}")


def check_choices(method: Method) -> None:
    """Refuse a field of a method that is none of the choices of its `Literal` annotation."""
    for name, hint in typing.get_type_hints(type(method)).items():
        value, choices = getattr(method, name, None), typing.get_args(hint)
        if typing.get_origin(hint) is Literal and value not in choices:
            told = short(repr(value))
            raise FoveateError(f"{name}={told} is not among its choices; {did_you_mean(str(value), choices)}")


def tokens_to_keep(keep: Keep, original: int, left: int | None = None, name: str = "keep") -> int:
    """The number of tokens that `keep` asks of an image of `original` tokens, of which `left` are still there.

    A share is taken of the original tokens and rounded half to even (Python's `round`), at least 1.

    Raises:
        FoveateError: `keep` asks for more tokens than are left.
    """
    count = keep if isinstance(keep, int) else max(1, round(original * keep))
    left = original if left is None else left
    if count > left:
        has = f"{left} of its {original} tokens are left" if left != original else f"the image has {original} tokens"
        raise FoveateError(f"{name}={keep} asks for {count} tokens but {has}; the most is {name}={left}")
    return count


def scaled_layers(stages: tuple[int, ...], of: int, layers: int) -> tuple[int, ...]:
    """A paper's pruning depths, given for a decoder of `of` blocks, on one of `layers`: round(layers * k / of).

    At least 1 and strictly rising.

    Raises:
        FoveateError: the decoder has too few blocks for so many stages.
    """
    if layers <= len(stages):
        raise FoveateError(f"{len(stages)} stages need a decoder of at least {len(stages) + 1} blocks, not {layers}")
    depths: list[int] = []
    for place, stage in enumerate(stages):
        lowest = depths[-1] + 1 if depths else 1
        highest = layers - (len(stages) - place)
        depths.append(min(highest, max(lowest, round(layers * stage / of))))
    return tuple(depths)


def check_depths(depths: tuple[int, ...], layers: int, method: str) -> None:
    """Refuse depths outside 1..layers-1 or not strictly rising."""
    for depth in depths:
        if not 1 <= depth < layers:
            raise FoveateError(f"{method}: layer={depth} is outside 1..{layers - 1} of a decoder of {layers} blocks")
    if any(later <= earlier for earlier, later in pairwise(depths)):
        raise FoveateError(f"{method}: layers {depths} do not rise strictly; nearest: {tuple(sorted(set(depths)))}")


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@dataclass(frozen=True)
class Described:
    """What is to be known of one signal; whatever else speaks of signals is derived from it.

    Attributes:
        axes: one letter each: B images, N visual tokens, T text tokens, L cache entries, H heads, D width, W window.
        words: for readers; empty for a mask, which says what of another signal counts.
        rooms: where it can be had: "encoder" and "decoder" (fields of a Block), "latest" (the encoder block in which a
            stage acts), "prompt", "joint" (CLIP's joint space), "cache".
        of: the token beside the patches that it belongs to, "cls" or "companion"; empty for none.
        attention: how much of a map of attention it takes: "sums" of all of it, a "row", "rows", or nothing.
    """

    axes: str
    words: str
    rooms: tuple[str, ...]
    of: str = ""
    attention: str = ""


def _signal(axes: str, words: str, *rooms: str, of: str = "", attention: str = "") -> Any:
    return field(default=None, metadata={"described": Described(axes, words, rooms, of, attention)})


@dataclass(frozen=True, eq=False)
class Block:
    """What one transformer block shows a method. Every field is None unless a method needs it.

    Encoder blocks speak of patches (N) and CLS, decoder blocks of visual tokens (N) and text (T).
    """

    # (B, N, E) the block's output for the visual tokens, (B, E) and for CLS
    hidden: Tensor | None = _signal("BND", "hidden states", "encoder", "decoder")
    cls: Tensor | None = _signal("BD", "the hidden state of CLS", "encoder", of="cls")
    # (B, H, N) CLS query; softmax over CLS + patches, CLS column dropped
    cls_attention: Tensor | None = _signal(
        "BHN", "the attention of CLS to the patches", "encoder", of="cls", attention="row"
    )
    # (B, N) attention received, mean over heads and patch queries; given, over heads and patch keys; CLS query included
    received: Tensor | None = _signal("BN", "attention received", "encoder", attention="sums")
    given: Tensor | None = _signal("BN", "attention given", "encoder", attention="sums")
    received_all: Tensor | None = _signal("BN", "attention received, from CLS too", "encoder", attention="sums")
    # (B, H, N, d), (B, H, d) as the block computes them (decoder: post-RoPE, Hkv heads)
    keys: Tensor | None = _signal("BHND", "keys", "encoder", "decoder")
    key_cls: Tensor | None = _signal("BHD", "the key of CLS", "encoder", of="cls")
    query_cls: Tensor | None = _signal("BHD", "the query of CLS", "encoder", of="cls")
    # (B, H, N) attention of the last prompt token to the visual tokens, (B, H, T, N) of every text token,
    # (B, H, N) of the last prompt token through the NEXT block's norm, q and k
    last_query: Tensor | None = _signal("BHN", "the last prompt token's attention", "decoder", attention="row")
    text_query: Tensor | None = _signal("BHTN", "the text's attention", "decoder", attention="rows")
    next_query: Tensor | None = _signal(
        "BHN", "the last prompt token's attention in the next block", "decoder", attention="row"
    )
    text_hidden: Tensor | None = _signal("BTD", "the text's hidden states", "decoder")
    text_keys: Tensor | None = _signal("BHTD", "the text's keys", "decoder")  # (B, Hkv, T, d)
    # (B, N, D), (B, T, D) hidden states after the decoder's final norm
    normed: Tensor | None = _signal("BND", "hidden states behind the decoder's last norm", "decoder")
    text_normed: Tensor | None = _signal("BTD", "the text's hidden states behind the decoder's last norm", "decoder")
    # (B, E), (B, H, d), (B, H, N) CrossGET's cross token
    cross: Tensor | None = _signal("BD", "the cross token", "latest", of="companion")
    cross_key: Tensor | None = _signal("BHD", "the cross token's key", "latest", of="companion")
    cross_attention: Tensor | None = _signal(
        "BHN", "the cross token's attention", "latest", of="companion", attention="row"
    )


@dataclass(frozen=True, eq=False)
class CacheBlock:
    """One layer's KV cache at a `cache` site; L counts the entries that the layer holds."""

    # (B, Hkv, L) attention accumulated on each entry, and its timeline position
    scores: Tensor | None = _signal("BHL", "attention that each entry has received", "cache", attention="sums")
    age: Tensor | None = _signal("BHL", "each entry's position", "cache")
    keys: Tensor | None = _signal("BHLD", "keys", "cache")  # (B, Hkv, L, d)
    # (B, H, w, d) the last w prompt queries
    window_queries: Tensor | None = _signal("BHWD", "the queries of the prompt's end", "cache", attention="rows")
    prompt_length: int | None = None


@dataclass(frozen=True, eq=False)
class Signals:
    """What a method may look at. B images of one size; the N axis is the tokens as they stand at this stage.

    `original` is the number of tokens an image had before any stage, `stage` which stage of its part a method is
    asked for, `memory` is carried between the stages of one part within one prefill.

    At site `tower`, block "latest" is the one that has run last. For a `Merger` that is the block in which it acts: its
    attention has run, and `hidden` and `cls` are the stream between attention and MLP.
    """

    original: int
    index: Tensor  # (B, N) original raster index of each token
    stage: int = 0
    stages: int = 1  # how many stages a part inside the encoder has
    keep: int | None = None  # tokens that this stage is to leave of each image; None: ask the method's own `keep`
    memory: dict[str, Any] = field(default_factory=dict)
    grid: Grid | None = None  # raster shape (h, w); None once tokens have left
    tile: Tensor | None = None  # (B, N) anyres tile of each token, 0 = base
    size: Tensor | None = None  # (B, N) how many original tokens each stands for
    # (B, N, D) after the projector; (B, T, D) input embeddings of the prompt's text, (B, T) bool which of them count
    features: Tensor | None = _signal("BND", "the visual tokens after the projector", "prompt")
    text: Tensor | None = _signal("BTD", "the prompt's word embeddings", "prompt")
    text_mask: Tensor | None = _signal("BT", "", "prompt")
    after_image: Tensor | None = _signal("BT", "", "prompt")
    # CLIP's joint space: (B, N, C) the patches; (B, Q, C) the question, one embedding per piece that CLIP's text tower
    # takes; (B, W, C) every position of those pieces, start, end and padding included; (B, W) the question's own tokens
    image_clip: Tensor | None = _signal("BND", "the patches in CLIP's joint space", "joint")
    text_clip: Tensor | None = _signal("BTD", "the question in CLIP's joint space", "joint")
    word_clip: Tensor | None = _signal("BTD", "the question's words in CLIP's joint space", "joint")
    word_mask: Tensor | None = _signal("BT", "", "joint")
    tower: Mapping[int | str, Block] = field(default_factory=dict)  # by 0-based block, "8/24", "read", "last", "latest"
    decoder: Block | None = None  # layer=k: block k-1
    cache: CacheBlock | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, N)."""
        batch, tokens = self.index.shape
        return batch, tokens

    @property
    def tiles(self) -> int:
        """Tiles of the image; 1 without anyres."""
        return 1 if self.tile is None else int(self.tile.max()) + 1

    def lacking(self, needs: Iterable[str]) -> list[str]:
        """Which of a method's needs ("features", "tower.read.hidden") nobody has filled in."""
        missing = []
        for need in needs:
            room, _, rest = need.partition(".")
            block, _, name = rest.rpartition(".")
            holder: Any = self.tower.get(block) if room == "tower" else getattr(self, room, None) if rest else self
            if getattr(holder, name if rest else room, None) is None:
                missing.append(need)
        return missing

    def raster(self, method: str, otherwise: str) -> Grid:
        """The grid, for a method that cannot do without; `otherwise` says what its user can do.

        Raises:
            FoveateError: tokens have left, or an image's tokens form no single raster.
        """
        if self.grid is not None:
            return self.grid
        gone = self.shape[1] < self.original
        why = "an earlier stage has taken tokens from it" if gone else "its tokens come from several tiles"
        raise FoveateError(f"{method} needs the whole grid of the image, but {why}; {otherwise}")


@functools.cache
def described(kind: type) -> Mapping[str, Described]:
    """The signals that are fields of Signals, Block or CacheBlock, by name."""
    found = {one.name: one.metadata.get("described") for one in dataclasses.fields(kind)}
    return {name: what for name, what in found.items() if what is not None}


def names_of(kind: type, *, room: str = "", of: str | None = None, attention: str = "") -> tuple[str, ...]:
    """Names of a kind's signals: of one room, of the patches or a token beside them, or of one kind of attention."""
    return tuple(
        name
        for name, what in described(kind).items()
        if (not room or room in what.rooms) and (of is None or what.of == of) and attention in ("", what.attention)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Selection


@dataclass(frozen=True, eq=False)
class Selection:
    """What a method decided for B images: which original tokens stay, and what stands in their place.

    Output token k of an image takes the position id, the timeline slot and the place in the picture of the original
    token `indices[b][k]`; a merged token carries its representative's index. `features`, when given, has one row per
    index. `extra` marks tokens that are not to be drawn. `groups`, which a method that merges inside the encoder gives,
    says of each token that was there (in the order of `Signals.index`) which output token it went into, -1 where it was
    dropped; sizes add up along it.
    """

    indices: list[Tensor]  # B tensors (K_b,) int64, distinct
    features: list[Tensor] | None = None  # B tensors (K_b, D)
    space: Literal["encoded", "projected"] = "projected"
    extra: list[Tensor] | None = None  # B tensors (K_b,) bool
    ordered: bool = True
    groups: list[Tensor] | None = None  # B tensors (N,) int64, -1..K_b - 1

    def check(self, original: int, batch: int, method: str) -> None:
        """Refuse a selection that breaks the contract, naming the method and the image.

        Raises:
            FoveateError: wrong number of rows, indices out of range, repeated, out of order, features that do not match
                them or are not finite, or groups that name no output token.
        """
        if len(self.indices) != batch:
            raise FoveateError(f"{method} answered for {len(self.indices)} images but was asked for {batch}")
        given = (("features", self.features), ("masks of extra tokens", self.extra), ("groups", self.groups))
        for name, rows in given:
            if rows is not None and len(rows) != batch:
                raise FoveateError(f"{method} gave {name} for {len(rows)} images but was asked for {batch}")
        for image, kept in enumerate(self.indices):
            problem = self._problem(image, kept, original)
            if problem:
                raise FoveateError(f"{method}, image {image}: {problem}")

    def _problem(self, image: int, kept: Tensor, original: int) -> str | None:
        if kept.ndim != 1 or str(kept.dtype) != "torch.int64":
            return f"kept indices are {kept.dtype} of shape {tuple(kept.shape)}; they must be torch.int64 of shape (K,)"
        if kept.numel() == 0:
            return "no token was kept; at least 1 must stay"
        low, high = kept.min().item(), kept.max().item()
        if low < 0 or high >= original:
            return f"kept index {low if low < 0 else high} is outside 0..{original - 1}"
        if kept.unique().numel() != kept.numel():
            return f"{kept.numel()} tokens were kept but only {kept.unique().numel()} of them are distinct"
        if self.ordered and not bool((kept[1:] > kept[:-1]).all()):
            return "kept indices do not ascend; a method that wants another order says ordered=False"
        if self.features is not None:
            rows = self.features[image]
            if rows.ndim != 2:
                return f"features of shape {tuple(rows.shape)}; they must be (K, D)"
            if rows.shape[0] != kept.numel():
                return f"{rows.shape[0]} feature rows for {kept.numel()} kept tokens"
            if not bool(rows.isfinite().all()):
                return "features hold NaN or infinity"
        if self.extra is not None and self.extra[image].shape != kept.shape:
            return f"the mask of extra tokens has {self.extra[image].numel()} entries for {kept.numel()} kept tokens"
        if self.groups is not None:
            return _problem_of_groups(self.groups[image], kept.numel())
        return None


def _problem_of_groups(groups: Tensor, kept: int) -> str | None:
    if groups.ndim != 1 or str(groups.dtype) != "torch.int64":
        return f"groups are {groups.dtype} of shape {tuple(groups.shape)}; they must be torch.int64 of shape (N,)"
    low, high = groups.min().item(), groups.max().item()
    if low < -1 or high >= kept:
        return f"group {low if low < -1 else high} is outside -1..{kept - 1}"
    return None


@dataclass(frozen=True, eq=False)
class CacheSelection:
    """What stays of one layer's cache, per KV head, in timeline coordinates."""

    positions: Tensor  # (B, Hkv, K) int64


# ---------------------------------------------------------------------------------------------------------------------
# Method


@dataclass(frozen=True)
class Method:
    """One paper with its hyper-parameters. A frozen dataclass; it sees `Signals`, never the model.

    Class attributes: `paper` (URL), `site` (where it acts), `needs` (signals it reads, such as
    "tower.read.cls_attention"), `adaptive` (decides its own count).
    """

    paper: ClassVar[str] = ""
    site: ClassVar[Site] = "input"
    adaptive: ClassVar[bool] = False
    encoded: ClassVar[bool] = False  # hands on tokens of the encoder, which a projector must take one by one

    @property
    def needs(self) -> tuple[str, ...]:
        """Signals this method reads; a plain class attribute in methods whose needs do not depend on their fields."""
        return ()

    def select(self, signals: Signals) -> Selection | CacheSelection:
        """Decide which of the tokens stay; a CacheSelection at site `cache`, a Selection elsewhere."""
        raise NotImplementedError(f"{type(self).__name__} has no select()")

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        """Tokens of an image that are left after each stage, by arithmetic alone; None when adaptive.

        Here of a method with one stage and one field `keep`, a share rounded half to even; others say their own.

        Raises:
            FoveateError: the budget cannot be met by an image of `original` tokens.
        """
        if not hasattr(self, "keep"):
            raise NotImplementedError(f"{type(self).__name__} has no count()")
        return None if self.keep is None else (tokens_to_keep(self.keep, original),)

    def asked(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        """What `keep` comes to at each stage; a method whose count differs, losing tokens as its code does, says so."""
        return self.count(original, grid, tiles)

    def wanted(self, signals: Signals) -> int:
        """Tokens that this stage is to leave of each image: what the runtime says, else what the method itself asks.

        Raises:
            FoveateError: more than are left.
        """
        left = signals.shape[1]
        if signals.keep is not None and signals.keep <= left:
            return signals.keep
        asked = self.asked(signals.original, signals.grid, signals.tiles)
        assert asked is not None, "a method that decides its own count does not ask"
        count = asked[signals.stage] if signals.keep is None else signals.keep
        if count > left:  # refused in the words of the method's field, where that is one number for one stage
            keep = getattr(self, "keep", count)
            tokens_to_keep(keep if len(asked) == 1 and isinstance(keep, int | float) else count, signals.original, left)
        return min(count, left)

    def depths(self, layers: int) -> tuple[int, ...]:
        """Decoder blocks, of `layers`, that run at full length before each stage; empty at other sites than `layer`."""
        return ()

    def flops(self, visual: int, text: int) -> int:
        """Operations of choosing among `visual` tokens beside `text` others; 0 for a method without weights."""
        return 0

    def check_model(self, config: Any) -> None:
        """Refuse a model by its configuration, before any work: a method that was trained for one model does.

        Raises:
            FoveateError: the method was trained for another model.
        """

    def parts(self) -> tuple[Method, ...]:
        """The single-site methods this one is made of."""
        return (self,)

    @classmethod
    def example(cls, config: Any = None) -> Method:
        """An instance that needs no arguments and no files, so that registry tests cover every method."""
        required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        return cls(**dict.fromkeys(required, 0.5))

    def __str__(self) -> str:
        from foveate.spec import format as format_spec

        return format_spec(self)


@dataclass(frozen=True)
class Scorer(Method):
    """A method that is one number per token: the highest `keep` stay, in raster order; ties go to the lowest index."""

    keep: Keep = 0.5

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def score(self, signals: Signals) -> Tensor:
        """(B, N), the higher the better."""
        raise NotImplementedError(f"{type(self).__name__} has no score()")

    def select(self, signals: Signals) -> Selection:
        from foveate.ops.subsets import top_k

        kept = top_k(self.score(signals), self.wanted(signals))
        return Selection([row[chosen].sort().values for row, chosen in zip(signals.index, kept, strict=True)])


@dataclass(frozen=True)
class Merger(Method):
    """A method that merges tokens inside the encoder, between attention and MLP of its blocks.

    It acts in every block up to the one that the projector reads and is asked once for each (`signals.stage` of
    `signals.stages`), but counts as one stage. No block merges away more than half of its patches. With `keep`, each
    block merges away the same number of patches, the smallest that gets there, until what is missing is less.

    Args:
        keep: tokens per image at the end, or a share of them, rounded half to even.
        r: in its place, patches that each block merges away (more than half of them counts as half), or one number per
            block, the blocks behind them merging none.
        proportional: attention weighs a token by the number of patches in it: log(size) is added to its logits.
    """

    site: ClassVar[Site] = "tower"
    beside: ClassVar[int] = 0  # tokens that reach the decoder besides the patches, once any have merged

    keep: Keep | None = None
    r: int | tuple[int, ...] | None = None
    proportional: bool = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        if (self.keep is None) == (self.r is None):
            raise FoveateError(f"{name}: keep={self.keep} and r={self.r}; give one of them")
        if self.keep is not None:
            check_keep(self.keep)
        for number in self.r if isinstance(self.r, tuple) else () if self.r is None else (self.r,):
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise FoveateError(f"{name}: r={number!r} is no number of patches from 0; the smallest is r=0")
        # The class speaks for the defaults; with one number per block, the blocks of an encoder decide the count.
        object.__setattr__(self, "adaptive", isinstance(self.r, int))

    def asked(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        """What `keep` comes to at each stage; a method whose count differs, losing tokens as its code does, says so."""
        return self.count(original, grid, tiles)

    def wanted(self, signals: Signals) -> int:
        """Tokens that this stage is to leave of each image: what the runtime says, else what the method itself asks.

        Raises:
            FoveateError: more than are left.
        """
        left = signals.shape[1]
        if signals.keep is not None and signals.keep <= left:
            return signals.keep
        asked = self.asked(signals.original, signals.grid, signals.tiles)
        assert asked is not None, "a method that decides its own count does not ask"
        count = asked[signals.stage] if signals.keep is None else signals.keep
        if count > left:  # refused in the words of the method's field, where that is one number for one stage
            keep = getattr(self, "keep", count)
            tokens_to_keep(keep if len(asked) == 1 and isinstance(keep, int | float) else count, signals.original, left)
        return min(count, left)

    def depths(self, layers: int) -> tuple[int, ...]:
        """Encoder blocks that run before each merge: all from 0; `layers` counts them up to the one that is read."""
        if isinstance(self.r, tuple) and len(self.r) > layers:
            raise FoveateError(
                f"{type(self).__name__}: r names {len(self.r)} blocks; {layers} run up to the one that the projector "
                f"reads, so the most is {layers}"
            )
        return tuple(range(layers))

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        if self.keep is not None:
            count = tokens_to_keep(self.keep, original)
            self._patches(count, original)
            return (count,)
        if isinstance(self.r, int) or tiles > 1:  # every tile merges as many, and how many each has is not known here
            return None
        left = original - sum(self.schedule(original, len(self.r or ())))
        return (left + self.beside if left < original else left,)

    def schedule(
        self, tokens: int, blocks: int, original: int | None = None, keep: int | None = None
    ) -> tuple[int, ...]:
        """How many of `tokens` patches each of `blocks` blocks merges away.

        Args:
            original: tokens of the image before any stage; `tokens` where None.
            keep: tokens at the end, in place of the method's own `keep`.

        Raises:
            FoveateError: `keep` is outside the reach of so many blocks; the message says what is reachable.
        """
        if self.keep is None:
            every_block = (self.r,) * blocks if isinstance(self.r, int) else (*(self.r or ()), *[0] * blocks)
            return _halving(tokens, 0, every_block[:blocks])
        original = original or tokens
        wanted = self.keep if keep is None or self._means(keep, original) else keep
        target = self._patches(tokens_to_keep(wanted, original, tokens), original)
        least = tokens - sum(_halving(tokens, 0, (tokens,) * blocks))
        if target < least:
            raise FoveateError(
                f"{type(self).__name__}: keep={wanted} asks for {target + self.beside} of {tokens} tokens, but "
                f"{blocks} blocks that each merge away at most half reach {least + self.beside} to {tokens}; the least "
                f"is keep={least + self.beside}"
            )
        every = -((target - tokens) // blocks)  # evenly, rounded up; more where half of the tokens is less than that
        while sum(merged := _halving(tokens, target, (every,) * blocks)) < tokens - target:
            every += 1
        return merged

    def _means(self, count: int, original: int) -> bool:
        """Whether the method's own `keep` comes to `count` tokens."""
        with contextlib.suppress(FoveateError):
            return self.keep is not None and tokens_to_keep(self.keep, original) == count
        return False

    def _patches(self, count: int, original: int) -> int:
        """Patches among `count` tokens at the end; where all patches stay, no other token joins them."""
        if count <= self.beside < original:
            least = self.beside + 1
            raise FoveateError(f"{type(self).__name__}: keep={self.keep} leaves no patch; the least is keep={least}")
        return count if count == original else count - self.beside

    def merges(self, signals: Signals) -> int:
        """How many patches the block at hand merges away.

        Where other methods have dropped patches since the first block, the rest is planned anew. It depends on nothing
        but counts, so that a picture in a batch gets what it gets alone.
        """
        stage, left = signals.stage, signals.shape[1]
        if isinstance(self.r, int):
            return min(self.r, left // 2)
        if self.r is not None:
            return min(self.r[stage], left // 2) if stage < len(self.r) else 0
        if stage:
            with contextlib.suppress(FoveateError):  # of a budget that other methods have made reachable
                plan = self.schedule(signals.original, signals.stages, keep=signals.keep)
                if left == signals.original - sum(plan[:stage]):
                    return plan[stage]
        return self.schedule(left, signals.stages - stage, signals.original, signals.keep)[0]

    def companion(self, block: int, cls: Tensor, before: Tensor | None) -> Tensor | None:
        """A token (B, E) that runs beside CLS through encoder block `block`; None for a method without.

        Args:
            block: 0-based; asked before each block in turn.
            cls: (B, E), the block's input.
            before: (B, E), what the block before made of the companion; None at the first block.
        """
        return None


def _halving(tokens: int, target: int, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """What each block merges away of what it wants: at most half of its tokens, and none below `target`."""
    merged: list[int] = []
    for most in wanted:
        merged.append(min(most, tokens - target, tokens // 2))
        tokens -= merged[-1]
    return tuple(merged)


# ---------------------------------------------------------------------------------------------------------------------
# Budget


@dataclass(frozen=True)
class Budget:
    """What a prefill costs, defined once for every method.

    Attributes:
        tokens: (layers,) visual tokens per image at each decoder layer, mean over the images.
        prefill_flops: floating-point operations of the prefill, tower and projector included, all rows together.
        kv_bytes: bytes of keys and values that the prompt leaves in the cache, all rows together.
    """

    tokens: tuple[float, ...]
    prefill_flops: float
    kv_bytes: int

    @property
    def equivalent_tokens(self) -> float:
        """Visual tokens averaged over the decoder layers."""
        return sum(self.tokens) / len(self.tokens) if self.tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "tokens": list(self.tokens),
            "equivalent_tokens": self.equivalent_tokens,
            "prefill_flops": self.prefill_flops,
            "kv_bytes": self.kv_bytes,
        }


# ---------------------------------------------------------------------------------------------------------------------
# Trace


@dataclass(frozen=True, eq=False)
class StageRecord:
    """What one stage did to one image."""

    method: str  # its spec
    site: Site
    layer: int | None  # decoder blocks that ran at full length before it; None before the decoder
    before: int
    after: int
    kept: Tensor  # (K,) original indices
    extra: Tensor | None = None  # (K,) bool: tokens that are not to be drawn
    flops: int = 0  # operations of choosing, where modules of the method's own do it


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image of a call: its prompt row, its tokens before any stage, its grid and what each stage left."""

    row: int
    original: int
    grid: Grid | None
    stages: tuple[StageRecord, ...]
    proportional: bool = False  # the grid has the picture's own proportions; else one of any shape may have made it

    @property
    def after(self) -> int:
        """Tokens left after the last stage."""
        return self.stages[-1].after if self.stages else self.original

    @property
    def kept(self) -> Tensor:
        """(K,) original indices left after the last stage."""
        if self.stages:
            return self.stages[-1].kept
        import torch

        return torch.arange(self.original)

    @property
    def extra(self) -> Tensor | None:
        """(K,) bool over `kept`: tokens that are not to be drawn."""
        return self.stages[-1].extra if self.stages else None


@dataclass(frozen=True, eq=False)
class Call:
    """One prefill: what came in, what each stage left, and what it cost beside the unpruned prompt."""

    images: tuple[ImageRecord, ...]
    prompt_length: int  # padded length of the caller's prompt
    length: int  # ... of the shortened one
    text: float  # tokens per row that are neither visual nor padding, mean over the rows
    index: Tensor  # (B, length) original position of each shortened one, -1 in padding
    budget: Budget
    unpruned: Budget
    kv_lengths: tuple[int, ...]  # entries that each decoder layer's cache holds after the prefill
    stopwatch: Callable[[], float] = field(default=lambda: 0.0, repr=False)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values after the prefill, re-padding of ragged rows included."""
        return self.budget.kv_bytes

    @property
    def milliseconds(self) -> float:
        """Time spent choosing tokens; waits for the device on first reading."""
        return self.stopwatch()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, ready for JSON; kept indices as lists."""
        images = [
            {
                "row": image.row,
                "original": image.original,
                "grid": image.grid,
                "stages": [
                    {
                        "method": stage.method,
                        "site": stage.site,
                        "layer": stage.layer,
                        "before": stage.before,
                        "after": stage.after,
                        "kept": stage.kept.tolist(),
                    }
                    for stage in image.stages
                ],
            }
            for image in self.images
        ]
        return {
            "images": images,
            "prompt_length": self.prompt_length,
            "length": self.length,
            "text": self.text,
            "kv_lengths": list(self.kv_lengths),
            "budget": self.budget.to_dict(),
            "unpruned": self.unpruned.to_dict(),
            "milliseconds": self.milliseconds,
        }

    def __str__(self) -> str:
        if not self.images:
            return f"no picture: {self.text:.4g} tokens of text in each row, run as they are"
        counts = []
        for image in self.images:
            steps = [image.original, *(stage.after for stage in image.stages)]
            counts.append(" -> ".join(map(str, steps)))
        tokens = f"{counts[0]} tokens" if len(set(counts)) == 1 else "; ".join(counts) + " tokens"
        if len(counts) > 1 and len(set(counts)) == 1:
            tokens += f" in each of {len(counts)} images"
        flops, full = self.budget.prefill_flops, self.unpruned.prefill_flops
        saved = f" ({flops / full:.0%})" if full else ""
        return (
            f"{tokens} | prefill {readable(full, 'FLOPs')} -> {readable(flops, 'FLOPs')}{saved} | "
            f"KV {readable(self.unpruned.kv_bytes, 'B')} -> {readable(self.kv_bytes, 'B')} | "
            f"choosing {self.milliseconds:.2f} ms"
        )


class Trace:
    """What a handle did: the latest call's record, earlier ones in `history`.

    Every attribute of the latest `Call` can be read on the trace itself.
    """

    history_limit: ClassVar[int] = 1000

    def __init__(self) -> None:
        self.history: list[Call] = []

    @property
    def latest(self) -> Call:
        """The latest call.

        Raises:
            FoveateError: no prompt with an image has run yet.
        """
        if not self.history:
            raise FoveateError(
                "nothing has been pruned yet: the trace fills when the model sees a prompt with an image"
            )
        return self.history[-1]

    def add(self, call: Call) -> None:
        """Record a call; the oldest goes once `history_limit` are kept."""
        self.history.append(call)
        del self.history[: -self.history_limit]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in _CALL_ATTRIBUTES:
            raise AttributeError(f"Trace has no attribute {name!r}")
        return getattr(self.latest, name)

    def __str__(self) -> str:
        return str(self.latest) if self.history else "nothing pruned yet"

    def __repr__(self) -> str:
        return f"<Trace of {len(self.history)} calls: {self}>"


_CALL_ATTRIBUTES = frozenset(
    {f.name for f in dataclasses.fields(Call)}
    | {n for n, v in vars(Call).items() if isinstance(v, property)}
    | {"to_dict"}
)


def readable(value: float, unit: str) -> str:
    """A number with a decimal prefix: 8.453e12, "FLOPs" -> "8.45 TFLOPs"."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:  # what three digits would round up to 1000 of the smaller unit
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
