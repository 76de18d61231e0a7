"""Packed questions: the layout, and that each answer is what the question would get on its own."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core import FoveateError
from foveate.scenes import mini, vocabulary
from foveate.scenes.generator import generate
from foveate.scenes.learner import Learner, Staged, answer_loss, asking_loss, likeness_loss, naming_loss
from foveate.scenes.packing import (
    IGNORED,
    MIX,
    Packed,
    ask,
    ask_about,
    attention_mask,
    choose,
    pack,
    position_ids,
    tokens,
)
from foveate.scenes.questions import Question, questions
from foveate.scenes.targets import SCALE, Targets

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
    assert packed.target.tolist() == [[0] * 9 + [-1] * 11, [-1] * 20]


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


def test_questions_about_one_object_are_about_no_other():
    scenes = generate(6, seed=1)
    packed, about = ask_about(scenes, 127, random.Random(0))
    words = [" ".join(vocabulary.WORDS[token] for token in row) for row in packed.ids.tolist()]
    for row, text in enumerate(words):
        name = vocabulary.NAMES[int(scenes.names[row, about[row]])]
        assert text.count("USER") == 3  # there?, what colour?, what number?
        assert {word for word in text.split() if word in vocabulary.NAMES} == {name}
    assert len(set(about.tolist())) > 1


def _asked(layers: int) -> tuple[Learner, Packed, torch.Tensor]:
    """A learner, questions about two pictures, and the pictures' tokens."""
    learner, scenes = _jittered(layers), generate(2, seed=4)
    return learner, ask(scenes, 60, random.Random(0)), learner.encode(scenes.pixels)[0]


def _jittered(layers: int) -> Learner:
    model = mini.build(seed=0, config=mini.llava_config(width=32, layers=layers)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return Learner(model)


@torch.no_grad()
def test_tokens_that_leave_between_blocks_are_as_if_nobody_could_see_them_from_there():
    learner, packed, visual = _asked(layers=3)
    first = torch.arange(0, 576, 2).expand(2, -1)  # the even ones stay before block 1, every third of these before 2
    second = torch.arange(0, 288, 3).expand(2, -1)
    said = learner.decode_staged(visual, packed, None, {1: first, 2: second})
    assert torch.equal(said.left, first)  # of those behind block 1

    hidden = torch.cat((learner.words[mini.BOS].expand(2, 1, -1), visual, learner.words[packed.ids]), dim=1)
    decoder = learner.model.model.language_model
    rotary = decoder.rotary_emb(hidden, position_ids(packed, torch.arange(576).expand(2, -1)))
    gone = torch.zeros(hidden.shape[1], dtype=torch.bool)
    for number, block in enumerate(decoder.layers):
        mask = attention_mask(packed, 577, hidden.dtype)
        gone[1:577] = torch.arange(576) % (1, 2, 6)[number] != 0
        mask[..., gone] = torch.finfo(mask.dtype).min
        hidden = block(hidden, attention_mask=mask, position_embeddings=rotary, use_cache=False)
        if number == 1:
            early = hidden[:, 1:577:2]
    wanted = decoder.norm(hidden[:, 577:]) @ learner.words.T
    assert torch.allclose(said.logits, wanted, atol=1e-4)
    assert torch.allclose(said.seen, early, atol=1e-4)
    assert torch.allclose(said.read, hidden[:, 577:], atol=1e-4)  # three blocks: the last one


@torch.no_grad()
def test_where_nothing_leaves_staged_decoding_is_decoding():
    learner, packed, visual = _asked(layers=2)
    places = torch.arange(0, 576, 5).expand(2, -1)
    fewer = visual[:, ::5]
    for shown, at in ((visual, None), (fewer, places)):
        said = learner.decode_staged(shown, packed, at, {}).logits
        assert torch.allclose(said, learner.decode(shown, packed, at), atol=1e-5)


def test_the_losses_on_the_way_to_a_digit_by_hand():
    words = torch.eye(len(vocabulary.WORDS))
    names, digits = (len(group) - 1 for group in (vocabulary.NAMES, vocabulary.DIGITS))
    wanted = Targets(*(torch.tensor([[0, 1, 1, -1]]),) * 4, tag=torch.tensor([[False, True, True, False]]))
    seen = torch.zeros(1, 2, len(words))
    seen[0, 1, ids(vocabulary.NAMES[1])] = 0.25
    said = Staged(torch.zeros(1, 1, 1), seen, torch.tensor([[0, 2]]), seen)  # the tag at place 1 has left
    assert naming_loss(said, words, wanted).item() == pytest.approx(
        math.log(1 + names * math.exp(-SCALE / 4)), abs=1e-5
    )
    none = Staged(torch.zeros(1, 1, 1), seen, torch.tensor([[0, 3]]), seen)
    assert naming_loss(none, words, wanted).item() == 0.0

    packed = pack([[CAT, MANY]], 17)  # "cat" is the fifth word, and only it is a name that somebody asks about
    read = torch.zeros(1, 17, len(words))
    read[0, 4, ids("7")] = 1.0  # of length 1, so a root mean square of 1 / sqrt(words)
    said = Staged(torch.zeros(1, 1, 1), seen, said.left, read)
    loss = asking_loss(said, words, packed, torch.tensor([[7, 3]]))
    assert loss.item() == pytest.approx(math.log(1 + digits * math.exp(-4 * len(words) ** 0.5)), abs=1e-4)
    wrong = asking_loss(said, words, packed, torch.tensor([[3, 7]]))
    assert wrong.item() == pytest.approx(4 * len(words) ** 0.5, abs=1e-2)


def test_likeness_by_hand():
    packed = pack([[CAT]], 9)  # two labels, of which none is a digit
    logits = torch.zeros(1, 9, 2)
    before = logits.clone()
    before[0, 6, 0] = math.log(3)  # three quarters against a half
    by_hand = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert likeness_loss(logits, before, packed).item() == pytest.approx(by_hand, abs=1e-6)
    assert likeness_loss(before, before, packed).item() == 0.0
    packed = pack([[MANY]], 8)
    before = torch.zeros(1, 8, 2)
    before[0, 5, 0] = math.log(3)  # where the digit is said
    assert likeness_loss(logits[:, :8], before, packed).item() == 0.0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_questions_are_answered_as_if_asked_alone(attention):
    learner = _jittered(layers=2)
    model = learner.model
    model.set_attn_implementation(attention)
    scenes = generate(1, seed=4)
    packed = ask(scenes, 90, random.Random(0))
    assert packed.segment.max() >= 4
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
