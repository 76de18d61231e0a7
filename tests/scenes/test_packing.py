"""Packed questions: the layout, and that each answer is what the question would get on its own."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core import FoveateError
from foveate.scenes import mini, vocabulary
from foveate.scenes.generator import generate
from foveate.scenes.learner import Learner, answer_loss
from foveate.scenes.packing import IGNORED, MIX, ask, attention_mask, choose, pack, position_ids, tokens
from foveate.scenes.questions import Question, questions

CAT = Question("existence", "is there a cat ?", "yes", 0)
MANY = Question("count", "how many objects ?", "3", None)


def ids(text: str) -> list[int]:
    return [vocabulary.WORDS.index(word) for word in text.split()]


def test_the_layout_by_hand():
    packed = pack([[CAT, MANY], [MANY]], length=20)
    first, second = "USER is there a cat ? ASSISTANT yes <eos>", "USER how many objects ? ASSISTANT 3 <eos>"
    assert packed.ids[0].tolist() == ids(first) + ids(second) + [mini.PAD] * 3
    assert packed.segment[0].tolist() == [0] * 9 + [1] * 8 + [-1] * 3
    assert packed.offset[0].tolist() == [*range(9), *range(8), 0, 0, 0]
    labels = [IGNORED] * 20
    labels[6:8] = ids("yes <eos>")
    labels[14:16] = ids("3 <eos>")
    assert packed.labels[0].tolist() == labels
    assert packed.ids[1, :8].tolist() == ids(second)


def test_the_mask_by_hand():
    hello = Question("count", "?", "3", None)  # USER ? ASSISTANT 3 <eos>
    mask = attention_mask(pack([[hello, hello]], 10), prefix=2, dtype=torch.float32)[0, 0]
    seen = mask == 0
    for row in range(12):
        for column in range(12):
            own = row < 2 or column < 2 or (row - 2) // 5 == (column - 2) // 5
            assert seen[row, column] == (column <= row and own), (row, column)
    assert (mask[~seen] == torch.finfo(torch.float32).min).all()


def test_every_question_starts_right_after_the_picture():
    packed = pack([[CAT, MANY]], 17)
    positions = position_ids(packed, torch.tensor([[4, 575]]))
    assert positions[0].tolist() == [0, 5, 576, *range(577, 586), *range(577, 585)]


def test_too_many_questions_are_refused():
    with pytest.raises(FoveateError, match=r"row 0 need 17 tokens or more; length=16"):
        pack([[CAT, MANY]], 16)


@given(seed=st.integers(0, 10**6), room=st.integers(0, 127))
@settings(max_examples=25, deadline=None)
def test_chosen_questions_fit_and_are_asked_once(seed, room):
    scenes = generate(1, seed=7)
    draw = random.Random(seed)
    asked = questions(scenes, 0, draw)
    chosen = choose(asked, room, draw)
    assert sum(len(tokens(question)[0]) for question in chosen) <= room
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(asked)


def test_the_mix_decides_what_is_asked():
    scenes = generate(8, seed=1)
    draw = random.Random(0)
    only = {**dict.fromkeys(MIX, 0.0), "digit": 1.0}
    first = [choose(questions(scenes, row, draw), 127, draw, only)[0].kind for row in range(8)]
    assert first == ["digit"] * 8


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_questions_are_answered_as_if_asked_alone(attention):
    model = mini.build(seed=0, config=mini.llava_config(width=32, layers=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.set_attn_implementation(attention)
    scenes = generate(1, seed=4)
    packed = ask(scenes, 90, random.Random(0))
    assert packed.segment.max() >= 4
    learner = Learner(model)
    with torch.no_grad():
        visual = learner.encode(scenes.pixels)[0]
        logits = learner.decode(visual, packed)
        loss, alone = answer_loss(logits, packed), []
        for number in range(int(packed.segment.max()) + 1):
            where = packed.segment[0] == number
            text = packed.ids[:, where]
            prompt = torch.cat((torch.tensor([[mini.BOS] + [mini.IMAGE] * 576]), text), dim=1)
            stock = model(input_ids=prompt, pixel_values=mini.normalise(scenes.pixels)).logits[:, 577:]
            assert torch.allclose(stock, logits[:, where], atol=1e-4)
            labels = packed.labels[0, where]
            alone.append(torch.nn.functional.cross_entropy(stock[0], labels, reduction="none"))
    read = packed.labels[0][packed.segment[0] >= 0] != IGNORED
    assert torch.cat(alone)[read].mean().item() == pytest.approx(loss.item(), abs=1e-4)
