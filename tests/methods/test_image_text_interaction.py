"""Image-text interaction: hand-worked splits, the paper's rivals and ablations, its parts, and calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny
from models.batches import assert_rows_stand_alone

import foveate
from foveate.core import Block, FoveateError, Signals
from foveate.methods.h2o import H2O
from foveate.methods.image_text_interaction import ImageTextInteraction
from foveate.ops.subsets import long_tail_split
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(*weights: Sequence[float], block: int | str = "2/24") -> Signals:
    """Images whose patches have these weights, up to a factor, in the softmax of the similarity to CLS."""
    hidden = torch.tensor(weights, dtype=torch.float64).log().float()[..., None]
    batch, tokens = hidden.shape[:2]
    shown = Block(hidden=hidden, cls=torch.ones(batch, 1))
    return Signals(original=tokens, index=torch.arange(tokens).repeat(batch, 1), tower={block: shown})


CURVE = (1.0, 3, 1, 10, 1)
"""In descending order 10 3 1 1 1: (5 - i)(10 - d_i) is 0, 21, 18, 9, so that the head ends after 2 tokens."""


def test_the_head_ends_where_the_product_peaks() -> None:
    assert long_tail_split(torch.tensor([CURVE])).tolist() == [2]
    assert long_tail_split(torch.tensor([[8.0, 4, 2, 1, 1]])).tolist() == [2], "of 0 12 12 7 the first"
    assert long_tail_split(torch.tensor([[2.0, 1], [1.0, 1]])).tolist() == [1, 2], "a flat curve has no tail"
    assert long_tail_split(torch.tensor([[7.0]])).tolist() == [1]


@pytest.mark.parametrize(
    ("alpha", "kept"),
    [
        (1.0, [1, 3]),
        (0.075, [3]),  # at least one
        (0.5, [3]),
        (1.25, [1, 3]),  # 2.5, half to even
        (1.3, [0, 1, 3]),
        (50.0, [0, 1, 2, 3, 4]),  # at most all
    ],
)
def test_alpha_scales_the_count(alpha: float, kept: list[int]) -> None:
    assert ImageTextInteraction(alpha=alpha).select(signals(CURVE)).indices[0].tolist() == kept


@pytest.mark.parametrize("alpha", [0.075, 1.0, 3.0])
def test_a_flat_curve_keeps_everything(alpha: float) -> None:
    assert ImageTextInteraction(alpha=alpha).select(signals([1.0] * 6)).indices[0].tolist() == list(range(6))


def test_a_single_patch_stays() -> None:
    assert ImageTextInteraction().select(signals([3.0])).indices[0].tolist() == [0]


def test_every_image_has_its_own_count() -> None:
    kept = ImageTextInteraction().select(signals(CURVE, (9, 9, 9, 1, 1), (1, 1, 1, 1, 1))).indices
    # (5 - i)(9 - d_i) of the second is 0, 0, 0, 8: its head has 4.
    assert [row.tolist() for row in kept] == [[1, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_the_similarity_is_divided_by_the_root_of_the_width() -> None:
    torch.manual_seed(0)
    hidden, cls = torch.randn(1, 40, 16), torch.randn(1, 16)
    shown = Signals(original=40, index=torch.arange(40)[None], tower={"2/24": Block(hidden=hidden, cls=cls)})
    curve = torch.softmax(torch.stack([cls[0] @ patch for patch in hidden[0]]) / 4, dim=0).double()
    falling = curve.sort(descending=True)
    values = [(40 - i) * float(falling.values[0] - falling.values[i - 1]) for i in range(1, 40)]
    head = 1 + max(range(39), key=lambda place: (values[place], -place))
    assert ImageTextInteraction().select(shown).indices[0].tolist() == sorted(falling.indices[:head].tolist())


def test_the_printed_alpha_cannot_keep_what_the_paper_reports() -> None:
    torch.manual_seed(0)
    counts = [
        len(kept)
        for kind in (torch.rand(4, 576), torch.randn(4, 576).exp(), torch.linspace(1, 2, 576).repeat(4, 1))
        for kept in ImageTextInteraction(alpha=0.075).select(signals(*kind.tolist())).indices
    ]
    assert max(counts) <= 43


# ---------------------------------------------------------------------------------------------------------------------
# the rival of Table 1, the ablation of Tables 2 and 4, the place


def test_a_fixed_count_takes_the_most_similar() -> None:
    method = ImageTextInteraction(keep=3)
    assert [row.tolist() for row in method.select(signals(CURVE, (1, 2, 3, 4, 5))).indices] == [[0, 1, 3], [2, 3, 4]]
    assert method.count(576) == (3,) and not method.adaptive
    assert ImageTextInteraction(keep=0.25).count(576) == (144,)
    assert ImageTextInteraction().count(576) is None and ImageTextInteraction().adaptive


def test_it_is_made_of_a_split_and_a_cache() -> None:
    split, cache = ImageTextInteraction(alpha=0.5).parts()
    assert split == ImageTextInteraction(alpha=0.5, visual_only=True) and split.parts() == (split,)
    assert split.site == "tower" and split.depths(24) == (3,)
    assert split.needs == ("tower.2/24.hidden", "tower.2/24.cls")
    assert cache == H2O(heavy=0.5, recent=0.5)
    assert ImageTextInteraction(heavy=0.2, recent=16).parts()[1] == H2O(heavy=0.2, recent=16)


def test_the_cache_holds_the_whole_prompt_by_default() -> None:
    cache = ImageTextInteraction().parts()[1]
    assert isinstance(cache, H2O)
    assert all(sum(cache.budget(prompt)) == prompt for prompt in range(2, 700))


def test_tokens_can_leave_at_the_output_of_the_encoder() -> None:
    split = ImageTextInteraction(where="output").parts()[0]
    assert split.site == "input" and split.depths(24) == () and split.needs == ("tower.read.hidden", "tower.read.cls")
    assert split.select(signals(CURVE, block="read")).indices[0].tolist() == [1, 3]
    assert ImageTextInteraction(where=1).needs == ("tower.0.hidden", "tower.0.cls")


@pytest.mark.parametrize(("blocks", "depth"), [(24, 3), (12, 2), (6, 1), (32, 4), (48, 5), (2, 1)])
def test_by_default_it_acts_as_deep_in_any_encoder_as_after_3_blocks_of_24(blocks: int, depth: int) -> None:
    assert ImageTextInteraction().depths(blocks) == (depth,)
    assert ImageTextInteraction(where="6/24").depths(blocks) == (min(blocks - 1, 1 + round(5 * blocks / 24)),)
    if blocks > 3:
        assert ImageTextInteraction(where=3).depths(blocks) == (3,)


def test_a_spec_survives_the_round_trip() -> None:
    for method in (
        ImageTextInteraction(),
        ImageTextInteraction(alpha=0.8, where="output", heavy=64),
        ImageTextInteraction(keep=127, where=5),
        ImageTextInteraction(keep=127, where="5/12"),
    ):
        for one in (method, *method.parts()):
            again = parse(format_spec(one))
            assert again == one and again.site == one.site and again.adaptive == one.adaptive


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageTextInteraction(alpha=0.0), r"alpha=0\.0 is no positive number"),
        (lambda: ImageTextInteraction(alpha=float("nan")), "alpha=nan is no positive number"),
        (lambda: ImageTextInteraction(keep=0), "keep=0 is below 1 token"),
        (lambda: ImageTextInteraction(heavy=2.0), r"heavy=2\.0 is no share"),
        (lambda: ImageTextInteraction(where=0), "where=0 is neither a number of encoder blocks from 1 nor 'output'"),
        (lambda: ImageTextInteraction(where="input"), "where='input' is neither"),  # type: ignore[arg-type]
        (lambda: ImageTextInteraction(where=24).depths(24), r"where=24 is outside 1\.\.23 of an encoder of 24 blocks"),
        (lambda: ImageTextInteraction(keep=9).select(signals(CURVE)), "keep=9 asks for 9 tokens but the image has 5"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        make()


@given(st.data())
def test_tokens_ascend_and_rows_stand_alone(data: st.DataObject) -> None:
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    weights = st.lists(st.integers(1, 9), min_size=tokens, max_size=tokens)
    shown = signals(*(data.draw(weights) for _ in range(batch)))
    keep = data.draw(st.one_of(st.none(), st.integers(1, tokens)))
    method = ImageTextInteraction(alpha=data.draw(st.floats(0.01, 3.0)), keep=keep)
    (selection,) = assert_rows_stand_alone(method, [shown])
    selection.check(tokens, batch, "image_text_interaction")
    if keep is not None:
        assert [len(kept) for kept in selection.indices] == [keep] * batch


# ---------------------------------------------------------------------------------------------------------------------
# what patches receive


def received(*weights: Sequence[float], block: int | str = "2/24") -> Signals:
    """Images whose patches receive attention in proportion to these weights; there is no CLS."""
    rows = torch.tensor(weights) / 1000
    index = torch.arange(rows.shape[1]).repeat(len(rows), 1)
    return Signals(original=rows.shape[1], index=index, tower={block: Block(received=rows)})


def test_the_curve_of_what_is_received_is_split() -> None:
    """CURVE again: the head ends after 2 tokens. It is each patch's share in what all receive."""
    method = ImageTextInteraction(attention="received")
    shown = received(CURVE, (9, 9, 9, 1, 1), (1, 1, 1, 1, 1))
    torch.testing.assert_close(method.similarity(shown)[0], torch.tensor(CURVE) / 16)
    assert [row.tolist() for row in method.select(shown).indices] == [[1, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    fixed = ImageTextInteraction(attention="received", keep=3)
    assert [row.tolist() for row in fixed.select(received((1, 2, 3, 4, 5))).indices] == [[2, 3, 4]]


def test_the_block_is_the_one_that_cls_would_be_read_in() -> None:
    split, cache = ImageTextInteraction(attention="received").parts()
    assert split.needs == ("tower.2/24.received",) and split.site == "tower" and cache == H2O(heavy=0.5, recent=0.5)
    assert ImageTextInteraction(attention="received", where=1).needs == ("tower.0.received",)
    output = ImageTextInteraction(attention="received", where="output")
    assert output.needs == ("tower.read.received",) and output.site == "input"
    assert output.select(received(CURVE, block="read")).indices[0].tolist() == [1, 3]


def test_alpha_is_found_for_what_is_received() -> None:
    torch.manual_seed(0)
    method = ImageTextInteraction(attention="received", where=1)
    shown = [received(*torch.rand(3, 50).pow(4).add(0.01).tolist(), block=0) for _ in range(4)]
    found = method.calibrate(shown, 12)
    assert found == ImageTextInteraction(alpha=found.alpha, attention="received", where=1)
    assert abs(average(found, shown) - 12) <= 0.5


def test_alpha_is_found_on_an_encoder_without_cls() -> None:
    model = tiny.model(tower="siglip")
    pixels = torch.randn(4, 3, tiny.IMAGE_SIDE, tiny.IMAGE_SIDE, generator=torch.Generator().manual_seed(3))
    method = ImageTextInteraction(attention="received", where=2, visual_only=True)
    found = foveate.calibrate(model, method, pixels, 9)
    assert isinstance(found, ImageTextInteraction) and found.attention == "received"
    with foveate.prune(model, found) as trace:
        model.generate(**{**tiny.inputs(model, *["i3"] * 4), "pixel_values": pixels}, max_new_tokens=1)
    assert abs(sum(image.after for image in trace.images) / 4 - 9) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# calibration


def average(method: ImageTextInteraction, batches: Sequence[Signals]) -> float:
    counts = [len(kept) for shown in batches for kept in method.select(shown).indices]
    return sum(counts) / len(counts)


def test_alpha_is_found_for_a_wanted_average() -> None:
    torch.manual_seed(0)
    batches = [signals(*torch.rand(3, 50).pow(4).add(0.01).tolist()) for _ in range(4)]
    for target in (5, 12, 25, 50):
        found = ImageTextInteraction().calibrate(batches, target)
        assert abs(average(found, batches) - target) <= 0.5
    assert ImageTextInteraction().calibrate(batches, 0.5) == ImageTextInteraction().calibrate(batches, 25)
    assert ImageTextInteraction().calibrate(batches[0], 12).alpha > 0


def test_the_other_fields_stay() -> None:
    method = ImageTextInteraction(heavy=0.2, where=1)
    found = method.calibrate(signals(CURVE, block=0), 3)
    assert found == ImageTextInteraction(alpha=found.alpha, heavy=0.2, where=1)
    assert average(found, [signals(CURVE, block=0)]) == 3


def test_the_lower_average_wins_a_tie() -> None:
    """Both images have heads of 2, so that the average is a whole number: 2.5 lies between 2 and 3."""
    shown = signals(CURVE, CURVE)
    found = ImageTextInteraction().calibrate([shown], 0.5)
    assert average(found, [shown]) == 2


@given(st.data())
def test_no_alpha_comes_nearer(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(2, 9))
    curve = st.lists(st.integers(1, 9), min_size=tokens, max_size=tokens)
    shown = signals(*(data.draw(curve) for _ in range(data.draw(st.integers(1, 4)))))
    target = data.draw(st.integers(1, tokens))
    found = ImageTextInteraction().calibrate(shown, target)
    best = abs(average(found, [shown]) - target)
    tries = [index / 120 + 1e-4 for index in range(1, 120 * tokens)]
    splits = long_tail_split(shown.tower["2/24"].hidden.squeeze(-1).softmax(dim=-1)).tolist()  # type: ignore[union-attr]
    for alpha in tries:
        counts = [tokens if split == tokens else min(tokens, max(1, round(alpha * split))) for split in splits]
        assert best <= abs(sum(counts) / len(counts) - target) + 1e-9


def test_flat_images_leave_alpha_as_it_is() -> None:
    method = ImageTextInteraction(alpha=0.3)
    assert method.calibrate(signals([1.0] * 5), 2) == method


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageTextInteraction(keep=5).calibrate(signals(CURVE), 3), "keep=5 fixes the count"),
        (lambda: ImageTextInteraction().calibrate([], 3), "signals of at least one image"),
        (lambda: ImageTextInteraction().calibrate(signals(CURVE), 6), "target=6 is above the 5 tokens"),
        (lambda: ImageTextInteraction().calibrate(signals(CURVE), 0), "target=0 is below 1 token"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        make()
