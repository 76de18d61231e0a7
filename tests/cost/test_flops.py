"""Operations and bytes: published figures, shapes worked by hand, and counts taken from a model that runs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.core import FoveateError
from foveate.cost import (
    PRESETS,
    Convention,
    DecoderShape,
    ModelShape,
    ProjectorShape,
    TowerShape,
    decode_flops,
    decoder_flops,
    equivalent_tokens,
    kv_bytes,
    lvpruning_modules,
    prefill_flops,
    projector_flops,
    tower_flops,
)

LLAVA = PRESETS["llava-1.5-7b"]
TERA = 1e12
CONVENTIONS: list[Convention] = ["weights", "roofline"]

# Block: q 4x4 + k 4x2 + v 4x2 + o 4x4 = 48, feed-forward 3 x 4x6 = 72: 120 weights. Head 4x10: 40.
TINY = DecoderShape(layers=2, width=4, ffn=6, heads=2, kv_heads=1, head_width=2, vocabulary=10)
# Block: 4 x 4x4 = 64, feed-forward 2 x 4x8 = 64: 128 weights. Patch 3 x 2x2 x 4: 48. Tokens: 4 and CLS.
TINY_TOWER = TowerShape(layers=2, width=4, ffn=8, heads=2, tokens=4, cls=True, patch=2)
# 4x4 twice: 32 weights.
TINY_MODEL = ModelShape(TINY, TINY_TOWER, ProjectorShape(((4, 4), (4, 4)), tokens=4), "tiny")


def lvpruning(rho: float) -> tuple[list[int], list[int]]:
    """Visual tokens per decoder block and per decision module of LVPruning on LLaVA-1.5-7B (section 4.1)."""
    first, second, third = (int(share * 576) for share in (rho, rho - 0.2, rho - 0.4))
    return [576] + 7 * [first] + 8 * [second] + 16 * [third], [576, first, second]


# ---------------------------------------------------------------------------------------------------------------------
# Published figures


def test_llava_with_30_text_tokens_in_weights() -> None:
    flops = prefill_flops(LLAVA, visual=[576] * 32, text=30, convention="weights")
    assert flops == 8_381_126_934_528
    assert f"{flops / TERA:.2f}" == "8.38"


@pytest.mark.parametrize(("rho", "published"), [(0.6, 3.97), (0.5, 3.18), (0.45, 2.79)])
def test_lvpruning_totals(rho: float, published: float) -> None:
    visual, seen = lvpruning(rho)
    total = prefill_flops(LLAVA, visual=visual, text=30, convention="weights")
    total += lvpruning_modules(LLAVA.decoder, visual=seen, text=30)
    assert total / TERA == pytest.approx(published, rel=0.003)


def test_lvpruning_modules_add_what_is_published() -> None:
    flops = lvpruning_modules(LLAVA.decoder, visual=[576] * 3, text=30)
    assert f"{flops / TERA:.2f}" == "0.71"


@pytest.mark.parametrize(("visual", "published"), [(576, "8.453"), (144, "2.665")])
def test_llava_with_60_text_tokens_in_roofline(visual: int, published: str) -> None:
    flops = prefill_flops(LLAVA, visual=[visual] * 32, text=60, convention="roofline")
    assert f"{flops / TERA:.3f}" == published


def test_roofline_to_the_operation() -> None:
    # n = 636. Per block: 2 x 636 x 202,375,168 + 4 x 636^2 x 4096 + 5 x 32 x 636^2 + 18 x 636 x 4096
    #        = 257,421,213,696 + 6,627,262,464 + 64,719,360 + 46,891,008 = 264,160,086,528.
    # 32 blocks: 8,453,122,768,896. Head: 131,072,000.
    assert prefill_flops(LLAVA, visual=[576] * 32, text=60, convention="roofline") == 8_453_253_840_896


# ---------------------------------------------------------------------------------------------------------------------
# Worked by hand


def test_tiny_decoder() -> None:
    # weights: 2 x 120 x (5 + 3) = 1920, head on the 3 tokens of the last layer 2 x 3 x 40 = 240.
    assert decoder_flops(TINY, lengths=[5, 3], convention="weights") == 2160
    # roofline, 5 tokens: 1200 + 4 x 25 x 4 + 5 x 2 x 25 + 18 x 5 x 4 = 1200 + 400 + 250 + 360 = 2210;
    # 3 tokens: 720 + 4 x 9 x 4 + 5 x 2 x 9 + 18 x 3 x 4 = 720 + 144 + 90 + 216 = 1170; head 40.
    assert decoder_flops(TINY, lengths=[5, 3], convention="roofline") == 3420
    assert decoder_flops(TINY, lengths=[5, 3], convention="roofline", batch=7) == 7 * 3420


def test_tiny_tower() -> None:
    # weights: two blocks on 5 tokens 2 x 2 x 5 x 128 = 2560, convolution on 4 patches 2 x 4 x 48 = 384.
    assert tower_flops(TINY_TOWER, convention="weights") == 2944
    # roofline: each block 1280 + 4 x 25 x 4 + 5 x 2 x 25 + 18 x 5 x 4 = 1280 + 400 + 250 + 360 = 2290.
    assert tower_flops(TINY_TOWER, convention="roofline") == 2 * 2290 + 384
    # the second block on 3 tokens: 768 + 144 + 90 + 216 = 1218.
    assert tower_flops(TINY_TOWER, convention="roofline", lengths=[5, 3]) == 2290 + 1218 + 384
    assert tower_flops(TINY_TOWER, convention="weights", tiles=3, batch=2) == 6 * 2944
    assert tower_flops(TINY_TOWER, convention="weights", tiles=0) == 0


def test_tiny_projector() -> None:
    assert projector_flops(TINY_MODEL.projector) == 2 * 4 * 32
    assert projector_flops(TINY_MODEL.projector, tokens=1, batch=3) == 3 * 2 * 32


def test_tiny_prefill_and_what_of_it_is_the_tower() -> None:
    counts: dict[str, Any] = {"visual": [4, 2], "text": 1}  # lengths 5 and 3
    assert prefill_flops(TINY_MODEL, **counts, convention="weights") == 2160 + 2944 + 256
    assert prefill_flops(TINY_MODEL, **counts, convention="weights", tower=False) == 2160
    assert prefill_flops(TINY_MODEL, **counts, convention="roofline") == 3420
    assert prefill_flops(TINY_MODEL, **counts, convention="roofline", tower=True) == 3420 + 4964 + 256
    assert prefill_flops(TINY_MODEL, **counts, convention="weights", tiles=2) == 2160 + 2 * (2944 + 256)
    assert prefill_flops(TINY_MODEL, **counts, convention="weights", batch=3) == 3 * (2160 + 2944 + 256)


def test_tiny_decode() -> None:
    # weights: 2 blocks x 240 + head 80 = 560 a step, whatever the context.
    assert decode_flops(TINY_MODEL, visual=[4, 2], text=1, convention="weights", steps=3) == 3 * 560
    # roofline, first step, 6 and 4 keys: 240 + 4 x 6 x 4 + 5 x 2 x 6 + 18 x 4 = 240 + 96 + 60 + 72 = 468,
    # 240 + 64 + 40 + 72 = 416, head 40: 924. Each further step has one key more in both layers: 2 x (16 + 10) = 52.
    assert decode_flops(TINY, visual=[4, 2], text=1, convention="roofline") == 924
    assert decode_flops(TINY, visual=[4, 2], text=1, convention="roofline", steps=3, batch=2) == 2 * (924 + 976 + 1028)
    assert decode_flops(TINY, visual=[4, 2], text=1, convention="roofline", steps=0) == 0


def test_tiny_lvpruning() -> None:
    # Width 4, one module, 3 visual and 5 text tokens, 2 blocks: weights on a visual token 2 x 6 x 16 + 8 = 200, on a
    # text token 2 x 2 x 16 = 64.
    assert lvpruning_modules(TINY, visual=[3], text=5) == 2 * (3 * 200 + 5 * 64)


def test_kv_bytes() -> None:
    # Keys and values of one head of width 2, 5 + 3 positions: 32 values.
    assert kv_bytes(TINY, [5, 3], 2) == 64
    assert kv_bytes(TINY, [5, 3], 2, batch=3) == 192
    assert kv_bytes(TINY, [5, 3], 0.5) == 16
    assert kv_bytes(TINY, [0, 0], 2) == 0
    assert kv_bytes(LLAVA.decoder, [636] * 32, 2) == 32 * 2 * 636 * 4096 * 2
    assert isinstance(kv_bytes(TINY, [5, 3], 0.5), int)


def test_equivalent_tokens() -> None:
    # FastV: 2 blocks see 576, 30 see 144: (1152 + 4320) / 32.
    assert equivalent_tokens([576] * 2 + [144] * 30) == 171.0
    assert equivalent_tokens([144] * 32) == 144.0


# ---------------------------------------------------------------------------------------------------------------------
# A model that runs


def test_against_operations_counted_while_a_model_runs() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=12, patch_size=4),
        text_config=LlamaConfig(**text, num_key_value_heads=2, vocab_size=50, pad_token_id=0, bos_token_id=1),
        image_token_index=49,
    )
    config._attn_implementation = "eager"  # so that attention shows as batched products, apart from the weights
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1] + [49] * 9 + [5, 6, 7]] * 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, pixel_values=torch.zeros(2, 3, 12, 12))
    counts = counter.get_flop_counts()
    product, shape = torch.ops.aten.bmm, ModelShape.from_config(config)
    weights = sum(flops for operator, flops in counts["Global"].items() if operator != product)
    assert prefill_flops(shape, visual=[9, 9], text=4, convention="weights", batch=2) == weights

    attention = [found[product] for name, found in counts.items() if name.endswith("language_model.layers.0.self_attn")]
    assert attention == [2 * 4 * 13**2 * shape.decoder.attention_width]


# ---------------------------------------------------------------------------------------------------------------------
# Properties

decoders = st.builds(
    lambda layers, width, ffn, kv, group, head, vocabulary, gated: DecoderShape(
        layers, width, ffn, kv * group, kv, head, vocabulary, gated=gated
    ),
    *(st.integers(1, high) for high in (5, 64, 200, 4, 4, 16, 100)),
    st.booleans(),
)


@given(decoders, st.data(), st.sampled_from(CONVENTIONS))
def test_more_tokens_in_any_layer_cost_more(decoder: DecoderShape, data: st.DataObject, convention: Convention) -> None:
    lengths = data.draw(st.lists(st.integers(1, 900), min_size=decoder.layers, max_size=decoder.layers))
    layer = data.draw(st.integers(0, decoder.layers - 1))
    longer = [length + (index == layer) for index, length in enumerate(lengths)]
    before = decoder_flops(decoder, lengths=lengths, convention=convention)
    assert isinstance(before, int)
    assert decoder_flops(decoder, lengths=longer, convention=convention) > before
    assert kv_bytes(decoder, longer, 2) > kv_bytes(decoder, lengths, 2)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 16), st.integers(1, 300), st.integers(1, 99))
def test_roofline_closed_form(layers: int, heads: int, head: int, ffn: int, n: int) -> None:
    """Equal lengths, as many key-value heads as heads: the simulator's sum in closed form."""
    d, vocabulary = heads * head, 77
    decoder = DecoderShape(layers, d, ffn, heads, heads, head, vocabulary)
    closed = layers * (2 * n * (4 * d**2 + 3 * d * ffn) + 4 * n**2 * d + 5 * heads * n**2 + 18 * n * d) + d * vocabulary
    assert decoder_flops(decoder, lengths=[n] * layers, convention="roofline") == closed


@given(decoders, st.data())
def test_a_prefill_is_as_many_steps_at_full_context(decoder: DecoderShape, data: st.DataObject) -> None:
    """No half is taken off for causality, so n prompt tokens cost n steps that see n keys, bar the output head."""
    n = data.draw(st.integers(1, 500))
    prefill = decoder_flops(decoder, lengths=[n] * decoder.layers, convention="roofline")
    step = decode_flops(decoder, visual=[0] * decoder.layers, text=n - 1, convention="roofline")
    assert prefill - decoder.head_weights == n * (step - decoder.head_weights)


@given(decoders, st.data(), st.sampled_from(CONVENTIONS), st.integers(0, 9), st.integers(1, 4))
def test_steps_add_up(
    decoder: DecoderShape, data: st.DataObject, convention: Convention, steps: int, batch: int
) -> None:
    visual = data.draw(st.lists(st.integers(0, 600), min_size=decoder.layers, max_size=decoder.layers))
    text = data.draw(st.integers(0, 60))
    whole = decode_flops(decoder, visual=visual, text=text, convention=convention, steps=steps, batch=batch)
    single = [decode_flops(decoder, visual=visual, text=text + s, convention=convention) for s in range(steps)]
    assert whole == batch * sum(single)


# ---------------------------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prefill_flops(TINY_MODEL, visual=[4], text=1, convention="weights"), "1 token counts for 2 layers"),
        (lambda: prefill_flops(TINY_MODEL, visual=[4, -1], text=1, convention="weights"), "=-1 is below 0"),
        (lambda: prefill_flops(TINY_MODEL, visual=[4, 4], text=-1, convention="weights"), "text=-1 is below 0"),
        (lambda: prefill_flops(TINY_MODEL, visual=[4, 0], text=0, convention="weights"), "=0 is below 1"),
        (lambda: decoder_flops(TINY, lengths=[1, 1], convention="weights", batch=0), "batch=0 is below 1"),
        (lambda: decoder_flops(TINY, lengths=[1, 1], convention="weight"), "did you mean 'weights'?"),  # type: ignore[arg-type]
        (lambda: decode_flops(TINY, visual=[1, 1], text=0, convention="roofline", steps=-1), "steps=-1 is below 0"),
        (lambda: tower_flops(TINY_TOWER, convention="weights", tiles=-1), "tiles=-1 is below 0"),
        (lambda: tower_flops(TINY_TOWER, convention="weights", lengths=[5]), "1 token counts for 2 layers"),
        (lambda: projector_flops(TINY_MODEL.projector, tokens=-1), "tokens=-1 is below 0"),
        (lambda: lvpruning_modules(TINY, visual=[-1], text=1), "tokens=-1 is below 0"),
        (lambda: kv_bytes(TINY, [1], 2), "1 token counts for 2 layers"),
        (lambda: kv_bytes(TINY, [1, 1], 0), "bytes_per_value=0 is no size"),
        (lambda: kv_bytes(TINY, [1, 1], float("nan")), "bytes_per_value=nan is no size"),
        (lambda: equivalent_tokens([]), "visual has no entries"),
    ],
)
def test_refused(call: Any, message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        call()
    assert message in str(caught.value)
