"""Answers from pictures that were pruned inside the encoder, against decoders and encoders run by hand."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from models import tiny
from models.conversations import STEPS, Turn, continued, generate, rows_of, sizes, worst
from models.untouched import untouched
from references import reference
from references.encoder_by_hand import READ, ROWS, RaggedCut, answered, by_hand, close, features_of, keeping
from torch import Tensor

import foveate
from foveate import H2O, FastV, FoPru, ImageTextInteraction, Random
from foveate.core import Method
from foveate.runtime.seams import CACHE

# ---------------------------------------------------------------------------------------------------------------------
# answers


COMPOSED: dict[str, tuple[list[Method], tuple[int, ...], tuple[str, ...]]] = {
    "tower": ([RaggedCut(layers=(1,))], (1,), tiny.TOWERS),
    "tower, fopru": ([RaggedCut(layers=(1,), factor=0.9), FoPru(keep=10)], (1,), tiny.TOWERS),
    "tower, fopru, fastv, h2o": (
        [RaggedCut(layers=(1, 2), factor=0.8), FoPru(keep=10), FastV(layer=1, keep=6), H2O(0.3, 0.3)],
        (1, 2),
        tiny.TOWERS,
    ),
    "interaction": ([ImageTextInteraction(where=2)], (2,), ("clip",)),
    "interaction in the prompt": ([ImageTextInteraction(where=1, heavy=0.2, recent=0.3)], (1,), ("clip",)),
    "interaction, alpha": ([ImageTextInteraction(alpha=0.5, where=1)], (1,), ("clip",)),
    "interaction, fixed": ([ImageTextInteraction(keep=0.25, where=1)], (1,), ("clip",)),
    "interaction, entries": ([ImageTextInteraction(where=1, heavy=6, recent=5)], (1,), ("clip",)),
    "interaction, visual only": ([ImageTextInteraction(where=2, visual_only=True)], (2,), ("clip",)),
    "interaction, output": ([ImageTextInteraction(where="output")], (), ("clip",)),
    "interaction, fastv": (
        [ImageTextInteraction(where=1, heavy=0.3, recent=0.3), FastV(layer=2, keep=3)], (1,), ("clip",),
    ),
}  # fmt: skip
CASES = [(name, tower, "sdpa") for name, (_, _, towers) in COMPOSED.items() for tower in towers]
CASES += [(name, "clip", "eager") for name in ("tower, fopru, fastv, h2o", "interaction in the prompt")]


@pytest.mark.parametrize(("name", "tower", "attn"), CASES)
def test_answers_of_a_padded_batch_equal_the_reference(name: str, tower: str, attn: str, encoder_by_hand: Any) -> None:
    methods, depths, _ = COMPOSED[name]
    model = tiny.model(tower=tower, attn=attn)
    given = tiny.inputs(model, *ROWS)
    out, call = answered(model, given, methods)
    encoder_by_hand(given, call, *depths)
    turn = Turn(given, out.sequences[:, -STEPS:], call)
    assert worst(out, rows_of([turn], model, methods)) < 1e-4
    if attn == "eager":
        assert worst(out, rows_of([turn], model, methods, renumber=True)) > 0.1
    if name in {"tower", "interaction", "interaction in the prompt"}:
        assert len({image.after for image in call.images}) > 1


@pytest.mark.parametrize("name", ["interaction in the prompt", "tower, fopru, fastv, h2o"])
def test_beams_equal_the_row_alone(name: str) -> None:
    methods, _, _ = COMPOSED[name]
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    beams: dict[str, Any] = dict(num_beams=3, num_return_sequences=2, output_scores=True)
    out, _ = answered(model, given, methods, **beams)
    for row in range(4):
        if row == 2:
            continue  # a prompt without picture is refused alone
        alone, _ = answered(model, tiny.alone(given, row, tiny.IMAGE), methods, **beams)
        mine = slice(2 * row, 2 * row + 2)
        assert torch.equal(out.sequences[mine, -STEPS:], alone.sequences[:, -STEPS:])
        close(out.sequences_scores[mine], alone.sequences_scores, 1e-4)


@pytest.mark.parametrize("name", ["interaction", "interaction in the prompt", "tower, fopru"])
@pytest.mark.parametrize("second", [("5", "3"), ("2i3", "i2")])
def test_a_second_turn_equals_the_reference(name: str, second: tuple[str, str], encoder_by_hand: Any) -> None:
    methods, depths, _ = COMPOSED[name]
    model = tiny.model()
    first = tiny.inputs(model, "3i4", "2i1i5")
    then = tiny.inputs(model, *second, seed=1)
    with untouched(model), foveate.prune(model, methods) as trace:
        out = generate(model, first)
        call = trace.latest
        given = continued(first, out.sequences, then)
        again = generate(model, given, **{CACHE: getattr(out, CACHE)})
    encoder_by_hand(first, call, *depths)
    turns = [Turn(first, out.sequences[:, -STEPS:], call)]
    later = trace.latest if "i" in second[0] else None
    assert len(trace.history) == (2 if later else 1)
    if later is not None:
        encoder_by_hand(then, later, *depths)
    turns.append(Turn(then, again.sequences[:, -STEPS:], later))
    assert worst(again, rows_of(turns, model, methods)) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# image-text interaction


def similar(seen: Tensor) -> tuple[list[int], int]:
    """(1 + N, E): patches from the most to the least similar to CLS, and where equation 3 splits them."""
    cls, patches = seen[0].double().numpy(), seen[1:].double().numpy()
    logits = patches @ cls / numpy.sqrt(len(cls))
    curve = numpy.exp(logits - logits.max())
    order = numpy.argsort(-curve, kind="stable")
    falling = (curve / curve.sum())[order]
    values = [(len(falling) - i) * (falling[0] - falling[i - 1]) for i in range(1, len(falling))]
    return order.tolist(), 1 + int(numpy.argmax(values))


@pytest.mark.parametrize("alpha", [0.075, 1.0, 2.5])
@pytest.mark.parametrize("where", [1, 2, "output"])
def test_the_head_of_the_similarity_stays(where: Any, alpha: float) -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    method = ImageTextInteraction(alpha=alpha, where=where, visual_only=True)
    got, call = features_of(model, given, method)
    depth = READ + 1 if where == "output" else where
    for image, features, pixels in zip(call.images, got, given["pixel_values"], strict=True):
        plain = by_hand(model, pixels[None], [])
        with torch.no_grad():
            shown = model.model.vision_tower.encoder.layers[depth - 1](plain.inputs[depth - 1][None], None)[0]
        order, split = similar(shown)
        assert image.kept.tolist() == sorted(order[: min(36, max(1, round(alpha * split)))])
        assert image.stages[0].site == ("input" if where == "output" else "tower")
        leave = [] if where == "output" else [(where, keeping(image.kept))]
        seen = by_hand(model, pixels[None], leave)
        close(features, reference.project(model, seen.read if leave else seen.read[image.kept]))


def test_a_fixed_count_is_the_rival_of_table_1() -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    for keep, count in ((7, 7), (0.25, 9), (1.0, 36)):
        _, call = features_of(model, given, ImageTextInteraction(keep=keep, where=1, visual_only=True))
        assert [image.after for image in call.images] == [count] * 4


def test_half_and_half_loses_nothing_in_the_prompt_and_stops_growing_there() -> None:
    """Tables 2 and 4: one-word answers are those of visual pruning alone, long ones have a capped cache."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    visual, _ = answered(model, given, ImageTextInteraction(where=2, visual_only=True))
    out, call = answered(model, given, ImageTextInteraction(where=2))
    prompt = 7 + call.images[0].after
    assert torch.equal(out.logits[0], visual.logits[0])
    assert sizes(getattr(out, CACHE)) == [(1, 2, prompt, 8)] * 4
    assert sizes(getattr(visual, CACHE)) == [(1, 2, prompt + STEPS - 1, 8)] * 4
    assert call.kv_lengths == (prompt,) * 4
    lengths: list[int] = []
    model.model.language_model.register_forward_hook(
        lambda module, arguments, output: lengths.append(getattr(output, CACHE).layers[0].keys.shape[2])
    )
    with foveate.prune(model, ImageTextInteraction(where=2)):
        generate(model, given, max_new_tokens=STEPS)
    assert lengths == [prompt] * STEPS


def test_below_one_in_total_it_prunes_in_the_prompt_too() -> None:
    model = tiny.model()
    out, call = answered(model, tiny.inputs(model, "3i4"), ImageTextInteraction(where=2, heavy=0.25, recent=0.25))
    prompt = 7 + call.images[0].after
    held = 2 * int(prompt * 0.25)
    assert call.kv_lengths == (held,) * 4
    assert sizes(getattr(out, CACHE)) == [(1, 2, held, 8)] * 4


# ---------------------------------------------------------------------------------------------------------------------
# refusals


def test_a_random_choice_inside_the_answer_is_the_same_for_every_batch() -> None:
    """Two towers' worth of stages and a random one behind: a row in a batch equals the row alone."""
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    methods = [RaggedCut(layers=(1,)), Random(keep=5)]
    _, call = features_of(model, given, methods)
    _, alone = features_of(model, tiny.alone(given, 1, tiny.IMAGE), methods)
    assert [image.kept.tolist() for image in call.images if image.row == 1] == [
        image.kept.tolist() for image in alone.images
    ]


def test_the_reference_can_fail(encoder_by_hand: Any) -> None:
    """The plain encoder's features in place of the pruned one's are told apart."""
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    method = ImageTextInteraction(where=1, visual_only=True)
    out, call = answered(model, given, method)
    turn = Turn(given, out.sequences[:, -STEPS:], call)
    encoder_by_hand(given, call, 1)
    right = worst(out, rows_of([turn], model, [method]))
    encoder_by_hand(given, call, 2)
    assert right < 1e-4 < 0.01 < worst(out, rows_of([turn], model, [method]))
