"""Estimates: the simulator's published figures, a closed form written out plainly, and traces of a model that runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_families

import foveate
from foveate import methods
from foveate.core import FoveateError
from foveate.cost import (
    HARDWARE,
    PRESETS,
    Cost,
    DecoderShape,
    Hardware,
    ModelShape,
    ProjectorShape,
    Stage,
    TowerShape,
    estimate,
)

TERA, GIGA = 1e12, 1e9

# ---------------------------------------------------------------------------------------------------------------------
# Published figures


@pytest.mark.parametrize(
    ("visual", "dtype", "tera", "milliseconds", "moved", "stored"),
    [
        (576, "fp16", "8.453", "30.31", "22.207", "4.0535"),
        (144, "fp16", "2.665", "9.89", "15.377", "0.9393"),
        (576, "int8", "8.453", "15.16", "11.103", "2.0268"),
        (576, "int4", "8.453", "14.18", "5.552", "1.0134"),
        (144, "int8", "2.665", "4.94", "7.688", "0.4696"),
        (144, "int4", "2.665", "4.46", "3.844", "0.2348"),
    ],
)
def test_llm_viewer_on_an_a100(visual: int, dtype: str, tera: str, milliseconds: str, moved: str, stored: str) -> None:
    prefill = estimate("llava-1.5-7b", visual, 60, dtype=dtype).prefill
    assert f"{prefill.flops / TERA:.3f}" == tera
    assert f"{prefill.seconds * 1e3:.2f}" == milliseconds
    assert f"{prefill.bytes_moved / GIGA:.3f}" == moved
    assert f"{prefill.stored_activation_bytes / GIGA:.4f}" == stored


def test_what_llm_viewer_calls_memory_consumption() -> None:
    # Blocks 32 x 202,375,168 x 2 B = 12.952 GB, cache 2 x 636 x 4096 x 32 x 2 B = 0.333 GB, one block's activations
    # 4.0535 GB / 32 = 0.127 GB.
    assert f"{estimate('llava-1.5-7b').decoder_footprint_bytes / GIGA:.2f}" == "13.41"


def test_lvpruning_in_weights() -> None:
    whole = estimate("llava-1.5-7b", 576, 30, convention="weights")
    assert whole.first_token.flops == 8_381_126_934_528
    assert whole.choosing == Stage(launched_seconds=whole.choosing.launched_seconds)
    modules = estimate("llava-1.5-7b", 576, 30, "lvpruning:keep=1.0/1.0/1.0", convention="weights").choosing
    assert f"{modules.flops / TERA:.2f}" == "0.71"


@pytest.mark.parametrize(
    ("keep", "published"), [("0.6/0.4/0.2", 3.97), ("0.5/0.3/0.1", 3.18), ("0.45/0.25/0.05", 8.38 * (1 - 0.667))]
)
def test_lvpruning_totals(keep: str, published: float) -> None:
    total = estimate("llava-1.5-7b", 576, 30, f"lvpruning:keep={keep}", convention="weights").first_token
    assert total.flops / TERA == pytest.approx(published, rel=0.003)


# Eager prefills of LLaVA-1.5-7B in bfloat16 on one H200, 60 text tokens: visual tokens, batch, median milliseconds.
H200 = [
    (576, 1, 21.7), (288, 1, 20.3), (144, 1, 20.6), (64, 1, 21.4), (576, 8, 148), (288, 8, 83), (144, 8, 50),
    (64, 8, 31),
]  # fmt: skip


@pytest.mark.parametrize(("visual", "batch", "milliseconds"), H200)
def test_launches_make_the_prediction_honest(visual: int, batch: int, milliseconds: float) -> None:
    """Within 15 % is asked for, within 5 % is what the page says."""
    cost = estimate("llava-1.5-7b", visual, 60, batch=batch, hardware="h200", dtype="bf16")
    assert cost.prefill.launched_seconds == pytest.approx(milliseconds / 1e3, rel=0.05)


@pytest.mark.parametrize(("visual", "milliseconds"), [(2880, 162), (1440, 84), (720, 46), (320, 26)])
def test_a_model_that_was_not_fitted(visual: int, milliseconds: float) -> None:
    cost = estimate("llava-1.6-13b", visual, 60, hardware="h200", dtype="bf16")
    assert cost.prefill.launched_seconds == pytest.approx(milliseconds / 1e3, rel=0.15)


def test_the_fit_is_the_best_of_these_runs() -> None:
    from foveate.cost import fitted

    bare = dataclasses.replace(HARDWARE["h200"], efficiency=None, launch=None)
    prefills = [(estimate("llava-1.5-7b", v, batch=b, hardware=bare).prefill, ms) for v, b, ms in H200]
    again = fitted(bare, [(stage.launches, stage.fused_seconds, ms / 1e3) for stage, ms in prefills])
    assert again.efficiency == pytest.approx(HARDWARE["h200"].efficiency, rel=0.02)
    assert again.launch == pytest.approx(HARDWARE["h200"].launch, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Worked by hand

# The shapes of tests/cost/test_flops.py: blocks of 120 weights (q and o 16, k and v 8, three of 24), head 40; tower
# blocks of 128 weights, patches of 48; projector 32.
TINY = ModelShape(
    DecoderShape(layers=2, width=4, ffn=6, heads=2, kv_heads=1, head_width=2, vocabulary=10),
    TowerShape(layers=2, width=4, ffn=8, heads=2, tokens=4, cls=True, patch=2),
    ProjectorShape(((4, 4), (4, 4)), tokens=4),
    "tiny",
)
# One operation and one byte a second, so that seconds are whichever of both is larger.
SLOW = Hardware("slow", fp16=1.0, fp32=1.0, int8=2.0, bandwidth=1.0, memory=1e3)


def tiny(**options: Any) -> Cost:
    return estimate(TINY, 4, 1, **{"answer": 1, "hardware": SLOW, **options})


def test_prefill_of_five_tokens() -> None:
    """Each block on 5 tokens, values read and written at 2 bytes each."""
    # norm x2: 140 ops, 20 + 20 values; q, o: 160 ops, 16 weights + 20 + 20; k, v: 80 ops, 8 + 20 + 10 to the cache;
    # scores: 2 x 25 x 4 = 200 ops, 5 x 2 read + 10 of the cache, 50 written; softmax 250 ops, 50 + 50; values 200 ops,
    # 50 + 10 of the cache, 20; adds x2: 20 ops, 20 + 20; gate, up: 240 ops, 24 + 20 + 30; activation 40 ops, 40 + 20;
    # down 240 ops, 24 + 30 + 20.
    operators = [
        *[(140, 40)] * 2, *[(160, 56)] * 2, *[(80, 38)] * 2, (200, 70), (250, 100), (200, 80), *[(20, 40)] * 2,
        *[(240, 74)] * 2, (40, 60), (240, 74),
    ]  # fmt: skip
    head = (40, 40 + 4 + 10)
    assert sum(ops for ops, _ in operators) == 2210
    prefill = tiny().prefill
    assert prefill.flops == 2 * 2210 + 40
    assert prefill.bytes_moved == 2 * (2 * sum(values for _, values in operators) + head[1])
    assert prefill.seconds == sum(2 * max(ops, 2 * values) for ops, values in operators) + max(40, 2 * head[1])
    # written: norms 40, q 20, o 20, scores 50, softmax 50, values 20, adds 40, gate and up 60, activation 20, down 20
    assert prefill.stored_activation_bytes == 2 * (2 * 340 + 10)
    # Fused attention: 650 operations, q 20 + k and v 20 of the cache, 20 written.
    rest = [row for row in operators if row not in [(200, 70), (250, 100), (200, 80)]]
    assert prefill.fused_seconds == sum(2 * max(ops, 2 * values) for ops, values in [*rest, (650, 60)]) + 108


def test_tower_and_projector() -> None:
    cost = tiny()
    assert cost.tower.flops == 2 * 2290 + 384  # as tests/cost/test_flops.py works out
    assert cost.projector.flops == 2 * 4 * 32
    # Two maps of 16 weights on 4 tokens of 4 values, 128 operations and 2 x 48 bytes each.
    assert cost.projector.bytes_moved == 2 * 96
    assert cost.projector.seconds == 256
    assert cost.projector.stored_activation_bytes == 2 * 32
    total = cost.tower.flops + cost.projector.flops + cost.prefill.flops
    assert cost.first_token.flops == cost.total.flops == total


def test_decode_of_two_tokens() -> None:
    # Steps that see 6 and 7 keys. Blocks: 240 of matrices, 16 and 5 x 2 per key, 18 x 4: 312 + 26 x keys; head 40.
    decode = tiny(answer=3).decode
    assert decode.flops == 2 * (312 + 26 * 6) + 2 * (312 + 26 * 7) + 2 * 40
    assert tiny(answer=3).per_token_seconds == decode.seconds / 2
    assert tiny().decode.flops == 0 and tiny().per_token_seconds is None
    weights = tiny(answer=3, convention="weights")
    assert weights.decode.flops == 2 * (2 * 240 + 80)
    assert weights.decode.seconds == decode.seconds


def test_what_is_held() -> None:
    cost = tiny(answer=3, batch=2)
    # 2 layers, keys and values of 2 each, 5 entries at the prompt and 7 at the end, 2 rows, 2 bytes.
    assert cost.kv_bytes == 2 * 4 * 5 * 2 * 2
    assert cost.final_kv_bytes == 2 * 4 * 7 * 2 * 2
    # Tower 2 x 128 + 48, projector 32, blocks 2 x 120, embedding and head 2 x 40.
    assert cost.weight_bytes == 2 * (304 + 32 + 240 + 80)
    # A block of 10 tokens holds its stream twice (8) and gate, up and their product (18): 520 bytes beside the cache.
    assert cost.footprint_bytes == cost.weight_bytes + 160 + 520
    assert not cost.fits and tiny(hardware="a100-40gb").fits


def test_bits_of_weights_activations_and_cache() -> None:
    mixed = tiny(dtype="w4a16kv8")
    assert mixed.weight_bytes * 4 == tiny().weight_bytes
    assert mixed.kv_bytes * 2 == tiny().kv_bytes
    assert mixed.prefill.stored_activation_bytes == tiny().prefill.stored_activation_bytes
    assert tiny(dtype="int8").projector.seconds == 128  # twice as fast on 8 bits


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 16), st.integers(1, 300), st.integers(2, 99))
def test_closed_form(layers: int, heads: int, head: int, m: int, n: int) -> None:
    """As many key-value heads as heads: what the simulator counts, in closed form."""
    d, v, h = heads * head, 77, heads
    model = dataclasses.replace(TINY, decoder=DecoderShape(layers, d, m, heads, heads, head, v))
    prefill = estimate(model, 1, n - 1).prefill
    weights = layers * (4 * d * d + 3 * d * m) + d * v
    read = layers * (n * (6 * d + m) + n * d + 2 * h * n * n + 6 * n * d) + d
    written = layers * (n * (3 * d + 2 * m) + h * n * n + n * d + h * n * n + 5 * n * d) + v
    cache = layers * 2 * n * d
    assert prefill.bytes_moved == 2 * (weights + read + written + 2 * cache)
    assert prefill.stored_activation_bytes == 2 * written
    flops = layers * (2 * n * (4 * d * d + 3 * d * m) + 4 * n * n * d + 5 * h * n * n + 18 * n * d) + d * v
    assert prefill.flops == flops


# ---------------------------------------------------------------------------------------------------------------------
# Methods

SPECS = [
    "fopru:keep=0.25",
    "fastv:layer=1,keep=9",
    "fopru:keep=0.5+fastv:layer=2,keep=0.25",
    "tome:keep=20",
    "tome:r=3",
    "crossget:keep=20",
    "dynamicvit:from=random,layers=1/2,keep=0.7/0.4",
    "pyramiddrop",
    "h2o:heavy=5,recent=7",
    "snapkv:capacity=20,window=4",
    "lvpruning:from=random,layers=1/2/3,keep=20/10/4",
]


@pytest.mark.parametrize("spec", SPECS)
def test_what_a_trace_counts(spec: str) -> None:
    """The estimate knows beforehand what a trace of the running model says; attention read anew is left out there."""
    import torch
    from models import tiny as models

    model = models.model()
    inputs = models.inputs(model, "3i4")
    with torch.no_grad(), foveate.prune(model, spec) as trace:
        model(**inputs)
    cost = estimate(model.config, models.TOKENS, 7, spec, dtype="fp32")
    assert list(cost.visual) == list(trace.budget.tokens)
    modules = cost.choosing.flops if spec.startswith("lvpruning") else 0
    flops = cost.tower.flops + modules + cost.projector.flops + cost.prefill.flops
    assert flops == trace.budget.prefill_flops
    assert cost.kv_bytes == trace.kv_bytes
    plain = estimate(model.config, models.TOKENS, 7, dtype="fp32")
    assert plain.first_token.flops == trace.unpruned.prefill_flops


# Those whose tiles have padding and newlines, and the encoder in which nothing merges or leaves.
APART = ("llava-next", "llava-onevision", "llava-next-video", "gemma4")


@pytest.mark.parametrize("spec", ["tome:keep=6", "tome:r=1", "dynamicvit:from=random,layers=1/2,keep=9/6"])
@pytest.mark.parametrize("family", [name for name in tiny_families.KINDS if name.partition("/")[0] not in APART])
def test_what_a_trace_counts_inside_the_encoders_of_families(family: str, spec: str) -> None:
    """Patches of a token leave together; tiles of one size share a budget evenly."""
    import torch
    from models import tiny as models

    model = models.model(family, blocks=6)
    inputs = models.inputs(model, "3i4")
    with torch.no_grad(), foveate.prune(model, spec) as trace:
        model(**inputs)
    (image,) = trace.images
    text = inputs["input_ids"].shape[1] - image.original
    tiles = 3 if family == "internvl" else None
    cost = estimate(model.config, image.original, text, spec, dtype="fp32", tiles=tiles)
    assert cost.tower.flops + cost.projector.flops + cost.prefill.flops == trace.budget.prefill_flops
    plain = estimate(model.config, image.original, text, dtype="fp32", tiles=tiles)
    assert cost.tower.flops < plain.tower.flops
    assert plain.first_token.flops == trace.unpruned.prefill_flops


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize(("preset", "visual"), [("llava-1.5-7b", 576), ("llava-1.6-7b", 2880), ("internvl3-8b", 1280)])
def test_every_method_that_states_its_count_saves(name: str, preset: str, visual: int) -> None:
    method, plain = methods.get(name).example(), estimate(preset, visual)
    if any(part.adaptive for part in method.parts()):
        with pytest.raises(FoveateError, match="decides its own count from the image"):
            estimate(preset, visual, methods=method)
        return
    if method.site == "picture":  # these presets bring all pictures to one size
        with pytest.raises(FoveateError, match="brings all pictures to one size"):
            estimate(preset, visual, methods=method)
        return
    cost = estimate(preset, visual, methods=method)
    assert cost.prefill.flops <= plain.prefill.flops
    assert cost.projector.flops <= plain.projector.flops
    assert cost.kv_bytes < plain.kv_bytes
    assert cost.decode.flops < plain.decode.flops
    inside = any(part.site == "tower" for part in method.parts())
    assert (cost.tower.flops < plain.tower.flops) == inside


def test_a_cache_keeps_its_budget_while_decoding() -> None:
    # 636 entries: 10 % and 10 % of them are 63 + 63. SnapKV's quarter is 159, and grows.
    evicting = estimate("llava-1.5-7b", methods="h2o", answer=100)
    each = 2 * 32 * 4096 * 2
    assert evicting.kv_bytes == evicting.final_kv_bytes == 126 * each
    once = estimate("llava-1.5-7b", methods="snapkv", answer=100)
    assert (once.kv_bytes, once.final_kv_bytes) == (159 * each, (159 + 99) * each)
    plain = estimate("llava-1.5-7b", answer=100)
    assert evicting.decode.flops < once.decode.flops < plain.decode.flops
    assert evicting.prefill == plain.prefill


def test_a_cache_that_is_not_full_yet_grows_to_its_budget() -> None:
    cost = estimate("llava-1.5-7b", methods="h2o:heavy=300,recent=340", answer=100)
    each = 2 * 32 * 4096 * 2
    assert (cost.kv_bytes, cost.final_kv_bytes) == (636 * each, 640 * each)


def test_choosing_counts_the_attention_that_is_read() -> None:
    # FoPru: one map of 577 x 577 over width 1024 and 16 heads, products and softmax; both sums come from one reading.
    fopru = estimate("llava-1.5-7b", methods="fopru:keep=0.25").choosing
    assert fopru.flops == (2 * 1024 + 5 * 16) * 577 * 577
    # FastV: one row of 636 over width 4096 and 32 heads. FasterVLM: CLS's row.
    assert estimate("llava-1.5-7b", methods="fastv").choosing.flops == (2 * 4096 + 5 * 32) * 636
    assert estimate("llava-1.5-7b", methods="fastervlm").choosing.flops == (2 * 1024 + 5 * 16) * 577
    # H2O: a whole map in each of 32 layers. SparseVLM: a row per text token, after 3, 7 and 16 blocks.
    assert estimate("llava-1.5-7b", methods="h2o").choosing.flops == 32 * (2 * 4096 + 5 * 32) * 636 * 636
    rows = 60 * ((576 + 60) + (300 + 60) + (200 + 60))
    assert estimate("llava-1.5-7b", methods="sparsevlm").choosing.flops == (2 * 4096 + 5 * 32) * rows
    assert estimate("llava-1.5-7b", methods="uniform").choosing.flops == 0
    assert estimate("llava-1.5-7b", methods="fopru", convention="weights").choosing.flops == 0


def test_choosing_counts_trained_modules() -> None:
    # DynamicViT, width 1024: 1024^2 + 1024 x 512 + 512 x 256 + 256 x 2 weights on each patch left.
    weights = 1024**2 + 1024 * 512 + 512 * 256 + 256 * 2
    cost = estimate("llava-1.5-7b", methods="dynamicvit:layers=6/12/18,keep=400/300/200", convention="weights")
    assert cost.choosing.flops == 2 * weights * (576 + 400 + 300)
    assert cost.projector.flops == 2 * 200 * (1024 * 4096 + 4096**2)


def test_tokens_that_leave_inside_the_encoder_save_there() -> None:
    plain, pruned = estimate("llava-1.5-7b"), estimate("llava-1.5-7b", methods="dynamicvit:layers=12,keep=144")
    blocks = 2 * (plain.tower.flops - 2 * 576 * 3 * 14 * 14 * 1024) / 24
    half = 12 * (2 * 145 * 12 * 1024**2 + 4 * 145**2 * 1024 + 5 * 16 * 145**2 + 18 * 145 * 1024)
    assert pruned.tower.flops == plain.tower.flops - 6 * blocks + half
    assert pruned.tower.seconds < plain.tower.seconds


# ---------------------------------------------------------------------------------------------------------------------
# What can be given


def test_every_preset_on_every_device() -> None:
    for name in PRESETS:
        for device in HARDWARE:
            cost = estimate(name, hardware=device, methods="fopru:keep=0.25", answer=2)
            whole = estimate(name, hardware=device, answer=2)
            assert 0 < cost.prefill.seconds < whole.prefill.seconds
            assert cost.decode.seconds <= whole.decode.seconds
            json.dumps(cost.to_dict())


def test_json_has_the_names_of_the_attributes() -> None:
    cost = estimate("mini", methods="fopru:keep=0.25")
    stored = json.loads(json.dumps(cost.to_dict()))
    for stage in ("tower", "choosing", "projector", "prefill", "decode", "first_token", "total"):
        assert stored[stage] == vars(getattr(cost, stage))
    for name in ("kv_bytes", "final_kv_bytes", "weight_bytes", "footprint_bytes", "equivalent_tokens", "visual"):
        assert stored[name] == (list(cost.visual) if name == "visual" else getattr(cost, name))


def test_a_folder_and_a_config_object() -> None:
    from transformers import LlavaConfig

    assert estimate(foveate.MINI).prefill == estimate("mini").prefill
    assert estimate(Path(foveate.MINI) / "config.json").prefill == estimate("mini").prefill
    assert estimate(LlavaConfig()).prefill == estimate("llava-1.5-7b").prefill


def test_tiles_and_pictures_of_their_own_size() -> None:
    assert estimate("llava-1.6-7b", 2880).tower.flops == 5 * estimate("llava-1.5-7b").tower.flops
    assert estimate("llava-1.6-7b", 2144, tiles=5).tower.flops == 5 * estimate("llava-1.5-7b").tower.flops
    # 1000 tokens are 4000 patches of 6 x 14 x 14 values; windows of 64 in 28 of 32 blocks, all pairs in 4.
    tower = PRESETS["qwen2.5-vl-7b"].tower
    pairs = 4000 * (28 * 64 + 4 * 4000)
    flops = 32 * (2 * 4000 * tower.block_weights + 18 * 4000 * 1280) + (4 * 1280 + 5 * 16) * pairs
    assert estimate("qwen2.5-vl-7b", 1000).tower.flops == flops + 2 * 4000 * 6 * 14 * 14 * 1280
    assert estimate("internvl3-8b", 256).tower.flops == estimate("internvl3-8b", 100).tower.flops


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "llava"}, "'llava' is no preset and no folder; did you mean 'llava-1.6-7b'?"),
        ({"visual": 0}, "visual=0 is below 1; the smallest is 1"),
        ({"text": -1}, "text=-1 is below 0; the smallest is 0"),
        ({"batch": 0}, "batch=0 is below 1"),
        ({"answer": 0}, "answer=0 is below 1"),
        ({"tiles": 0}, "tiles=0 is below 1"),
        ({"hardware": "a100"}, "no hardware is called 'a100'; did you mean 'a100-40gb'?"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8'; did you mean 'fp32'?"),
        ({"dtype": "w3a16kv16"}, "dtype='w3a16kv16' has values of 3 bits; the nearest width is 4"),
        ({"convention": "roof"}, "'roof' is no way of counting operations; did you mean 'roofline'?"),
        ({"methods": "fopru:keep=600"}, "keep=600 asks for 600 tokens but the image has 576 tokens; the most is"),
        ({"methods": "prumerge"}, "PruMerge decides its own count from the image, so nothing can be planned"),
        ({"methods": "fopru", "kept": 0.5}, "kept=0.5 is for methods that decide their own count, and none is given"),
        ({"methods": "prumerge", "kept": 600}, "kept=600 asks for 600 tokens but the image has 576 tokens"),
        ({"methods": "prumerge", "kept": 1.5}, "kept=1.5"),
        ({"methods": "dynamicvit:layers=23,keep=5"}, "DynamicViT acts after 23 encoder blocks, outside 1..22"),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        estimate(**{"model": "llava-1.5-7b", **arguments})
    assert message in str(caught.value)
