"""Rivals that look at one encoding: each answers as it would alone, and the encoder runs once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from models import tiny, tiny_families
from models.untouched import untouched

import foveate
from foveate import methods
from foveate.core import FoveateError
from foveate.families import family_of
from foveate.prune import share_encoding
from foveate.runtime.seams import CACHE

RIVALS = ("fopru:keep=4", "random:keep=4", "fopru:keep=6+fastv:layer=2,keep=3")
NEEDS = {need for rival in RIVALS for stage in foveate.spec.parse_stages(rival) for need in stage.needs}


class Counter:
    """Counts how often a module runs."""

    def __init__(self, module: Any) -> None:
        self.runs = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.runs += 1


def answers(model: Any, rival: str, given: dict[str, Any]) -> tuple[Any, list[list[int]]]:
    with foveate.prune(model, rival) as trace:
        out = model.generate(**given, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits), [image.kept.tolist() for image in trace.images]


def test_each_answers_as_it_would_alone() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5")
    alone = [answers(model, rival, given) for rival in RIVALS]
    with untouched(model), share_encoding(model, NEEDS):
        together = [answers(model, rival, given) for rival in RIVALS]
    for (logits, kept), (logits_alone, kept_alone) in zip(together, alone, strict=True):
        assert kept == kept_alone
        assert torch.equal(logits, logits_alone)


def test_the_encoder_runs_once_for_the_same_pictures() -> None:
    model = tiny.model()
    counter = Counter(tiny.vision(model).encoder.layers[0])
    first, second = tiny.inputs(model, "3i4"), tiny.inputs(model, "3i4", seed=1)
    with share_encoding(model, NEEDS):
        for given in (first, first, {**first, "pixel_values": first["pixel_values"].clone()}):
            for rival in RIVALS:
                answers(model, rival, given)
        assert counter.runs == 1
        model.generate(**first, max_new_tokens=1)
        assert counter.runs == 1
        kept = answers(model, RIVALS[0], second)[1]
        assert counter.runs == 2
        assert answers(model, RIVALS[0], first)[1] != kept
        assert counter.runs == 3
    assert kept == answers(model, RIVALS[0], second)[1]
    assert counter.runs == 4


WITH_VIDEOS = tiny_families.with_videos()


def encoders(model: Any) -> tuple[Counter, Counter]:
    """Runs of the encoder of pictures and of that of videos, which may be one."""
    family = family_of(model)
    pictures = Counter(family.blocks_of(model)[0])
    return pictures, pictures if family.video_tower is None else Counter(family.blocks_of(model, "video")[0])


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_videos_are_encoded_once_and_each_answers_as_it_would_alone(name: str) -> None:
    model = tiny.model(name, blocks=6)
    first, second = tiny.inputs(model, "3v4", "2v1v5", "6"), tiny.inputs(model, "3v4", "6", seed=1)
    alone = [answers(model, rival, given) for given in (first, second) for rival in RIVALS]
    _, counter = encoders(model)
    with untouched(model), share_encoding(model, NEEDS):
        together = []
        for runs, given in enumerate((first, second), start=1):
            for rival in RIVALS:
                together.append(answers(model, rival, dict(given)))
                assert counter.runs == runs
            again = {**given, "pixel_values_videos": given["pixel_values_videos"].clone()}
            assert torch.equal(answers(model, RIVALS[0], again)[0], together[-3][0])
            with foveate.prune(model, RIVALS[0]), torch.no_grad():
                model(**again)
            assert counter.runs == runs
    assert len({tuple(map(tuple, kept)) for _, kept in alone}) > 2, "the rivals differ"
    for (logits, kept), (logits_alone, kept_alone) in zip(together, alone, strict=True):
        assert kept == kept_alone
        assert torch.equal(logits, logits_alone)


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_pictures_and_videos_are_remembered_side_by_side(name: str) -> None:
    """Rivals hold one conversation each, with a picture in its first turn and a video in its second."""
    model = tiny.model(name, blocks=6)
    pictures, videos = tiny.inputs(model, "3i4"), tiny.inputs(model, "2v3", seed=1)

    def talk(rival: str) -> list[Any]:
        with foveate.prune(model, rival) as trace:
            out = model.generate(**pictures, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
            given, _ = pictures.continued(out.sequences, videos)
            later = model.generate(
                **given,
                **{CACHE: getattr(out, CACHE)},
                max_new_tokens=3,
                return_dict_in_generate=True,
                output_logits=True,
            )
            kept = [image.kept for call in trace.history for image in call.images]
        return [*out.logits, *later.logits, *kept]

    alone = [talk(rival) for rival in RIVALS]
    of_pictures, of_videos = encoders(model)
    with untouched(model), share_encoding(model, NEEDS):
        together = [talk(rival) for rival in RIVALS]
    assert (of_pictures.runs, of_videos.runs) == ((2, 2) if of_pictures is of_videos else (1, 1))
    for mine, own in zip(together, alone, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine, own, strict=True))


def test_an_encoding_that_fails_leaves_nothing_behind() -> None:
    model = tiny.model("qwen2-vl", blocks=6)
    given = tiny.inputs(model, "3v4")
    alone = answers(model, RIVALS[0], given)
    with untouched(model), share_encoding(model, NEEDS):
        hook = model.model.visual.blocks[-1].register_forward_hook(_explode)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="in the middle"):
                answers(model, RIVALS[0], given)
        hook.remove()
        logits, kept = answers(model, RIVALS[0], given)
    assert kept == alone[1] and torch.equal(logits, alone[0])


def _explode(*_: Any) -> None:
    raise RuntimeError("in the middle")


def test_a_direct_call_shares_too() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    counter = Counter(tiny.vision(model).encoder.layers[0])
    with foveate.prune(model, RIVALS[0]), torch.no_grad():
        alone = model(**given).logits
    with share_encoding(model, NEEDS), torch.no_grad():
        for _ in range(2):
            with foveate.prune(model, RIVALS[0]):
                assert torch.equal(model(**given).logits, alone)
    assert counter.runs == 2


def test_what_changes_the_encoding_cannot_share_it() -> None:
    model = tiny.model(blocks=6)
    with (
        untouched(model),
        share_encoding(model, ()),
        pytest.raises(FoveateError, match=r"image_text_interaction.* changes the encoding, so it cannot share it"),
    ):
        foveate.prune(model, "image_text_interaction").start()


def needs_of(name: str) -> frozenset[str]:
    return frozenset(need for part in methods.get(name).example().parts() for need in part.needs)


# Methods that look at the encoding and leave it as it is.
CHANGING = ("picture", "pixels", "tower")
BEHIND = [
    name for name in methods.names() if all(part.site not in CHANGING for part in methods.get(name).example().parts())
]
# One of each set of needs: two methods share what the encoder shows, and those that need the same are alike to a third.
KINDS = {needs_of(name): name for name in BEHIND}


def test_any_two_methods_stand_side_by_side() -> None:
    model = tiny.model(blocks=6)
    given = tiny.inputs(model, "3i4")
    handles = {name: tiny.prune(model, methods.get(name).example(model.config)) for name in KINDS.values()}

    def logits(name: str) -> torch.Tensor:
        with handles[name], torch.no_grad():
            return model(**given).logits

    alone = {name: logits(name) for name in handles}
    for (needs, name), (more, other) in itertools.combinations(KINDS.items(), 2):
        with share_encoding(model, needs | more):
            for one in (name, other):
                assert torch.equal(logits(one), alone[one]), f"{name} and {other}"


def test_what_was_not_asked_for_is_missed_at_once() -> None:
    model = tiny.model()
    with (
        untouched(model),
        share_encoding(model, {"tower.read.hidden"}),
        pytest.raises(FoveateError, match=r"shows no tower\.2\.given, tower\.2\.received; give share_encoding\(\)"),
    ):
        foveate.prune(model, "fopru:keep=4").start()


def test_a_model_that_is_being_pruned_shares_nothing() -> None:
    model = tiny.model()
    with (
        foveate.prune(model, RIVALS[0]),
        pytest.raises(FoveateError, match="share its encoding before a handle is started"),
        share_encoding(model, ()),
    ):
        pass
