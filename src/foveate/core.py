"""The nouns of the library: Method, Signals and what is to be known of each, Selection, and the errors they raise.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.ops.device import Unread


Keep: TypeAlias = int | float
Grid: TypeAlias = tuple[int, int]
Site: TypeAlias = Literal["picture", "pixels", "tower", "input", "layer", "cache"]


class FoveateError(ValueError):
    """Every error that a user can cause: the message names the value, the limit and the nearest valid choice."""


def short(text: str, most: int = 80) -> str:
    """What a user wrote as a message repeats it: whole up to `most` characters, else without its middle."""
    if len(text) <= most:
        return text
    return f"{text[: most * 2 // 3]}...{text[-(most // 4) :]} ({len(text)} characters)"


class UsageError(FoveateError):
    """An argument is wrong, and nothing has been done; the command line exits with a code of its own."""


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """What fails in here is an argument that cannot be used."""
    try:
        yield
    except FoveateError as error:
        raise UsageError(str(error)) from error


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The tail of an error message: the nearest of `choices` to `name`, then all of them."""
    known = sorted(choices)
    near = difflib.get_close_matches(name[:200], known, n=1, cutoff=0.5)  # it takes time in proportion to both
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Choices: {', '.join(known) or 'none'}."


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


hints_of: Callable[[type], Mapping[str, Any]] = functools.cache(typing.get_type_hints)
"""The annotations of a class; read once, since classes do not change."""


def check_choices(method: Method) -> None:
    """Refuse a field of a method that is none of the choices of its `Literal` annotation."""
    for name, hint in hints_of(type(method)).items():
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


@dataclass(frozen=True)
class Described:
    """What is to be known of one signal; whatever else speaks of signals is derived from it.

    Attributes:
        axes: one letter each: B images, N visual tokens, T text tokens, L cache entries, H heads, D width, W window.
        words: for readers; empty for a mask, which says what of another signal counts.
        rooms: where it can be had: "picture" (before the encoder), "encoder" and "decoder" (fields of a Block),
            "latest" (the encoder block in which a stage acts), "prompt", "joint" (CLIP's joint space), "cache".
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

    At sites `pixels` and `tower` the images are single tiles, as `tile` numbers them, or single frames (`frames`).

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
    tile: Tensor | None = None  # (B, N) anyres tile of each token, 0 = base; or frame
    tile_counts: tuple[tuple[int, ...], ...] | None = None  # `by_tile`, where the host knows it; else it is read
    frames: tuple[tuple[int, int], ...] | None = None  # of each image, its video and which frame; None for pictures
    size: Tensor | None = None  # (B, N) how many original tokens each stands for
    # (B, N, P) before the encoder, all patches of a token side by side: in [0, 1], the frames of a still picture once
    pixels: Tensor | None = _signal("BND", "the pixels", "picture")
    # (B, N, P) as the encoder is given them: normalised, and all frames
    normalised: Tensor | None = _signal("BND", "the pixels as the encoder is given them", "picture")
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
        """Tiles of the image; 1 without anyres, and of tiles by themselves."""
        counts = self.by_tile()
        return max(map(len, counts)) if any(sum(map(bool, image)) > 1 for image in counts) else 1

    def by_tile(self) -> Sequence[Sequence[int]]:
        """Of each image the number of tokens in each of its tiles, to the last that has any; all in one without."""
        if self.tile is None or self.tile_counts is not None:
            return self.tile_counts or [[self.shape[1]]] * self.shape[0]
        return [row.bincount().tolist() for row in self.tile.cpu()]

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


@dataclass(frozen=True, eq=False)
class Selection:
    """What a method decided for B images: which original tokens stay, and what stands in their place.

    Output token k of an image takes the position id, the timeline slot and the place in the picture of the original
    token `indices[b][k]`; a merged token carries its representative's index. `features`, when given, has one row per
    index. `extra` marks tokens that are not to be drawn. `groups`, which a method that merges inside the encoder gives,
    says of each token that was there (in the order of `Signals.index`) which output token it went into, or -1.
    """

    indices: list[Tensor] | Unread  # B tensors (K_b,) int64, distinct
    features: list[Tensor] | None = None  # B tensors (K_b, D)
    space: Literal["encoded", "projected"] = "projected"
    extra: list[Tensor] | None = None  # B tensors (K_b,) bool
    ordered: bool = True
    groups: list[Tensor] | None = None  # B tensors (N,) int64, -1..K_b - 1
    scores: Tensor | None = None  # (B, N) for those who look on: what a token is worth

    def check(self, original: int, batch: int, method: str) -> Selection:
        """Refuse a selection that breaks the contract, naming the method and the image; what it says, on the host.

        Whatever the number of images, this waits for the device once.

        Returns:
            The same selection with indices, groups and masks on the host, where the device was another.

        Raises:
            FoveateError: wrong number of rows, indices out of range, repeated, out of order, features that do not match
                them or are not finite, or groups that name no output token.
        """
        from foveate.ops.device import on_host

        self.check_form(batch, method)
        return self.checked(on_host(self.unread()), original, method)

    @property
    def _later(self) -> Unread | None:
        """The indices, where nobody knows yet how many there are."""
        indices: Any = self.indices
        return indices if hasattr(indices, "unread") else None

    def check_form(self, batch: int, method: str) -> None:
        """The part of `check` that waits for no device."""
        if len(self.indices) != batch:
            raise FoveateError(f"{method} answered for {len(self.indices)} images but was asked for {batch}")
        given = (("features", self.features), ("masks of extra tokens", self.extra), ("groups", self.groups))
        for name, rows in given:
            if rows is not None and len(rows) != batch:
                raise FoveateError(f"{method} gave {name} for {len(rows)} images but was asked for {batch}")
        if self._later is None:
            _refuse(method, (self._problem_of_form(image, kept) for image, kept in enumerate(self.indices)))

    def unread(self) -> list[Tensor]:
        """What the host has to know of it, to be handed to `checked`."""
        indices = self.indices if self._later is None else self._later.unread()
        return [
            *indices,
            *(self.extra or ()),
            *(self.groups or ()),
            *(row.isfinite().all() for row in self.features or ()),
        ]

    def checked(self, read: Sequence[Tensor], original: int, method: str) -> Selection:
        """The rest of `check`, with what was read."""
        values, later = iter(read), self._later
        kept = self.indices if later is None else later.unread()
        kept, extra, groups, finite = (
            [next(values) for _ in rows or ()] for rows in (kept, self.extra, self.groups, self.features)
        )
        if later is not None:
            kept = later.rows(kept)
            _refuse(method, (self._problem_of_form(image, one) for image, one in enumerate(kept)))
        made = dataclasses.replace(self, indices=kept, extra=self.extra and extra, groups=self.groups and groups)
        flags = [bool(flag) for flag in finite]
        _refuse(method, (made._problem(image, one, original, flags) for image, one in enumerate(kept)))
        return made

    def _problem_of_form(self, image: int, kept: Tensor) -> str | None:
        """What is wrong with shapes and dtypes."""
        if kept.ndim != 1 or str(kept.dtype) != "torch.int64":
            return f"kept indices are {kept.dtype} of shape {tuple(kept.shape)}; they must be torch.int64 of shape (K,)"
        if kept.numel() == 0:
            return "no token was kept; at least 1 must stay"
        if self.features is not None:
            rows = self.features[image]
            if rows.ndim != 2:
                return f"features of shape {tuple(rows.shape)}; they must be (K, D)"
            if rows.shape[0] != kept.numel():
                return f"{rows.shape[0]} feature rows for {kept.numel()} kept tokens"
        if self.extra is not None and self.extra[image].shape != kept.shape:
            return f"the mask of extra tokens has {self.extra[image].numel()} entries for {kept.numel()} kept tokens"
        groups = None if self.groups is None else self.groups[image]
        if groups is not None and (groups.ndim != 1 or str(groups.dtype) != "torch.int64"):
            return f"groups are {groups.dtype} of shape {tuple(groups.shape)}; they must be torch.int64 of shape (N,)"
        return None

    def _problem(self, image: int, kept: Tensor, original: int, finite: list[bool]) -> str | None:
        """What is wrong with the values, which are on the host."""
        numbers = kept.tolist()
        low, high = min(numbers), max(numbers)
        if low < 0 or high >= original:
            return f"kept index {low if low < 0 else high} is outside 0..{original - 1}"
        if len(set(numbers)) != len(numbers):
            return f"{len(numbers)} tokens were kept but only {len(set(numbers))} of them are distinct"
        if self.ordered and any(later <= earlier for earlier, later in pairwise(numbers)):
            return "kept indices do not ascend; a method that wants another order says ordered=False"
        if self.features is not None and not finite[image]:
            return "features hold NaN or infinity"
        if self.groups is not None and self.groups[image].numel():
            low, high = int(self.groups[image].min()), int(self.groups[image].max())
            if low < -1 or high >= len(numbers):
                return f"group {low if low < -1 else high} is outside -1..{len(numbers) - 1}"
        return None


def _refuse(method: str, problems: Iterable[str | None]) -> None:
    for image, problem in enumerate(problems):
        if problem:
            raise FoveateError(f"{method}, image {image}: {problem}")


@dataclass(frozen=True, eq=False)
class CacheSelection:
    """What stays of one layer's cache, per KV head, in timeline coordinates; `slots`, where given, are not checked."""

    positions: Tensor  # (B, Hkv, K) int64
    slots: Tensor | None = None  # (B, Hkv, K) places of these among the entries, ascending: foveate.ops knows them


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
    merging: ClassVar[bool] = False  # acts inside the blocks of the encoder, all of them one stage: see Merger
    beside: ClassVar[int] = 0  # tokens that reach the decoder besides the patches, once any have merged

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
