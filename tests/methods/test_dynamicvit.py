"""DynamicViT: which patches its predictors keep, its stages and budgets, and which predictors it takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny

import foveate
from foveate.core import Block, FoveateError, Signals
from foveate.methods.dynamicvit import DynamicViT
from foveate.modules.dynamicvit import DynamicViTConfig, DynamicViTPredictors, build, save
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(hidden: torch.Tensor, **given: Any) -> Signals:
    index = torch.arange(hidden.shape[1]).expand(hidden.shape[:2])
    return Signals(**{"original": hidden.shape[1], "index": index, "tower": {"latest": Block(hidden=hidden)}, **given})


def stored(folder: Path, **shape: Any) -> DynamicViTPredictors:
    predictors = build(DynamicViTConfig(**{"width": 8, "blocks": 6, "layers": [2, 3, 4], **shape}), seed=1)
    save(predictors, folder)
    return predictors


def test_the_highest_scores_stay_in_raster_order(tmp_path: Path) -> None:
    predictors = stored(tmp_path)
    method = DynamicViT.from_pretrained(str(tmp_path), keep=(0.7, 0.5, 2))
    hidden = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    index = torch.arange(9) * 3 + torch.tensor([[0], [1]])
    for stage, count in enumerate((19, 14, 2)):
        seen = signals(hidden, index=index, original=28, stage=stage)
        if count > 9:
            with pytest.raises(FoveateError, match=f"asks for {count} tokens but 9 of its 28 tokens are left"):
                method.select(seen)
            continue
        answer = method.select(seen)
        scores = predictors(stage, hidden)[..., 0]
        for row in range(2):
            best = sorted(scores[row].argsort(descending=True)[:count].tolist())
            assert answer.indices[row].tolist() == index[row][best].tolist()


def test_each_stage_has_a_predictor_of_its_own(tmp_path: Path) -> None:
    stored(tmp_path)
    method = DynamicViT.from_pretrained(str(tmp_path), keep=(5, 5, 5))
    hidden = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(3))
    kept = [method.select(signals(hidden, stage=stage)).indices[0].tolist() for stage in range(3)]
    assert len({tuple(one) for one in kept}) == 3


def test_counts_are_rounded_down() -> None:
    assert DynamicViT().count(196) == (137, 96, 67), "int(196 * 0.7 ** p)"
    assert DynamicViT().count(576) == (403, 282, 197)
    assert DynamicViT(keep=(0.9, 0.01, 0.01)).count(9) == (8, 1, 1)
    assert DynamicViT(keep=(100, 0.1, 3)).count(196) == (100, 19, 3)
    with pytest.raises(FoveateError, match="asks for 9 tokens but 2 of"):
        DynamicViT(keep=(2, 0.9, 0.9)).count(10)


@pytest.mark.parametrize(
    ("blocks", "depths"), [(12, (3, 6, 9)), (24, (6, 12, 18)), (6, (2, 3, 4)), (5, (1, 2, 4)), (4, (1, 2, 3))]
)
def test_depths_are_scaled_to_the_encoder(blocks: int, depths: tuple[int, ...]) -> None:
    assert DynamicViT().depths(blocks) == depths


def test_trained_predictors_say_where_they_belong(tmp_path: Path) -> None:
    stored(tmp_path, layers=[1, 4])
    method = DynamicViT.from_pretrained(str(tmp_path), keep=(0.5, 0.25))
    assert method.depths(6) == (1, 4)
    with pytest.raises(FoveateError, match=r"layers=\(2, 3\), but the predictors in .* belong after \(1, 4\) blocks"):
        DynamicViT.from_pretrained(str(tmp_path), keep=(0.5, 0.25), layers=(2, 3))
    with pytest.raises(FoveateError, match=r"3 budgets \(0\.7, 0\.49, 0\.343\) for the 2 predictors"):
        DynamicViT.from_pretrained(str(tmp_path))


def test_without_predictors_it_counts_but_does_not_choose() -> None:
    method = DynamicViT()
    assert method.count(196) == (137, 96, 67)
    for attempt in (lambda: method.select(signals(torch.zeros(1, 9, 8))), lambda: foveate.prune(tiny.model(), method)):
        with pytest.raises(
            FoveateError, match="chooses by trained predictors and was given none; write dynamicvit:from="
        ):
            attempt()


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    stored(tmp_path)
    method = DynamicViT.from_pretrained(str(tmp_path))

    def model(width: int, blocks: int) -> Any:
        return SimpleNamespace(vision_config=SimpleNamespace(hidden_size=width, num_hidden_layers=blocks))

    method.check_model(model(8, 6))
    with pytest.raises(
        FoveateError, match="these predictors of DynamicViT were trained for an encoder with hidden_size=8"
    ):
        method.check_model(model(16, 6))
    with pytest.raises(FoveateError, match="num_hidden_layers=6, not 7"):
        method.check_model(model(8, 7))
    with pytest.raises(FoveateError, match="read patches of 8 values, the encoder has 16"):
        method.select(signals(torch.zeros(1, 9, 16)))


def test_specs(tmp_path: Path) -> None:
    stored(tmp_path)
    method = parse(f'dynamicvit:from="{tmp_path}",keep=0.5/0.25/0.1')
    assert method == DynamicViT(keep=(0.5, 0.25, 0.1), path=str(tmp_path))
    assert parse(format_spec(method)) == method
    assert DynamicViT.example() == parse("dynamicvit:from=random")


def test_untrained_ones_fit_any_encoder_and_are_the_same_each_time() -> None:
    for width in (8, 16):
        hidden = torch.randn(1, 9, width, generator=torch.Generator().manual_seed(0))
        first, second = (DynamicViT(path="random", keep=(4, 3, 2)).select(signals(hidden)) for _ in range(2))
        assert torch.equal(first.indices[0], second.indices[0])


def test_inside_an_encoder_it_reads_the_block_before(tmp_path: Path) -> None:
    """What the predictors are shown is the stream that enters the block: patches left, CLS not among them."""
    predictors = stored(tmp_path, width=32)
    model = tiny.model(blocks=6)
    given = tiny.inputs(model, "3i4", "2i1i5")
    entered: dict[int, torch.Tensor] = {}
    layers = model.model.vision_tower.encoder.layers
    for number in (2, 3, 4):
        layers[number - 1].register_forward_hook(
            lambda module, arguments, output, number=number: entered.__setitem__(number, output[:, 1:])
        )
    with foveate.prune(model, f'dynamicvit:from="{tmp_path}"') as trace, torch.no_grad():
        model(**given)
    for place, image in enumerate(trace.images):
        index = torch.arange(36)
        for stage, (number, record) in enumerate(zip((2, 3, 4), image.stages, strict=True)):
            scores = predictors(stage, entered[number][[place]])[0, :, 0]
            assert record.kept.tolist() == sorted(index[scores.argsort(descending=True)[: record.after]].tolist())
            index = record.kept
        assert [record.after for record in image.stages] == [25, 17, 12]
