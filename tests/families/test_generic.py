"""Models whose type has no row: what is assumed of them, what they are warned of, and what is refused by name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from models import tiny, tiny_parts
from models.untouched import untouched
from torch import Tensor
from transformers import (
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    LlavaConfig,
    MistralConfig,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Qwen2Config,
    Qwen3VLMoeConfig,
)

import foveate
from foveate.core import FoveateError
from foveate.evaluate.check import check
from foveate.families import family_of
from foveate.families.generic import GenericFamily
from foveate.families.reading import assume_model
from foveate.families.rows import FAMILIES
from foveate.families.shapes import ModelShape
from foveate.runtime.seams import CACHE

STEPS = 4


class Newcomer(LlavaConfig):
    """A type that no row names."""

    model_type = "newcomer"


def newcomer(**more: Any) -> Any:
    model = tiny.model(**more)
    model.config.__class__ = Newcomer
    model.config.image_seq_length = tiny.TOKENS
    return model


def generate(model: Any, given: dict[str, Tensor]) -> Any:
    return model.generate(**given, max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)


def given_to(model: Any, *rows: str) -> dict[str, Tensor]:
    """The inputs of the same model under its own name."""
    return tiny.inputs(tiny.model(), *rows)


@pytest.mark.parametrize("method", ["random:keep=0.5", "fopru:keep=0.5", "fastervlm:keep=7", "fastv:layer=2,keep=0.5"])
def test_a_model_of_unknown_type_is_pruned_as_its_known_twin(method: str) -> None:
    known, unknown = tiny.model(), newcomer()
    given = given_to(unknown, "3i4", "2i1i5", "6")
    with foveate.prune(known, method) as expected:
        wanted = generate(known, given)
    with pytest.warns(UserWarning, match="'newcomer' is no family that Foveate knows"):
        handle = foveate.prune(unknown, method)
    with untouched(unknown), handle as trace:
        got = generate(unknown, given)
    assert torch.equal(torch.stack(got.logits), torch.stack(wanted.logits))
    assert [image.after for image in trace.images] == [image.after for image in expected.images]
    for one, other in zip(trace.images, expected.images, strict=True):
        assert torch.equal(one.kept, other.kept)


def test_the_warning_says_what_is_assumed() -> None:
    with pytest.warns(UserWarning, match="newcomer") as caught:
        foveate.prune(newcomer(), "random:keep=0.5").discard()
    (warning,) = caught
    assert str(warning.message) == (
        "'newcomer' is no family that Foveate knows. What was found of it has the standard parts, and this is assumed: "
        "each entry of pooler_output is one picture, whose tokens stand in the prompt in their order; token types, "
        "where the model takes any, mark pictures alone; the decoder's blocks are dense and gated, and what encoder "
        "and projector compute is not counted; its 36 tokens are the patches of the block that vision_feature_layer "
        "names, or the last. Run `foveate check` on it first"
    )


@pytest.mark.filterwarnings("ignore:'newcomer' is no family")
@pytest.mark.parametrize("hide", ["tokens", "kind"])
def test_an_encoder_that_is_not_described_shows_nothing(hide: str) -> None:
    model = newcomer()
    if hide == "tokens":
        model.config.image_seq_length = 9
    else:
        model.model.vision_tower.config.model_type = "eye"
    with pytest.raises(FoveateError) as error:
        foveate.prune(model, "fopru:keep=0.5")
    assert str(error.value).startswith(
        "fopru:keep=0.5 needs tower.read.given, tower.read.received, which newcomer with a vision encoder that is not "
        "described does not have; methods that work: dart, "
    )
    with pytest.raises(FoveateError, match="acts inside the encoder, which newcomer does not allow: its type has"):
        foveate.prune(model, "tome:keep=0.5")
    given = given_to(model, "3i4", "2i1i5")
    with foveate.prune(model, "fastv:layer=2,keep=0.5") as trace:
        out = generate(model, given)
    known = tiny.model()
    with foveate.prune(known, "fastv:layer=2,keep=0.5"):
        wanted = generate(known, given)
    assert [image.after for image in trace.images] == [18, 18, 18]
    assert torch.equal(torch.stack(out.logits), torch.stack(wanted.logits))


def got_ocr2() -> Any:
    """Its tokens are groups of patches, of which no row says anything."""
    config = GotOcr2Config(
        vision_config=dict(
            hidden_size=32,
            output_channels=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=64,
            patch_size=4,
            window_size=4,
            global_attn_indexes=[1],
            mlp_dim=48,
        ),
        text_config=Qwen2Config(**tiny_parts.SIZES),
        image_token_index=tiny.IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return tiny_parts.finished(GotOcr2ForConditionalGeneration, config, "eager", 0)


@pytest.mark.filterwarnings("ignore:'got_ocr2' is no family")
@pytest.mark.parametrize("method", ["random:keep=0.5", "fastv:layer=2,keep=0.25", "divprune:keep=5"])
def test_a_stock_model_without_a_row(method: str) -> None:
    model = got_ocr2()
    assert not any(model.config.model_type in family.types for family in FAMILIES)
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 6, 7, *[tiny.IMAGE] * 16, 8, 9]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": picture}
    unpruned = generate(model, given)
    with foveate.prune(model, "random:keep=1.0"):
        same = generate(model, given)
    assert torch.equal(torch.stack(same.logits), torch.stack(unpruned.logits))
    seen: list[Tensor] = []
    with untouched(model), foveate.prune(model, method) as trace:
        hook = model.get_decoder().register_forward_pre_hook(
            lambda module, arguments, options: seen.append(options["position_ids"]), with_kwargs=True
        )
        generate(model, given)
        hook.remove()
    (image,) = trace.images
    assert image.original == 16
    assert image.after == {"r": 8, "f": 4, "d": 5}[method[0]]
    assert torch.equal(seen[0], trace.index)


def ovis2() -> Any:
    """Its tokens are drawn from a table of visual words."""
    config = Ovis2Config(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=24,
            patch_size=4,
            hidden_stride=2,
            vocab_size=40,
            num_visual_indicator_tokens=5,
        ),
        text_config=Qwen2Config(**tiny_parts.SIZES),
        image_token_id=tiny.IMAGE,
        visual_indicator_token_ids=[90, 91, 92, 93, 94],
        vocab_size=tiny_parts.VOCABULARY,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    return tiny_parts.finished(Ovis2ForConditionalGeneration, config, "sdpa", 0)


def idefics2() -> Any:
    """Its tokens are drawn from all patches of a picture."""
    config = Idefics2Config(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=4,
        ),
        perceiver_config=dict(
            hidden_size=32,
            resampler_n_latents=5,
            resampler_depth=1,
            resampler_n_heads=4,
            resampler_head_dim=8,
            num_key_value_heads=2,
        ),
        text_config=MistralConfig(**tiny_parts.SIZES, sliding_window=None),
        image_token_id=tiny.IMAGE,
        tie_word_embeddings=False,
    )
    return tiny_parts.finished(Idefics2ForConditionalGeneration, config, "sdpa", 0)


@pytest.mark.parametrize(
    ("build", "shape", "tokens"),
    [(ovis2, (2, 3, 24, 24), 9), (got_ocr2, (2, 3, 64, 64), 16), (idefics2, (2, 1, 3, 24, 32), 5)],
)
def test_the_contract_holds_on_stock_models_without_a_row(build: Any, shape: tuple[int, ...], tokens: int) -> None:
    model = build()
    pictures = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 6, *[tiny.IMAGE] * tokens, 8], [*[tiny.IMAGE] * tokens, 9, 10, 11]])
    found = check(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures})
    assert [outcome for outcome in found.outcomes if not outcome.passed] == []
    assert (found.encoder_blocks, found.tokens) == (0, (tokens, tokens))
    assert found.methods["fastv"] is None
    assert "needs tower.read.given, tower.read.received, which" in str(found.methods["fopru"])


def test_layers_that_hang_together() -> None:
    """Nothing leaves inside a decoder whose layers need more than hidden states."""
    model = newcomer()
    for name in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        setattr(model.config.text_config, name, 2)
        for method, where in (("fastv:layer=2,keep=0.5", "inside the decoder"), ("h2o", "on the cache")):
            with pytest.warns(UserWarning, match="'newcomer' is no family"), pytest.raises(FoveateError) as error:
                foveate.prune(model, method)
            assert (
                f"acts {where}, which newcomer does not allow: its layers take inputs of their own for each token, or "
                "keys and values of others; methods that work: "
            ) in str(error.value)
        setattr(model.config.text_config, name, 0)


def looking_ahead() -> Any:
    """No encoder at all; tokens of a picture see each other in layers with a window."""
    if not hasattr(transformers, "Gemma4UnifiedConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no gemma4_unified")
    text = transformers.Gemma4UnifiedTextConfig(
        **tiny_parts.SIZES,
        head_dim=8,
        global_head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
        use_bidirectional_attention="vision",
    )
    vision = transformers.Gemma4UnifiedVisionConfig(
        patch_size=2, pooling_kernel_size=2, mm_embed_dim=32, mm_posemb_size=16, output_proj_dims=32
    )
    config = transformers.Gemma4UnifiedConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tiny.IMAGE,
        video_token_id=tiny_parts.VIDEO,
        audio_token_id=tiny_parts.VOCABULARY,
        tie_word_embeddings=False,
    )
    return tiny_parts.finished(transformers.Gemma4UnifiedForConditionalGeneration, config, "sdpa", 0)


def looked_at(ids: list[int], pictures: list[int]) -> dict[str, Tensor]:
    """A prompt with numbered pictures of 2 x 3 patches."""
    row = torch.tensor([ids])
    places = torch.tensor([[column, line] for line in range(2) for column in range(3)])
    pixels = [torch.rand(6, 48, generator=torch.Generator().manual_seed(number)) for number in pictures]
    return {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "mm_token_type_ids": (row == tiny.IMAGE).long(),
        "pixel_values": torch.stack(pixels),
        "image_position_ids": places.expand(len(pictures), -1, -1),
    }


@pytest.mark.filterwarnings("ignore:'gemma4_unified' is no family")
def test_a_later_turn_where_pictures_look_ahead() -> None:
    model = looking_ahead()
    first, second = [5, 6, *[tiny.IMAGE] * 6, 8], [9, *[tiny.IMAGE] * 6, 10, 11]
    found = check(model, looked_at(first, [0]))
    assert [outcome for outcome in found.outcomes if not outcome.passed] == []
    with foveate.prune(model, "random:keep=1.0"):
        out = generate(model, looked_at(first, [0]))
        whole = [*out.sequences[0].tolist(), *second]
        given = looked_at(whole, [1])
        again = model.generate(
            **given,
            **{CACHE: getattr(out, CACHE)},
            max_new_tokens=STEPS,
            return_dict_in_generate=True,
            output_logits=True,
        )
    stock = generate(model, looked_at(whole, [0, 1]))
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(stock.logits), atol=1e-4, rtol=0)


class Stranger(Qwen3VLMoeConfig):
    """Another type that no row names, of a model with positions on three axes, deepstack and experts."""

    model_type = "stranger"


def test_the_contract_holds_where_positions_have_several_axes() -> None:
    model = tiny.model("qwen3-vl-moe")
    model.config.__class__ = Stranger
    found = check(model, tiny.inputs(tiny.model("qwen3-vl"), "3i4"))
    assert [outcome for outcome in found.outcomes if not outcome.passed] == []
    assert (found.encoder_blocks, found.read, found.tokens) == (0, None, (24,))
    assert len(found.assumed) == 4


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_contract_holds_where_the_encoder_is_described(tower: str) -> None:
    model = newcomer(tower=tower)
    found = check(model, given_to(model, "3i4"))
    assert [outcome for outcome in found.outcomes if not outcome.passed] == []
    assert any(outcome.name.startswith("fopru") for outcome in found.outcomes)
    assert (found.family, found.encoder_blocks) == ("newcomer", 4)
    assert (found.methods["fastervlm"] is None) == (tower == "clip")


# ---------------------------------------------------------------------------------------------------------------------
# what is missing


def refusal(model: Any) -> str:
    with pytest.raises(FoveateError) as error:
        family_of(model)
    return str(error.value)


@pytest.mark.parametrize("kind", ["Qwen3_5", "Qwen3_5Moe"])
@pytest.mark.parametrize("first", [False, True])
def test_a_decoder_with_attention_in_some_layers_only(kind: str, first: bool) -> None:
    """Whether or not the first is one of them."""
    layers = ["full_attention", "linear_attention"] if first else ["linear_attention", "full_attention"]
    vision = dict(depth=1, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    linear = dict(
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, head_dim=8
    )
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    sizes = {**tiny_parts.SIZES, "num_hidden_layers": 2, **linear, **(experts if kind.endswith("Moe") else {})}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=dict(**sizes, layer_types=layers, rope_parameters=rope),
        image_token_id=tiny.IMAGE,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    assert refusal(model) == (
        f"{kind}ForConditionalGeneration ({config.model_type}) cannot be pruned: 1 of its 2 decoder layers, layer "
        f"{int(first)} among them, have no self_attn. They carry a state from token to token in place of keys and "
        "values of each, which is neither counted nor cached by tokens; `foveate models` lists the families"
    )
    with pytest.raises(FoveateError, match="have no self_attn"):
        foveate.prune(model, "random:keep=0.5")


def test_a_missing_part_is_named() -> None:
    model = newcomer()
    model.config.image_token_id = None
    model.get_decoder().norm = None
    assert refusal(model) == (
        "LlavaForConditionalGeneration (newcomer) has no row among the families, and a row cannot be made for it "
        "without image_token_id in its configuration, get_decoder().norm; `foveate models` lists the families"
    )


def test_features_that_are_not_one_entry_per_picture() -> None:
    model = newcomer()
    stock = model.model.get_image_features

    @functools.wraps(stock)
    def flat(*arguments: Any, **options: Any) -> Any:
        output = stock(*arguments, **options)
        output.pooler_output = torch.cat(list(output.pooler_output))
        return output

    model.model.get_image_features = flat
    model.config.image_seq_length = 9
    with pytest.warns(UserWarning, match="is assumed"):
        handle = foveate.prune(model, "random:keep=0.5")
    with handle, pytest.raises(FoveateError) as error:
        generate(model, given_to(model, "3i4"))
    assert str(error.value) == (
        "the prompt has 36 visual placeholders, but the entries of the encoder's pooler_output, taken for one picture "
        "each, have 1152 tokens together"
    )


def test_another_number_of_tokens_than_stated() -> None:
    """The map from patches to tokens rests on the configuration: where a picture contradicts it, nothing is guessed."""
    model = newcomer()
    stock = model.model.get_image_features

    @functools.wraps(stock)
    def half(*arguments: Any, **options: Any) -> Any:
        output = stock(*arguments, **options)
        output.pooler_output = [rows[::2] for rows in output.pooler_output]
        return output

    model.model.get_image_features = half
    ids = torch.tensor([[5, *[tiny.IMAGE] * 18, 6]])
    given = {**given_to(model, "3i4"), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.warns(UserWarning, match="is assumed"):
        handle = foveate.prune(model, "fopru:keep=0.5")
    with handle, pytest.raises(FoveateError) as error:
        generate(model, given)
    assert str(error.value) == (
        "a picture of this 'newcomer' model has 18 tokens and its encoder 36 patches; which token is which patch is "
        "not known. Methods that read nothing from the encoder work, such as fastv"
    )


def test_a_family_with_a_row_is_never_guessed_at(recwarn: pytest.WarningsRecorder) -> None:
    model = tiny.model()
    assert not isinstance(family_of(model), GenericFamily)
    foveate.prune(model, "fopru:keep=0.5").discard()
    assert not recwarn.list


def test_what_a_trace_counts_of_an_unknown_decoder() -> None:
    model = newcomer()
    shape, known = assume_model(model.config), ModelShape.from_config(tiny.model().config)
    assert shape.decoder == known.decoder
    assert (shape.tower.layers, shape.projector.weights) == (1, 1)
    text = model.config.text_config.to_dict()
    with pytest.raises(FoveateError, match="states hidden_size=None, which is no size"):
        assume_model({"model_type": "newcomer", "text_config": {**text, "hidden_size": None}})
