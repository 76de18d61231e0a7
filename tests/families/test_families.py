"""The rows of the families: which model has which, where its encoder is, and which block its projector reads."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from foveate.core import FoveateError
from foveate.families import family_of
from foveate.families.rows import FAMILIES, UNFIT
from foveate.families.towers import TOWERS, Tower

BLOCKS = 4  # of the tiny encoders
KNOWN = ", ".join(f"{family.name} ({', '.join(family.types)})" for family in FAMILIES)


def refusal(model: object) -> str:
    with pytest.raises(FoveateError) as error:
        family_of(model)
    return str(error.value)


def fake(kind: str | None, **more: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(model_type=kind, **more))


# ---------------------------------------------------------------------------------------------------------------------
# which model


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_tiny_model_of_each_family_is_known(name: str) -> None:
    assert family_of(tiny.model(name)).name == name


@pytest.mark.parametrize("what", ["mini", 7, None, nn.Linear(2, 2), fake(None)])
def test_what_is_no_model_of_transformers(what: object) -> None:
    assert refusal(what) == (
        f"{type(what).__name__} is no transformers model; load one with AutoModelForImageTextToText"
    )


def test_a_model_that_sees_nothing() -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    assert refusal(LlamaForCausalLM(config)) == (
        f"LlamaForCausalLM (llama) is no vision-language model; known families: {KNOWN}"
    )


def test_a_model_without_a_row_that_lacks_standard_parts() -> None:
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = CLIPConfig(
        text_config=dict(vocab_size=8, eos_token_id=1, bos_token_id=0, pad_token_id=0, **sizes),
        vision_config=dict(image_size=4, patch_size=2, **sizes),
        projection_dim=4,
    )
    assert refusal(CLIPModel(config)) == (
        "CLIPModel (clip) has no row among the families, and a row cannot be made for it without generate(), "
        "image_token_id in its configuration, get_decoder().layers, get_decoder().norm, mm_encoder_outputs among the "
        "arguments of forward(); `foveate models` lists the families"
    )


@pytest.mark.parametrize("kind", list(UNFIT))
def test_a_model_that_is_known_not_to_fit(kind: str) -> None:
    assert not any(kind in family.types for family in FAMILIES)
    assert refusal(fake(kind, vision_config={})) == (
        f"SimpleNamespace ({kind}) cannot be pruned: {UNFIT[kind]}; `foveate models` lists the families"
    )


def test_a_model_that_cannot_generate() -> None:
    base = tiny.model().model
    assert refusal(base) == ("LlavaModel has no generate(); load it with AutoModelForImageTextToText, not AutoModel")


def test_rows_do_not_overlap() -> None:
    names = [family.name for family in FAMILIES]
    types = [kind for family in FAMILIES for kind in family.types]
    towers = [tower.type for tower in TOWERS]
    for listed in (names, types, towers):
        assert len(set(listed)) == len(listed) > 0
    for family in FAMILIES:
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in family.hub_ids)
        assert tuple(map(int, family.transformers.split("."))) >= (5, 18)


# ---------------------------------------------------------------------------------------------------------------------
# its parts


@pytest.mark.parametrize(("kind", "summary"), [("clip", 1), ("siglip", 0)])
def test_the_encoder_and_its_blocks(kind: str, summary: int) -> None:
    model = tiny.model(tower=kind)
    tower, row = family_of(model).tower_of(model)
    assert tower is model.model.vision_tower
    assert row.summary == summary
    blocks = row.blocks_of(tower)
    assert len(blocks) == BLOCKS
    for block in blocks:
        attention = getattr(block, row.attention)
        assert {"q_proj", "k_proj"} <= {name for name, _ in attention.named_children()}
    tokens = tower(torch.zeros(1, 3, tiny.IMAGE_SIDE, tiny.IMAGE_SIDE)).last_hidden_state.shape[1]
    height, width = family_of(model).grid(model.config)
    assert tokens == summary + height * width


def test_the_projector_and_the_placeholder() -> None:
    model = tiny.model()
    family = family_of(model)
    assert family.image_token_id(model.config) == tiny.IMAGE
    assert family.grid(model.config) == tiny.GRID
    module: Any = model.base_model
    for name in family.projector.split("."):
        module = getattr(module, name)
    assert module is model.model.multi_modal_projector


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_parts_of_every_family_are_where_it_says(name: str) -> None:
    model = tiny.model(name)
    family = family_of(model)
    tower, row = family.tower_of(model)
    assert isinstance(tower, nn.Module)
    for block in row.blocks_of(tower):
        assert hasattr(getattr(block, row.attention), "config")
    for path in filter(None, (family.projector, family.norm)):
        module: Any = model.base_model
        for part in path.split("."):
            module = getattr(module, part)
        assert isinstance(module, nn.Module)
    assert 0 <= family.read_block(model) < len(row.blocks_of(tower))
    assert family.image_token_id(model.config) == tiny.IMAGE
    if family.deepstack is not None:
        assert callable(getattr(model.get_decoder(), family.deepstack))


def test_the_projector_maps_each_token_by_itself() -> None:
    """What `pointwise` promises: any subset of the tokens gives the same as all of them, cut afterwards."""
    model = tiny.model()
    assert family_of(model).pointwise
    encoded = torch.randn(1, 10, 32)
    kept = torch.tensor([1, 4, 9])
    project = model.model.multi_modal_projector
    torch.testing.assert_close(project(encoded[:, kept]), project(encoded)[:, kept])


def test_an_encoder_that_is_not_described() -> None:
    tower = nn.Module()
    tower.config = SimpleNamespace(model_type="dinov2")  # type: ignore[assignment]
    model = SimpleNamespace(base_model=SimpleNamespace(vision_tower=tower))
    known = ", ".join(row.type for row in TOWERS)
    with pytest.raises(FoveateError) as error:
        FAMILIES[0].tower_of(model)
    assert str(error.value) == (f"llava-1.5: the vision encoder 'dinov2' is not described; known encoders: {known}")


# ---------------------------------------------------------------------------------------------------------------------
# the block that is read


def read_by_transformers(model: Any, tower: Any, row: Tower, layer: int) -> list[int]:
    """The blocks whose output is the hidden state of this number, found by running the encoder."""
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: outputs.append(output)) for block in row.blocks_of(tower)
    ]
    pixels = torch.randn(1, 3, tiny.IMAGE_SIDE, tiny.IMAGE_SIDE, generator=torch.Generator().manual_seed(0))
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    return [number for number, output in enumerate(outputs) if torch.equal(output, hidden[layer])]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("layer", "block"),
    [(-2, 2), (-1, 3), (-4, 0), (1, 0), (3, 2), (4, 3), ([-2], 2), ([1, 2, 3], 2), ([-3, -1], 3), ([3, 1], 0)],
)
def test_the_block_that_the_projector_reads(kind: str, layer: Any, block: int) -> None:
    model = tiny.model(tower=kind)
    model.config.vision_feature_layer = layer
    family = family_of(model)
    assert family.read_block(model) == block
    tower, row = family.tower_of(model)
    last = layer if isinstance(layer, int) else layer[-1]
    assert read_by_transformers(model, tower, row, last) == [block]


@pytest.mark.parametrize(("layer", "block"), [(0, -1), (5, 4), (-5, -1), (-6, -2), ([1, 0], -1)])
def test_a_projector_that_reads_no_block(layer: Any, block: int) -> None:
    model = tiny.model()
    model.config.vision_feature_layer = layer
    with pytest.raises(FoveateError) as error:
        family_of(model).read_block(model)
    assert str(error.value) == (
        f"llava-1.5: the projector reads encoder block {block}, outside 0..3; set vision_feature_layer to 1..4 or "
        "-4..-1"
    )
