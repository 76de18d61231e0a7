"""`mini` in vLLM answers as on transformers: every question, method and way, in any chunks, batches and order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from references.vllm_answers import LONGEST, MINI, MINI_SPECS, QUESTIONS
from references.vllm_ties import near
from vllm import SamplingParams
from vllm.compilation.counter import compilation_counter
from vllm.exceptions import VLLMValidationError

from foveate.core import FoveateError
from foveate.evaluate.scenes_task import draw_samples
from foveate.serve.vllm.model import Pruning

SAMPLES = list(draw_samples(QUESTIONS, seed=3))
FEW = 6
GREEDY = SamplingParams(temperature=0, max_tokens=LONGEST, logprobs=1)


def turn(sample: Any) -> dict[str, Any]:
    picture = {"type": "image_pil", "image_pil": sample.image}
    return {"role": "user", "content": [picture, {"type": "text", "text": sample.question}]}


def ask(llm: Any, samples: Sequence[Any], spec: str | None) -> list[Any]:
    """Answers; a method that reads the question is told it, request by request."""
    if spec is not None and spec.startswith("cdpruner"):
        given = [{"foveate": spec, "question": one.question} for one in samples]
        return [
            llm.chat([[turn(one)]], GREEDY, use_tqdm=False, mm_processor_kwargs=more)[0]
            for one, more in zip(samples, given, strict=True)
        ]
    given = None if spec is None else {"foveate": spec}
    return llm.chat([[turn(one)] for one in samples], GREEDY, use_tqdm=False, mm_processor_kwargs=given)


def agrees(answer: Any, right: dict[str, Any]) -> bool:
    (output,) = answer.outputs
    logprob = max(entry.logprob for entry in output.logprobs[0].values())
    same = len(answer.prompt_token_ids) == right["length"] and output.text.strip() == right["text"]
    return bool(same and logprob == pytest.approx(right["logprob"], abs=1e-4))


def told(answer: Any) -> tuple[int, str, float]:
    (output,) = answer.outputs
    return len(answer.prompt_token_ids), output.text, max(entry.logprob for entry in output.logprobs[0].values())


def check(answers: Sequence[Any], expected: Sequence[dict[str, Any]]) -> None:
    """Every answer is the reference's; where two tokens tie but for rounding, that with either of them."""
    for answer, right in zip(answers, expected, strict=True):
        if not agrees(answer, right):
            others = near(right["spec"], right["number"]) if "spec" in right else []
            assert any(agrees(answer, other) for other in others), (told(answer), right, others)


@pytest.fixture(scope="module")
def llm(engine: Callable[..., Any]) -> Any:
    """On vLLM's own kernels, all caches on; 64 prompts fit into one step."""
    return engine("mini", MINI[0], methods=["all"], max_num_batched_tokens=16384)


@pytest.mark.parametrize("spec", MINI_SPECS)
def test_every_answer_is_that_on_transformers(spec: str, llm: Any, reference: Callable[[str], Any]) -> None:
    check(ask(llm, SAMPLES, spec), reference("mini")[spec])


def test_a_request_that_names_nothing_gets_the_engines_spec(llm: Any, reference: Callable[[str], Any]) -> None:
    check(ask(llm, SAMPLES[:FEW], None), reference("mini")[MINI[0]][:FEW])


def test_64_at_once_may_hold_every_method_and_unpruned_pictures(
    llm: Any, reference: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    stock = scheduler.schedule

    def spy(*arguments: Any, **options: Any) -> Any:
        made = stock(*arguments, **options)
        together.append(len(made.num_scheduled_tokens))
        return made

    monkeypatch.setattr(scheduler, "schedule", spy)
    specs = [spec for spec in MINI_SPECS if not spec.startswith("cdpruner")]
    numbers = [(number, spec) for number in range(11) for spec in specs][:64]
    tokenizer = llm.get_tokenizer()
    given = []
    for number, spec in numbers:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": SAMPLES[number].question}]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        picture = {"image": SAMPLES[number].image}
        given.append({"prompt": prompt, "multi_modal_data": picture, "mm_processor_kwargs": {"foveate": spec}})
    answers = llm.generate(given, GREEDY, use_tqdm=False)
    check(answers, [reference("mini")[spec][number] for number, spec in numbers])
    assert max(together) == 64


def test_a_picture_that_comes_again_is_cached_by_what_is_asked_of_it(llm: Any, reference: Callable[[str], Any]) -> None:
    for spec in (MINI[0], MINI[1], "none", MINI[0]):
        answers = ask(llm, SAMPLES[:2], spec)
        check(answers, reference("mini")[spec][:2])
    assert all(answer.num_cached_tokens >= 32 for answer in answers)


def test_the_second_turn_of_a_conversation(llm: Any, reference: Callable[[str], Any]) -> None:
    more = {"role": "user", "content": SAMPLES[1].question}
    chat = [turn(SAMPLES[0]), {"role": "assistant", "content": SAMPLES[0].answer}, more]
    (answer,) = llm.chat([chat], GREEDY, use_tqdm=False)
    assert answer.num_cached_tokens >= 32
    check([answer], [reference("mini")["conversation"]])


def test_alone_and_in_any_order(llm: Any, reference: Callable[[str], Any]) -> None:
    expected = reference("mini")[MINI[3]]
    for number in range(FEW):
        check(ask(llm, SAMPLES[number : number + 1], MINI[3]), expected[number : number + 1])
    check(ask(llm, SAMPLES[FEW - 1 :: -1], MINI[3]), expected[FEW - 1 :: -1])


def test_a_budget_above_what_a_picture_has_keeps_all(llm: Any, reference: Callable[[str], Any]) -> None:
    check(ask(llm, SAMPLES[:2], "fopru:keep=1000"), reference("mini")["none"][:2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"foveate": "fopruu:keep=64"}, "unknown method 'fopruu'; did you mean 'fopru'"),
        ({"foveate": "fopru:kep=64"}, "fopru has no field 'kep'"),
        ({"foveate": "fastv:keep=0.5"}, "acts inside the decoder"),
        ({"foveate": "cdpruner:keep=64"}, "reads the question"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_lives_on(
    given: dict[str, str], message: str, llm: Any, reference: Callable[[str], Any]
) -> None:
    with pytest.raises(FoveateError, match=message):
        llm.chat([[turn(SAMPLES[0])]], GREEDY, use_tqdm=False, mm_processor_kwargs=given)
    check(ask(llm, SAMPLES[:1], None), reference("mini")[MINI[0]][:1])


def test_a_prompt_whose_unpruned_form_leaves_the_context_is_refused(llm: Any) -> None:
    with pytest.raises(FoveateError, match=r"the prompt takes 11\d\d positions, but the context .* has 1024"):
        llm.chat([[turn(SAMPLES[0]), turn(SAMPLES[1])]], GREEDY, use_tqdm=False)


def test_more_pictures_than_allowed_are_refused(llm: Any) -> None:
    with pytest.raises(VLLMValidationError, match=r"At most 3 image\(s\) may be provided"):
        llm.chat([[turn(SAMPLES[0])] * 4], GREEDY, use_tqdm=False)


@pytest.mark.parametrize("route", ["in-tree", "transformers"])
@pytest.mark.parametrize("chunk", [16, 32, 4096])
def test_chunks_change_nothing(
    chunk: int, route: str, engine: Callable[..., Any], reference: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: set[int] = set()
    stock = Pruning.recompute_mrope_positions

    def spy(self: Any, **given: Any) -> Any:
        if given["multimodal_embeddings"]:
            begun.add(given["num_computed_tokens"])
        return stock(self, **given)

    monkeypatch.setattr(Pruning, "recompute_mrope_positions", spy)
    more = dict(enable_chunked_prefill=True, max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 8))
    plain = dict(enable_prefix_caching=False, mm_processor_cache_gb=0)
    llm = engine("mini", MINI[0], route=route, **more, **plain)
    for spec in (MINI[0], MINI[2]):
        check(ask(llm, SAMPLES[:FEW], spec), reference("mini")[spec][:FEW])
    # A prompt has 4 tokens and more beside the 64 of its picture.
    assert len(begun) >= 64 // chunk and (begun == {0}) == (chunk > 1000)


@pytest.mark.parametrize("route", ["in-tree", "transformers"])
def test_a_compiled_decoder_changes_nothing(
    route: str, engine: Callable[..., Any], reference: Callable[[str], Any]
) -> None:
    def compiled() -> int:
        return compilation_counter.num_aot_compiles + compilation_counter.num_aot_artifacts_loaded

    before = compiled()
    llm = engine("mini", MINI[0], route=route, enforce_eager=False, max_num_seqs=8)
    for spec in (MINI[0], MINI[2], "none"):
        check(ask(llm, SAMPLES[:FEW], spec), reference("mini")[spec][:FEW])
    assert compiled() > before


@pytest.mark.parametrize("route", ["in-tree", "transformers"])
def test_two_devices_answer_as_one(route: str, engine: Callable[..., Any], reference: Callable[[str], Any]) -> None:
    llm = engine("mini", MINI[0], route=route, tensor_parallel_size=2, max_num_seqs=8)
    assert llm.collective_rpc(lambda worker: worker.parallel_config.world_size) == [2, 2]
    for spec in (MINI[0], MINI[2], "none"):
        check(ask(llm, SAMPLES[:FEW], spec), reference("mini")[spec][:FEW])
    llm.llm_engine.engine_core.shutdown()  # its processes are not needed any more
