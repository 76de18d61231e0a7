"""What an answer costs, stage by stage, before anything runs: operations, seconds, bytes moved, bytes held."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from foveate.core import FoveateError, did_you_mean
from foveate.cost.choosing import choosing_flops, choosing_operators
from foveate.cost.devices import Hardware, Precision, hardware, precision
from foveate.cost.flops import (
    Convention,
    decode_flops,
    decoder_flops,
    equivalent_tokens,
    kv_values,
    projector_flops,
    tower_flops,
)
from foveate.cost.operators import Operator, decoder_block, output_head, patch_embedding, projection, tower_block
from foveate.cost.plan import Plan, token_plan
from foveate.cost.shapes import shape
from foveate.families.shapes import DecoderShape, ModelShape

if TYPE_CHECKING:
    from foveate.core import Grid, Keep, Method

STAGES = ("tower", "choosing", "projector", "prefill", "decode")


@dataclass(frozen=True)
class Stage:
    """One stage of an answer, all prompts of the batch together.

    Attributes:
        flops: operations in the chosen convention.
        seconds: on the roofline: each operator takes as long as the slower of computing and moving, no two overlap, and
            launching costs nothing.
        bytes_moved: between memory and processor.
        stored_activation_bytes: activations written, summed over the operators. Keys and values are not among them.
        fused_seconds: ... where attention is one operator that stores no map, as models run today.
        launches: kernels that plain PyTorch modules launch with fused attention.
        launched_seconds: `fused_seconds` at the device's fitted efficiency, but no less than launching takes; None for
            a device without a fit.
    """

    flops: int = 0
    seconds: float = 0.0
    bytes_moved: int = 0
    stored_activation_bytes: int = 0
    fused_seconds: float = 0.0
    launches: int = 0
    launched_seconds: float | None = None

    def __add__(self, other: Stage) -> Stage:
        parts = (self.launched_seconds, other.launched_seconds)
        return Stage(
            self.flops + other.flops,
            self.seconds + other.seconds,
            self.bytes_moved + other.bytes_moved,
            self.stored_activation_bytes + other.stored_activation_bytes,
            self.fused_seconds + other.fused_seconds,
            self.launches + other.launches,
            None if None in parts else sum(part or 0.0 for part in parts),
        )


@dataclass(frozen=True)
class Cost:
    """What one batch of prompts and their answers costs.

    Attributes:
        visual: (layers,) visual tokens of a prompt that each decoder layer sees.
        tower, choosing, projector, prefill, decode: the stages; `prefill` is the decoder's pass over the prompt,
            `decode` all steps after the first token of the answer.
        kv_bytes: keys and values that the prompt leaves in the cache.
        final_kv_bytes: ... that are held when the answer ends.
        weight_bytes: all matrices of the model.
        footprint_bytes: the most memory held: weights, cache, and the activations of the widest block.
        decoder_footprint_bytes: what LLM-Viewer calls memory consumption: the decoder blocks' weights, the prompt's
            cache, and one block's stored activations.
    """

    model: str
    visual: tuple[int, ...]
    text: int
    answer: int
    batch: int
    hardware: Hardware
    dtype: str
    convention: Convention
    tower: Stage
    choosing: Stage
    projector: Stage
    prefill: Stage
    decode: Stage
    kv_bytes: int
    final_kv_bytes: int
    weight_bytes: int
    footprint_bytes: int
    decoder_footprint_bytes: int

    @property
    def first_token(self) -> Stage:
        """Everything up to the first token of the answer."""
        return self.tower + self.choosing + self.projector + self.prefill

    @property
    def total(self) -> Stage:
        """Everything up to the end of the answer."""
        return self.first_token + self.decode

    @property
    def per_token_seconds(self) -> float | None:
        """Mean of the steps after the first token, on the roofline; None for answers of one token."""
        return self.decode.seconds / (self.answer - 1) if self.answer > 1 else None

    @property
    def equivalent_tokens(self) -> float:
        """Visual tokens averaged over the decoder layers."""
        return equivalent_tokens(self.visual)

    @property
    def fits(self) -> bool:
        """Whether the device's memory holds it."""
        return self.footprint_bytes <= self.hardware.memory

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, by the names of the attributes."""
        stages = (*STAGES, "first_token", "total")
        return {
            **{name: value for name, value in vars(self).items() if name not in STAGES},
            "visual": list(self.visual),
            "hardware": dataclasses.asdict(self.hardware),
            **{name: dataclasses.asdict(getattr(self, name)) for name in stages},
            "per_token_seconds": self.per_token_seconds,
            "equivalent_tokens": self.equivalent_tokens,
            "fits": self.fits,
        }


def estimate(
    model: Any,
    visual: int = 576,
    text: int = 60,
    methods: Method | str | Iterable[Method | str] | None = None,
    *,
    batch: int = 1,
    answer: int = 32,
    hardware: str | Hardware = "a100-40gb",
    dtype: str | Precision = "fp16",
    convention: Convention = "roofline",
    grid: Grid | None = None,
    tiles: int | None = None,
    kept: Keep | None = None,
) -> Cost:
    """The cost of answering `batch` prompts with one image each.

    Args:
        model: a preset's name, a configuration (object, dict, or the folder that holds config.json), or a ModelShape.
        visual: tokens of the image before any stage.
        text: all other tokens of the prompt.
        methods: none, or those that compose, as methods or specs.
        answer: tokens generated; the first comes out of the prefill.
        hardware: a row of `HARDWARE`, or one of your own.
        dtype: fp32, fp16, bf16, int8, int4, or bits of weights, activations and cache such as w4a16kv8.
        convention: what `flops` counts, "roofline" or "weights" (see `foveate.cost.flops`); nothing else depends on it.
        grid: (h, w) of one tile's tokens, None for a square.
        tiles: pictures that the encoder runs on, None for as few as hold the tokens.
        kept: tokens that a method that decides its own count leaves at each of its stages, or a share of `visual`: what
            its trace shows on pictures like yours.

    Raises:
        FoveateError: an unknown name, a count below 1 (text: below 0), methods whose counts cannot be planned, or
            `kept` where no method decides its own count.
    """
    for name, value, least in (("visual", visual, 1), ("text", text, 0), ("batch", batch, 1), ("answer", answer, 1)):
        if value < least:
            raise FoveateError(f"{name}={value} is below {least}; the smallest is {least}")
    if convention not in get_args(Convention):
        choices = did_you_mean(str(convention), get_args(Convention))
        raise FoveateError(f"{convention!r} is no way of counting operations; {choices}")
    sizes, device, bits = shape(model), _hardware(hardware), precision(dtype)
    stages = _methods(methods)
    if kept is not None and not any(part.adaptive for stage in stages for part in stage.parts()):
        raise FoveateError(
            f"kept={kept} is for methods that decide their own count, and none is given; say keep= in one"
        )
    planned = token_plan(sizes, stages, visual, grid=grid, tiles=tiles, kept=kept)
    return _Account(sizes, planned, text, batch, answer, device, bits, convention).cost()


_hardware = hardware  # the argument of `estimate` takes the name


def _methods(methods: Method | str | Iterable[Method | str] | None) -> list[Method]:
    """Methods and specs as methods."""
    from foveate.core import Method
    from foveate.spec import parse_stages

    if methods is None:
        return []
    given = [methods] if isinstance(methods, Method | str) else list(methods)
    found: list[Method] = []
    for one in given:
        found += parse_stages(one) if isinstance(one, str) else [one]
    return found


@dataclass(frozen=True)
class _Account:
    """Everything that the stages of one estimate are counted from."""

    shape: ModelShape
    plan: Plan
    text: int
    batch: int
    answer: int
    hardware: Hardware
    precision: Precision
    convention: Convention

    @property
    def lengths(self) -> list[int]:
        """(layers,) tokens of the prompt that each layer sees."""
        return [seen + self.text for seen in self.plan.visual]

    def cost(self) -> Cost:
        bits, decoder = self.precision, self.shape.decoder
        prompt, final = self.held(1), self.held(self.answer)
        blocks = decoder.weights * bits.weights / 8
        prefill = self.prefill()
        head = self.batch * decoder.vocabulary * bits.activations / 8
        block = (prefill.stored_activation_bytes - head) / decoder.layers
        weights = math.ceil(self.shape.weights * bits.weights / 8)
        kv = [self.kv_bytes(held) for held in (prompt, final)]
        return Cost(
            model=self.shape.name,
            visual=self.plan.visual,
            text=self.text,
            answer=self.answer,
            batch=self.batch,
            hardware=self.hardware,
            dtype=bits.name,
            convention=self.convention,
            tower=self.tower(),
            choosing=self.choosing(),
            projector=self.projector(),
            prefill=prefill,
            decode=self.decode(),
            kv_bytes=kv[0],
            final_kv_bytes=kv[1],
            weight_bytes=weights,
            footprint_bytes=weights + max(kv[1], self.kv_bytes(self.lengths) + self.widest()),
            decoder_footprint_bytes=math.ceil(blocks + self.kv_bytes(self.lengths) + block),
        )

    # -- stages ---------------------------------------------------------------------------------------------------

    def tower(self) -> Stage:
        tower, pictures = self.shape.tower, self.batch * self.plan.tiles
        flops = tower_flops(
            tower,
            convention=self.convention,
            lengths=self.plan.tower,
            patches=self.plan.patches,
            tiles=self.plan.tiles,
            batch=self.batch,
        )

        def operators(fused: bool) -> list[tuple[Operator, int]]:
            lengths = enumerate(self.plan.tower)
            rows = Counter((length, tower.keys(block, length, self.plan.patches)) for block, length in lengths)
            found = [(one, 1) for one in patch_embedding(tower, patches=self.plan.patches, batch=pictures)]
            for (length, keys), times in rows.items():
                block = tower_block(tower, tokens=length, keys=keys, batch=pictures, fused=fused)
                found += [(one, times) for one in block]
            return found

        return self.stage(flops, operators(False), operators(True))

    def projector(self) -> Stage:
        flops = projector_flops(self.shape.projector, tokens=self.plan.projected, batch=self.batch)
        work = [(one, 1) for one in projection(self.shape.projector, tokens=self.plan.projected, batch=self.batch)]
        return self.stage(flops, work, work)

    def choosing(self) -> Stage:
        asked = {"text": self.text, "batch": self.batch}
        flops = choosing_flops(self.shape, self.plan, **asked, convention=self.convention)
        work = [(one, 1) for one in choosing_operators(self.shape, self.plan, **asked)]
        return self.stage(flops, work, work)

    def prefill(self) -> Stage:
        decoder = self.shape.decoder
        flops = decoder_flops(decoder, lengths=self.lengths, convention=self.convention, batch=self.batch)

        def operators(fused: bool) -> list[tuple[Operator, int]]:
            found = [(one, 1) for one in output_head(decoder, batch=self.batch)]
            each = zip(decoder.each, self.lengths, strict=True)
            kinds = Counter((one, length, decoder.experts_of(block)) for block, (one, length) in enumerate(each))
            for (one, length, experts), times in kinds.items():
                sizes = dict(queries=length, keys=length, batch=self.batch)
                found += [(work, times) for work in decoder_block(one, **sizes, fused=fused, experts=experts)]
            return found

        return self.stage(flops, operators(False), operators(True))

    def decode(self) -> Stage:
        """Every step attends to what the cache holds by then, its own token included."""
        steps = range(1, self.answer)
        if not steps:
            return self.stage(0, [], [])
        contexts = [[before + 1 for before in self.held(step)] for step in steps]

        decoder = self.shape.decoder

        def operators(fused: bool) -> list[tuple[Operator, int]]:
            found = [(one, len(steps)) for one in output_head(decoder, batch=self.batch)]
            kinds = Counter(
                (decoder.each[block], keys, decoder.experts_of(block))
                for step in contexts
                for block, keys in enumerate(step)
            )
            for (one, keys, experts), times in kinds.items():
                sizes = dict(queries=1, keys=keys, batch=self.batch)
                found += [(work, times) for work in decoder_block(one, **sizes, fused=fused, experts=experts)]
            return found

        flops = sum(
            decode_flops(
                decoder,
                visual=[keys - 1 for keys in step],
                text=0,
                convention=self.convention,
                batch=self.batch,
            )
            for step in contexts
        )
        return self.stage(flops, operators(False), operators(True))

    def stage(self, flops: int, work: Sequence[tuple[Operator, int]], run: Sequence[tuple[Operator, int]]) -> Stage:
        """A stage from its operators and how often each runs: by LLM-Viewer's rules, and with fused attention."""
        bits, device = self.precision, self.hardware
        launches = sum(one.launches * times for one, times in run)
        fused = sum(one.seconds(device, bits) * times for one, times in run)
        return Stage(
            flops=flops,
            seconds=sum(one.seconds(device, bits) * times for one, times in work),
            bytes_moved=math.ceil(sum(one.bytes_moved(bits) * times for one, times in work)),
            stored_activation_bytes=math.ceil(sum(one.written * times for one, times in work) * bits.activations / 8),
            fused_seconds=fused,
            launches=launches,
            launched_seconds=device.launched(fused, launches),
        )

    # -- what is held ---------------------------------------------------------------------------------------------

    def held(self, token: int) -> list[int]:
        """(layers,) entries of a row's cache once token `token` of the answer is known, the first being 1."""
        cached = [part for part in self.plan.parts if part.site == "cache"]
        prompt = self.lengths
        if not cached:
            return [length + token - 1 for length in prompt]
        part: Any = cached[0]
        held = []
        for length in prompt:
            budget = sum(part.budget(length))
            grown = token - 1
            once = part.when == "prefill"
            held.append(min(length, budget) + grown if once else min(length + grown, budget))
        return held

    def kv_bytes(self, lengths: Sequence[int]) -> int:
        return math.ceil(kv_values(self.shape.decoder, lengths) * self.batch * self.precision.cache / 8)

    def widest(self) -> int:
        """Bytes of the activations that the widest block of the decoder holds at a time, attention being fused."""
        each = zip(self.shape.decoder.each, self.lengths, strict=True)
        return max(_widest(block, length * self.batch, self.precision) for block, length in each)


def _widest(decoder: DecoderShape, tokens: int, bits: Precision) -> int:
    """The residual stream, and whichever is wider of attention's and the feed-forward network's own."""
    attention = 2 * decoder.attention_width + 2 * decoder.cached_width
    experts = decoder.experts
    routed = 0 if experts is None else 3 * (experts.chosen * experts.width + experts.shared)
    dense = 0 if experts is not None and len(experts.blocks) == decoder.layers else decoder.ffn
    inner = max(attention, (3 if decoder.gated else 1) * dense, routed)
    return math.ceil(tokens * (2 * decoder.width + inner) * bits.activations / 8)
