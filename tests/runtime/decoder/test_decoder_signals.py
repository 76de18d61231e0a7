"""What a method inside the decoder is shown of keys and normed states, against a plain forward of each prompt alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny

import foveate
from foveate import DART, FastV
from foveate.core import Method, Selection, Signals
from foveate.runtime.seams import CACHE

ROWS = ("3i4", "1i9", "2i2")


def shown_to(model: Any, methods: list[Method], given: dict[str, torch.Tensor], **options: Any) -> list[Signals]:
    """What DART saw, one entry per group of images that are alike."""
    seen: list[Signals] = []
    stock = DART.select

    def select(self: DART, signals: Signals) -> Selection:
        seen.append(signals)
        return stock(self, signals)

    with pytest.MonkeyPatch.context() as patch, foveate.prune(model, methods):
        patch.setattr(DART, "select", select)
        model.generate(**given, max_new_tokens=1, **options)
    return seen


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_keys_and_normed_states_of_visual_and_text_tokens(decoder: str, attn: str, layer: int) -> None:
    model = tiny.model(decoder=decoder, attn=attn)
    given = tiny.inputs(model, *ROWS)
    (shown,) = shown_to(model, [DART(layer=layer)], given)
    seen = shown.decoder
    assert seen is not None and shown.text_mask is not None and shown.after_image is not None
    assert seen.keys is not None and seen.text_keys is not None and seen.normed is not None
    assert seen.text_normed is not None
    for row, layout in enumerate(ROWS):
        alone = tiny.alone(given, row, tiny.IMAGE)
        with torch.no_grad():
            plain = model(**alone, output_hidden_states=True, use_cache=True)
        normed = model.get_decoder().norm(plain.hidden_states[layer][0])
        keys = getattr(plain, CACHE).layers[layer - 1].keys[0]
        visual = alone["input_ids"][0] == tiny.IMAGE
        words = shown.text_mask[row]
        torch.testing.assert_close(seen.normed[row], normed[visual], atol=2e-5, rtol=0)
        torch.testing.assert_close(seen.text_normed[row, words], normed[~visual], atol=2e-5, rtol=0)
        torch.testing.assert_close(seen.keys[row], keys[:, visual], atol=2e-5, rtol=0)
        torch.testing.assert_close(seen.text_keys[row][:, words], keys[:, ~visual], atol=2e-5, rtol=0)
        before, after = (int(part) for part in layout.split("i"))
        assert shown.after_image[row, words].tolist() == [False] * before + [True] * after


def test_after_an_earlier_stage_of_the_same_depth() -> None:
    """FastV has shortened the rows by then: the keys are still those of the tokens that are left."""
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    (whole,) = shown_to(model, [DART(layer=2)], given)
    (left,) = shown_to(model, [FastV(layer=2, keep=0.5), DART(layer=2, keep=0.2)], given)
    assert whole.decoder is not None and left.decoder is not None and left.shape == (3, tiny.TOKENS // 2)
    assert whole.decoder.keys is not None and left.decoder.keys is not None
    assert whole.decoder.normed is not None and left.decoder.normed is not None
    assert whole.decoder.text_keys is not None and left.decoder.text_keys is not None
    words = whole.text_mask
    assert words is not None
    for row, index in enumerate(left.index):
        torch.testing.assert_close(left.decoder.keys[row], whole.decoder.keys[row][:, index])
        torch.testing.assert_close(left.decoder.normed[row], whole.decoder.normed[row, index])
        there = words[row]
        torch.testing.assert_close(left.decoder.text_keys[row][:, there], whole.decoder.text_keys[row][:, there])
