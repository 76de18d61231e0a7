"""Stock generate() on a shortened prompt: every way of decoding against the reference, or against each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from models import tiny
from models.conversations import STEPS, generate
from models.doubles import Answer, Fixed, Ragged
from packaging.version import Version
from references import agreement, reference
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
)

import foveate
from foveate import FoPru, FoveateError, Pool, Random, Uniform, families
from foveate.core import Selection, Signals
from foveate.runtime.seams import CACHE

ROWS = ("3i4", "2i1i5", "6", "1i")  # text after, between and after, none, image at the very end


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", tiny.TOWERS)
@pytest.mark.parametrize("decoder", tiny.DECODERS)
def test_every_decoder_and_encoder_equals_the_reference(decoder: str, tower: str, attn: str) -> None:
    model = tiny.model(decoder=decoder, tower=tower, attn=attn)
    given = tiny.inputs(model, *ROWS)
    with foveate.prune(model, Ragged()) as trace:
        out = generate(model, given)
    assert len({image.after for image in trace.images}) > 1
    rows = agreement.prompts(model, given, trace.latest)
    assert agreement.worst(model, rows, out, STEPS) < agreement.TOLERANCE
    renumbered = agreement.prompts(model, given, trace.latest, renumber=True)
    assert agreement.worst(model, renumbered, out, STEPS) > 0.1


def test_the_tiny_model_tells_choices_apart() -> None:
    """Different kept tokens give different answers, so that the comparisons of this file can fail."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    answers = set()
    for seed in range(6):
        with foveate.prune(model, Random(keep=9, seed=seed)):
            answers.add(tuple(model.generate(**given, max_new_tokens=4)[0, -4:].tolist()))
    assert len(answers) > 3


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("rows", [("3i",), ("3i", "2i1", "i"), ("2i1i",)])
def test_a_prompt_that_ends_in_dropped_tokens(rows: tuple[str, ...], use_cache: bool) -> None:
    """The answer's positions go on from the unpruned prompt's end, not from the last token that stayed."""
    model = tiny.model()
    given = tiny.inputs(model, *rows)
    with foveate.prune(model, Fixed((0, 3, 17))) as trace:
        out = generate(model, given, use_cache=use_cache)
    rows_of_reference = agreement.prompts(model, given, trace.latest)
    assert agreement.worst(model, rows_of_reference, out, STEPS) < agreement.TOLERANCE


@pytest.mark.parametrize("batch_mask", [True, False])
@pytest.mark.parametrize("rows", [("3i4",), ("3i4", "2i5"), ROWS])
def test_without_cache(rows: tuple[str, ...], batch_mask: bool) -> None:
    """Gaps in the positions of a call without mask and cache would be read as packed sequences."""
    model = tiny.model()
    given = tiny.inputs(model, *rows, batch_mask=batch_mask)
    with foveate.prune(model, Random(keep=0.25)) as trace:
        cached = generate(model, given)
        out = generate(model, given, use_cache=False)
    assert torch.equal(out.sequences, cached.sequences)
    given = tiny.inputs(model, *rows)
    assert agreement.worst(model, agreement.prompts(model, given, trace.latest), out, STEPS) < agreement.TOLERANCE


def test_without_mask_padding_is_told_by_the_pad_token() -> None:
    model = tiny.model()
    model.generation_config.eos_token_id = tiny.EOS  # generate() infers a mask only where padding is no end
    with foveate.prune(model, Random(keep=0.25)):
        with_mask = model.generate(**tiny.inputs(model, "3i4", "2i9"), max_new_tokens=4)
        without = model.generate(**tiny.inputs(model, "3i4", "2i9", batch_mask=False), max_new_tokens=4)
    assert torch.equal(with_mask, without)


@pytest.mark.parametrize("decoder", ["llama", "qwen2-mixed", "mistral-sliding"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_beams_with_ragged_counts(decoder: str, attn: str) -> None:
    """Each row's beams equal the row alone, and their scores are the reference's log-probabilities."""
    model = tiny.model(decoder=decoder, attn=attn)
    given = tiny.inputs(model, *ROWS)
    beams: dict[str, Any] = dict(num_beams=3, num_return_sequences=3, output_scores=True)
    with foveate.prune(model, Ragged()) as trace:
        out = generate(model, given, **beams)
        call = trace.latest
        assert len({image.after for image in call.images}) > 2
        for row, prompt in enumerate(agreement.prompts(model, given, call)):
            mine = slice(3 * row, 3 * row + 3)
            expected = [
                reference.log_probability(model, prompt, answer[-STEPS:]) / STEPS for answer in out.sequences[mine]
            ]
            torch.testing.assert_close(out.sequences_scores[mine], torch.tensor(expected), atol=1e-5, rtol=0)
            if "i" in ROWS[row]:
                alone = generate(model, tiny.alone(given, row, tiny.IMAGE), **beams)
                assert torch.equal(out.sequences[mine, -STEPS:], alone.sequences[:, -STEPS:])


def test_several_samples_of_each_row() -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    sampling: dict[str, Any] = dict(do_sample=True, num_return_sequences=2, top_k=20, temperature=1.5)
    with foveate.prune(model, Ragged()) as trace:
        torch.manual_seed(5)
        first = generate(model, given, **sampling)
        torch.manual_seed(5)
        second = generate(model, given, **sampling)
    assert torch.equal(first.sequences, second.sequences)
    assert first.sequences.shape[0] == 8
    assert not torch.equal(first.sequences[0], first.sequences[1])
    rows = agreement.prompts(model, given, trace.latest)
    doubled = [row for row in rows for _ in range(2)]
    assert agreement.worst(model, doubled, second, STEPS) < agreement.TOLERANCE


def test_sampling_draws_as_the_unpruned_model_does_where_nothing_leaves() -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    torch.manual_seed(5)
    unpruned = model.generate(**given, do_sample=True, max_new_tokens=STEPS)
    torch.manual_seed(5)
    with foveate.prune(model, Random(keep=1.0)):
        pruned = model.generate(**given, do_sample=True, max_new_tokens=STEPS)
    assert torch.equal(pruned, unpruned)


@pytest.mark.parametrize("decoder", ["llama", "qwen2-mixed", "mistral-sliding"])
def test_a_static_cache_equals_a_dynamic_one(decoder: str) -> None:
    model = tiny.model(decoder=decoder)
    for rows in (("3i4",), ROWS):
        given = tiny.inputs(model, *rows)
        with foveate.prune(model, Ragged()):
            dynamic = generate(model, given)
            static = generate(model, given, cache_implementation="static")
            own = StaticCache(config=model.config.get_text_config(), max_cache_len=150)
            owned = generate(model, given, **{CACHE: own})
        for other in (static, owned):
            assert torch.equal(other.sequences, dynamic.sequences)
            torch.testing.assert_close(torch.stack(other.logits), torch.stack(dynamic.logits), atol=1e-4, rtol=0)


def test_a_static_cache_is_as_long_as_the_pruned_prompt_whatever_ran_before() -> None:
    """transformers makes the next one as long as the longest; a handle at work and a model without one count apart."""
    model = tiny.model()
    given, handle = tiny.inputs(model, "3i4"), foveate.prune(model, Fixed((0, 3, 17)))

    def longest(steps: int = STEPS) -> int:
        answer = generate(model, given, cache_implementation="static", max_new_tokens=steps)
        return int(answer[CACHE].layers[0].max_cache_len)

    whole = longest()
    assert whole == given["input_ids"].shape[1] + STEPS - 1
    with handle:
        assert (longest(), longest(STEPS - 1)) == (whole - 33, whole - 33)
    assert longest(STEPS - 1) == whole
    with handle:
        assert longest(STEPS - 1) == whole - 33
    foveate.prune(model, "uniform:keep=2").discard()
    assert longest(STEPS - 1) == whole


def test_compiled_decoding_equals_eager() -> None:
    """One whole graph, the added positions of a prompt that ends in dropped tokens included."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = tiny.model()
    given = tiny.inputs(model, "3i", "2i9")
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True
    with foveate.prune(model, Fixed((0, 3, 17))):
        plain = model.generate(**given, max_new_tokens=STEPS)
        compiled = model.generate(**given, max_new_tokens=STEPS, cache_implementation="static", compile_config=config)
    assert torch.equal(compiled, plain)
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_chunks_are_refused_where_transformers_gets_them_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.runtime.generating.transformers.__version__", "5.22.2")
    model = tiny.model()
    message = r"prefill_chunk_size=5: .* 5\.22\.2"
    with foveate.prune(model, "random:keep=0.5"), pytest.raises(FoveateError, match=message):
        generate(model, tiny.inputs(model, "3i4"), prefill_chunk_size=5)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="stock chunks are wrong before 5.23")
@pytest.mark.parametrize("decoder", ["llama", "mistral-sliding"])
@pytest.mark.parametrize("size", [1, 5, 50])
def test_a_prompt_fed_in_chunks(decoder: str, size: int) -> None:
    model = tiny.model(decoder=decoder)
    given = tiny.inputs(model, *ROWS)
    with foveate.prune(model, Ragged()):
        whole = generate(model, given)
        chunked = generate(model, given, prefill_chunk_size=size)
    assert torch.equal(chunked.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(chunked.logits), torch.stack(whole.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("decoder", ["llama", "mistral-sliding"])
def test_prompt_lookup_equals_greedy(decoder: str) -> None:
    model = tiny.model(decoder=decoder)
    given = tiny.inputs(model, "3i9")
    # Words that come again, so that there is something to look up.
    given["input_ids"][0, -9:] = torch.tensor([5, 6, 7, 8, 5, 6, 7, 8, 5])
    calls = []
    with foveate.prune(model, Random(keep=0.25)):
        hook = model.lm_head.register_forward_pre_hook(lambda module, given: calls.append(given[0].shape[1]))
        greedy = model.generate(**given, max_new_tokens=24)
        plain, calls = calls, []
        found = model.generate(**given, max_new_tokens=24, prompt_lookup_num_tokens=3)
        hook.remove()
    assert torch.equal(found, greedy)
    assert len(plain) == 24
    assert max(calls) > 1, "no candidate was looked up"


def test_an_assistant_model_changes_nothing() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i9")
    assistant = LlamaForCausalLM(model.config.get_text_config()).eval()
    assistant.generation_config.pad_token_id = tiny.PAD
    # A draft by the decoder's own weights, so that some of it is accepted.
    assistant.model.load_state_dict(model.get_decoder().state_dict())
    assistant.lm_head.load_state_dict(model.lm_head.state_dict())
    with foveate.prune(model, Random(keep=0.25)):
        plain = model.generate(**given, max_new_tokens=12)
        assisted = model.generate(**given, max_new_tokens=12, assistant_model=assistant)
    assert torch.equal(assisted, plain)


def test_guidance_by_a_negative_prompt() -> None:
    """The unguided half is text alone and runs beside the pruned prompt."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    guided: dict[str, Any] = dict(guidance_scale=1.7, negative_prompt_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=5)
    unpruned = model.generate(**given, **guided)
    with foveate.prune(model, Random(keep=1.0)):
        assert torch.equal(model.generate(**given, **guided), unpruned)
    with foveate.prune(model, Random(keep=0.25)):
        assert not torch.equal(model.generate(**given, **guided), unpruned)


def test_a_logits_processor_may_generate_on_its_own() -> None:
    model = tiny.model()
    given, other = tiny.inputs(model, "3i4"), tiny.inputs(model, "2i1i5", seed=3)
    inside: list[Tensor] = []

    class Nested(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            inside.append(model.generate(**other, max_new_tokens=3))
            return scores

    with foveate.prune(model, FoPru(keep=0.25)):
        expected, expected_inside = model.generate(**given, max_new_tokens=4), model.generate(**other, max_new_tokens=3)
        out = model.generate(**given, max_new_tokens=4, logits_processor=LogitsProcessorList([Nested()]))
    assert torch.equal(out, expected)
    assert len(inside) == 4
    assert all(torch.equal(one, expected_inside) for one in inside)


# -- composition ------------------------------------------------------------------------------------------------------


def test_stages_compose_and_count_the_original_tokens() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5")
    with foveate.prune(model, [FoPru(keep=0.5), FoPru(keep=0.25)]) as trace:
        out = generate(model, given)
    with foveate.prune(model, FoPru(keep=0.25)) as alone:
        once = generate(model, given)
    for image, single in zip(trace.images, alone.images, strict=True):
        assert [(stage.before, stage.after) for stage in image.stages] == [(36, 18), (18, 9)]
        assert set(image.stages[1].kept.tolist()) <= set(image.stages[0].kept.tolist())
        # The same scores choose twice, so the best quarter is the best quarter of the better half.
        assert torch.equal(image.kept, single.kept)
    assert torch.equal(out.sequences, once.sequences)


@pytest.mark.parametrize(
    "stages",
    [
        [Random(keep=0.5), Uniform(keep=0.25)],
        "random:keep=0.5+fopru:keep=0.25",
        ["fopru:keep=20,reorder=false", FoPru(keep=7)],
        [Ragged(), Random(keep=8)],
    ],
)
def test_any_stages_equal_the_reference(stages: Any) -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    with foveate.prune(model, stages) as trace:
        out = generate(model, given)
    assert agreement.worst(model, agreement.prompts(model, given, trace.latest), out, STEPS) < agreement.TOLERANCE


def test_after_an_adaptive_stage_a_budget_is_a_ceiling() -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    with foveate.prune(model, [Ragged(), Random(keep=6)]) as trace:
        generate(model, given)
    counts = [[stage.after for stage in image.stages] for image in trace.images]
    assert {first > 6 for first, _ in counts} == {True, False}
    assert all(second == min(first, 6) for first, second in counts)


def test_a_merging_method_equals_the_reference() -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    with foveate.prune(model, Pool(keep=0.25)) as trace:
        out = generate(model, given)
    merged = []
    for encoded in reference.encode(model, given["pixel_values"]):
        grid = reference.project(model, encoded).unflatten(0, (3, 2, 3, 2))  # 2 x 2 blocks of a 6 x 6 grid
        merged.append(grid.mean(dim=(1, 3)).flatten(0, 1))
    rows = agreement.prompts(model, given, trace.latest, merged=[merged])
    assert agreement.worst(model, rows, out, STEPS) < agreement.TOLERANCE
    unmerged = agreement.prompts(model, given, trace.latest)
    assert agreement.worst(model, unmerged, out, STEPS) > 0.1


def answers_encoded(signals: Signals) -> Selection:
    """Two tokens of the encoder's own width, before the projector."""
    hidden = signals.tower["read"].hidden
    assert hidden is not None
    features = [torch.stack([one[:18].mean(dim=0), one[18:].mean(dim=0)]) for one in hidden]
    return Selection([index[[0, 18]] for index in signals.index], features=features, space="encoded")


def test_encoded_tokens_are_projected() -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    with foveate.prune(model, Answer(answer=answers_encoded, wants=("tower.read.hidden",))) as trace:
        out = generate(model, given)
    merged = [
        reference.project(model, torch.stack([one[:18].mean(dim=0), one[18:].mean(dim=0)]))
        for one in reference.encode(model, given["pixel_values"])
    ]
    rows = agreement.prompts(model, given, trace.latest, merged=[merged])
    assert agreement.worst(model, rows, out, STEPS) < agreement.TOLERANCE


def test_encoded_tokens_are_refused_where_the_projector_merges_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", (dataclasses.replace(families.FAMILIES[0], pointwise=False),))
    model = tiny.model()
    message = (
        "answer:.* returns encoded tokens, but this family's projector merges neighbours and cannot map single ones"
    )
    method = Answer(answer=answers_encoded, wants=("tower.read.hidden",))
    with foveate.prune(model, method), pytest.raises(FoveateError, match=message):
        generate(model, tiny.inputs(model, "3i4"))


def test_fopru_without_reordering_hands_tokens_on_by_significance() -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    with foveate.prune(model, FoPru(keep=0.25, reorder=False)) as trace:
        out = generate(model, given)
    maps = reference.tower_attention(model, given["pixel_values"])[2]
    order = reference.significance(maps, skip=1).argsort(dim=1, descending=True)[:, :9]
    assert [image.kept.tolist() for image in trace.images] == order.tolist()
    assert agreement.worst(model, agreement.prompts(model, given, trace.latest), out, STEPS) < agreement.TOLERANCE
    with foveate.prune(model, FoPru(keep=0.25)):
        raster = generate(model, given)
    assert not torch.equal(raster.logits[0], out.logits[0])


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["quantized", "offloaded", "offloaded_static"])
def test_caches_that_cannot_hold_a_pruned_prompt(kind: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    message = f"cache_implementation='{kind}' cannot hold a pruned prompt; use 'dynamic' or 'static'"
    with foveate.prune(model, Random(keep=0.25)):
        with pytest.raises(FoveateError, match=message):
            model.generate(**given, cache_implementation=kind, max_new_tokens=1)
        stored = GenerationConfig(cache_implementation=kind, max_new_tokens=1, pad_token_id=tiny.PAD)
        with pytest.raises(FoveateError, match=message):
            model.generate(**given, generation_config=stored)
        model.generation_config.cache_implementation = kind
        with pytest.raises(FoveateError, match=message):
            model.generate(**given, max_new_tokens=1)


def test_embeddings_are_refused() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    embeddings = model.get_input_embeddings()(given["input_ids"])
    message = "inputs_embeds hide which tokens are visual; pass input_ids"
    with foveate.prune(model, Random(keep=0.25)), pytest.raises(FoveateError, match=message):
        model.generate(inputs_embeds=embeddings, max_new_tokens=1)
