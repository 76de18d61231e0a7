"""Tiny random models of the families answer in vLLM as they do on transformers, pruned and unpruned.

Pictures of several sizes, one to three in a prompt, prompts that begin and end in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from models import vllm_checkpoints as checkpoints
from references.vllm_answers import BEFORE, BEFORE_FAMILIES, SPECS, TOKENS, TWO_WAY
from vllm import SamplingParams

from foveate.serve.vllm.routes import routes_of

ROUTES = [(family, route) for family in checkpoints.FAMILIES for route in routes_of(family)]
GREEDY = dict(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True)


def prompts(folder: Path, spec: str | None) -> list[dict[str, Any]]:
    from transformers import AutoProcessor

    holder = checkpoints.holder(AutoProcessor.from_pretrained(folder))
    return [
        {
            "prompt": checkpoints.text(prompt, holder),
            "multi_modal_data": {"image": checkpoints.pictures(prompt)},
            **({} if spec is None else {"mm_processor_kwargs": {"foveate": spec}}),
        }
        for prompt in checkpoints.PROMPTS
    ]


@pytest.mark.parametrize(("family", "route"), ROUTES)
def test_answers_are_those_on_transformers(
    family: str, route: str, folder: Path, reference: Callable[[str], Any], engine: Callable[..., Any]
) -> None:
    expected = reference(family)  # and the model with it
    llm = engine(str(folder / family), SPECS[0], route=route, max_model_len=400, max_num_seqs=8)
    check(llm, folder / family, SPECS, expected)


@pytest.mark.parametrize("family", BEFORE_FAMILIES)
def test_what_leaves_before_the_encoder_is_what_leaves_on_transformers(
    family: str, folder: Path, reference: Callable[[str], Any], engine: Callable[..., Any]
) -> None:
    expected = reference(family)
    lengths = [[right["length"] for right in expected[spec]] for spec in (BEFORE[0], "none")]
    assert sum(lengths[0]) < sum(lengths[1])
    llm = engine(str(folder / family), BEFORE[0], max_model_len=400, max_num_seqs=8)
    check(llm, folder / family, (*BEFORE, *SPECS), expected)


def check(llm: Any, folder: Path, specs: Sequence[str], expected: dict[str, Any]) -> None:
    for spec in specs:
        answers = llm.generate(prompts(folder, spec), SamplingParams(**GREEDY), use_tqdm=False)
        for answer, right in zip(answers, expected[spec], strict=True):
            (output,) = answer.outputs
            assert len(answer.prompt_token_ids) == right["length"], spec
            assert list(output.token_ids) == right["ids"], spec
            logprob = max(entry.logprob for entry in output.logprobs[0].values())
            assert logprob == pytest.approx(right["logprob"], abs=1e-4), spec


def test_stock_answers_about_pictures_that_look_both_ways_are_those_of_a_causal_model(
    folder: Path, reference: Callable[[str], Any], engine: Callable[..., Any]
) -> None:
    """Why they are refused: not even unpruned they are answered as on transformers."""
    expected = reference(TWO_WAY)
    llm = engine(str(folder / TWO_WAY), None, model_impl="transformers", max_model_len=400, max_num_seqs=8)
    (answer,) = llm.generate(prompts(folder / TWO_WAY, None)[:1], SamplingParams(**GREEDY), use_tqdm=False)
    logprob = max(entry.logprob for entry in answer.outputs[0].logprobs[0].values())
    assert logprob == pytest.approx(expected["causal"]["logprob"], abs=1e-4)
    assert logprob != pytest.approx(expected["both ways"]["logprob"], abs=1e-3)
    with pytest.raises(ValueError, match="gemma3 cannot be pruned in vLLM: its pictures look both ways"):
        engine(str(folder / TWO_WAY), SPECS[0])
