"""Examines `mini` on held-out pictures: with packed questions during training, by plain `generate` at the end."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from foveate.scenes.generator import Scenes, generate
from foveate.scenes.learner import Learner
from foveate.scenes.packing import IGNORED, choose, pack, tokens
from foveate.scenes.questions import KINDS, Question, questions, sample
from foveate.scenes.scoring import score

EVEN = dict.fromkeys(KINDS, 1.0)


@torch.no_grad()
def quick_exam(learner: Learner, pictures: int, *, seed: int, length: int = 127, batch: int = 16) -> dict[str, float]:
    """Accuracy per kind of question on pictures of the split "test", and "ends": answers whose `<eos>` is right.

    A one-word answer counts if the word is the most likely one, exactly when greedy generation gives it; descriptions
    count the share of right words, each given the right words before it.
    """
    device = learner.words.device
    right: dict[str, list[float]] = defaultdict(list)
    for start in range(0, pictures, batch):
        scenes = generate(min(batch, pictures - start), seed=seed + start, split="test", device=device)
        draw = random.Random(seed + start)
        rows = [choose(questions(scenes, row, draw), length, draw, EVEN) for row in range(len(scenes))]
        packed = pack(rows, length).to(device)
        guess = learner.decode(learner.encode(scenes.pixels)[0], packed).argmax(dim=-1)
        hit = (guess == packed.labels).tolist()
        labels = packed.labels.tolist()
        for row, asked in enumerate(rows):
            _mark(asked, hit[row], labels[row], right)
    return {kind: sum(marks) / len(marks) for kind, marks in sorted(right.items())}


def _mark(asked: Sequence[Question], hit: list[bool], labels: list[int], right: dict[str, list[float]]) -> None:
    place = 0
    for question in asked:
        stop = place + len(tokens(question)[0])
        marks = [hit[at] for at in range(place, stop) if labels[at] != IGNORED]
        right[question.kind].append(sum(marks[:-1]) / len(marks[:-1]))
        right["ends"].append(float(marks[-1]))
        place = stop


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: Scenes,
    asked: Sequence[Question],
    *,
    max_new_tokens: int = 24,
) -> list[str]:
    """Greedy answers to one question per picture, special tokens included: plain `generate`, one left-padded batch."""
    prompts = []
    for question in asked:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        prompts.append(
            processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        )
    images = [scenes.image(row) for row in range(len(scenes))]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt").to(model.device)
    made = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return list(processor.batch_decode(made[:, inputs["input_ids"].shape[1] :]))


def full_exam(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: int, *, seed: int, batch: int = 20
) -> dict[str, float]:
    """Score per kind of question, one question per picture of the split "test", kinds balanced; "ends" counts `<eos>`.

    Scores are those of `scoring.score`.
    """
    right: dict[str, list[float]] = defaultdict(list)
    for start in range(0, pictures, batch):
        scenes = generate(min(batch, pictures - start), seed=seed + start, split="test")
        asked = sample(scenes, seed=seed + start)
        for question, answer in zip(asked, answers(model, processor, scenes, asked), strict=True):
            right[question.kind].append(score(question.kind, answer, question.answer))
            right["ends"].append(float("<eos>" in answer))
    return {kind: sum(marks) / len(marks) for kind, marks in sorted(right.items())}
