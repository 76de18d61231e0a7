"""Prompts fed in pieces (`prefill_chunk_size`): the same as whole ones, or refused where a piece cannot be right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families.test_generic import newcomer
from models import tiny, tiny_families
from packaging.version import Version
from torch import Tensor

import foveate
from foveate.core import FoveateError
from foveate.families.rows import FAMILIES

EVERY = (*tiny.FAMILIES, *(name for name in tiny_families.KINDS if "/" in name))
TWO_WAY = (*(family.name for family in FAMILIES if family.two_way), "gemma4/31b")
ONE_WAY = tuple(name for name in EVERY if name not in TWO_WAY)
SIZES = (1, 5, 50)
since = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="stock chunks are wrong before")


def generate(model: Any, given: dict[str, Tensor], **options: Any) -> Any:
    made = model.generate(**given, max_new_tokens=4, return_dict_in_generate=True, output_logits=True, **options)
    return torch.stack(made.logits)


def rows_of(name: str) -> list[tuple[str, ...]]:
    """Prompts with pictures, and with videos where the family takes them."""
    kind = tiny_families.KINDS.get(name)
    pictures = ("3i4", "2i1i5", "6")
    return [pictures, ("3v4", "2v1v5", "6")] if kind is not None and kind.video is not None else [pictures]


@since
@pytest.mark.parametrize("method", ["random:keep=0.5", "fopru:keep=0.3"])
@pytest.mark.parametrize("name", ONE_WAY)
def test_a_prompt_in_pieces_gives_what_it_gives_whole(name: str, method: str) -> None:
    model = tiny.model(name, blocks=6)
    for rows in rows_of(name):
        given = tiny.inputs(model, *rows)
        with foveate.prune(model, method) as trace:
            whole = generate(model, given)
            kept = [image.kept.tolist() for image in trace.images]
            for size in SIZES:
                in_pieces = generate(model, given, prefill_chunk_size=size)
                torch.testing.assert_close(in_pieces, whole, atol=1e-4, rtol=0)
                assert [image.kept.tolist() for image in trace.images] == kept
    torch.testing.assert_close(generate(model, given, prefill_chunk_size=5), generate(model, given), atol=1e-4, rtol=0)


@since
@pytest.mark.parametrize("name", TWO_WAY)
def test_pieces_are_wrong_where_tokens_look_ahead(name: str) -> None:
    """The row tells the truth of stock transformers, pruning aside; once this fails, the refusal can go."""
    model = tiny.model(name)
    given = tiny.inputs(model, "1i2")
    assert (generate(model, given, prefill_chunk_size=5) - generate(model, given)).abs().max() > 0.1


@pytest.mark.parametrize("name", TWO_WAY)
@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_pieces_are_refused_where_tokens_look_ahead(name: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.runtime.generating.transformers.__version__", "5.23.0")
    model = tiny.model(name)
    given, options = tiny.inputs(model, "1i2"), {"prefill_chunk_size": 5}
    if by == "configuration":
        model.generation_config.prefill_chunk_size, options = 5, {}
    with foveate.prune(model, "random:keep=0.5") as trace, pytest.raises(FoveateError) as error:
        generate(model, given, **options)
    assert str(error.value) == (
        f"prefill_chunk_size=5: the prompt's tokens of {name.partition('/')[0]} attend to later ones too, which a "
        "chunk cuts off, pruned or not; leave it out"
    )
    assert not trace.history


def test_a_type_without_a_row_that_looks_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.runtime.generating.transformers.__version__", "5.23.0")
    model = newcomer()
    given = tiny.inputs(tiny.model(), "1i2")
    for stated, refused in ((None, False), ("vision", True)):
        model.config.text_config.use_bidirectional_attention = stated
        with pytest.warns(UserWarning, match="'newcomer' is no family"):
            handle = foveate.prune(model, "random:keep=0.5")
        assert handle.family.two_way == refused
        with handle:
            if refused:
                with pytest.raises(FoveateError, match="of newcomer attend to later ones too"):
                    generate(model, given, prefill_chunk_size=5)
            else:
                generate(model, given)
