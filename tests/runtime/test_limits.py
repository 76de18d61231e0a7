"""What no method may answer: pixels that are no numbers, and prompts that leave the decoder's context."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny, tiny_families
from models.untouched import untouched
from references import family_reference
from references.contract import RUNNABLE

import foveate
from foveate import methods
from foveate.core import FoveateError
from foveate.families import family_of
from foveate.inference.answers import greedy
from foveate.runtime.limits import check_room, context_of
from foveate.runtime.seams import CACHE

each_family = pytest.mark.parametrize("family", tiny.FAMILIES)
VIDEOS = tiny_families.with_videos()


def generate(model: Any, given: Any, tokens: int = 1, **options: Any) -> Any:
    return model.generate(**given, max_new_tokens=tokens, do_sample=False, **options)


def any_method(model: Any) -> Any:
    """One that every family can run."""
    return methods.get("random").example(model.config)


def set_context(model: Any, positions: int) -> None:
    model.config.get_text_config(decoder=True).max_position_embeddings = positions


def reach_of(model: Any, given: Any) -> int:
    """One past the largest position of the rows, each by itself, as the stock model counts them."""
    alone = [tiny.alone(given, row, model.config.image_token_id) for row in range(given["input_ids"].shape[0])]
    return max(int(family_reference.positions(model, one).max()) for one in alone) + 1


# -- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_method_refuses_pixels_that_are_no_numbers(name: str) -> None:
    model = tiny.model(blocks=6)
    given = tiny.inputs(model, "3i4", "2i1i5")
    broken = {**given, "pixel_values": given["pixel_values"].clone()}
    broken["pixel_values"][1, 2, 3, 4:6] = float("nan")
    broken["pixel_values"][2, 0, 0, 0] = float("inf")
    message = "3 pixel values are NaN or infinite; pass what the processor made"
    with untouched(model), tiny.prune(model, methods.get(name).example(model.config)) as trace:
        for call in (lambda: generate(model, broken), lambda: model(**broken)):
            with pytest.raises(FoveateError) as error:
                call()
            assert str(error.value) == message
        assert not trace.history


@each_family
def test_every_family_refuses_pixels_that_are_no_numbers(family: str) -> None:
    model = tiny.model(family, blocks=6)
    given = tiny.inputs(model, "3i4")
    given["pixel_values"].view(-1)[5] = float("nan")
    with tiny.prune(model, any_method(model)), pytest.raises(FoveateError, match=r"^1 pixel values are NaN"):
        generate(model, given)


@pytest.mark.parametrize("family", VIDEOS)
def test_videos_are_looked_at_as_well(family: str) -> None:
    model = tiny.model(family, blocks=6)
    given = tiny.inputs(model, "3v4")
    given["pixel_values_videos"].view(-1)[5] = float("nan")
    with tiny.prune(model, any_method(model)), pytest.raises(FoveateError, match=r"^1 pixel values are NaN"):
        generate(model, given)


# -- the context ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "rope", "context"),
    [
        (4096, None, 4096),
        (4096, {"rope_type": "default", "rope_theta": 1e4}, 4096),
        (32768, {"rope_type": "default", "mrope_section": [16, 24, 24]}, 32768),
        # Stated after stretching, by the checkpoints of these kinds.
        (131072, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 131072),
        (131072, {"rope_type": "longrope", "factor": 32.0, "original_max_position_embeddings": 4096}, 131072),
        # Stated before: 4 times 32768; and after, where 4 times 32768 are stated.
        (32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (131072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (4096, {"rope_type": "dynamic", "factor": 2.0}, 8192),
        (4096, {"rope_type": "linear", "factor": 2.0}, 8192),
        # Layers with a window beside layers without one.
        (8192, {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "default"}}, 8192),
        (
            8192,
            {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "linear", "factor": 8.0}},
            65536,
        ),
        (None, None, None),
    ],
)
def test_the_context_of_a_decoder(stated: int | None, rope: Any, context: int | None) -> None:
    text = SimpleNamespace(max_position_embeddings=stated, rope_parameters=rope)
    assert context_of(SimpleNamespace(get_text_config=lambda decoder: text)) == context


def test_windows_are_no_limit() -> None:
    """The window is 12 tokens, the prompt several times that."""
    model = tiny.model("aya-vision", blocks=6)
    assert model.config.text_config.sliding_window == 12
    assert context_of(model.config) == 512


@each_family
@pytest.mark.parametrize("rows", [("3i4",), ("3i4", "2i1i5", "1i2")])
def test_a_prompt_that_leaves_the_context_is_refused(
    rows: tuple[str, ...], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every position fits it is not; where one does not, no picture is encoded."""
    model = tiny.model(family, blocks=6)
    given = tiny.inputs(model, *rows)
    reach = reach_of(model, given)
    set_context(model, reach)
    greedy(model, given, max_new_tokens=1)
    with tiny.prune(model, any_method(model)) as trace:
        generate(model, given)
        if len(rows) == 1:
            model(**given)
        assert len(trace.history) == 1 + (len(rows) == 1)
    set_context(model, reach - 1)
    base = model.base_model
    monkeypatch.setattr(base, "get_image_features", lambda *_, **__: pytest.fail("a picture was encoded"))
    message = f"the prompt takes {reach} positions, but the context of this decoder has {reach - 1}. Pruned or not:"
    with pytest.raises(FoveateError, match=re.escape(message)):
        greedy(model, given, max_new_tokens=1)
    with untouched(model), tiny.prune(model, any_method(model)) as trace:
        for call in [lambda: generate(model, given), *([lambda: model(**given)] if len(rows) == 1 else [])]:
            with pytest.raises(FoveateError, match=re.escape(message)):
                call()
        assert not trace.history


@pytest.mark.parametrize("name", ["fopru", "dynamicvit", "fastv", "h2o"])
def test_no_site_makes_a_long_prompt_fit(name: str) -> None:
    """5 + 36 + 4 tokens, of which few stay, at the positions that they have."""
    model = tiny.model(blocks=6)
    given = tiny.inputs(model, "5i4")
    set_context(model, 44)
    with tiny.prune(model, methods.get(name).example(model.config)), pytest.raises(FoveateError) as error:
        generate(model, given)
    assert str(error.value) == (
        "the prompt takes 45 positions, but the context of this decoder has 44. Pruned or not: tokens that stay keep "
        "their positions. Give a shorter text, or fewer or smaller pictures"
    )


def test_pictures_that_share_positions_take_fewer_than_tokens() -> None:
    """More tokens than the context has positions: each raster takes as many as its longer side."""
    model = tiny.model("qwen2-vl", blocks=6)
    given = tiny.inputs(model, "3i4")
    reach, tokens = reach_of(model, given), given["input_ids"].shape[1]
    assert reach < tokens
    set_context(model, reach)
    check_room(model, given, 1)
    with tiny.prune(model, any_method(model)):
        generate(model, given)


def test_padding_takes_no_position() -> None:
    """Rows of 41 and 50 tokens; the shorter one is filled up in front."""
    model = tiny.model()
    given = tiny.inputs(model, "3i2", "6i8")
    filled = {name: torch.nn.functional.pad(given[name], (9, 0)) for name in ("input_ids", "attention_mask")}
    set_context(model, 50)
    with tiny.prune(model, any_method(model)) as trace:
        generate(model, {**given, **filled})
    assert trace.prompt_length == 59


def test_a_later_turn_counts_on_from_the_earlier_ones() -> None:
    """41 tokens, 3 of an answer, 41 more: 85 positions, whatever the cache holds."""
    model = tiny.model()
    first, second = tiny.inputs(model, "3i2"), tiny.inputs(model, "2i3", seed=1)
    for context in (85, 84):
        set_context(model, context)
        with tiny.prune(model, foveate.FoPru(keep=0.25)):
            out = generate(model, first, 3, return_dict_in_generate=True)
            ids = torch.cat([out.sequences, second["input_ids"]], dim=1)
            both = dict(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=second["pixel_values"],
                **{CACHE: getattr(out, CACHE)},
            )
            if context == 85:
                generate(model, both)
                continue
            with pytest.raises(FoveateError, match="the prompt takes 85 positions, but the context of this decoder"):
                generate(model, both)


def test_an_answer_may_end_before_the_context_does() -> None:
    """44 of 50 positions are taken; the seventh token is written behind the last one, and none can follow it."""
    model = tiny.model()
    given = tiny.inputs(model, "3i5")
    set_context(model, 50)
    with tiny.prune(model, any_method(model)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(model, given, 7)
            model.generate(**given, max_length=51)
        for call in (lambda: generate(model, given, 8), lambda: model.generate(**given, max_length=52)):
            with pytest.warns(UserWarning, match=r"takes 44 of the 50 positions .* the most is max_new_tokens=7"):
                call()
    greedy(model, given, max_new_tokens=7)
    with pytest.raises(FoveateError) as error:
        greedy(model, given, max_new_tokens=8)
    assert str(error.value) == (
        "max_new_tokens=8 leaves the decoder's context: the prompt takes 44 of its 50 positions; the most is "
        "max_new_tokens=7"
    )


def test_a_model_that_cannot_be_pruned_has_a_context_too() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i5")
    set_context(model, 43)
    model.config.model_type = "llama4"
    with pytest.raises(FoveateError, match="cannot be pruned"):
        family_of(model)
    with pytest.raises(FoveateError, match="the prompt takes 44 positions"):
        check_room(model, given, 1)
