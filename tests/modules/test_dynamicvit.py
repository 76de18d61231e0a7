"""DynamicViT's predictors against their equations by hand; reading, writing, and what cannot be read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from foveate.core import FoveateError
from foveate.modules.crossget import CrossGETConfig, CrossGETTokens
from foveate.modules.crossget import load as load_tokens
from foveate.modules.crossget import save as save_tokens
from foveate.modules.dynamicvit import DynamicViTConfig, DynamicViTPredictors, build, load, save

SMALL = DynamicViTConfig(width=8, blocks=6, layers=[2, 3, 4])


def gelu(value: float) -> float:
    return value * 0.5 * (1 + math.erf(value / math.sqrt(2)))


def linear(weights: dict[str, list], name: str, vector: list[float]) -> list[float]:
    rows, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return [sum(w * x for w, x in zip(row, vector, strict=True)) + b for row, b in zip(rows, bias, strict=True)]


def test_a_predictor_by_hand() -> None:
    """Norm, linear, GELU; half of the channels replaced by the weighted mean; three linear maps; log-softmax."""
    predictors = build(SMALL, seed=5)
    torch.nn.init.normal_(predictors.stages[1].local[0].weight)
    torch.nn.init.normal_(predictors.stages[1].local[0].bias)
    patches = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    policy = [1.0, 0.0, 1.0]
    weights = {name: value.double().tolist() for name, value in predictors.stages[1].state_dict().items()}
    local = []
    for row in patches[0].double().tolist():
        mean = sum(row) / 8
        spread = math.sqrt(sum((x - mean) ** 2 for x in row) / 8 + 1e-5)
        normed = [
            (x - mean) / spread * w + b
            for x, w, b in zip(row, weights["local.0.weight"], weights["local.0.bias"], strict=True)
        ]
        local.append([gelu(x) for x in linear(weights, "local.1", normed)])
    common = [(local[0][c] + local[2][c]) / 2 for c in range(4, 8)]
    expected = []
    for row in local:
        first = [gelu(x) for x in linear(weights, "score.0", row[:4] + common)]
        second = [gelu(x) for x in linear(weights, "score.2", first)]
        keep, drop = linear(weights, "score.4", second)
        total = math.log(math.exp(keep) + math.exp(drop))
        expected.append([keep - total, drop - total])
    got = predictors(1, patches, torch.tensor([policy]))
    torch.testing.assert_close(got[0], torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_patches_that_have_left_do_not_speak() -> None:
    """Weight 0 equals not being there; without weights all count."""
    predictors = build(SMALL)
    patches = torch.randn(2, 7, 8)
    policy = torch.tensor([[1.0, 1, 0, 1, 1, 0, 1]]).expand(2, 7)
    among = predictors(0, patches, policy)[:, policy[0].bool()]
    torch.testing.assert_close(among, predictors(0, patches[:, policy[0].bool()]))
    torch.testing.assert_close(predictors(0, patches, torch.ones(2, 7)), predictors(0, patches))
    assert predictors(0, patches.half()).dtype == torch.float32


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    predictors = build(SMALL, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(predictors.stages[0].score[0].weight, build(SMALL, seed=3).stages[0].score[0].weight)
    again = load(save(predictors, tmp_path / "made"))
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["config.json", "model.safetensors"]
    assert again.config.layers == [2, 3, 4] and again.config.width == 8 and again.config.blocks == 6
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in predictors.state_dict().items())
    assert not again.training and not any(parameter.requires_grad for parameter in again.parameters())
    tokens = CrossGETTokens(CrossGETConfig(width=4, blocks=2))
    torch.nn.init.ones_(tokens.tokens)
    assert load_tokens(save_tokens(tokens, tmp_path / "tokens")).tokens.tolist() == [[1.0] * 4] * 2


def test_a_width_that_cannot_be_halved_twice() -> None:
    with pytest.raises(FoveateError, match="width=6 cannot be halved twice; the predictors need a multiple of 4"):
        DynamicViTPredictors(DynamicViTConfig(width=6))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="no predictors of DynamicViT can be loaded from nowhere-at-all"):
        load("nowhere-at-all")
    folder = save(build(SMALL), tmp_path / "made")
    with pytest.raises(FoveateError, match="holds a 'foveate_dynamicvit' model, no cross tokens of CrossGET"):
        load_tokens(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if name != "stages.1.local.1.bias"},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(FoveateError, match=r"are incomplete: 1 tensors, first stages\.1\.local\.1\.bias"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(FoveateError, match="no predictors of DynamicViT can be loaded from"):
        load(folder)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    folder = save(build(SMALL), tmp_path / "made")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FoveateError, match="no predictors of DynamicViT can be loaded from"):
        load(folder)


def test_another_shape_than_the_weights_is_refused(tmp_path: Path) -> None:
    folder = save(build(SMALL), tmp_path / "made")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "width": 16}))
    with pytest.raises(FoveateError, match=r"no predictors of DynamicViT can be loaded|are incomplete"):
        load(folder)
