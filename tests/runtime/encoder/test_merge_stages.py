"""Merging inside the encoder beside stages that drop and stages that look, and behind projectors that join patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from models import tiny
from references import merging_by_hand, reference
from references.encoder_by_hand import ATTENTION, ROWS, features_of
from references.merging_by_hand import TWO, close, indices, rows
from torch import Tensor

import foveate
from foveate import FoPru, FoveateError
from foveate.core import Grid, Method, Selection, Signals, Site
from foveate.methods.crossget import CrossGET
from foveate.methods.tome import ToMe

# ---------------------------------------------------------------------------------------------------------------------
# with other stages


@dataclass(frozen=True)
class Cut(Method):
    """Cut: keeps the patches with the longest hidden states before a block; of each picture another number."""

    site: ClassVar[Site] = "tower"
    adaptive: ClassVar[bool] = True
    needs = ("tower.latest.hidden",)

    at: int = 1
    factor: float = 1.0

    def depths(self, layers: int) -> tuple[int, ...]:
        return (self.at,)

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return None

    def select(self, signals: Signals) -> Selection:
        hidden = signals.tower["latest"].hidden
        assert hidden is not None
        length = hidden.double().norm(dim=-1)
        kept = length > self.factor * length.mean(dim=-1, keepdim=True)
        return Selection([index[row].sort().values for index, row in zip(signals.index, kept, strict=True)])


@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("method", [ToMe(r=3), ToMe(keep=8), ToMe(r=3, proportional=False), CrossGET(keep=8)], ids=str)
@pytest.mark.parametrize("at", [1, 2])
def test_ragged_pictures_equal_each_picture_alone(at: int, method: Method, attn: str) -> None:
    """Tokens leave between blocks that merge, another number of each picture: padding, weights and both at once."""
    model = tiny.model(attn=attn)
    given = tiny.inputs(model, *ROWS)
    methods = [Cut(at=at, factor=0.97), method]
    together, call = features_of(model, given, methods)
    middle = [[stage.after for stage in image.stages] for image in call.images]
    assert len({counts[1] for counts in middle}) > 1, "the pictures are ragged"
    for row in (0, 1, 3):
        single, alone = features_of(model, tiny.alone(given, row, tiny.IMAGE), methods)
        mine = [number for number, image in enumerate(call.images) if image.row == row]
        for number, features, image in zip(mine, single, alone.images, strict=True):
            assert torch.equal(call.images[number].kept, image.kept)
            close(together[number], features)


def test_a_budget_of_everything_leaves_what_others_kept() -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    cut, first = features_of(model, given, Cut(at=1))
    for method in (ToMe(keep=1.0), CrossGET(keep=1.0)):
        got, call = features_of(model, given, [Cut(at=1), method])
        assert [image.after for image in call.images] == [image.after for image in first.images]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, cut, strict=True))


@torch.no_grad()
def test_a_stage_behind_the_block_at_hand_sees_it() -> None:
    """ "latest" is the block before the stage; where tokens have merged in it, its output."""
    model = tiny.model(tower="siglip")
    given = tiny.inputs(model, "3i4")
    shown: list[Signals] = []

    class Look(Cut):
        def select(self, signals: Signals) -> Selection:
            shown.append(signals)
            return Selection(list(signals.index), ordered=False)

    features_of(model, given, [Look(at=1)])
    features_of(model, given, [ToMe(r=4), Look(at=1)])
    tower = model.model.vision_tower
    plain = tower.encoder.layers[0](tower.embeddings(given["pixel_values"]), None)
    assert shown[0].tower["latest"].hidden is not None and shown[1].tower["latest"].hidden is not None
    close(shown[0].tower["latest"].hidden, plain)
    assert shown[1].shape == (1, 32)
    run = merging_by_hand.tome(model, given["pixel_values"], (4,))
    by_index = dict(zip(indices(run), rows(run), strict=True))
    close(shown[1].tower["latest"].hidden[0], torch.stack([by_index[index] for index in shown[1].index[0].tolist()]))


@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_a_probe_sees_the_weighed_attention(tower: str, attn: str) -> None:
    """FoPru reads the block in which the last merge happens: attention by those that it ran on, weights included."""
    model = tiny.model(tower=tower, attn=attn)
    given = tiny.inputs(model, *TWO)
    _, call = features_of(model, given, [ToMe(keep=12), FoPru(keep=4)])
    cls = int(tower == "clip")
    for image, pixels in zip(call.images, given["pixel_values"], strict=True):
        run = merging_by_hand.tome(model, pixels[None], (8, 8, 8))
        patches = run.attention[:, cls:, cls:].mean(dim=0)
        where = [run.seen[cls:].index(index) for index in indices(run)]
        sums = [patches.mean(dim=1)[where], patches.mean(dim=0)[where]]
        score = max(sums, key=lambda vector: float(vector.var()))
        best = sorted(indices(run)[place] or 0 for place in score.argsort(descending=True)[:4].tolist())
        assert image.kept.tolist() == best


def test_a_probe_sees_patches_only_while_a_cross_token_runs() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i2")
    caught: list[Signals] = []

    @dataclass(frozen=True)
    class Listen(Cut):
        site: ClassVar[Site] = "input"
        needs = ("tower.1.received", "tower.1.hidden", "tower.1.cls_attention", "tower.1.cls")

        def select(self, signals: Signals) -> Selection:
            caught.append(signals)
            return Selection(list(signals.index))

        def depths(self, layers: int) -> tuple[int, ...]:
            return ()

    with foveate.prune(model, [CrossGET(r=(3, 0, 3)), Listen()]) as trace, torch.no_grad():
        model(**given)
    (signals,) = caught
    for place, pixels in enumerate(given["pixel_values"]):
        run = merging_by_hand.crossget(model, pixels[None], (3, 0))
        extra = trace.images[place].stages[0].extra
        assert extra is not None
        kept = [index for index in signals.index[place][~extra].tolist() if index in run.seen]
        columns = [signals.index[place].tolist().index(index) for index in kept]
        where = [run.seen.index(index) for index in kept]
        assert len(kept) >= 30
        received = run.attention[:, 1:-1].mean(dim=(0, 1))[where]
        block = signals.tower[1]
        assert block.received is not None and block.cls_attention is not None and block.hidden is not None
        close(block.received[place][columns], received)
        close(block.cls_attention[place][:, columns], run.attention[:, 0][:, where])
        by_index = {token.index: token.row for token in run.tokens if token.members}
        close(block.hidden[place][columns], torch.stack([by_index[index] for index in kept]))
    assert [image.after for image in trace.images] == [31, 31]


def test_a_cross_token_has_nothing_of_the_patch_whose_place_it_takes() -> None:
    model = tiny.model()
    caught: list[Signals] = []

    @dataclass(frozen=True)
    class Listen(Cut):
        site: ClassVar[Site] = "input"
        needs = ("tower.0.received", "tower.0.hidden", "tower.read.received", "tower.read.hidden")

        def select(self, signals: Signals) -> Selection:
            caught.append(signals)
            return Selection(list(signals.index))

        def depths(self, layers: int) -> tuple[int, ...]:
            return ()

    given = tiny.inputs(model, "3i4", "2i2")
    with foveate.prune(model, [CrossGET(keep=12), Listen()]) as trace, torch.no_grad():
        model(**given)
    (signals,) = caught
    for place, image in enumerate(trace.images):
        extra = image.stages[0].extra
        assert extra is not None and extra.sum() == 1
        run = merging_by_hand.crossget(model, given["pixel_values"][[place]], (9, 9, 7))
        for block, name in ((0, "received"), (0, "hidden"), ("read", "received"), ("read", "hidden")):
            value = getattr(signals.tower[block], name)[place]
            assert value[~extra].abs().amin() > 0
            if (block, name) == ("read", "hidden"):
                close(value, rows(run))
            else:
                assert not value[extra].any()


# ---------------------------------------------------------------------------------------------------------------------
# projectors that are not pointwise


@pytest.mark.usefixtures("gridded")
@pytest.mark.parametrize("method", [ToMe(keep=9), CrossGET(keep=9)], ids=str)
def test_a_merged_patch_goes_back_with_its_groups_state(method: Method) -> None:
    model = tiny.model()
    given = tiny.inputs(model, *TWO)
    read: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    got, call = features_of(model, given, method)
    hook.remove()
    assert [tuple(one.shape) for one in read] == [(2, 36, 32)]
    for number, (image, pixels) in enumerate(zip(call.images, given["pixel_values"], strict=True)):
        if isinstance(method, ToMe):
            run = merging_by_hand.tome(model, pixels[None], (9, 9, 9))
        else:
            run = merging_by_hand.crossget(model, pixels[None], (10, 10, 8))
        full = run.put_back(36)
        close(read[0][number], full)
        close(got[number], reference.project(model, full)[image.kept])


@pytest.mark.usefixtures("gridded")
def test_a_dropped_group_goes_back_as_it_last_was() -> None:
    """Patches that merged and whose group was dropped afterwards stand there with the group's last state."""
    model = tiny.model(tower="siglip")
    given = tiny.inputs(model, "3i4")
    read: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    _, call = features_of(model, given, [ToMe(r=(9,)), Cut(at=1)])
    hook.remove()
    run = merging_by_hand.tome(model, given["pixel_values"], (9,))
    dropped = [token for token in run.tokens if token.index not in call.images[0].kept.tolist()]
    assert any(len(token.members) > 1 for token in dropped)
    for token in dropped:
        for member in token.members:
            close(read[0][0, member], token.row)


# ---------------------------------------------------------------------------------------------------------------------
# refusals


def test_behind_the_encoder_there_is_no_latest_block() -> None:
    @dataclass(frozen=True)
    class Late(Cut):
        site: ClassVar[Site] = "input"

    with pytest.raises(FoveateError, match=r"needs tower\.latest\.hidden outside the encoder"):
        foveate.prune(tiny.model(), Late())
