"""TRL trains `mini` under a handle: the log-probabilities that its trainers score are each row's own."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from references import agreement
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, set_seed

import foveate
from foveate.scenes.generator import generate
from foveate.scenes.mini import FOLDER
from foveate.scenes.questions import sample

# Both libraries warn of what transformers has renamed; none of it is ours.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
STEPS = 2
TEMPERATURE = 3.0  # so that answers differ in length


@pytest.fixture(scope="module")
def trl() -> Any:
    """The trainers; importing them takes seconds, so only whoever runs these tests waits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trl")
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
    return SimpleNamespace(
        Dataset=Dataset, GRPOConfig=GRPOConfig, GRPOTrainer=GRPOTrainer, SFTConfig=SFTConfig, SFTTrainer=SFTTrainer
    )


def mini() -> tuple[Any, Any]:
    model = LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(FOLDER)


def rows(trl: Any, *, answers: bool) -> Any:
    scenes = generate(4, seed=0, split="test")
    made = []
    for number, question in enumerate(sample(scenes, seed=0)):
        row: dict[str, Any] = {"images": [scenes.image(number)]}
        row["prompt"] = [{"role": "user", "content": question.text}]
        if answers:
            row["completion"] = [{"role": "assistant", "content": question.answer}]
        made.append(row)
    return trl.Dataset.from_list(made)


def settings(kind: Any, folder: Path, **more: Any) -> Any:
    return kind(
        output_dir=str(folder),
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        learning_rate=1e-3,
        **more,
    )


@torch.no_grad()
def own_log_probabilities(
    model: Any, spec: str, ids: Tensor, pixels: Tensor, answer: int, temperature: float = 1.0
) -> Tensor:
    """(S - 1,) of each token of a row (S,) without padding, by the reference: no batch, no hook, no cache.

    Args:
        answer: how many tokens at its end are to be written.
    """
    given = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "pixel_values": pixels[None]}
    labels = ids[None].clone()
    labels[:, : ids.numel() - answer] = -100  # what is taught chooses no tokens
    with foveate.prune(model, spec) as trace:
        model(**given, labels=labels)
    (prompt,) = agreement.prompts(model, given, trace.latest)
    logits, _ = agreement.direct(model, prompt, ids.numel())
    return (logits[:-1] / temperature).log_softmax(dim=-1).gather(1, ids[1:, None]).squeeze(1)


def test_grpo_scores_each_completion_as_its_row_alone(trl: Any, tmp_path: Path) -> None:
    """Prompts padded on the left, completions of different lengths on the right, scored with the latest weights."""
    spec = "fopru:keep=0.5+fastv:layer=2,keep=0.25"
    scored: list[tuple[Any, ...]] = []

    class Noted(trl.GRPOTrainer):  # type: ignore[misc, name-defined]
        def _get_per_token_logps_and_entropies(
            self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *rest: Any, **more: Any
        ) -> Any:
            weights = copy.deepcopy(model.state_dict())
            made = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *rest, **more
            )
            scored.append((weights, input_ids, attention_mask.bool(), more["pixel_values"], made[0].detach()))
            return made

    set_seed(0)
    model, processor = mini()
    given = settings(
        trl.GRPOConfig,
        tmp_path,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        temperature=TEMPERATURE,
        top_k=0,
    )
    trainer = Noted(
        model=model,
        args=given,
        train_dataset=rows(trl, answers=False),
        processing_class=processor,
        reward_funcs=lambda completions, **_: [float(number) for number, _ in enumerate(completions)],
    )
    with foveate.prune(model, spec):
        trainer.train()
    assert len(scored) == STEPS
    again, _ = mini()
    assert any(not torch.equal(scored[0][0][name], one) for name, one in scored[1][0].items()), "it has learned"
    lengths = set()
    for weights, ids, there, pixels, found in scored:
        again.load_state_dict(weights)
        for row in range(ids.shape[0]):
            completion = there[row, -found.shape[1] :]
            length = int(completion.sum())
            lengths.add((int(there[row].sum()) - length, length))
            own = own_log_probabilities(again.eval(), spec, ids[row, there[row]], pixels[row], length, TEMPERATURE)
            torch.testing.assert_close(found[row, completion], own[-length:], atol=1e-3, rtol=0)
    prompts, answers = ({pair[part] for pair in lengths} for part in (0, 1))
    assert len(prompts) > 1 and len(answers) > 1, "both sides are padded"


def test_sft_learns_from_the_loss_of_the_rows_alone(trl: Any, tmp_path: Path) -> None:
    spec, batches = "fopru:keep=0.25", []

    class Noted(trl.SFTTrainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
            batches.append((copy.deepcopy(model.state_dict()), dict(inputs)))
            return super().compute_loss(model, inputs, *rest, **more)

    set_seed(0)
    model, processor = mini()
    given = settings(trl.SFTConfig, tmp_path, per_device_train_batch_size=2, max_length=None)
    trainer = Noted(model=model, args=given, train_dataset=rows(trl, answers=True), processing_class=processor)
    with foveate.prune(model, spec):
        trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    again, _ = mini()
    expected = []
    for weights, inputs in batches:
        again.load_state_dict(weights)
        losses = []
        for row, there in enumerate(inputs["attention_mask"].bool()):
            ids, labels = inputs["input_ids"][row, there], inputs["labels"][row, there]
            own = own_log_probabilities(
                again.eval(), spec, ids, inputs["pixel_values"][row], int((labels != -100).sum())
            )
            losses.append(-own[labels[1:] != -100])
        expected.append(float(torch.cat(losses).mean()))
    assert logged == pytest.approx(expected, abs=1e-3)
    assert len(logged) == STEPS
