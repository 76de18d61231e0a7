"""What every method must hold to on the families beside LLaVA-1.5.

Each method runs once per attention, each situation with methods of every kind. A method that a family cannot serve must
say why.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import zlib
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from models import tiny, tiny_calls, tiny_families, tiny_parts, tiny_processors
from models.untouched import untouched
from packaging.version import Version
from references import agreement, family_reference, tower_by_hand
from test_contracts import ATTENTION, SITUATIONS, at
from torch import Tensor

from foveate import methods
from foveate.core import FoveateError, Method, Selection, Signals
from foveate.cost.flops import decoder_flops, projector_flops, tower_flops
from foveate.families import family_of
from foveate.families.rows import FAMILIES
from foveate.families.shapes import ModelShape
from foveate.runtime import support
from foveate.runtime.encoder.share import share_encoding
from foveate.runtime.seams import CACHE
from foveate.trace import Call

STEPS = 4
OTHERS = tuple(name for name in tiny.FAMILIES if name != "llava-1.5")
RUNNABLE = at(*support.SITES)
# One that reads the encoder, one that merges after it, one inside the decoder, one in several steps of it, and one on
# the cache.
KINDS = ("fopru", "prumerge", "fastv", "pyramiddrop", "h2o")
VARIANTS = tuple(name for name in tiny_families.KINDS if "/" in name)
LARGER = ("gemma4/31b",)  # other methods run on it than on the small ones of its family
TILED = (
    "llava-next",
    "llava-onevision",
    "llava-next-video",
    "internvl",
)  # pictures in tiles of several sizes form no single raster
NEED_A_RASTER = ("hiprune", "pool", "vscan")


def fields_of(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(methods.get(name))}


FORMS = tuple(name for name in RUNNABLE if fields_of(name) & {"attention", "space"})
each_family = pytest.mark.parametrize("family", OTHERS)
each_attention = pytest.mark.parametrize("attn", ATTENTION)


@dataclass(frozen=True, eq=False)
class Asked:
    """One answer of a method, and about what it was asked."""

    part: Method
    original: int
    selection: Selection


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Record what a method answers: the reference takes merged features from there."""

    def record(method: Method) -> list[Asked]:
        seen: list[Asked] = []
        for kind in {type(part) for part in method.parts() if part.site == "input"}:
            stock = kind.select

            def select(self: Method, signals: Signals, stock: Any = stock) -> Any:
                seen.append(Asked(self, signals.original, stock(self, signals)))
                return seen[-1].selection

            monkeypatch.setattr(kind, "select", select)
        return seen

    return record


def model_of(family: str, attn: str = "sdpa") -> Any:
    return tiny.model(family, attn=attn, blocks=6)


def generate(model: Any, given: dict[str, Tensor], **options: Any) -> Any:
    settings = dict(max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)
    return model.generate(**given, **{**settings, **options})


def served(model: Any, name: str, **settings: Any) -> Method:
    """A method that the model can run; what it cannot run must be refused before any work, with a reason."""
    method = methods.get(name).example(model.config)
    try:
        method = dataclasses.replace(method, **settings)
        tiny.prune(model, method).discard()
    except FoveateError as error:
        pytest.skip(f"refused: {error}")
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


@each_attention
@pytest.mark.parametrize("family", [*OTHERS, *LARGER])
@pytest.mark.parametrize("name", RUNNABLE)
def test_each_method_equals_the_reference(
    name: str, family: str, attn: str, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    equals_the_reference(model_of(family, attn), name, family, attn, asked, monkeypatch)


def equals_the_reference(
    model: Any,
    name: str,
    family: str,
    attn: str,
    asked: Any,
    monkeypatch: pytest.MonkeyPatch,
    **settings: Any,
) -> None:
    method = served(model, name, **settings)
    situation = list(SITUATIONS)[zlib.crc32(f"{name} {family} {attn}".encode()) % len(SITUATIONS)]
    given = tiny.inputs(model, *SITUATIONS[situation])
    sites = {part.site for part in method.parts()}
    seen = asked(method)
    unpruned = generate(model, given) if "cache" in sites else None
    try:
        with untouched(model), tiny.prune(model, method) as trace:
            out = generate(model, given)
    except FoveateError as error:
        if (family not in TILED or name not in NEED_A_RASTER) and "are interpolated between patches" not in str(error):
            raise
        pytest.skip(f"refused: {error}")
    check_counts(model, given, method, trace.latest)
    if "tower" in sites:
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


@each_family
@pytest.mark.parametrize("name", FORMS)
def test_each_other_form_of_a_method_equals_the_reference(
    name: str, family: str, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that is refused with the settings that the refusal names, another one without CLS."""
    model = model_of(family)
    row = family_of(model)
    method, tower = methods.get(name).example(model.config), row.tower_of(model)[1]
    settings: dict[str, Any] = {"attention": "received"} if "attention" in fields_of(name) else {}
    if any(support.why_not(part, row, tower) is not None for part in method.parts()):
        form = support.other_form(method, row, tower)
        if form is None:  # another part of it cannot run, and that is what is said
            with pytest.raises(FoveateError) as error:
                tiny.prune(model, method)
            assert f"which {row.name} does not allow" in str(error.value) and " it runs)" not in str(error.value)
            pytest.skip(f"refused: {error.value}")
        settings = dict(pair.split("=") for pair in form.split(","))
        with pytest.raises(FoveateError, match=re.escape(f"(with {form} it runs)")):
            tiny.prune(model, method)
    if not settings:
        pytest.skip("the method runs as it is")
    equals_the_reference(model, name, family, "sdpa", asked, monkeypatch, **settings)


@each_family
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", [name for name in KINDS if name in at("input", "layer")])
def test_each_situation_equals_the_reference(name: str, situation: str, family: str, asked: Any) -> None:
    model = model_of(family)
    method = served(model, name)
    given = tiny.inputs(model, *SITUATIONS[situation])
    seen = asked(method)
    with tiny.prune(model, method) as trace:
        out = generate(model, given)
        again = generate(model, given)
    assert torch.equal(torch.stack(out.logits), torch.stack(again.logits)), "the second run equals the first"
    calls = trace.history[:1]
    check_agreement(model, given, out, calls, seen[: len(seen) // 2])


@pytest.mark.parametrize("family", [*OTHERS, *LARGER])
@pytest.mark.parametrize("name", ["fopru", "fastv"])
def test_a_second_turn_equals_the_reference(name: str, family: str, asked: Any) -> None:
    """Row 0 speaks on, row 1 shows a picture in its second turn, row 2 its first one; new parts differ in length."""
    model = model_of(family)
    method = served(model, name)
    turns = (("3i4", "2i2", "6"), ("5", "1i3", "2i1"))
    if getattr(model.get_decoder().config, "sliding_window", None):
        turns = (("2i2",), ("1i3",))  # a window counts the padding between two turns, pruned or not
    first, second = tiny.inputs(model, *turns[0]), tiny.inputs(model, *turns[1], seed=1)
    seen = asked(method)
    with tiny.prune(model, method) as trace:
        out = generate(model, first, max_new_tokens=3)
        given, whole = first.continued(out.sequences, second)
        needed = family_of(model).later_turns
        if needed is not None and Version(transformers.__version__) < Version(needed):
            with pytest.raises(FoveateError, match="picture wrongly that comes in a later turn"):
                generate(model, given, **{CACHE: getattr(out, CACHE)})
            return
        out = generate(model, given, **{CACHE: getattr(out, CACHE)})
    assert len(trace.history) == 2
    prefix = first["attention_mask"].sum(dim=1).tolist()
    check_agreement(model, whole, out, trace.history, seen, prefix)
    assert torch.equal(out.sequences[:, :-STEPS], given["input_ids"])


@each_family
@each_attention
@pytest.mark.parametrize("name", ["fopru", "fastv", "h2o"])
def test_beams_over_ragged_rows_equal_each_row_alone(name: str, family: str, attn: str) -> None:
    model = model_of(family, attn)
    method = served(model, name)
    rows = ("3i4", "2i1i5", "1i2")
    given = tiny.inputs(model, *rows)
    beams: dict[str, Any] = dict(num_beams=3, num_return_sequences=3, output_scores=True)
    with tiny.prune(model, method) as trace:
        together = generate(model, given, **beams)
        images = trace.images
        for row in range(len(rows)):
            alone = generate(model, given.alone(row), **beams)
            mine = slice(3 * row, 3 * row + 3)
            torch.testing.assert_close(together.sequences_scores[mine], alone.sequences_scores, atol=1e-4, rtol=0)
            assert torch.equal(together.sequences[mine, -STEPS:], alone.sequences[:, -STEPS:])
            for in_batch, by_itself in zip([i for i in images if i.row == row], trace.images, strict=True):
                assert torch.equal(in_batch.kept, by_itself.kept)


@each_family
@each_attention
@pytest.mark.parametrize("name", ["fopru", "random", "fastv", "pyramiddrop", "h2o"])
def test_keeping_everything_changes_nothing(name: str, family: str, attn: str) -> None:
    model = model_of(family, attn)
    method = agreement.keeping_all(served(model, name)) or dataclasses.replace(
        methods.get(name)(), heavy=1.0, recent=1.0
    )
    given = tiny.inputs(model, "3i4", "2i1i5", "6")
    unpruned = generate(model, given)
    with untouched(model), tiny.prune(model, method) as trace:
        pruned = generate(model, given)
        direct = model(**given).logits
    assert all(image.after == image.original for image in trace.images)
    assert torch.equal(pruned.sequences, unpruned.sequences)
    torch.testing.assert_close(torch.stack(pruned.logits), torch.stack(unpruned.logits), atol=1e-5, rtol=0)
    valid = given["attention_mask"].bool()
    torch.testing.assert_close(direct[valid], model(**given).logits[valid], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", ["fopru", "divprune", "fastervlm", "random"])
@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_a_share_is_one_of_each_image(keep: float, name: str, family: str) -> None:
    """Whatever its tiles: InternVL's here have 9 tokens each, of which a half cannot stay."""
    model = model_of(family)
    given = tiny.inputs(model, "2i1i1i2")
    settings = {"attention": "received"} if "attention" in fields_of(name) else {}
    with tiny.prune(model, dataclasses.replace(methods.get(name)(), keep=keep, **settings)) as trace:
        generate(model, given, max_new_tokens=1)
    assert [image.after for image in trace.images] == [round(image.original * keep) for image in trace.images]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", ["fopru", "divprune", "fastv"])
def test_other_members_of_a_family_equal_the_reference(name: str, situation: str, variant: str, asked: Any) -> None:
    """Another decoder, or another encoder in the place of the usual one."""
    model = model_of(variant)
    method = served(model, name)
    given = tiny.inputs(model, *SITUATIONS[situation])
    seen = asked(method)
    with untouched(model), tiny.prune(model, method) as trace:
        out = generate(model, given)
    check_counts(model, given, method, trace.latest)
    check_agreement(model, given, out, trace.history, seen)


@each_attention
@pytest.mark.parametrize("family", tiny_families.with_videos())
@pytest.mark.parametrize("name", [*KINDS[:1], "divprune", "fastv", "pyramiddrop"])
def test_videos_equal_the_reference(name: str, family: str, attn: str, asked: Any) -> None:
    model = model_of(family, attn)
    method = served(model, name)
    given = tiny.inputs(model, "3v4", "2v1v5", "6")
    unpruned = generate(model, given)
    everything = agreement.keeping_all(method)
    assert everything is not None
    with tiny.prune(model, everything):
        same = generate(model, given)
    torch.testing.assert_close(torch.stack(same.logits), torch.stack(unpruned.logits), atol=1e-5, rtol=0)
    seen = asked(method)
    with untouched(model), tiny.prune(model, method) as trace:
        out = generate(model, given)
        direct = model(**given).logits
    assert direct.shape[1] == given["input_ids"].shape[1]
    check_agreement(model, given, out, trace.history[:1], seen[: len(seen) // 2])
    pictures = [one for row in range(3) for one in family_reference.pictures(model, given.alone(row))]
    assert [image.original for image in trace.images] == [one.visual.numel() for one in pictures]


@pytest.mark.parametrize("family", tiny_families.with_videos())
@pytest.mark.parametrize("name", ["fopru", "fastv"])
def test_a_video_in_the_turn_after_a_picture(name: str, family: str, asked: Any) -> None:
    model = model_of(family)
    method = served(model, name)
    first, second = tiny.inputs(model, "3i4", "6"), tiny.inputs(model, "2v3", "1v2", seed=1)
    seen = asked(method)
    with tiny.prune(model, method) as trace:
        out = generate(model, first, max_new_tokens=3)
        given, whole = first.continued(out.sequences, second)
        out = generate(model, given, **{CACHE: getattr(out, CACHE)})
    check_agreement(model, whole, out, trace.history, seen)


FRAMES = tuple(family.name for family in FAMILIES if family.frames)


def video_in_words(family: str, frames: int) -> tuple[Any, str]:
    """What the stock processor of a family writes for a video, and a tokenizer that knows its tokens."""
    module = importlib.import_module(f"transformers.models.{family}.processing_{family}")
    if family == "internvl":
        processor = tiny_processors.PROCESSORS[family]()
        return processor.tokenizer, processor.replace_video_token({"pixel_values_videos": [torch.zeros(frames, 1)]}, 0)
    marks = ("<fake_token_around_image>", "<global-img>")
    names = dict(image_seq_len=16, image_token="<image>", fake_image_token=marks[0], global_image_token=marks[1])
    told = SimpleNamespace(fps=1, timestamps=list(range(frames)), duration=frames)
    with mock.patch.object(module, "num2words", str):
        text = module.SmolVLMProcessor.replace_video_token(
            SimpleNamespace(**names), {"pixel_values": torch.zeros(1, frames, 1), "video_metadata": [told]}, 0
        )
    return tiny_processors.tokenizer(more=marks), text


@pytest.mark.parametrize("family", FRAMES)
@pytest.mark.parametrize("name", ["fopru", "divprune", "fastv", "pyramiddrop", "tome"])
def test_frames_that_are_handed_over_as_pictures(name: str, family: str, asked: Any) -> None:
    """Text stands between them, so each is pruned as the same picture alone is."""
    model = model_of(family)
    method = served(model, name)
    pictures = tiny.inputs(model, "1i1i1i").pictures[0]
    frames = [dataclasses.replace(one, tokens=9, pixels=one.pixels[:1]) for one in pictures]
    frames = frames if family == "internvl" else pictures
    tokenizer, text = video_in_words(family, len(frames))
    ids = tokenizer(f"w7 w8 {text}\nw9", return_tensors="pt")["input_ids"]
    given = tiny_calls.call(model, ids, torch.ones_like(ids), [frames])
    seen = asked(method)
    with untouched(model), tiny.prune(model, method) as trace:
        out = generate(model, given)
        if "tower" not in {part.site for part in method.parts()}:
            check_agreement(model, given, out, trace.history[:1], seen)
        together = trace.images
        assert [image.original for image in together] == [9 if family == "internvl" else 16] * 3
        if {part.site for part in method.parts()} == {"layer"}:
            return  # chosen by the text as well
        for frame, image in zip(frames, together, strict=True):
            alone = torch.cat([ids[:, :1], ids[ids == tiny_parts.IMAGE][None, : frame.tokens], ids[:, -1:]], dim=1)
            generate(model, tiny_calls.call(model, alone, torch.ones_like(alone), [[frame]]))
            assert torch.equal(image.kept, trace.images[0].kept)


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("internvl", "internvl takes the frames of a video as pictures; pass them as pixel_values"),
        ("gemma3", "videos of gemma3 cannot be pruned; pictures can"),
    ],
)
def test_videos_where_they_are_not_described(family: str, told: str) -> None:
    model = model_of(family)
    given = tiny.inputs(model, "1i")
    with tiny.prune(model, methods.get("fastv")()), pytest.raises(FoveateError) as error:
        generate(model, {**given, "pixel_values_videos": given["pixel_values"]})
    assert str(error.value) == told


def test_pictures_beside_sounds() -> None:
    model = model_of("gemma4")
    given = tiny.inputs(model, "1i")
    with tiny.prune(model, methods.get("random")()), pytest.raises(FoveateError) as error:
        generate(model, {**given, "input_features": torch.zeros(1, 4, 8)})
    assert str(error.value) == "pictures beside sounds in one call cannot be pruned; give them in separate turns"


def test_pictures_and_videos_in_one_call() -> None:
    model = model_of("qwen2-vl")
    given = tiny.inputs(model, "1i1v")
    with tiny.prune(model, methods.get("fastv")()), pytest.raises(FoveateError) as error:
        generate(model, given)
    assert str(error.value) == "pictures and videos in one call cannot be pruned; give them in separate turns"


@each_family
@pytest.mark.parametrize("name", ["fopru", "fastv"])
def test_direct_calls_equal_generation(name: str, family: str) -> None:
    """A prompt and the tokens after it, one call each, give the logits of generate()."""
    model = model_of(family)
    method = served(model, name)
    given = tiny.inputs(model, "3i4")
    with tiny.prune(model, method):
        out = generate(model, given)
        step = model(**given, use_cache=True)
        logits, mask = [step.logits[:, -1]], given["attention_mask"]
        for token in out.sequences[0, -STEPS:-1]:
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
            step = model(input_ids=token[None, None], attention_mask=mask, **{CACHE: getattr(step, CACHE)})
            logits.append(step.logits[:, -1])
    torch.testing.assert_close(torch.cat(logits), torch.cat(out.logits), atol=agreement.TOLERANCE, rtol=0)


@each_family
@pytest.mark.parametrize("name", ["fopru", "fastv"])
def test_a_static_cache_gives_the_same(name: str, family: str) -> None:
    model = model_of(family)
    method = served(model, name)
    given = tiny.inputs(model, "3i4", "2i1i5", "6")
    with tiny.prune(model, method):
        dynamic = generate(model, given)
        if name == "fastv" and getattr(model.get_decoder().config, "sliding_window", None):
            with pytest.raises(FoveateError, match="layer 0 slides, and a static sliding cache cannot hold a pruned"):
                generate(model, given, cache_implementation="static")
            return
        static = generate(model, given, cache_implementation="static")
    torch.testing.assert_close(
        torch.stack(static.logits), torch.stack(dynamic.logits), atol=agreement.TOLERANCE, rtol=0
    )


@each_family
@pytest.mark.parametrize("name", ["fopru", "fastv"])
def test_padding_on_the_right_gives_each_row_what_it_gets_alone(name: str, family: str) -> None:
    model = model_of(family)
    method = served(model, name)
    given = tiny.inputs(model, "3i4", "2i1i5", padding="right")
    with torch.no_grad(), tiny.prune(model, method):
        together = model(**given).logits
        for row in range(2):
            alone = model(**given.alone(row)).logits[0]
            own = together[row, : alone.shape[0]]
            torch.testing.assert_close(own, alone, atol=agreement.TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", [*OTHERS, *LARGER])
@pytest.mark.parametrize("name", ["fopru", "prumerge", "fastv", "pyramiddrop"])
@torch.no_grad()
def test_a_direct_call_answers_in_the_callers_columns(name: str, family: str, asked: Any) -> None:
    """Prompts padded on the left, answers on the right: what a trainer scores, each row by the reference."""
    model = model_of(family)
    method = served(model, name)
    given = tiny.completed(tiny.inputs(model, "3i4", "2i1i5", "6"), 5, 2, 4)
    seen, valid = asked(method), given["attention_mask"].bool()
    with tiny.prune(model, method) as trace:
        out = model(**given, output_hidden_states=True)
        last = model(**given, logits_to_keep=6).logits
    assert out.logits.shape[:2] == valid.shape
    calls = trace.history[:1]
    merged = merged_features(model, seen[: len(seen) // 2], calls)
    for row, prompt in enumerate(agreement.prompts(model, given, *calls, merged=merged)):
        logits, states = agreement.direct(model, prompt, int(valid[row].sum()))
        torch.testing.assert_close(out.logits[row, valid[row]], logits, atol=agreement.TOLERANCE, rtol=0)
        for got, expected in zip(out.hidden_states, states, strict=True):
            torch.testing.assert_close(got[row, valid[row]], expected, atol=agreement.TOLERANCE, rtol=0)
    torch.testing.assert_close(last, out.logits[:, -6:], atol=1e-5, rtol=1e-5)


@each_family
def test_an_encoding_that_is_shared_gives_the_same(family: str) -> None:
    model = model_of(family)
    method = served(model, "fopru")
    given = tiny.inputs(model, "3i4", "2i1i5")
    with tiny.prune(model, method):
        own = generate(model, given)
    with share_encoding(model, method.needs):
        for _ in range(2):
            with tiny.prune(model, method):
                shared = generate(model, given)
            assert torch.equal(torch.stack(shared.logits), torch.stack(own.logits))


@each_family
def test_the_work_before_the_decoder_is_counted_for_what_was_encoded(family: str) -> None:
    """Pruning after the encoder takes operations off the decoder alone; each tile counts with its own patches."""
    model = model_of(family)
    given = tiny.inputs(model, "3i4", "2i1i5")
    with tiny.prune(model, methods.get("random")(keep=0.5)) as trace:
        generate(model, given, max_new_tokens=1)
    shape, call = ModelShape.from_config(model.config), trace.latest
    encoder = 0
    for row in given.pictures:
        for one in row:
            tiles = one.pixels.shape[0] if one.pixels.ndim == 4 else 1
            patches = one.pixels.shape[-1] * one.pixels.shape[-2] // 16 if one.pixels.ndim > 2 else one.pixels.shape[0]
            encoder += tiles * tower_flops(shape.tower, convention="roofline", patches=patches)
            encoder += projector_flops(shape.projector, tokens=tiles * patches // shape.projector.merge)
    for budget, left in ((call.unpruned, False), (call.budget, True)):
        decoder = 0
        for row in range(2):
            originals = sum(image.original for image in call.images if image.row == row)
            text = int(given["attention_mask"][row].sum()) - originals  # newlines among it
            visual = sum(image.after if left else image.original for image in call.images if image.row == row)
            lengths = (text + visual,) * shape.decoder.layers
            decoder += decoder_flops(shape.decoder, lengths=lengths, convention="roofline")
        assert budget.prefill_flops == encoder + decoder


@each_family
@pytest.mark.parametrize("name", ["fopru", "fastv"])
def test_the_model_is_as_before_after_an_exception(name: str, family: str) -> None:
    model = model_of(family)
    method = served(model, name)
    given = tiny.inputs(model, "3i4")

    def explode(*_: Any) -> None:
        raise RuntimeError("in the middle")

    for call in (lambda: generate(model, given), lambda: model(**given)):
        with untouched(model):
            hook = model.get_decoder().layers[1].register_forward_pre_hook(explode)
            with pytest.raises(RuntimeError, match="in the middle"), tiny.prune(model, method):
                call()
            hook.remove()


@each_family
def test_the_methods_that_a_family_is_said_to_serve(family: str) -> None:
    """The message that names what works tells the truth."""
    model = model_of(family)
    works = support.working_methods(family_of(model), family_of(model).tower_of(model)[1])
    assert {"fopru", "divprune", "random"} <= set(works)
    behind = {"fastv", "pyramiddrop", "sparsevlm", "h2o", "snapkv"}
    assert behind & set(works) == (behind if family_of(model).within is None else set())
    for name in RUNNABLE:
        try:
            tiny.prune(model, methods.get(name).example(model.config)).discard()
        except FoveateError:
            assert name not in works, name
        else:
            assert name in works, name


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        (
            "gemma3",
            "image_text_interaction",
            "needs tower.2/24.cls, which gemma3 with siglip_vision_model does not have (with attention=received",
        ),
        (
            "gemma4",
            "pyramiddrop",
            "the last ones the keys and values of others (E2B, E4B; not so the 31B, where they can); methods that work",
        ),
        ("gemma4", "h2o", "acts on the cache, which gemma4 does not allow: its layers take inputs of their own"),
        ("gemma4/31b", "tome", "acts inside the encoder, which gemma4 does not allow: its blocks turn each patch by"),
        ("qwen2.5-vl", "crossget", "needs tower.latest.cross, tower.latest.cross_attention, which qwen2.5-vl with"),
        (
            "internvl",
            "visionzip",
            "the projector of internvl takes no single ones (with attention=received,space=projected it runs); methods",
        ),
        (
            "gemma3",
            "visionzip",
            "needs tower.read.cls, tower.read.cls_attention, which gemma3 with siglip_vision_model",
        ),
    ],
)
def test_a_refusal_gives_its_reason_and_what_works(family: str, name: str, reason: str) -> None:
    model = model_of(family)
    with pytest.raises(FoveateError) as error:
        tiny.prune(model, methods.get(name).example(model.config))
    assert reason in str(error.value)
    assert "; methods that work: " in str(error.value)
    assert ("fastv" in str(error.value)) == (family_of(model).within is None)
