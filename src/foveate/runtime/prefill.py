"""One prefill, from the caller's arguments to the decoder's: encode, choose, gather, and note it all in a Timeline.

Shapes: B rows, S columns of the caller's new tokens, S' of the shortened ones, E entries that a cache already holds.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from foveate.choosing.choose import Image, Prompt, choose
from foveate.choosing.lanes import Lanes, settle
from foveate.choosing.packing import Apart, to_tokens
from foveate.choosing.record import Stopwatch, record
from foveate.choosing.shorten import Plan, Side, find_images, padding_side, place_images, plan
from foveate.choosing.timeline import Group, Owner, Timeline
from foveate.core import Block, FoveateError, Method
from foveate.families.family import Family
from foveate.families.layouts import Encoded as Pictures
from foveate.families.layouts import runs_of
from foveate.runtime.decoder.cache import TimelineCache, attach, check_usable, timeline_of
from foveate.runtime.encoder.joint_space import JointSpace
from foveate.runtime.encoder.probe import Probe
from foveate.runtime.encoder.tower import Brought, TowerStages
from foveate.runtime.limits import check_reach, context_of, may_leave, room_after, unfit
from foveate.runtime.seams import CACHE, FORMER
from foveate.runtime.support import shape_of
from foveate.spec import format as format_spec
from foveate.trace import Call

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Arguments of a call that have a column for each token, beside ids and mask."""

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
_OF_ENCODER = ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")


@dataclass(eq=False)
class Shortened:
    """What one prefill hands to the decoder."""

    ids: Tensor  # (B, E + S') where the caller's ids repeat the cached prompt, else (B, S')
    options: dict[str, Any]
    timeline: Timeline
    plan: Plan
    images: list[Image]
    prompt: Prompt
    entries: int  # E
    earlier: list[Group]  # what the cache said of deep layers before
    stopwatches: list[Stopwatch]
    record: Callable[[], Call] | None  # makes the trace's record; None without images
    aparts: list[Apart | None]  # of each image, its tokens that are not visual
    encoded: Any = None  # transformers' output for the images, before shortening
    kind: str = "image"  # or "video": what its images are
    removed: int = 0
    settled: bool = False  # its stages inside the decoder have acted and the trace knows
    repeats: int = 1
    keep: int | Tensor = 0  # of a direct call whose columns are counted behind the decoder, its `logits_to_keep`
    cache: Any = None  # that the decoder fills; None without one
    fed: int = 0  # tokens that its first layer has been given of it
    notes: list[str] = field(default_factory=list)  # what the trace is to say besides

    def repeat_encoded(self, times: int) -> dict[str, Any]:
        """`mm_encoder_outputs` with what is left of each image, each row's group of images repeated."""
        kind = type(self.encoded)
        features = [image.features for image in self.images]
        made = {"pooler_output": self._repeated(features, times, self.encoded.pooler_output)}
        deep = getattr(self.encoded, "deepstack_features", None)
        if deep is not None:
            made["deepstack_features"] = [self._repeated(self._left(of_block), times, of_block) for of_block in deep]
        return {self.kind: kind(**made)}

    def _left(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Of features that an encoder hands over beside the pooled ones, those of what is left of each image.

        Tokens that stand for no patch have none.
        """
        flat = torch.cat(list(rows))
        lengths = [image.original for image in self.images]
        found = []
        for image, mine in zip(self.images, flat.split(lengths), strict=True):
            kept = mine[image.index]
            found.append(kept if image.extra is None else kept.masked_fill(image.extra[:, None].to(kept.device), 0.0))
        return found

    def _repeated(self, features: Sequence[Tensor], times: int, like: Any) -> Any:
        """What is left of each image, each row's group `times` over, in the container that the model hands over."""
        whole = [
            one if apart is None else apart.woven(image, one)
            for image, apart, one in zip(self.images, self.aparts, features, strict=True)
        ]
        rows = range(self.plan.index.shape[0])
        groups = [[one for image, one in zip(self.images, whole, strict=True) if image.row == row] for row in rows]
        repeated = [one for group in groups for _ in range(times) for one in group]
        return torch.cat(repeated)[None] if isinstance(like, Tensor) else repeated


@dataclass(frozen=True, eq=False)
class _Input:
    """The caller's new tokens and what the cache knows of earlier ones."""

    ids: Tensor  # (B, S)
    mask: Tensor  # (B, S) bool
    positions: Tensor  # (..., B, S)
    past_mask: Tensor | None  # (B, E) bool: the caller's mask on what the cache holds
    timeline: Timeline | None
    entries: int  # E

    @property
    def reached(self) -> int:
        """Places of the timeline that the cache covers."""
        return self.timeline.reached(self.entries) if self.timeline is not None else 0

    @property
    def next_position(self) -> Tensor:
        """(B,) position of the token after the prompt: one past the largest on any axis."""
        largest = self.positions.masked_fill(~self.mask, -1).amax(dim=-1)
        return largest.reshape(-1, self.ids.shape[0]).amax(dim=0) + 1

    @property
    def following(self) -> Tensor:
        """(..., B) where generate() goes on: behind the prompt's last token, on each axis by itself."""
        last = torch.arange(self.ids.shape[1], device=self.ids.device).where(self.mask, 0).amax(dim=1)
        behind: Tensor = self.positions.gather(-1, last[:, None].expand(*self.positions.shape[:-1], 1))
        return behind.squeeze(-1) + 1


class Prefill:
    """Shortens the prompts of one model; holds no state between calls."""

    def __init__(
        self,
        model: Any,
        family: Family,
        parts: Sequence[Method],
        probe: Probe,
        stages: TowerStages,
        owner: Owner,
        joint_space: JointSpace | None = None,
        short_outputs: bool = False,
    ) -> None:
        self.model, self.family, self.probe, self.stages, self.owner = model, family, probe, stages, owner
        self.joint_space, self.short_outputs = joint_space, short_outputs
        self.encoded: Lanes | None = None  # of the prefill in progress
        self.evicting = any(part.site == "cache" for part in parts)
        self._on_cache = [format_spec(part) for part in parts if part.site == "cache"]
        self._elsewhere = len(parts) > len(self._on_cache)
        self.within = any(part.site == "layer" for part in parts)
        self.parts = [part for part in parts if part.site == "input"]
        self.image_token = family.image_token_id(model.config)
        self.tokens: dict[str, Any] = {
            "image": self.image_token,
            "video": getattr(model.config, "video_token_id", None),
        }
        self.shape = shape_of(model, family)
        self.context = context_of(model.config)

    def check_images(self, ids: Tensor, given: dict[str, Any], cache: object) -> None:
        """Refuse prompts and pictures that do not belong together, before anything is encoded.

        Raises:
            FoveateError: pictures without placeholders, or placeholders without pictures; pixels that are NaN or
                infinite; another encoder block than the configuration's.
        """
        for name in _OF_ENCODER:
            asked, stated = given.get(name), getattr(self.model.config, name, None)
            if asked is not None and asked != stated:
                raise FoveateError(
                    f"{name}={asked!r} differs from the configuration's {stated!r}, by which this handle was made; set "
                    f"model.config.{name} before prune()"
                )
        self._check_kinds(given)
        pixels = [given[name] for name in _PIXELS.values() if given.get(name) is not None]
        pictures = bool(pixels)
        # Both at once: each would wait for the device.
        placeholders, broken = torch.stack([self.is_visual(ids).sum(), unfit(pixels, ids.device)]).tolist()
        if broken:
            raise FoveateError(f"{broken} pixel values are NaN or infinite; pass what the processor made")
        timeline = timeline_of(cache)
        if timeline is not None:
            self._check_later_turn(pictures)
            if pictures and self.evicting and not timeline.evicting:
                raise FoveateError(
                    "the words in this cache came in pieces or into a static cache, where a method on the cache did "
                    "not see them; start with a new cache for the picture"
                )
            return
        if pictures and not placeholders:
            raise FoveateError(
                f"pixel_values were given but the prompt has no image: no token {self.image_token} among "
                f"{ids.numel()}; write the image into the prompt"
            )
        if placeholders and not pictures:
            raise FoveateError(f"the prompt has {placeholders} visual placeholders but no pixel_values were given")

    def check_length(self, ids: Tensor, given: dict[str, Any], contains_past: bool, new_tokens: int) -> None:
        """Refuse a prompt of generate() that leaves the decoder's context, before its pictures are encoded.

        An answer that may leave it is warned of: it may end before.

        Args:
            new_tokens: of the longest answer.
        """
        cache: Any = given.get(CACHE)
        timeline = timeline_of(cache)
        held = 0 if timeline is None or contains_past else timeline.reached(int(cache.get_seq_length()))
        if self.context is None or not may_leave(self.context, held + ids.shape[1] + new_tokens - 1, given):
            return
        mask = given.get("attention_mask")
        counted = {**given, "position_ids": None if mask is None else (mask.long().cumsum(dim=-1) - 1).clamp(min=0)}
        reach = self._check_reach(self._input(ids, counted, cache, contains_past, given))
        room = room_after(reach, self.context)
        if new_tokens > room:
            warnings.warn(
                f"the prompt takes {reach} of the {self.context} positions of the decoder's context: an answer of more "
                f"than {room} tokens leaves it, and can turn to nonsense there; the most is max_new_tokens={room}",
                UserWarning,
                stacklevel=5,  # the call of generate()
            )

    def _check_reach(self, new: _Input) -> int:
        """Positions that a prompt takes; FoveateError where the decoder's context has fewer."""
        reach = int(new.next_position.max())
        assert self.context is not None
        check_reach(reach, self.context)
        return reach

    def _check_later_turn(self, pictures: bool) -> None:
        """Refuse pictures that follow a filled cache where transformers masks them wrongly, pruned or not."""
        needed, found = self.family.later_turns, transformers.__version__
        if pictures and needed is not None and Version(found) < Version(needed):
            raise FoveateError(
                f"transformers {found} masks a {self.family.name} picture wrongly that comes in a later turn, pruned "
                f"or not; use {needed} or newer, or give the whole conversation without {CACHE}"
            )

    def _check_kinds(self, given: dict[str, Any]) -> None:
        """Refuse videos where they are not described, and videos beside pictures."""
        kinds = [kind for kind, name in _PIXELS.items() if given.get(name) is not None]
        if "video" in kinds and self.family.frames:
            raise FoveateError(f"{self.family.name} takes the frames of a video as pictures; pass them as pixel_values")
        if "video" in kinds and self.family.videos is None:
            raise FoveateError(f"videos of {self.family.name} cannot be pruned; pictures can")
        if "video" in kinds and self.family.video_tower is not None:
            self._check_video_tower()
        if kinds and given.get("input_features") is not None:
            raise FoveateError("pictures beside sounds in one call cannot be pruned; give them in separate turns")
        if len(kinds) > 1:
            raise FoveateError("pictures and videos in one call cannot be pruned; give them in separate turns")

    def _check_video_tower(self) -> None:
        """Refuse videos where a method relies on the encoder of pictures, and videos have another."""
        other = f"videos of {self.family.name} have an encoder of their own"
        if self.stages.stages:
            name = format_spec(self.stages.stages[0][2])
            raise FoveateError(f"{other}, and {name} acts inside that of pictures; use a method that acts behind it")
        if self.joint_space is not None:
            raise FoveateError(f"{other}, which clip= does not belong to; use a method that needs no CLIP")

    def is_text(self, ids: object, given: Mapping[str, Any]) -> bool:
        """Whether neither a prompt nor the cache that it follows has any picture, so that all runs as it is."""
        timeline = timeline_of(given.get(CACHE))
        if timeline is not None and bool(timeline.pictured.any()):
            return False
        if any(given.get(name) is not None for name in _PIXELS.values()):
            return False  # without waiting for the device
        return isinstance(ids, Tensor) and not bool(self.is_visual(ids).any())

    def is_visual(self, ids: Tensor) -> Tensor:
        """Which ids stand for visual tokens, of pictures or videos."""
        visual = ids == self.image_token
        video = self.tokens["video"]
        return visual if video is None else visual | (ids == video)

    def expect(self, ids: Any, given: dict[str, Any], contains_past: bool) -> None:
        """Pictures of a prompt are about to be encoded: the stages inside the encoder must know how they lie."""
        if not isinstance(ids, Tensor):
            return
        cache: Any = given.get(CACHE)
        timeline = timeline_of(cache)
        if timeline is not None and contains_past:
            ids = ids[:, timeline.reached(int(cache.get_seq_length())) :]
        kind = "image" if given.get("pixel_values_videos") is None else "video"
        self.stages.expect(Brought(given, lambda: runs_of(ids, self.tokens[kind]), kind))

    # -- generate() -----------------------------------------------------------------------------------------------

    def for_generate(
        self, ids: Tensor, options: dict[str, Any], contains_past: bool, repeats: int, given: dict[str, Any]
    ) -> Shortened:
        """Shorten what generate() has prepared: images encoded, rows not yet repeated for beams.

        Args:
            ids: (B, S), or (B, reached + S) when `contains_past`.
            given: what the caller gave, sizes of the pictures among it.
        """
        cache = options.get(CACHE)
        new = self._input(ids, options, cache, contains_past, given)
        outputs = (options.get("mm_encoder_outputs") or {}).items()
        kind, encoded = next(((kind, output) for kind, output in outputs if output is not None), ("image", None))
        shortened = self._shorten(new, kind, encoded, "left", repeats, given)
        kept_ids = shortened.plan.gather(new.ids, self._pad_id())
        if new.timeline is not None and contains_past:
            kept_ids = torch.cat([ids.gather(1, new.timeline.places(new.entries)), kept_ids], dim=1)
        valid = shortened.plan.valid
        padded = options.get("attention_mask") is not None and not bool(options["attention_mask"].all())
        mask: Tensor | None = valid.long()
        if new.past_mask is not None:
            mask = torch.cat([new.past_mask, valid], dim=1).long()
        elif bool(valid.all()) and (padded or options.get("attention_mask") is None):
            mask = None
        shortened.options = {
            **options,
            **self._aligned(options, shortened.plan, new),
            "attention_mask": mask,
            "mm_encoder_outputs": {},
        }
        shortened.removed = ids.shape[1] - kept_ids.shape[1]
        shortened.ids = kept_ids
        return shortened

    # -- forward() ------------------------------------------------------------------------------------------------

    def for_forward(self, given: dict[str, Any]) -> Shortened:
        """Shorten a direct call of the model: encodes its pictures, or follows a pruned cache one step on."""
        ids, cache = given.get("input_ids"), given.get(CACHE)
        if ids is None or given.get("mm_encoder_outputs"):
            raise FoveateError("pruning needs input_ids and pixel_values; embeddings hide what is visual")
        check_usable(cache, self.owner)
        uncapped = self.evicting and not self._fills_cache(given, cache) and not self.is_text(ids, given)
        notes = self.without_cache() if uncapped else []
        self.check_images(ids, given, cache)
        self._check_outputs(ids, given)
        options, first = dict(given), self.family.first_position
        if options.get("position_ids") is not None:
            options["position_ids"] = options["position_ids"] - first
        new = self._input(ids, options, cache, contains_past=False, given=given)
        if self.context is not None and may_leave(self.context, new.reached + ids.shape[1], given):
            self._check_reach(new)
        kind = "image" if given.get("pixel_values_videos") is None else "video"
        self.expect(ids, given, contains_past=False)
        encoded = self._encode(options, kind)
        side = padding_side(new.mask)
        shortened = self._shorten(new, kind, encoded, side, 1, given)
        valid = shortened.plan.valid if new.past_mask is None else torch.cat([new.past_mask, shortened.plan.valid], 1)
        options.update(self._aligned(options, shortened.plan, new))
        options["position_ids"] = options["position_ids"] + first
        options["attention_mask"] = valid.long()
        self._hide_labels(options, shortened.plan)
        if not self.short_outputs and options.get("logits_to_keep") is not None:
            # Some models look for these columns among the short ones, before their last layers.
            shortened.keep = options.pop("logits_to_keep")
        shortened.ids = options["input_ids"] = shortened.plan.gather(ids, self._pad_id())
        if encoded is not None:
            options["mm_encoder_outputs"] = shortened.repeat_encoded(1)
        shortened.cache = self._give_cache(options, cache, shortened.timeline)
        shortened.notes += notes
        shortened.options = options
        return shortened

    def _check_outputs(self, ids: Tensor, given: dict[str, Any]) -> None:
        """Refuse what a direct call cannot give, or be given, in the caller's columns, before anything is encoded."""
        if self.short_outputs:
            for name in ("logits_to_keep", "shift_labels"):
                if isinstance(given.get(name), Tensor):
                    instead = "a number of last tokens" if name == "logits_to_keep" else "labels"
                    raise FoveateError(
                        f"{name} as a tensor counts the unpruned prompt, and short_outputs=True hands out the columns "
                        f"of the pruned one; give {instead}, or leave short_outputs out"
                    )
        elif self._asked("output_attentions", given):
            raise FoveateError(
                "output_attentions in a direct call: what a token attends to has no column for tokens that were "
                "pruned; prune(..., short_outputs=True) hands out attentions between the tokens that are left"
            )
        if self.within and self._asked("output_router_logits", given):
            raise FoveateError(
                "output_router_logits: where tokens leave inside the decoder, its blocks choose experts for different "
                "numbers of them, which the loss on that choice cannot take; leave it out, or use a method that acts "
                "before the decoder"
            )
        keep = given.get("logits_to_keep")
        if isinstance(keep, Tensor) and keep.ndim > 1 and keep.dtype == torch.bool:
            raise FoveateError(
                f"logits_to_keep as a mask {tuple(keep.shape)} joins the columns of all rows, which a pruned call does "
                "not; give the columns of each row as (rows, n) numbers"
            )
        if given.get("labels") is not None and (isinstance(keep, Tensor) or keep):
            raise FoveateError(
                "labels beside logits_to_keep: the loss takes the logits of all columns; give one of them"
            )
        for name in ("labels", "shift_labels"):
            stated = given.get(name)
            if stated is not None and stated.shape != ids.shape:
                raise FoveateError(
                    f"{name} have shape {tuple(stated.shape)}; {tuple(ids.shape)} is needed: one for each token of the "
                    "unpruned prompt"
                )

    def _asked(self, name: str, given: dict[str, Any]) -> bool:
        """Whether a call wants an output, by itself or by the configuration."""
        configs = (self.model.config, text_config(self.model))
        stated = given.get(name)
        return bool(stated if stated is not None else any(getattr(config, name, False) for config in configs))

    def _hide_labels(self, options: dict[str, Any], plan: Plan) -> None:
        """Take out the labels of tokens that left, and of those that padding would be made to predict."""
        if options.get("shift_labels") is not None:
            ahead = nn.functional.pad(plan.unheard, (-1, 1), value=False)
            options["shift_labels"] = options["shift_labels"].masked_fill(ahead, -100)
        if options.get("labels") is not None:
            labels = options["labels"].masked_fill(plan.unheard, -100)
            options["labels"] = plan.gather(labels, -100) if self.short_outputs else labels

    def _encode(self, options: dict[str, Any], kind: str) -> Any:
        """Run the vision encoder as generate() would, and take its arguments away from forward()."""
        encode = getattr(self.model.base_model, f"get_{kind}_features")
        names = [name for name in inspect.signature(encode).parameters if name != "kwargs" and name in options]
        arguments = {name: options.pop(name) for name in names}
        if arguments.get(_PIXELS[kind]) is None:
            return None
        return encode(**{name: value for name, value in arguments.items() if value is not None}, return_dict=True)

    def _give_cache(self, options: dict[str, Any], cache: Any, timeline: Timeline) -> Any:
        """The cache that the decoder will fill, ready to be pruned; None without one."""
        filled = self._fills_cache(options, cache)
        if cache is None and filled:
            cache = options[CACHE] = TimelineCache(config=text_config(self.model))
        if cache is not None:
            attach(cache, timeline)
        return cache if filled else None

    def _fills_cache(self, options: Mapping[str, Any], cache: Any) -> bool:
        """Whether the decoder fills a cache in a direct call."""
        first = self.model.get_decoder().layers[0]
        if first.training and getattr(first, "gradient_checkpointing", False):
            return False  # transformers leaves it empty, and says so
        wanted = options.get("use_cache")
        if wanted is None:
            wanted = text_config(self.model).use_cache and not self.model.training
        return cache is not None or bool(wanted)

    def without_cache(self) -> list[str]:
        """What the trace notes of a call without a cache: what was to act there has nothing to do.

        What leaves a cache leaves it after the layer has attended to it, so that a direct call gives the same.

        Raises:
            FoveateError: nothing else was to be pruned.
        """
        if self._on_cache and not self._elsewhere:
            raise FoveateError(
                f"{self._on_cache[0]} acts on the cache, and use_cache=False leaves it no place, nor does gradient "
                "checkpointing; nothing would be pruned"
            )
        return [f"{name} has nothing to do: this call has no cache" for name in self._on_cache]

    # -- both -----------------------------------------------------------------------------------------------------

    def _input(
        self, ids: Tensor, options: dict[str, Any], cache: Any, contains_past: bool, given: dict[str, Any]
    ) -> _Input:
        timeline = timeline_of(cache)
        entries = int(cache.get_seq_length()) if timeline is not None else 0
        reached = timeline.reached(entries) if timeline is not None else 0
        new = ids[:, reached:] if contains_past else ids
        if new.shape[1] == 0:
            raise FoveateError(f"the cache holds {reached} tokens already and the prompt brings no new one")
        whole = reached + new.shape[1]
        mask = options.get("attention_mask")
        mask = ids.new_ones(ids.shape[0], whole) if mask is None else mask
        if mask.ndim != 2 or mask.shape[1] != whole:
            raise FoveateError(
                f"attention_mask has shape {tuple(mask.shape)}; a mask of (rows, {whole}) is needed: one column for "
                "each token of the unpruned sequence"
            )
        mask = mask.to(ids.device).bool()
        past_mask = None
        if timeline is not None:
            if timeline.kept.shape[0] != ids.shape[0]:
                raise FoveateError(f"the cache holds {timeline.kept.shape[0]} rows, the prompt has {ids.shape[0]}")
            past_mask = mask.gather(1, timeline.places(entries)) & timeline.valid_places(entries)
        axes = self._axes(options.get("position_ids"), new, mask[:, reached:], timeline, entries, given)
        positions = self._positions(options.get("position_ids"), new, timeline, entries) if axes is None else axes
        return _Input(new, mask[:, reached:], positions, past_mask, timeline, entries)

    def _axes(
        self,
        stated: Tensor | None,
        new: Tensor,
        mask: Tensor,
        timeline: Timeline | None,
        entries: int,
        given: dict[str, Any],
    ) -> Tensor | None:
        """(3, B, S) positions of a family that counts on several axes; None for others.

        A row in front of them that counts text, as generate() writes it, is left out: only masks were made of it, and
        its gaps would be read as packed sequences.
        """
        if self.family.positions is None:
            return None
        batch, length = new.shape
        if timeline is None and stated is not None and stated.ndim == 3:
            return stated[-3:, :, -length:].expand(3, batch, -1).to(new.device)
        start = new.new_zeros(batch) if timeline is None else timeline.positions(entries, 1)[:, 0]
        if bool(self.is_visual(new).any()):
            return self.family.positions(self.model, new, mask, given, start)
        along = mask.long().cumsum(dim=1) - 1 if timeline is None else torch.arange(length, device=new.device)
        return (start[:, None] + along).clamp(min=0).expand(3, batch, -1)

    def _positions(self, given: Tensor | None, new: Tensor, timeline: Timeline | None, entries: int) -> Tensor:
        batch, length = new.shape
        reached = timeline.reached(entries) if timeline is not None else 0
        # With a cache but no mask generate() counts from 0 again, though its caller means a continuation.
        if given is not None and given.shape[-1] == reached + length:
            return given[..., -length:].expand(*given.shape[:-2], batch, -1).to(new.device)
        if timeline is not None:
            return timeline.positions(entries, length)
        return torch.arange(length, device=new.device).expand(batch, -1)

    def _shorten(
        self, new: _Input, kind: str, encoded: Any, side: Side, repeats: int, given: dict[str, Any]
    ) -> Shortened:
        images, aparts, blocks = self._images(new.ids, kind, encoded, given)
        masked = int((self.is_visual(new.ids) & ~new.mask).sum())
        if masked:
            raise FoveateError(f"attention_mask hides {masked} visual placeholders; only padding may be masked")
        for name, block in blocks.items():
            for value in vars(block).values():
                if value is not None and value.shape[0] != len(images):
                    raise FoveateError(f"encoder block {name} saw {value.shape[0]} pictures, the prompt {len(images)}")
        is_text = new.mask & ~self.is_visual(new.ids)
        stopwatch = Stopwatch(new.ids.device)
        with stopwatch:
            embed = lambda: self.model.get_input_embeddings()(new.ids.where(is_text, 0))  # noqa: E731 - rarely asked
            prompt = Prompt(embed, is_text, self.joint_space, new.ids)
            choose(self.parts, images, blocks, prompt, self._projector())
        made = plan(new.mask, images, side)
        timeline = self._timeline(new, made, repeats, [image.row for image in images])
        shortened = Shortened(
            ids=new.ids,
            options={},
            timeline=timeline,
            plan=made,
            images=images,
            prompt=prompt,
            entries=new.entries,
            earlier=[] if new.timeline is None else new.timeline.groups,
            stopwatches=[stopwatch, *([] if self.encoded is None else self.encoded.stopwatches)],
            record=None,
            aparts=aparts,
            encoded=encoded,
            kind=kind,
            repeats=repeats,
        )
        # Text alone is noted where it begins; what follows it is a step of decoding, for all that can be told.
        if images or new.timeline is None:
            mine = list(zip(images, aparts, strict=True))
            past = [0] * new.ids.shape[0] if new.past_mask is None else new.past_mask.sum(dim=1).tolist()
            shortened.record = partial(
                record,
                self.model,
                self.shape,
                images,
                index=made.original + torch.where(made.valid, new.reached, 0),
                prompt_length=new.ids.shape[1],
                text=[
                    words + sum(apart.columns.numel() for image, apart in mine if image.row == row and apart)
                    for row, words in enumerate(is_text.sum(dim=1).tolist())
                ],
                past=past,
                timeline=timeline,
                past_entries=new.entries,
                repeats=repeats,
                proportional=self.family.tower_of(self.model)[1].packed,
                stopwatches=shortened.stopwatches,
                notes=shortened.notes,
            )
        return shortened

    def _images(
        self, ids: Tensor, kind: str, encoded: Any, given: dict[str, Any]
    ) -> tuple[list[Image], list[Apart | None], dict[int | str, Block]]:
        """The call's images at their placeholders, what of them is not visual, and what the probe saw of them."""
        # A device map may have the encoder elsewhere than the decoder's first block.
        features = [] if encoded is None else [one.to(ids.device) for one in encoded.pooler_output]
        grid = self.family.grid(self.model.config)
        self.encoded = left = self.stages.take()
        seen = self.probe.take(None if left is None else left.full)
        blocks = {name: _moved(block, ids.device) for name, block in seen.items()}
        if left is None and not features:
            return find_images(ids, self.image_token, features, grid), [], blocks
        if left is not None and not left.put_back:
            tiles = left.pictures()
            counts = [tile.tile.length for (tile,) in tiles]
            kept = [rows[: tile.present.numel()] for rows, (tile,) in zip(features, tiles, strict=True)]
            images = find_images(ids, self.image_token, kept, grid, counts)
            for image, of_image in zip(images, tiles, strict=True):
                settle(image, of_image, put_back=False)
            return images, [None] * len(images), blocks
        token = self.tokens[kind]
        tower, row = self.family.tower_of(self.model)
        rows = [one.shape[0] for one in features]
        describe = self.family.layouts if kind == "image" else self.family.videos
        assert describe is not None, "videos of other families were refused before"
        layouts = describe(Pictures(self.model, tower, given, rows, lambda: runs_of(ids, token)))
        images, aparts = place_images(ids, token, torch.cat(features), layouts)
        if left is not None:
            for image, of_image in zip(images, left.pictures(), strict=True):
                settle(image, of_image, put_back=True)
                image.features = image.features[image.index]
        return images, aparts, to_tokens(blocks, layouts, row.packed)

    def _timeline(self, new: _Input, made: Plan, repeats: int, rows: list[int]) -> Timeline:
        kept, valid = made.index + new.reached, made.valid
        pictured = torch.zeros(new.ids.shape[0], dtype=torch.bool)
        pictured[rows] = True
        if new.timeline is not None:
            pictured = pictured | new.timeline.pictured
            kept = torch.cat([new.timeline.places(new.entries), kept], dim=1)
            valid = torch.cat([new.past_mask, valid], dim=1)  # type: ignore[list-item]
        lag = new.following - (made.gather(new.positions, 0)[..., -1] + 1)
        timeline = Timeline(
            kept=kept,
            valid=valid,
            length=new.reached + new.ids.shape[1],
            next_position=new.next_position,
            lag=lag if bool(lag.any()) else None,
            owner=self.owner,
            groups=[] if new.timeline is None else list(new.timeline.groups),
            pictured=pictured,
            evicting=self.evicting and (new.timeline is None or new.timeline.evicting),
            held={} if new.timeline is None else new.timeline.held,
            before=new.entries,
            seen=new.entries,
        )
        if repeats > 1:
            timeline.select_rows(torch.arange(kept.shape[0]).repeat_interleave(repeats))
        return timeline

    def _aligned(self, options: dict[str, Any], made: Plan, new: _Input) -> dict[str, Any]:
        """Every tensor that has a column per token, gathered with the one index."""
        aligned: dict[str, Any] = {"position_ids": made.gather(new.positions, 0)}
        for name in TOKEN_TYPES:
            if options.get(name) is not None:
                types = made.gather(options[name][:, -new.ids.shape[1] :], 0)
                # Those of the cache count for nothing: no new token is of the same picture as one there.
                past = types.new_zeros(types.shape[0], new.entries if self.family.typed_past else 0)
                aligned[name] = torch.cat([past, types], dim=1)
        return aligned

    def _projector(self) -> Any:
        if not self.family.pointwise:
            return None
        return partial(self.family.project, self.model)

    def _pad_id(self) -> int:
        """Any id but the placeholder's: padding is masked, but placeholders are counted."""
        pad = getattr(text_config(self.model), "pad_token_id", None)
        pad = 0 if pad is None or pad < 0 else int(pad)
        visual = set(self.tokens.values())
        return pad if pad not in visual else next(other for other in range(3) if other not in visual)


def named(function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a function is called with, by the names that its arguments have now."""
    signature = inspect.signature(function)
    bound = signature.bind_partial(*arguments, **options).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return renamed(bound)


def renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that this transformers has for them."""
    made = dict(given)
    for former, name in FORMER.items():
        value = made.pop(former, None)
        if value is not None and made.get(name) is None:
            made[name] = value
    return made


def _moved(block: Block, device: torch.device) -> Block:
    return Block(**{name: value.to(device) for name, value in vars(block).items() if value is not None})


def text_config(model: Any) -> Any:
    """The configuration of the decoder."""
    return model.config.get_text_config(decoder=True)
