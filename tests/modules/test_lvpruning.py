"""Decision modules: the paper's equations written out, padding, saving and loading, and models that do not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from torch import Tensor
from torch.nn import functional

from foveate.core import FoveateError
from foveate.cost.flops import lvpruning_modules
from foveate.cost.shapes import shape
from foveate.modules import storage
from foveate.modules.lvpruning import DecisionModule, LVPruningConfig, build, for_model, load, save

WIDTH, HEADS = 16, 8


def module() -> DecisionModule:
    torch.manual_seed(1)
    made = DecisionModule(WIDTH, HEADS, 2).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def reference(made: DecisionModule, visual: Tensor, text: Tensor) -> Tensor:
    """Eq. 1-4 token by token and head by head. (N, C), (T, C) -> (N, 2)."""
    depth = WIDTH // HEADS
    for block in made.blocks:
        rows = []
        for token in visual:
            query = block.query.weight @ token
            read = []
            for head in range(HEADS):
                part = slice(head * depth, (head + 1) * depth)
                keys = [(block.key.weight @ word)[part] for word in text]
                values = [(block.value.weight @ word)[part] for word in text]
                weights = torch.stack([query[part] @ key / math.sqrt(depth) for key in keys]).exp()
                weights = weights / weights.sum()
                read.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
            output = block.out.weight @ torch.cat(read) + query
            first, wide, _, narrow, last = block.ffn
            inner = functional.layer_norm(output, (WIDTH,), first.weight, first.bias)
            inner = wide.weight @ inner + wide.bias
            inner = narrow.weight @ (inner * torch.sigmoid(inner)) + narrow.bias
            rows.append(functional.layer_norm(inner, (WIDTH,), last.weight, last.bias))
        visual = torch.stack(rows)
    return visual @ made.score.weight.T + made.score.bias


def test_a_module_computes_the_papers_equations() -> None:
    made = module()
    visual, text = torch.randn(1, 5, WIDTH).double(), torch.randn(1, 3, WIDTH).double()
    scores = made(visual, text, torch.ones(1, 3, dtype=torch.bool))
    assert scores.shape == (1, 5, 2) and scores.dtype == torch.float32
    torch.testing.assert_close(scores[0].double(), reference(made, visual[0], text[0]), atol=1e-5, rtol=1e-5)


def test_padding_of_the_text_is_not_read() -> None:
    made = module().float()
    visual, text = torch.randn(2, 5, WIDTH), torch.randn(2, 4, WIDTH)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    scores = made(visual, text, mask)
    torch.testing.assert_close(scores[1:], made(visual[1:], text[1:, :2], mask[1:, :2]), atol=1e-5, rtol=1e-5)
    text[1, 2:] = 1e3
    torch.testing.assert_close(made(visual, text, mask), scores)
    text[1, 1] += 1
    assert not torch.allclose(made(visual, text, mask)[1], scores[1])


def test_a_module_has_the_weights_that_the_published_operations_count() -> None:
    """0.71 TFLOPs: two operations for each weight of a matrix and token, keys and values on text tokens."""
    decoder = shape("llava-1.5-7b").decoder
    with torch.device("meta"):
        one = DecisionModule(decoder.width, 8, 2)
    per_text = sum(block.key.weight.numel() + block.value.weight.numel() for block in one.blocks)
    matrices = sum(parameter.numel() for parameter in one.parameters() if parameter.ndim == 2)
    flops = 3 * 2 * (576 * (matrices - per_text) + 30 * per_text)
    assert flops == lvpruning_modules(decoder, visual=[576] * 3, text=30)
    assert f"{flops / 1e12:.2f}" == "0.71"


def test_modules_survive_saving_and_loading(tmp_path: Path) -> None:
    made = for_model(tiny.model().config, layers=(1, 2, 3), seed=4, ratios=[0.4, 0.3, 0.2], base_name="tiny")
    assert save(made, tmp_path / "new" / "lvp", card="# A card\n") == tmp_path / "new" / "lvp"
    files = {path.name for path in (tmp_path / "new" / "lvp").iterdir()}
    assert files == {"config.json", "model.safetensors", "README.md"}
    again = load(tmp_path / "new" / "lvp")
    assert isinstance(again.config, LVPruningConfig) and list(again.config.layers) == [1, 2, 3]
    assert (again.config.base_name, again.config.width, again.config.base_layers) == ("tiny", 32, 4)
    for name, value in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.to(torch.bfloat16)), name
    assert not any(parameter.requires_grad for parameter in again.parameters())
    again.check(tiny.model().config)


def test_modules_from_before_there_were_heads_for_evenness_have_none(tmp_path: Path) -> None:
    save(for_model(tiny.model().config, layers=(1, 2, 3)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["evenness"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(tmp_path)
    assert loaded.even_odds(0, torch.zeros(1, 2, 32), torch.ones(1, 2, dtype=torch.bool), torch.ones(1)) is None


def test_heads_for_evenness_read_text_that_counts_and_the_budget() -> None:
    modules = for_model(tiny.model().config, layers=(1, 2, 3), evenness=True, seed=2)
    text = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    budget = torch.tensor([0.5, 0.5])
    with torch.no_grad():
        odds = modules.even_odds(0, text, mask, budget)
        hidden = text.clone()
        hidden[:, 3:] = 9.0
        assert odds is not None and odds.shape == (2,) and odds.dtype == torch.float32
        torch.testing.assert_close(modules.even_odds(0, hidden, mask, budget), odds)
        assert not torch.equal(modules.even_odds(0, text, mask, budget / 8), odds)  # type: ignore[arg-type]
        assert not torch.equal(modules.even_odds(1, text, mask, budget), odds)  # type: ignore[arg-type]


def test_a_seed_makes_the_same_modules_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, same, other = (build(LVPruningConfig(width=16), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [one.stages[0].blocks[0].ffn[1].weight for one in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_copies_for_other_dtypes_are_made_once_and_change_nothing() -> None:
    made = build(LVPruningConfig(width=16))
    assert made.placed(torch.device("cpu"), torch.float32) is made
    half = made.placed(torch.device("cpu"), torch.bfloat16)
    assert half.dtype == torch.bfloat16 and made.dtype == torch.float32
    assert made.placed(torch.device("cpu"), torch.bfloat16) is half
    assert "placed" not in " ".join(made.state_dict()), "copies are not saved along"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_next"}, "with model_type='llava', not 'llava_next'"),
        ({"hidden_size": 48}, r"for a model \(tiny\) with hidden_size=32, not 48; load that model"),
        ({"num_hidden_layers": 6}, "num_hidden_layers=4, not 6"),
    ],
)
def test_a_model_of_another_shape_is_refused(change: dict[str, Any], message: str) -> None:
    made = for_model(tiny.model().config, layers=(1, 2, 3), base_name="tiny")
    config = tiny.model().config
    for name, value in change.items():
        setattr(config if name == "model_type" else config.text_config, name, value)
    with pytest.raises(FoveateError, match=message):
        made.check(config)


def test_what_is_no_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"no decision modules can be loaded from .*nowhere"):
        load(tmp_path / "nowhere")
    tiny.model().save_pretrained(tmp_path / "model")
    with pytest.raises(FoveateError, match="holds a 'llava' model, no decision modules"):
        load(tmp_path / "model")


def test_damaged_and_other_files_are_refused(tmp_path: Path) -> None:
    save(for_model(tiny.model().config, layers=(1, 2, 3)), tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FoveateError, match="no decision modules can be loaded"):
        load(tmp_path)
    weights.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FoveateError, match="no decision modules can be loaded"):
        load(tmp_path)
    weights.write_bytes(whole)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "layers": [1, 2], "ratios": [0.5, 0.1], "blocks": 3}))
    with pytest.raises(FoveateError, match="are incomplete: "):
        load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 20}, "width=20 cannot be shared evenly by heads=8"),
        ({"width": 16, "layers": [1, 2]}, "3 ratios for 2 layers"),
        ({"borders": [float("nan")]}, "are not up to 16 finite numbers"),
        ({"borders": [0.5] * 17}, "are not up to 16 finite numbers"),
    ],
)
def test_shapes_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        build(LVPruningConfig(**settings))


@pytest.mark.parametrize("folder", ["lvpruning", "dynamicvit", "crossget"])
def test_modules_are_found_beside_their_model(folder: str, tmp_path: Path) -> None:
    assert storage.find("mini", folder).endswith(str(Path("scenes") / "checkpoint" / folder))
    assert storage.find("owner/name", folder) == "owner/name"
    assert storage.find(tmp_path, folder) == str(tmp_path)
    save(build(LVPruningConfig(width=16)), tmp_path / folder)
    assert storage.find(tmp_path, folder) == str(tmp_path / folder)
