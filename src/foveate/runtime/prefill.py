"""One prefill, from the caller's arguments to the decoder's: encode, choose, gather, and note it all in a Timeline.

Shapes: B rows, S columns of the caller's new tokens, S' of the shortened ones, E entries that a cache already holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.choosing.choose import choose
from foveate.choosing.images import Image
from foveate.choosing.lanes import settled
from foveate.choosing.packing import to_tokens
from foveate.choosing.record import Stopwatch, record
from foveate.choosing.shorten import Plan, Side, find_images, padding_side, place_images, plan
from foveate.choosing.signals import Prompt
from foveate.choosing.timeline import Owner, Timeline
from foveate.core import Block, FoveateError, Method
from foveate.families.family import Family
from foveate.families.layouts import Encoded as Pictures
from foveate.families.layouts import Layout, runs_of
from foveate.families.shapes import ModelShape
from foveate.ops.device import on_device
from foveate.runtime.arguments import TOKEN_TYPES, kind_of, text_config
from foveate.runtime.decoder.cache import TimelineCache, attach, check_usable, timeline_of
from foveate.runtime.encoder.encode import encode, without_pictures
from foveate.runtime.encoder.joint_space import JointSpace
from foveate.runtime.encoder.probe import Probe
from foveate.runtime.encoder.tower import Brought, TowerStages
from foveate.runtime.incoming import Incoming, Reader, Told
from foveate.runtime.placeholders import Placeholders
from foveate.runtime.refusals import Refusals
from foveate.runtime.seams import CACHE
from foveate.runtime.shortened import Shortened
from foveate.spec import format as format_spec


class Prefill:
    """Shortens the prompts of one model; holds no state between calls.

    Attributes:
        placeholders: which ids are visual.
        refusals: what calls are checked for.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        parts: Sequence[Method],
        shape: ModelShape,
        probe: Probe,
        stages: TowerStages,
        owner: Owner,
        joint_space: JointSpace | None = None,
        short_outputs: bool = False,
    ) -> None:
        self.model, self.family, self.probe, self.stages, self.owner = model, family, probe, stages, owner
        self.joint_space, self.short_outputs = joint_space, short_outputs
        self._on_cache = [format_spec(part) for part in parts if part.site == "cache"]
        self._elsewhere = len(parts) > len(self._on_cache)
        self.parts = [part for part in parts if part.site == "input"]
        self.placeholders = Placeholders(model, family)
        self._read = Reader(model, family, self.placeholders)
        self.refusals = Refusals(
            model, family, parts, self.placeholders, self._read, joint_space is not None, short_outputs
        )
        self.shape = shape

    @property
    def evicting(self) -> bool:
        """Whether a method acts on the cache."""
        return bool(self._on_cache)

    def expect(self, ids: Any, given: dict[str, Any], contains_past: bool) -> None:
        """Pictures of a prompt are about to be encoded: the stages inside the encoder must know how they lie."""
        if not isinstance(ids, Tensor):
            return
        cache: Any = given.get(CACHE)
        timeline = timeline_of(cache)
        if timeline is not None and contains_past:
            ids = ids[:, timeline.reached(int(cache.get_seq_length())) :]
        kind = kind_of(given)
        self.stages.expect(Brought(given, lambda: runs_of(ids, self.placeholders.ids[kind]), kind))

    # -- generate() -----------------------------------------------------------------------------------------------

    def for_generate(
        self,
        ids: Tensor,
        options: dict[str, Any],
        contains_past: bool,
        repeats: int,
        given: dict[str, Any],
        told: Told,
    ) -> Shortened:
        """Shorten what generate() has prepared: images encoded, rows not yet repeated for beams.

        Args:
            ids: (B, S), or (B, reached + S) when `contains_past`.
            given: what the caller gave.
            told: what of it has been read.
        """
        cache = options.get(CACHE)
        new = self._read(ids, options, cache, contains_past, given, told)
        outputs = (options.get("mm_encoder_outputs") or {}).items()
        kind, encoded = next(((kind, output) for kind, output in outputs if output is not None), ("image", None))
        shortened = self._shorten(new, kind, encoded, "left", repeats, {**given, **told.sizes})
        kept_ids = shortened.plan.gather(new.ids, self.placeholders.padding())
        if new.timeline is not None and contains_past:
            kept_ids = torch.cat([ids.gather(1, new.timeline.places(new.entries)), kept_ids], dim=1)
        valid = shortened.plan.valid
        padded = options.get("attention_mask") is not None and not bool(new.host_mask.all())
        mask: Tensor | None = valid.long()
        if new.past_mask is not None:
            mask = torch.cat([new.past_mask, valid], dim=1).long()
        elif bool(shortened.plan.host.valid.all()) and (padded or options.get("attention_mask") is None):
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
        uncapped = self.evicting and not self._fills_cache(given, cache) and not self.placeholders.none_in(ids, given)
        notes = self.without_cache() if uncapped else []
        told = self.refusals.check_images(ids, given, cache)
        known = {**given, **told.sizes}
        self.refusals.check_outputs(ids, given)
        options, first = dict(given), self.family.first_position
        if options.get("position_ids") is not None:
            options["position_ids"] = options["position_ids"] - first
        new = self._read(ids, options, cache, contains_past=False, given=given, told=told)
        self.refusals.check_reach(new, given)
        kind = kind_of(given)
        self.expect(ids, known, contains_past=False)
        encoded = encode(self.model, options, kind)
        options = without_pictures(self.model, options, kind)
        side = padding_side(new.host_mask)
        shortened = self._shorten(new, kind, encoded, side, 1, known)
        valid = shortened.plan.valid if new.past_mask is None else torch.cat([new.past_mask, shortened.plan.valid], 1)
        options.update(self._aligned(options, shortened.plan, new))
        options["position_ids"] = options["position_ids"] + first
        options["attention_mask"] = valid.long()
        self._hide_labels(options, shortened.plan)
        if not self.short_outputs and options.get("logits_to_keep") is not None:
            # Some models look for these columns among the short ones, before their last layers.
            shortened.keep = options.pop("logits_to_keep")
        shortened.ids = options["input_ids"] = shortened.plan.gather(ids, self.placeholders.padding())
        if encoded is not None:
            options["mm_encoder_outputs"] = shortened.repeat_encoded(1)
        shortened.cache = self._give_cache(options, cache, shortened.timeline)
        shortened.notes += notes
        shortened.options = options
        return shortened

    def _hide_labels(self, options: dict[str, Any], plan: Plan) -> None:
        """Take out the labels of tokens that left, and of those that padding would be made to predict."""
        if options.get("shift_labels") is not None:
            ahead = nn.functional.pad(plan.unheard, (-1, 1), value=False)
            options["shift_labels"] = options["shift_labels"].masked_fill(ahead, -100)
        if options.get("labels") is not None:
            labels = options["labels"].masked_fill(plan.unheard, -100)
            options["labels"] = plan.gather(labels, -100) if self.short_outputs else labels

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

    def _shorten(
        self, new: Incoming, kind: str, encoded: Any, side: Side, repeats: int, given: dict[str, Any]
    ) -> Shortened:
        images, blocks, stopwatches = self._images(new, kind, encoded, given)
        visual = self.placeholders.are(new.host_ids)
        masked = int((visual & ~new.host_mask).sum())
        if masked:
            raise FoveateError(f"attention_mask hides {masked} visual placeholders; only padding may be masked")
        for name, block in blocks.items():
            for value in vars(block).values():
                if value is not None and value.shape[0] != len(images):
                    raise FoveateError(f"encoder block {name} saw {value.shape[0]} pictures, the prompt {len(images)}")
        is_text = new.host_mask & ~visual
        stopwatch = Stopwatch(new.ids.device)
        with stopwatch:
            asked, taught = _asked(is_text, visual, given)
            prompt = Prompt(lambda: self._embedded(new), asked, self.joint_space, new.host_ids, taught)
            images = choose(self.parts, images, blocks, prompt, self._projector())
        made = plan(new.host_mask, images, side).on(new.ids.device)
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
            stopwatches=[stopwatch, *stopwatches],
            encoded=encoded,
            kind=kind,
            repeats=repeats,
        )
        # Text alone is noted where it begins; what follows it is a step of decoding, for all that can be told.
        if images or new.timeline is None:
            shortened.record = partial(
                record,
                self.model,
                self.shape,
                index=made.host.original + torch.where(made.host.valid, new.reached, 0),
                prompt_length=new.ids.shape[1],
                text=[
                    words + sum(one.apart.columns.numel() for one in images if one.row == row and one.apart)
                    for row, words in enumerate(is_text.sum(dim=1).tolist())
                ],
                past=new.past,
                timeline=timeline,
                past_entries=new.entries,
                repeats=repeats,
                proportional=self.family.tower_of(self.model)[1].packed,
                stopwatches=shortened.stopwatches,
                notes=shortened.notes,
            )
        return shortened

    def _images(
        self, new: Incoming, kind: str, encoded: Any, given: dict[str, Any]
    ) -> tuple[list[Image], dict[int | str, Block], list[Stopwatch]]:
        """The call's images at their placeholders, what the probe saw of them, and what times stages in the encoder."""
        ids, device = new.host_ids, new.ids.device
        # A device map may have the encoder elsewhere than the decoder's first block.
        features = [] if encoded is None else [one.to(device) for one in encoded.pooler_output]
        grid = self.family.grid(self.model.config)
        left = self.stages.take()
        stopwatches = [] if left is None else left.stopwatches
        seen = self.probe.take(None if left is None else left.full)
        blocks = {name: _moved(block, device) for name, block in seen.items()}
        if left is None and not features:
            return find_images(ids, self.placeholders.image, features, grid), blocks, stopwatches
        if left is not None and not left.put_back:
            tiles = left.pictures()
            counts = [tile.tile.length for (tile,) in tiles]
            kept = [rows[: tile.present.numel()] for rows, (tile,) in zip(features, tiles, strict=True)]
            found = find_images(ids, self.placeholders.image, kept, grid, counts)
            images = [settled(image, of_image, put_back=False) for image, of_image in zip(found, tiles, strict=True)]
            return images, blocks, stopwatches
        token = self.placeholders.ids[kind]
        tower, row = self.family.tower_of(self.model)
        rows = [one.shape[0] for one in features]
        describe = self.family.layouts if kind == "image" else self.family.videos
        assert describe is not None, "videos of other families were refused before"
        layouts: Sequence[Layout] = () if left is None else left.described  # once: stated sizes wait for the device
        if not layouts:
            layouts = describe(Pictures(self.model, tower, given, rows, lambda: runs_of(ids, token)))
        images = place_images(ids, token, torch.cat(features), layouts)
        if left is not None:
            pairs = zip(images, left.pictures(), strict=True)
            images = [settled(image, of_image, put_back=True) for image, of_image in pairs]
            images = [replace(image, features=image.features[on_device(image.index, device)]) for image in images]
        return images, to_tokens(blocks, layouts, row.packed), stopwatches

    def _timeline(self, new: Incoming, made: Plan, repeats: int, rows: list[int]) -> Timeline:
        kept, valid = made.index + new.reached, made.valid
        before = [False] * new.ids.shape[0] if new.timeline is None else new.timeline.pictured
        pictured = [had or row in rows for row, had in enumerate(before)]
        if new.timeline is not None:
            kept = torch.cat([new.timeline.places(new.entries), kept], dim=1)
            valid = torch.cat([new.past_mask, valid], dim=1)  # type: ignore[list-item]
        last = torch.arange(new.ids.shape[1]).where(new.host_mask, 0).amax(dim=1)
        lags = bool((made.host.index[:, -1] != last).any())
        timeline = Timeline(
            kept=kept,
            valid=valid,
            length=new.reached + new.ids.shape[1],
            next_position=new.next_position,
            lag=new.following - (made.gather(new.positions, 0)[..., -1] + 1) if lags else None,
            owner=self.owner,
            groups=[] if new.timeline is None else list(new.timeline.groups),
            pictured=pictured,
            padded=not bool(made.host.valid.all()),
            evicting=self.evicting and (new.timeline is None or new.timeline.evicting),
            held={} if new.timeline is None else new.timeline.held,
            before=new.entries,
            seen=new.entries,
        )
        if repeats > 1:
            timeline.select_rows(torch.arange(kept.shape[0]).repeat_interleave(repeats))
        return timeline

    def _aligned(self, options: dict[str, Any], made: Plan, new: Incoming) -> dict[str, Any]:
        """Every tensor that has a column per token, gathered with the one index."""
        aligned: dict[str, Any] = {"position_ids": made.gather(new.positions, 0)}
        for name in TOKEN_TYPES:
            if options.get(name) is not None:
                types = made.gather(options[name][:, -new.ids.shape[1] :], 0)
                # Those of the cache count for nothing: no new token is of the same picture as one there.
                past = types.new_zeros(types.shape[0], new.entries if self.family.typed_past else 0)
                aligned[name] = torch.cat([past, types], dim=1)
        return aligned

    def _embedded(self, new: Incoming) -> Tensor:
        """(B, S, D) of the prompt's words; what stands elsewhere counts for nothing."""
        is_text = new.mask & ~self.placeholders.are(new.ids)
        embedded: Tensor = self.model.get_input_embeddings()(new.ids.where(is_text, 0))
        return embedded

    def _projector(self) -> Any:
        if not self.family.pointwise:
            return None
        return partial(self.family.project, self.model)


def _asked(is_text: Tensor, visual: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The text that methods may read, (B, S), and of which rows answers follow it, (B,); None without labels.

    What is labelled is to be written by the model, so that at inference it is not there yet, nor is what follows it. A
    row with a label in front of its picture says nothing about where a question ends: all of its text is read.

    Args:
        is_text, visual: (B, S) on the host.
        given: the caller's arguments.
    """
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if labels is None and shifted is not None:
        labels = nn.functional.pad(shifted, (1, -1), value=-100)
    if labels is None:
        return is_text, None
    labelled = labels.to(is_text.device) != -100
    asked = is_text & (labelled.cumsum(dim=1) == 0)
    in_front = (labelled & (visual.cumsum(dim=1) == 0)).any(dim=1)
    taught = asked.any(dim=1) & labelled.any(dim=1) & ~in_front
    return torch.where(taught[:, None], asked, is_text), taught


def _moved(block: Block, device: torch.device) -> Block:
    return Block(**{name: value.to(device) for name, value in vars(block).items() if value is not None})
