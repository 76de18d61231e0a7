"""Encoders that run the patches of all pictures as one sequence: what the probe sees of each, and where."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import tiny
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from foveate.choosing.packing import to_tokens
from foveate.core import Block
from foveate.families import family_of
from foveate.families.layouts import Encoded
from foveate.ops.scores import attention_sums
from foveate.runtime.encoder.probe import Probe
from foveate.runtime.encoder.watch import PackedWatch

PACKED = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "mistral3")
SUMS = ("received", "given", "received_all")
NEEDS = tuple(f"tower.read.{name}" for name in (*SUMS, "keys", "hidden"))


def seen(model: Any, given: Any, needs: tuple[str, ...] = NEEDS) -> dict[int | str, Block]:
    """What the probe shows of one encoding, patch by patch."""
    probe = Probe(model, family_of(model), needs)
    probe.install()
    encode = model.model.get_image_features
    names = [name for name in inspect.signature(encode).parameters if name in given]
    with torch.no_grad():
        encode(**{name: given[name] for name in names}, return_dict=True)
    probe.remove()
    return probe.take()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PACKED)
def test_a_picture_shows_the_same_alone_and_among_others(name: str, attn: str) -> None:
    model = tiny.model(name, attn=attn)
    given = tiny.inputs(model, "1i", "1i", "1i")
    together = seen(model, given)["read"]
    start = 0
    for row in range(3):
        alone = seen(model, given.alone(row))["read"]
        assert alone.received is not None
        patches = slice(start, start + alone.received.shape[1])
        start = patches.stop
        for field, axis in (*((one, 1) for one in SUMS), ("keys", 2), ("hidden", 1)):
            whole, part = getattr(together, field), getattr(alone, field)
            torch.testing.assert_close(whole.narrow(axis, patches.start, part.shape[axis]), part, atol=1e-5, rtol=1e-4)
    assert together.received is not None
    assert together.received.shape == (1, start)
    torch.testing.assert_close(together.received.sum(), torch.tensor(3.0))


def test_sums_are_those_of_the_whole_map() -> None:
    """Written out: every head's softmax over one picture's patches, from the block's own queries and keys."""
    model = tiny.model("qwen2-vl")
    given = tiny.inputs(model, "1i")
    block = model.model.visual.blocks[-1]
    inputs: dict[str, Any] = {}
    hook = block.attn.register_forward_pre_hook(
        lambda _, arguments, options: inputs.update(hidden=arguments[0], **options), with_kwargs=True
    )
    found = seen(model, given)["read"]
    hook.remove()
    length, heads = inputs["hidden"].shape[0], block.attn.num_heads
    queries, keys, _ = block.attn.qkv(inputs["hidden"]).reshape(length, 3, heads, -1).permute(1, 0, 2, 3).unbind(0)
    queries, keys = apply_rotary_pos_emb_vision(queries, keys, *inputs["position_embeddings"])
    logits = torch.einsum("qhd,khd->hqk", queries, keys) * queries.shape[-1] ** -0.5
    attention = logits.softmax(dim=-1).mean(dim=0).detach()
    torch.testing.assert_close(found.received, attention.mean(dim=0)[None])
    torch.testing.assert_close(found.given, attention.mean(dim=1)[None])


def test_attention_is_read_where_a_block_sees_the_whole_picture() -> None:
    """Blocks 2 and 5 of 6 do; sums are asked of blocks 0, 4 and 5, hidden states come from the named blocks."""
    model = tiny.model("qwen2.5-vl", blocks=6)
    given = tiny.inputs(model, "1i")
    needs = tuple(f"tower.{block}.{field}" for block in (0, 4, 5) for field in ("received", "hidden"))
    found = seen(model, given, (*needs, "tower.2.received"))
    for name, block in (("0", 2), ("4", 2), ("5", 5)):
        assert torch.equal(found[name].received, found[block].received)  # type: ignore[arg-type]
    hidden = [found[name].hidden for name in ("0", "4", "5")]
    assert not any(torch.equal(one, other) for one, other in pairwise(hidden))  # type: ignore[arg-type]


def test_tokens_average_their_patches_in_the_order_of_the_picture() -> None:
    """A picture without windows (all of it in one) shows each token the mean of its four patches, wherever they run."""
    model = tiny.model("qwen2.5-vl", blocks=6)
    given = tiny.inputs(model, "1i", "1i")
    found = seen(model, given)
    tower = model.model.visual
    with torch.no_grad():
        stock = tower(given["pixel_values"], grid_thw=given["image_grid_thw"])
    rows = [24, 24]
    made = to_tokens(found, family_of(model).layouts(Encoded(model, tower, given, rows, lambda: rows)), packed=True)[
        "read"
    ]
    assert made.hidden is not None
    assert made.hidden.shape == (2, 24, 32)
    # The merger maps each group of four by itself, so what it makes of a token tells which group that is.
    hidden = found["read"].hidden
    assert hidden is not None
    groups = tower.merger(hidden[0])
    order = [int((groups - token).abs().sum(dim=1).argmin()) for token in stock.pooler_output]
    means = hidden[0].view(-1, 4, 32).mean(dim=1)[torch.tensor(order)]
    torch.testing.assert_close(made.hidden.flatten(0, 1), means)
    assert order != sorted(order), "windows shuffle the tokens"


def test_bounds_that_flash_attention_is_given() -> None:
    """One call for all pictures, told apart by cumulative lengths."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 1, 2, 7, 4, generator=generator)
    watch = PackedWatch(torch.nn.Identity(), torch.nn.Identity(), {"received", "keys"}, 0)
    watch.bounds = [0, 3, 7]
    watch.read_attention(queries, keys, None, 0.5)
    found = watch.take()
    parts = [attention_sums(queries[:, :, part], keys[:, :, part], 0.5) for part in (slice(0, 3), slice(3, 7))]
    torch.testing.assert_close(found.received, torch.cat([part.received for part in parts], dim=1))
    assert torch.equal(found.keys, keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("additive", [False, True])
def test_bounds_read_from_a_mask(additive: bool) -> None:
    open_ = torch.block_diag(torch.ones(2, 2), torch.ones(1, 1), torch.ones(3, 3)).bool()[None, None]
    mask: Tensor = torch.zeros(open_.shape).masked_fill(~open_, torch.finfo(torch.float32).min) if additive else open_
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 1, 2, 6, 4, generator=generator)
    watch = PackedWatch(torch.nn.Identity(), torch.nn.Identity(), {"received"}, 0)
    watch.read_attention(queries, keys, mask, 0.5)
    found = watch.take().received
    assert found is not None
    torch.testing.assert_close(found.sum(), torch.tensor(3.0))
    assert float(found[0, 2]) == 1.0
