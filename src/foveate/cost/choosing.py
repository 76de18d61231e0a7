"""What choosing tokens costs: the attention that methods read anew, and the trained modules that they run.

What a method computes from its signals afterwards (sorting, similarities among tokens, greedy loops) differs from
method to method and is not counted; `foveate bench` measures it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from foveate.core import Block, names_of
from foveate.cost.flops import Convention, lvpruning_modules
from foveate.cost.operators import Operator
from foveate.cost.plan import Plan
from foveate.families.shapes import DecoderShape, ModelShape

if TYPE_CHECKING:
    from foveate.core import Method

_SUMS = {*names_of(Block, attention="sums")}  # signals that sum a whole map of attention
_ROWS = {*names_of(Block, attention="row")}  # signals that are one row of it
_LAUNCHES = 20  # kernels of one reading: products, softmax, sums


def choosing_operators(shape: ModelShape, plan: Plan, *, text: int, batch: int) -> list[Operator]:
    """The operators that all parts of a plan add to the model's own."""
    found: list[Operator] = []
    seen: set[tuple[str, str]] = set()
    for part in plan.parts:
        for need in part.needs:
            room, _, rest = need.partition(".")
            place, _, field = rest.rpartition(".")
            kind = "sums" if field in _SUMS else field
            # Two methods, or two signals of one map, read it once; blocks that merge are read each by itself.
            if (f"{room}.{place}", kind) in seen and not part.merging:
                continue
            seen.add((f"{room}.{place}", kind))
            if room == "tower":
                found += _tower(shape, plan, part, place, field, batch)
            elif room == "decoder":
                found += _decoder(shape.decoder, plan, part, field, text, batch)
            elif need in ("cache.scores", "cache.window_queries"):
                found += _cache(shape.decoder, plan, part, field, text, batch)
        found += _modules(shape, plan, part, text, batch)
    return found


def choosing_flops(shape: ModelShape, plan: Plan, *, text: int, batch: int, convention: Convention) -> int:
    """Their operations; `weights` counts trained modules alone, since attention is free in it."""
    if convention == "roofline":
        return sum(operator.flops for operator in choosing_operators(shape, plan, text=text, batch=batch))
    return sum(operator.flops for part in plan.parts for operator in _modules(shape, plan, part, text, batch))


def _reading(queries: int, keys: int, width: int, heads: int, batch: int) -> Operator:
    """Probabilities of some rows of attention, summed as they come; no map is stored."""
    return Operator(
        (2 * width + 5 * heads) * queries * keys * batch,
        read=(queries + keys) * width * batch,
        written=keys * batch,
        launches=_LAUNCHES,
    )


def _tower(shape: ModelShape, plan: Plan, part: Method, place: str, field: str, batch: int) -> Iterator[Operator]:
    """Reading one block of the encoder; a method that merges reads every block up to the projector's."""
    if field not in _SUMS | _ROWS:
        return
    tower, pictures = shape.tower, batch * plan.tiles
    reads = tower.reads or tower.layers
    blocks = range(reads) if part.merging else [min(reads - 1, _block(place, tower.layers, reads))]
    for block in blocks:
        length = plan.tower[block]
        queries = length if field in _SUMS else 1
        yield _reading(queries, length, tower.width, tower.heads, pictures)


def _block(place: str, layers: int, reads: int) -> int:
    """The 0-based block that the name of a place means; "8/24" is scaled."""
    number, _, of = place.partition("/")
    if not number.isdigit():
        return {"read": reads, "latest": reads}.get(number, layers) - 1
    return round(int(number) * layers / int(of)) if of else int(number)


def _decoder(shape: DecoderShape, plan: Plan, part: Method, field: str, text: int, batch: int) -> Iterator[Operator]:
    """Reading rows of attention in front of each stage."""
    queries = {"last_query": 1, "next_query": 1, "text_query": text}.get(field)
    if queries is None:
        return
    for depth in part.depths(shape.layers):
        length = plan.visual[depth - 1] + text
        yield _reading(queries, length, shape.attention_width, shape.heads, batch)


def _cache(shape: DecoderShape, plan: Plan, part: Method, field: str, text: int, batch: int) -> Iterator[Operator]:
    """Column sums of the prompt's attention in every layer, of all queries or of the last ones."""
    for visual in plan.visual:
        length = visual + text
        queries = length if field == "scores" else min(length, getattr(part, "window", 1))
        yield _reading(queries, length, shape.attention_width, shape.heads, batch)


def _modules(shape: ModelShape, plan: Plan, part: Method, text: int, batch: int) -> Iterator[Operator]:
    """The trained modules of LVPruning (section 4.1) and of DynamicViT."""
    name = type(part).__name__
    if name == "LVPruning":
        width = shape.decoder.width
        for depth in part.depths(shape.decoder.layers):
            seen = plan.visual[depth - 1]
            own = part.flops(seen, text)  # nothing as long as no modules are loaded
            flops = own * batch or lvpruning_modules(shape.decoder, visual=[seen], text=text, batch=batch)
            yield Operator(flops, weights=16 * width**2, read=(8 * seen + 4 * text) * width * batch, launches=30)
    elif name == "DynamicViT":
        width = shape.tower.width
        weights = width**2 + width**2 // 2 + width**2 // 8 + width // 2
        for depth in part.depths(shape.tower.layers):
            rows = (plan.tower[depth - 1] - shape.tower.cls) * plan.tiles * batch
            yield Operator(2 * weights * rows, weights=weights, read=4 * rows * width, launches=20)
