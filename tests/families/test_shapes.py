"""Shapes: the presets, reading configs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import tiny_families

from foveate.core import FoveateError
from foveate.cost import PRESETS, DecoderShape, ModelShape, ProjectorShape, TowerShape, decoder_flops, shape
from foveate.cost.operators import decoder_block
from foveate.families.shapes import Experts
from foveate.runtime.seams import CACHE

# The entries of LLaVA-1.5-7B that a published config.json states; the decoder's sizes are left to llama's defaults.
LLAVA_7B: dict[str, Any] = {
    "model_type": "llava",
    "_name_or_path": "org/llava-1.5-7b-hf",
    "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32000},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def changed(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    return {
        **LLAVA_7B,
        "text_config": {**LLAVA_7B["text_config"], **(text or {})},
        "vision_config": {**LLAVA_7B["vision_config"], **(vision or {})},
        **top,
    }


def test_weights_of_the_7b_blocks() -> None:
    decoder, tower = PRESETS["llava-1.5-7b"].decoder, PRESETS["llava-1.5-7b"].tower
    assert decoder.block_weights == 4 * 4096**2 + 3 * 4096 * 11008 == 202_375_168
    assert decoder.head_weights == 131_072_000
    assert tower.block_weights == 12 * 1024**2
    assert tower.patch_weights == 3 * 14 * 14 * 1024
    assert tower.length == 577
    assert PRESETS["llava-1.5-7b"].projector.weights == 1024 * 4096 + 4096 * 4096


def test_grouped_queries_and_plain_feed_forward() -> None:
    # q 4x4, o 4x4, k and v 4x2 each: 48. Two matrices 4x6: 48.
    decoder = DecoderShape(layers=2, width=4, ffn=6, heads=2, kv_heads=1, head_width=2, vocabulary=10, gated=False)
    assert decoder.block_weights == 96
    # Three heads of width 2 beside a model width of 4: q and o 4x6 each, k and v 4x6 each.
    wide = DecoderShape(layers=2, width=4, ffn=6, heads=3, kv_heads=3, head_width=2, vocabulary=10)
    assert wide.block_weights == 4 * 24 + 72
    assert TowerShape(2, 4, 8, 2, tokens=4, cls=False, patch=2, gated=True).block_weights == 64 + 96


def test_experts_count_as_one_token_meets_them() -> None:
    # Attention 48, a router 4x5, of five experts two of 3 x 4x2 each, and 3 x 4x3 that every token passes: 48 + 20 +
    # 48 + 36. Block 0 is dense: 48 + 72.
    sizes = dict(layers=2, width=4, ffn=6, heads=2, kv_heads=1, head_width=2, vocabulary=10)
    decoder = DecoderShape(**sizes, experts=Experts(5, 2, 2, (1,), shared=3))  # type: ignore[arg-type]
    assert (decoder.met(0), decoder.met(1)) == (120, 152)
    assert decoder.weights == 120 + 48 + 20 + 5 * 24 + 36
    assert (decoder.experts_of(0), decoder.experts_of(1)) == (None, decoder.experts)
    # Three tokens in the dense block, two in the other, and the head once.
    assert decoder_flops(decoder, lengths=(3, 2), convention="weights") == 2 * 3 * 120 + 2 * 2 * 152 + 2 * 2 * 40
    # Experts' matrices are read for as many as tokens reach: two by one token, all five by three.
    for tokens, reached in ((1, 2), (3, 5)):
        block = decoder_block(decoder, queries=tokens, keys=3, batch=1, fused=True, experts=decoder.experts)
        assert sum(one.weights for one in block) == 48 + 20 + reached * 24 + 36
    with pytest.raises(FoveateError, match="a token cannot pass 3 of 2 experts; at most 2"):
        Experts(2, 3, 2, (0,))
    with pytest.raises(FoveateError, match=r"Experts\.width=0 is below 1"):
        Experts(2, 1, 0, (0,))
    with pytest.raises(FoveateError, match="block 2 cannot have experts: the last of 2 is 1"):
        DecoderShape(**sizes, experts=Experts(5, 2, 2, (1, 2)))  # type: ignore[arg-type]


def test_a_flat_config_of_an_encoder_without_a_name_of_its_own() -> None:
    """As PaddleOCR-VL's config.json is written."""
    from transformers import PaddleOCRVLConfig

    config = PaddleOCRVLConfig()
    vision = {**config.vision_config.to_dict(), "model_type": "paddleocr_vl"}
    flat = {**config.text_config.to_dict(), "model_type": "paddleocr_vl", "vision_config": vision}
    assert shape(flat) == shape(config)


def test_which_blocks_have_experts() -> None:
    sizes = dict(num_hidden_layers=6, num_experts=8, num_experts_per_tok=2, hidden_size=32, num_attention_heads=4)
    text = {**sizes, "model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 8, "intermediate_size": 40}
    text |= {"vocab_size": 11, "num_key_value_heads": 4}

    def blocks(**more: Any) -> Any:
        found = DecoderShape.from_config({**text, **more}).experts
        return found and found.blocks

    assert blocks() == (0, 1, 2, 3, 4, 5)
    assert blocks(decoder_sparse_step=2, mlp_only_layers=[3]) == (1, 5)
    assert blocks(mlp_only_layers=[0, 1, 2, 3, 4, 5]) is None


def test_patches_that_are_joined_are_at_their_places() -> None:
    shape = PRESETS["internvl3-8b"]
    assert shape.tower.put_back
    with pytest.raises(FoveateError, match="a projector that joins 4 patches needs them all at their places: give the"):
        dataclasses.replace(shape, tower=dataclasses.replace(shape.tower, put_back=False))


def test_a_published_config_is_the_preset() -> None:
    read = ModelShape.from_config(LLAVA_7B)
    assert read == PRESETS["llava-1.5-7b"]
    assert read.name == "llava-1.5-7b-hf"


def test_a_padded_vocabulary_is_read_as_it_is() -> None:
    read = ModelShape.from_config(changed(text={"vocab_size": 32064}))
    preset = PRESETS["llava-1.5-7b"]
    assert read == dataclasses.replace(preset, decoder=dataclasses.replace(preset.decoder, vocabulary=32064))


def test_13b_from_config() -> None:
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    assert ModelShape.from_config(changed(text=sizes)) == PRESETS["llava-1.5-13b"]


def test_objects_read_like_dicts() -> None:
    nested = SimpleNamespace(
        **{**LLAVA_7B, "text_config": SimpleNamespace(**LLAVA_7B["text_config"])},
    )
    assert shape(nested) == PRESETS["llava-1.5-7b"]
    assert shape(SimpleNamespace(to_dict=lambda: LLAVA_7B)) == PRESETS["llava-1.5-7b"]


def test_transformers_own_config() -> None:
    from transformers import LlavaConfig

    assert shape(LlavaConfig()) == PRESETS["llava-1.5-7b"]
    assert shape(LlavaConfig()).name == "llava"


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_sizes_left_out_are_those_of_transformers(kind: str) -> None:
    from transformers import AutoConfig

    assert DecoderShape.from_config({"model_type": kind}) == DecoderShape.from_config(AutoConfig.for_model(kind))


def test_mini_is_the_model_that_ships() -> None:
    package = find_spec("foveate.core")
    assert package is not None
    assert package.origin is not None
    config = Path(package.origin).parent / "scenes" / "checkpoint" / "config.json"
    assert ModelShape.from_config(json.loads(config.read_text())) == PRESETS["mini"]


def test_text_config_inside_a_larger_one() -> None:
    text = {
        "model_type": "qwen2_5_vl_text",
        "num_hidden_layers": 36,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    }
    wanted = DecoderShape(36, 2048, 11008, 16, 2, 128, 151936, tied=True)
    assert DecoderShape.from_config({"text_config": text, "tie_word_embeddings": True}) == wanted
    assert DecoderShape.from_config({**text, "tie_word_embeddings": True}) == wanted


def test_feature_selection_sets_the_projector() -> None:
    full = ModelShape.from_config(changed(vision_feature_select_strategy="full"))
    assert full.projector == ProjectorShape(((1024, 4096), (4096, 4096)), tokens=577)
    two = ModelShape.from_config(changed(vision_feature_layer=[-2, -5]))
    assert two.projector == ProjectorShape(((2048, 4096), (4096, 4096)), tokens=576)


def test_shape_gives_presets_and_shapes() -> None:
    mini = PRESETS["mini"]
    assert shape(mini) is mini
    assert shape("mini") is mini
    assert shape("LLaVA-1.5-7B") is PRESETS["llava-1.5-7b"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llava-1.5-7bb", "'llava-1.5-7bb' is no preset and no folder; did you mean 'llava-1.5-7b'?"),
        ("zzz", "'zzz' is no preset and no folder; Choices: internvl3-8b, llava-1.5-13b, llava-1.5-7b, llava-1.6-13b,"),
    ],
)
def test_unknown_preset(name: str, message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        shape(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (3, "a int is no config"),
        ({"model_type": "llava_nex"}, "'llava_nex' model is not known; did you mean 'llava_next'?"),
        (changed(text={"model_type": "qwen3_moe"}), "'qwen3_moe' decoder is not known; did you mean 'qwen3'?"),
        (changed(vision={"model_type": "eva"}), "'eva' tower is not known"),
        (changed(vision={"patch_size": None}), "the clip_vision_model config states patch_size=None"),
        (changed(text={"model_type": "qwen2"}), "the qwen2 config states hidden_size=None"),
        (changed(text={"num_hidden_layers": 0}), "DecoderShape.layers=0 is below 1"),
        (changed(text={"num_key_value_heads": 5}), "32 query heads cannot share 5 key-value heads"),
    ],
)
def test_configs_that_are_refused(config: Any, message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        shape(config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"]
)
def test_block_weights_are_those_of_the_real_block(kind: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        kind,
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=11,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    counted = sum(part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear))
    assert DecoderShape.from_config(config).block_weights == counted


@pytest.mark.parametrize("family", ["gemma4", "gemma4/31b"])
def test_blocks_that_differ_weigh_and_hold_what_the_real_ones_do(family: str) -> None:
    import torch
    from models import tiny

    import foveate

    model = tiny.model(family)
    decoder, shape = model.get_decoder(), DecoderShape.from_config(model.config)
    linears = [one.weight.numel() for one in decoder.modules() if isinstance(one, torch.nn.Linear)]
    assert sum(block.block_weights for block in shape.blocks) == sum(linears)
    tables = [one.weight.numel() for one in decoder.modules() if isinstance(one, torch.nn.Embedding)]
    assert shape.head_weights + sum(rows * width for rows, width in shape.tables) == sum(tables)
    given = tiny.inputs(model, "1i2")  # shorter than a window
    with torch.no_grad(), foveate.prune(model, "random:keep=0.5") as trace:
        cache = getattr(model(**given, use_cache=True), CACHE)
    held = [one for layer in cache.layers for one in (layer.keys, layer.values) if one is not None]
    assert trace.kv_bytes == sum(one.numel() * 4 for one in held)
    text = model.config.to_dict()["text_config"]
    stated = {name: value for name, value in text.items() if name != "per_layer_config"}
    more = {"global_head_dim": 16, "num_global_key_value_heads": 1}
    assert DecoderShape.from_config({**stated, **more}) == shape, (
        "a config.json says it for all layers without a window"
    )
    alike = DecoderShape.from_config({**text, "per_layer_config": {}}).blocks
    assert {block.head_width for block in alike} == {8}
    with pytest.raises(FoveateError, match="gemma4 decoder with experts is not known"):
        DecoderShape.from_config({**text, "enable_moe_block": True})
    with pytest.raises(FoveateError, match="layer_types=None; a config object made by transformers fills them in"):
        DecoderShape.from_config({**text, "layer_types": None})
    with pytest.raises(FoveateError, match="4 shapes of blocks for 5 layers; give one for each"):
        dataclasses.replace(shape, layers=5)


@pytest.mark.parametrize("family", ["gemma4", "gemma4/31b"])
def test_an_estimate_of_blocks_that_differ_is_the_sum_of_theirs(family: str) -> None:
    from models import tiny

    from foveate.cost import estimate

    config = tiny.model(family).config
    shape, cost = ModelShape.from_config(config), estimate(config, 8, 4, answer=2)
    assert cost.prefill.flops == decoder_flops(shape.decoder, lengths=(12,) * 4, convention="roofline")
    parts = [dataclasses.replace(block, vocabulary=1) for block in shape.decoder.blocks]
    alone = [decoder_flops(block, lengths=(12,), convention="roofline") - block.width for block in parts]
    assert cost.prefill.flops == sum(alone) + shape.decoder.head_weights
    cached = sum(2 * block.cached_width for block in shape.decoder.blocks if block.own_keys)
    assert cost.kv_bytes == 12 * cached * 2
    assert cost.footprint_bytes > cost.weight_bytes == 2 * shape.weights


# Parameters in billions that the models' pages state; norms, biases and position tables are not counted.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llava-1.5-7b", 7.06), ("llava-1.5-13b", 13.35), ("llava-1.6-7b", 7.06), ("llava-1.6-13b", 13.35),
        ("llava-next-8b", 8.36), ("qwen2.5-vl-3b", 3.75), ("qwen2.5-vl-7b", 8.29), ("qwen3-vl-8b", 8.77),
        ("internvl3-8b", 7.94), ("mini", 0.0099),
    ],
)  # fmt: skip
def test_presets_have_as_many_weights_as_the_models(name: str, billions: float) -> None:
    assert PRESETS[name].weights / 1e9 == pytest.approx(billions, rel=0.008)


QWEN = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}


def test_qwen_and_internvl_configs_are_their_presets() -> None:
    from transformers import InternVLConfig, Qwen2_5_VLConfig, Qwen3VLConfig

    text = {**QWEN, "num_key_value_heads": 4, "vocab_size": 152064}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={"hidden_size": 1280, "out_hidden_size": 3584})
    assert shape(config) == PRESETS["qwen2.5-vl-7b"]
    text = {**text, "vocab_size": 151674, "model_type": "qwen2"}
    assert shape(InternVLConfig(text_config=text, tie_word_embeddings=False)) == PRESETS["internvl3-8b"]
    text = {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    }  # fmt: skip
    config = Qwen3VLConfig(text_config=text, vision_config={"out_hidden_size": 4096})
    assert shape(config) == PRESETS["qwen3-vl-8b"]


# Video-LLaVA has a second encoder, which a shape does not count; Gemma 4's configuration has none by default.
MODELS = sorted({"Llava", *(kind.model for kind in tiny_families.KINDS.values())} - {"VideoLlava", "Gemma4"})


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_those_of_the_real_model(kind: str) -> None:
    """Every matrix of the model, built without memory from its configuration's defaults."""
    import torch
    import transformers

    config = getattr(transformers, f"{kind}Config")()
    config.vision_config.vision_use_head = False  # of Gemma 3, which leaves it unused
    if kind == "AyaVision":
        config.vision_config.num_attention_heads = 16  # 14 do not divide the default width
    if kind == "Qwen3VLMoe":
        config.vision_config.out_hidden_size = 2048  # the default is not the decoder's width
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    tables = {"position_embedding", "position_embeddings", "embed_positions", "pos_embed"}
    found = {
        id(parameter): parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not tables & set(name.split(".")) and name.split(".")[-1] != "cls_token"
    }
    assert shape(config).weights == pytest.approx(sum(found.values()), rel=0.002)


def test_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"holds no config\.json"):
        shape(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAVA_7B))
    assert shape(tmp_path) == shape(str(file)) == PRESETS["llava-1.5-7b"]
    for text in ("{", "[1]"):
        file.write_text(text)
        with pytest.raises(FoveateError, match=r"config\.json (cannot be read|holds a list)"):
            shape(tmp_path)


def test_the_block_that_is_read() -> None:
    assert ModelShape.from_config(changed(vision_feature_layer=-1)).tower.reads is None
    assert ModelShape.from_config(changed(vision_feature_layer=5)).tower.reads == 5
    with pytest.raises(FoveateError, match="reads block 3 of 2; the last is 2"):
        TowerShape(2, 4, 8, 2, tokens=4, cls=True, patch=2, reads=3)
