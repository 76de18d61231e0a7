"""What the contracts of families share: which methods run where, what a method was asked, how answers are compared."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny, tiny_calls, tiny_families
from models.untouched import untouched
from references import agreement, documented, family_reference, tower_by_hand
from torch import Tensor

from foveate import methods
from foveate.core import FoveateError, Method, Selection
from foveate.runtime import support
from foveate.trace import Call

STEPS = 4
ATTENTION = ("sdpa", "eager")
SITUATIONS = {
    "single": ("3i4",),
    "padded": ("3i4", "2i9"),
    "two images": ("2i1i5",),
    "no image in one row": ("3i4", "6"),
}
OTHERS = tuple(name for name in tiny.FAMILIES if name != "llava-1.5")
VARIANTS = tuple(name for name in tiny_families.KINDS if "/" in name)
# One that reads the encoder, one that merges after it, one inside the decoder, one in several steps of it, and one on
# the cache.
SAMPLES = ("fopru", "prumerge", "fastv", "pyramiddrop", "h2o")
LARGER = ("gemma4/31b",)  # other methods run on it than on the small ones of its family
# Pictures in tiles of several sizes form no single raster.
TILED = ("llava-next", "llava-onevision", "llava-next-video", "internvl")
NEED_A_RASTER = ("hiprune", "pool", "vscan")


def at(*sites: str) -> list[str]:
    """Methods that act at these sites only."""
    found = []
    for name in methods.names():
        acts = {part.site for part in methods.get(name).example().parts()}
        if acts <= set(sites):
            found.append(name)
    return found


RUNNABLE = at(*support.SITES)
each_family = pytest.mark.parametrize("family", OTHERS)
each_attention = pytest.mark.parametrize("attn", ATTENTION)


def each_served(names: Iterable[str], families: Iterable[str] = OTHERS) -> pytest.MarkDecorator:
    """Each of some methods on each family on which the documentation says that it runs."""
    return pytest.mark.parametrize(("name", "family"), documented.pairs(list(names), list(families)))


def fields_of(name: str) -> set[str]:
    """Fields of a method."""
    return {field.name for field in dataclasses.fields(methods.get(name))}


@dataclass(frozen=True, eq=False)
class Asked:
    """One answer of a method, and about what it was asked."""

    part: Method
    original: int
    selection: Selection


def model_of(family: str, attn: str = "sdpa") -> Any:
    """A tiny model whose encoder is deep enough for methods that let some of its blocks run in full."""
    return tiny.model(family, attn=attn, blocks=6)


def generate(model: Any, given: dict[str, Tensor], **options: Any) -> Any:
    """A greedy answer, or whatever `options` make of it, with its logits."""
    settings = dict(max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)
    return model.generate(**given, **{**settings, **options})


def served(model: Any, name: str, **settings: Any) -> Method:
    """A method that the documentation says the model runs; a refusal is a failure."""
    method = dataclasses.replace(methods.get(name).example(model.config), **settings)
    try:
        tiny.prune(model, method).discard()
    except FoveateError as error:
        pytest.fail(f"docs/families.md says that {name} runs here, but it is refused: {error}")
    return method


def merged_features(model: Any, seen: list[Asked], calls: list[Call]) -> list[list[Tensor | None] | None]:
    """For each call, what stands in for the tokens of its images, as the decoder is to see it."""
    left = [
        (one.original, kept, None if one.selection.features is None else one.selection.features[row], one.selection)
        for one in seen
        for row, kept in enumerate(one.selection.indices)
    ]
    found: list[list[Tensor | None] | None] = []
    for call in calls:
        of_call: list[Tensor | None] = []
        for image in call.images:
            of_image = None
            for stage in (stage for stage in image.stages if stage.site == "input"):
                place = next(
                    place
                    for place, (original, kept, _, _) in enumerate(left)
                    if original == image.original and torch.equal(kept, stage.kept)
                )
                features, selection = left.pop(place)[2:]
                if features is not None and selection.space == "encoded":
                    features = family_reference.project(model, features)
                of_image = features
            of_call.append(of_image)
        found.append(of_call)
    return found


def check_agreement(
    model: Any, given: Any, out: Any, calls: list[Call], seen: list[Asked], prefix: Any = None, steps: int = STEPS
) -> None:
    """The answer is the reference's, and with positions counted anew it would not be."""
    merged = merged_features(model, seen, calls)
    rows = agreement.prompts(model, given, *calls, merged=merged, prefix=prefix)
    assert agreement.worst(model, rows, out, steps) < agreement.TOLERANCE
    shifted = agreement.prompts(model, given, *calls, merged=merged, renumber=True, prefix=prefix)
    assert agreement.worst(model, shifted, out, steps) > 0.05, "renumbered positions must be told apart"


def check_counts(model: Any, given: Any, method: Method, call: Call) -> None:
    """Exactly `count()` tokens stay, and no text leaves."""
    pictures = [one for row in range(len(given.pictures)) for one in family_reference.pictures(model, given.alone(row))]
    tiles = [one.pixels.shape[0] if one.pixels.ndim == 4 else 1 for row in given.pictures for one in row]
    for image, seen, of_image in zip(call.images, pictures, tiles, strict=True):
        assert image.original == seen.visual.numel()
        assert (image.grid is None) == (of_image > 1)
        counted = [part.count(image.original, image.grid, of_image) for part in method.parts()]
        if None not in counted:
            assert [stage.after for stage in image.stages] == [left for count in counted for left in count or ()]
        assert all(later.before == earlier.after for earlier, later in pairwise(image.stages))
    ids, valid = given["input_ids"], given["attention_mask"].bool()
    newlines = sum(seen.features.shape[0] - seen.visual.numel() for seen in pictures)
    kept = 0
    for row, index in enumerate(call.index):
        reached = set(index[index >= 0].tolist())
        text = (valid[row] & (ids[row] != model.config.image_token_id)).nonzero().squeeze(-1)
        assert set(text.tolist()) <= reached
        kept += len(reached) - text.numel()
    if all(stage.layer is None for image in call.images for stage in image.stages):
        assert kept == newlines + sum(image.after for image in call.images)


def refusal_of_pictures(name: str, family: str, given: Any) -> str | None:
    """What a method says of pictures that it cannot take, and the model can; None where it takes them."""
    tiles = [one.pixels.shape[0] for row in given.pictures for one in row if one.pixels.ndim == 4]
    if name in NEED_A_RASTER and family in TILED and max(tiles) > 1:
        return "needs the whole grid of the image"
    return "are interpolated between patches" if family == "llava-onevision" else None


def equals_the_reference(
    model: Any,
    name: str,
    family: str,
    attn: str,
    asked: Any,
    monkeypatch: pytest.MonkeyPatch,
    **settings: Any,
) -> None:
    """A method's answers are those of the reference, or it says why it cannot take pictures like these."""
    method = served(model, name, **settings)
    situation = list(SITUATIONS)[zlib.crc32(f"{name} {family} {attn}".encode()) % len(SITUATIONS)]
    given = tiny.inputs(model, *SITUATIONS[situation])
    sites = {part.site for part in method.parts()}
    given = tiny_calls.repeating(given) if "pixels" in sites else given
    seen = asked(method)
    unpruned = generate(model, given) if "cache" in sites else None
    try:
        with untouched(model), tiny.prune(model, method) as trace:
            out = generate(model, given)
    except FoveateError as error:
        said = refusal_of_pictures(name, family, given)
        if said is None or said not in str(error):
            raise
        return
    check_counts(model, given, method, trace.latest)
    if sites & {"pixels", "tower"}:
        if name != "crossget":  # the encoder's tests follow its cross token
            monkeypatch.setattr(
                family_reference, "pictures", tower_by_hand.replayed(model, given, method, trace.latest)
            )
            if "cache" in sites:
                first = out.sequences[:, : out.sequences.shape[1] - STEPS + 1]
                check_agreement(
                    model, given, SimpleNamespace(sequences=first, logits=out.logits[:1]), trace.history, seen, steps=1
                )
            else:
                check_agreement(model, given, out, trace.history, seen)
        return
    if unpruned is not None:  # on the cache nothing leaves before the first token of the answer
        if sites == {"cache"}:
            torch.testing.assert_close(out.logits[0], unpruned.logits[0], atol=agreement.TOLERANCE, rtol=0)
        return
    check_agreement(model, given, out, trace.history, seen)
