"""Each trap of building on transformers that pruning before the decoder can step into, one test for each."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from models import tiny
from models.doubles import Fixed, Ragged
from references import agreement, reference
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import find_packed_sequence_indices

import foveate
from foveate import FoPru, Random
from foveate.runtime.seams import CACHE

STEPS = 6
ROWS = ("3i4", "2i1i5", "6", "1i")


def generate(model: Any, given: dict[str, Tensor], **options: Any) -> Any:
    settings = dict(max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)
    return model.generate(**given, **{**settings, **options})


def decoder_calls(model: Any) -> list[dict[str, Any]]:
    """Arguments of every later call of the language model."""
    seen: list[dict[str, Any]] = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, arguments, options: seen.append(dict(options)), with_kwargs=True
    )
    return seen


def layer_calls(model: Any) -> list[dict[str, Any]]:
    """Arguments that the first decoder block gets, after every hook."""
    seen: list[dict[str, Any]] = []
    layer = model.get_decoder().layers[0]
    stock = layer.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        seen.append(dict(options))
        return stock(*arguments, **options)

    layer.forward = forward
    return seen


# -- packed sequences -------------------------------------------------------------------------------------------------


def test_gappy_positions_would_be_read_as_packed_sequences() -> None:
    """The trap itself: this is what transformers makes of the positions of a pruned prompt."""
    assert find_packed_sequence_indices(torch.tensor([[0, 1, 2, 3]])) is None
    assert find_packed_sequence_indices(torch.tensor([[0, 1, 5, 6]])).tolist() == [[0, 0, 1, 1]]


@torch.no_grad()
def test_without_a_mask_and_a_cache_the_runtime_brings_a_mask() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", batch_mask=False)
    with foveate.prune(model, Random(keep=0.25)) as trace:
        seen = decoder_calls(model)
        model(**given, use_cache=False)
        model.generate(**given, use_cache=False, max_new_tokens=2)
    for call in seen:
        assert call[CACHE] is None
        assert call["attention_mask"] is not None
        assert call["attention_mask"].all()
    assert seen[0]["position_ids"][0].diff().max() > 1, "the positions have gaps"
    assert seen[0]["position_ids"].shape[1] == trace.length


@torch.no_grad()
def test_decoder_blocks_see_no_positions() -> None:
    """Flash attention reads gaps as packed sequences inside the blocks; rotary embeddings are made before them."""
    model = tiny.model()
    first = tiny.inputs(model, "3i4")
    seen = layer_calls(model)
    with foveate.prune(model, Fixed((0, 3, 17))):
        out = generate(model, first)
        ids = torch.cat([out.sequences, torch.tensor([[5, 6]])], dim=1)
        generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **{CACHE: getattr(out, CACHE)})
        cache = getattr(model(**first), CACHE)
        model(input_ids=torch.tensor([[5]]), **{CACHE: cache})
    assert len(seen) == 2 * STEPS + 2
    assert all(call["position_ids"] is None for call in seen)
    seen.clear()
    generate(model, first, max_new_tokens=1)
    assert seen[0]["position_ids"] is not None, "outside the handle they are what they were"


def test_an_even_prompt_needs_no_mask() -> None:
    """Without padding the mask stays away, so that attention takes its plain causal path."""
    model = tiny.model()
    seen = decoder_calls(model)
    with foveate.prune(model, Random(keep=0.25)):
        generate(model, tiny.inputs(model, "3i4", "1i6"))
    assert all(call.get("attention_mask") is None for call in seen)
    seen.clear()
    with foveate.prune(model, Random(keep=0.25)):
        generate(model, tiny.inputs(model, "3i4", "2i1i5"), max_new_tokens=1)
    assert seen[0]["attention_mask"].shape == (2, 26)


def test_rows_that_become_even_lose_their_padding() -> None:
    """Two pictures against one: what padding made up for may be gone after pruning."""
    model = tiny.model()
    given = tiny.inputs(model, "2i1i3", "i41")
    with foveate.prune(model, Fixed((0, 3, 17))) as trace:
        seen = decoder_calls(model)
        out = generate(model, given)
    assert trace.length == 44
    assert seen[0]["attention_mask"].sum(dim=1).tolist() == [12, 44]
    assert agreement.worst(model, agreement.prompts(model, given, trace.latest), out, STEPS) < agreement.TOLERANCE


# -- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["3i4", "i", "2i1i5"])
def test_kept_tokens_and_the_answer_have_their_original_positions(row: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, row)
    seen = decoder_calls(model)
    with foveate.prune(model, Fixed((0, 3, 17))) as trace:
        generate(model, given)
    assert torch.equal(seen[0]["position_ids"], trace.index)
    length = given["input_ids"].shape[1]
    assert [int(call["position_ids"]) for call in seen[1:]] == list(range(length, length + STEPS - 1))


def test_left_padding_counts_from_the_first_real_token() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "6")
    seen = decoder_calls(model)
    with foveate.prune(model, Random(keep=0.25)):
        generate(model, given)
    assert seen[0]["position_ids"][1, -6:].tolist() == [0, 1, 2, 3, 4, 5]
    assert seen[1]["position_ids"].tolist() == [[43], [6]]


def test_a_control_that_renumbers_positions_is_caught() -> None:
    """Pruning that counts positions anew gives other logits by far more than the tolerance of these tests."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    with foveate.prune(model, Fixed((0, 3, 17))) as trace:
        layers = model.get_decoder()
        hook = layers.register_forward_pre_hook(_renumber, with_kwargs=True)
        wrong = generate(model, given, max_new_tokens=1)
        hook.remove()
        right = generate(model, given, max_new_tokens=1)
    rows = agreement.prompts(model, given, trace.latest)
    renumbered = agreement.prompts(model, given, trace.latest, renumber=True)
    assert agreement.worst(model, rows, right, 1) < agreement.TOLERANCE < 0.1 < agreement.worst(model, rows, wrong, 1)
    assert agreement.worst(model, renumbered, wrong, 1) < agreement.TOLERANCE


def _renumber(module: Any, arguments: Any, options: dict[str, Any]) -> Any:
    positions = options["position_ids"]
    return arguments, {**options, "position_ids": torch.arange(positions.shape[1]).expand_as(positions)}


# -- placeholders and encoded pictures --------------------------------------------------------------------------------


def test_padding_anew_never_looks_like_a_picture() -> None:
    """The first column of a row may be a placeholder; a re-padded column that repeats it would be counted."""
    model = tiny.model()
    given = tiny.inputs(model, "i4", "i1i5", "6")
    counted = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, ids: counted.append((ids[0] == tiny.IMAGE).sum(dim=1).tolist())
    )
    with foveate.prune(model, Fixed((0, 3, 17))):
        generate(model, given, max_new_tokens=1)
    assert [3, 6, 0] in counted


@pytest.mark.parametrize("pad", [None, -1, tiny.IMAGE])
def test_any_pad_token_of_the_configuration_will_do(pad: int | None) -> None:
    """Models come without one, with -1, or with the placeholder's own id."""
    model = tiny.model()
    model.config.get_text_config().pad_token_id = pad
    given = tiny.inputs(model, *ROWS)
    with foveate.prune(model, Ragged()) as trace:
        out = generate(model, given)
    assert agreement.worst(model, agreement.prompts(model, given, trace.latest), out, STEPS) < agreement.TOLERANCE


def test_the_encoder_runs_once_per_call_beams_or_not() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5")
    pictures: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, arguments, options: pictures.append(
            len(options.get("pixel_values", arguments and arguments[0]))
        ),
        with_kwargs=True,
    )
    with torch.no_grad(), foveate.prune(model, FoPru(keep=0.25)):
        generate(model, given)
        generate(model, given, num_beams=3)
        generate(model, given, use_cache=False)
        model(**given)
    assert pictures == [3, 3, 3, 3]


def test_the_method_chooses_once_per_picture_beams_or_not() -> None:
    from models.doubles import Scored

    asked: list[tuple[int, int]] = []

    def scores(signals: Any) -> Tensor:
        asked.append(signals.shape)
        return torch.rand(signals.shape)  # another answer each time it is asked

    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5")
    with foveate.prune(model, Scored(keep=5, scores=scores)) as trace:
        out = generate(model, given, num_beams=3, num_return_sequences=3, output_scores=True)
    assert asked == [(3, 36)]
    check_beams(model, agreement.prompts(model, given, trace.latest), out)


def test_counts_that_add_up_across_rows() -> None:
    """transformers groups pictures by matching running sums of tokens: sums that fall together must not mix rows."""
    from models.doubles import Answer

    from foveate.core import Selection

    counts = [4, 4, 8, 2, 2, 4]  # of the rows 1 + 1, 2 + 2: many running sums are equal
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "3i4", "1i1i5", "1i1i5", seed=2)
    method = Answer(
        answer=lambda signals: Selection([row[:count] for row, count in zip(signals.index, counts, strict=True)])
    )
    with foveate.prune(model, method) as trace:
        out = generate(model, given, num_beams=2, num_return_sequences=2, output_scores=True)
    assert [image.after for image in trace.images] == counts
    check_beams(model, agreement.prompts(model, given, trace.latest), out)


def check_beams(model: Any, rows: list[reference.Prompt], out: Any) -> None:
    """The beams' scores are the reference's log-probabilities."""
    answers = out.sequences[:, -STEPS:].unflatten(0, (len(rows), -1))
    expected = [
        reference.log_probability(model, prompt, answer) / STEPS
        for prompt, beams in zip(rows, answers, strict=True)
        for answer in beams
    ]
    torch.testing.assert_close(out.sequences_scores, torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_callers_arguments_stay_theirs() -> None:
    """transformers writes into the dictionaries it is given; nothing of that may reach the caller."""
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    before = {name: value.clone() for name, value in given.items()}
    with torch.no_grad(), foveate.prune(model, Ragged()):
        generate(model, given, num_beams=2)
        model(**given, labels=given["input_ids"])
        model.generate(**given, generation_config=model.generation_config, max_new_tokens=1)
    assert given.keys() == before.keys()
    assert all(torch.equal(given[name], before[name]) for name in given)
    assert model.generation_config.max_new_tokens is None


@torch.no_grad()
def test_token_types_are_shortened_with_their_tokens() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5")
    types = (given["input_ids"] == tiny.IMAGE).long()
    seen = decoder_calls(model)
    with foveate.prune(model, Fixed((0, 3, 17))) as trace:
        model(**given, mm_token_type_ids=types)
    expected = types.gather(1, trace.index.clamp(min=0)).masked_fill(trace.index < 0, 0)
    assert torch.equal(seen[0]["mm_token_type_ids"], expected)
    assert expected.sum(dim=1).tolist() == [3, 6]


# -- generate() -------------------------------------------------------------------------------------------------------


def test_an_attention_mask_of_ones_is_as_good_as_none() -> None:
    """generate() drops such a mask and keeps its length aside; the shortened prompt must not be cut by that length."""
    model = tiny.model()
    with foveate.prune(model, Random(keep=0.25)):
        with_mask = generate(model, tiny.inputs(model, "3i4"))
        without = generate(model, tiny.inputs(model, "3i4", batch_mask=False))
        cache = DynamicCache(config=model.config.get_text_config())
        cached = generate(model, tiny.inputs(model, "3i4"), **{CACHE: cache})
    assert torch.equal(with_mask.sequences, without.sequences)
    assert torch.equal(with_mask.sequences, cached.sequences)


def test_output_hidden_states_and_attentions_in_generate() -> None:
    model = tiny.model(attn="eager")
    given = tiny.inputs(model, "3i4")
    with foveate.prune(model, FoPru(keep=0.25)) as trace:
        plain = generate(model, given)
        out = generate(model, given, output_hidden_states=True, output_attentions=True)
    assert torch.equal(out.sequences, plain.sequences)
    assert out.hidden_states[0][-1].shape[1] == trace.length
    assert out.attentions[0][0].shape[-1] == trace.length
    assert out.attentions[1][0].shape[-1] == trace.length + 1


def test_custom_generate_runs_on_the_shortened_prompt() -> None:
    """A caller's own decoding loop gets the shortened prompt and its cache, and the caller the whole prompt back."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")

    def loop(model: Any, input_ids: Tensor, **options: Any) -> Tensor:
        for name in ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"):
            options.pop(name, None)
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **options)
        out = model(**inputs, return_dict=True)
        return torch.cat([input_ids, out.logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)

    with foveate.prune(model, Random(keep=0.25)):
        expected = model.generate(**given, max_new_tokens=1)
        assert torch.equal(model.generate(**given, max_new_tokens=1, custom_generate=loop), expected)


def test_the_seams_of_transformers_are_where_the_runtime_looks_for_them() -> None:
    """Names and arguments that it replaces or relies on; a release that moves them fails here first."""
    model = tiny.model()
    signatures = {
        "_expand_inputs_for_generation": ["expand_size", "is_encoder_decoder", "input_ids", "model_kwargs"],
        "_prepare_generated_length": [
            "generation_config",
            "has_default_max_length",
            "has_default_min_length",
            "model_input_name",
            "input_ids_length",
            "inputs_tensor",
        ],
    }
    for name, arguments in signatures.items():
        assert list(inspect.signature(getattr(model, name)).parameters) == arguments
    cache = list(inspect.signature(model._prepare_cache_for_generation).parameters)
    assert cache[:2] == ["generation_config", "model_kwargs"]
    assert "mm_encoder_outputs" in inspect.signature(model.forward).parameters


# -- several devices' hooks -------------------------------------------------------------------------------------------


def test_hooks_of_accelerate_come_after_those_of_the_runtime() -> None:
    """accelerate wraps forward(), so that its hooks see what pruning has made of the arguments."""
    accelerate_hooks = pytest.importorskip("accelerate.hooks")
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5")
    with foveate.prune(model, Ragged()):
        expected = generate(model, given)
    for layer in model.get_decoder().layers:
        accelerate_hooks.add_hook_to_module(layer, accelerate_hooks.AlignDevicesHook("cpu", io_same_device=True))
    with foveate.prune(model, Ragged()):
        out = generate(model, given)
    assert torch.equal(out.sequences, expected.sequences)
