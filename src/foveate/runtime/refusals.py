"""What a call of a pruned model may not bring or ask for, refused before anything is encoded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from foveate.core import FoveateError, Method
from foveate.families.family import Family
from foveate.ops.device import read_together
from foveate.runtime.arguments import PIXELS, SIZES, text_config
from foveate.runtime.decoder.cache import timeline_of
from foveate.runtime.incoming import Incoming, Told
from foveate.runtime.limits import check_reach, context_of, may_leave, room_after, unfit
from foveate.runtime.placeholders import Placeholders
from foveate.runtime.seams import CACHE
from foveate.spec import format as format_spec

_OF_ENCODER = ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")


class Refusals:
    """What one model's calls are checked for.

    Args:
        clip: CLIP's heads stand beside the encoder of pictures.
        short_outputs: direct calls hand out the columns of the shortened prompt.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        parts: Sequence[Method],
        placeholders: Placeholders,
        read: Callable[..., Incoming],
        clip: bool,
        short_outputs: bool,
    ) -> None:
        self.model, self.family, self._placeholders, self._read = model, family, placeholders, read
        self._parts = {site: [part for part in parts if part.site == site] for site in ("tower", "layer", "cache")}
        self._clip, self._short_outputs = clip, short_outputs
        self._context = context_of(model.config)

    def check_images(self, ids: Tensor, given: dict[str, Any], cache: object) -> Told:
        """Refuse prompts and pictures that do not belong together, before anything is encoded.

        Returns:
            What of the arguments has been read, together with what is to be refused.

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
        pixels = [given[name] for name in PIXELS.values() if given.get(name) is not None]
        pictures = bool(pixels)
        stated = {name: given[name] for name in SIZES if isinstance(given.get(name), Tensor)}
        # All at once: each would wait for the device.
        arguments = [one for one in (ids, given.get("attention_mask")) if isinstance(one, Tensor)]
        broken, read, sizes = read_together([[unfit(pixels, ids.device)], arguments, list(stated.values())])
        told = Told(dict(zip(stated, sizes, strict=True)), tuple(zip(arguments, read, strict=True)))
        if int(broken[0]):
            raise FoveateError(f"{int(broken[0])} pixel values are NaN or infinite; pass what the processor made")
        placeholders = int(self._placeholders.are(read[0]).sum())
        timeline = timeline_of(cache)
        if timeline is not None:
            self._check_later_turn(pictures)
            if pictures and self._parts["cache"] and not timeline.evicting:
                raise FoveateError(
                    "the words in this cache came in pieces or into a static cache, where a method on the cache did "
                    "not see them; start with a new cache for the picture"
                )
            return told
        if pictures and not placeholders:
            raise FoveateError(
                f"pixel_values were given but the prompt has no image: no token {self._placeholders.image} among "
                f"{ids.numel()}; write the image into the prompt"
            )
        if placeholders and not pictures:
            raise FoveateError(f"the prompt has {placeholders} visual placeholders but no pixel_values were given")
        return told

    def check_length(
        self, ids: Tensor, given: dict[str, Any], contains_past: bool, new_tokens: int, told: Told
    ) -> None:
        """Refuse a prompt of generate() that leaves the decoder's context, before its pictures are encoded.

        An answer that may leave it is warned of: it may end before.

        Args:
            new_tokens: of the longest answer.
            told: what `check_images` gave.
        """
        cache: Any = given.get(CACHE)
        timeline = timeline_of(cache)
        held = 0 if timeline is None or contains_past else timeline.reached(int(cache.get_seq_length()))
        if self._context is None or not may_leave(self._context, held + ids.shape[1] + new_tokens - 1, given):
            return
        mask = given.get("attention_mask")
        counted = {**given, "position_ids": None if mask is None else (mask.long().cumsum(dim=-1) - 1).clamp(min=0)}
        reach = self._check_reach(self._read(ids, counted, cache, contains_past, given, told))
        room = room_after(reach, self._context)
        if new_tokens > room:
            warnings.warn(
                f"the prompt takes {reach} of the {self._context} positions of the decoder's context: an answer of "
                f"more than {room} tokens leaves it, and can turn to nonsense there; the most is max_new_tokens={room}",
                UserWarning,
                stacklevel=5,  # the call of generate()
            )

    def check_reach(self, new: Incoming, given: dict[str, Any]) -> None:
        """Refuse a prompt of a direct call that leaves the decoder's context."""
        if self._context is not None and may_leave(self._context, new.reached + new.ids.shape[1], given):
            self._check_reach(new)

    def _check_reach(self, new: Incoming) -> int:
        """Positions that a prompt takes; FoveateError where the decoder's context has fewer."""
        reach = int(new.next_position.max())
        assert self._context is not None
        check_reach(reach, self._context)
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
        kinds = [kind for kind, name in PIXELS.items() if given.get(name) is not None]
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
        if self._parts["tower"]:
            name = format_spec(self._parts["tower"][0])
            raise FoveateError(f"{other}, and {name} acts inside that of pictures; use a method that acts behind it")
        if self._clip:
            raise FoveateError(f"{other}, which clip= does not belong to; use a method that needs no CLIP")

    def check_outputs(self, ids: Tensor, given: dict[str, Any]) -> None:
        """Refuse what a direct call cannot give, or be given, in the caller's columns, before anything is encoded."""
        if self._short_outputs:
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
        if self._parts["layer"] and self._asked("output_router_logits", given):
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
