"""The pass over compiled graphs by which query heads that share keys read them without copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

from foveate.inference.grouped import GroupedHeads

B, HEADS, LENGTH, WIDTH = 2, 6, 7, 4
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def given(groups: int, queries: int = 1, heads_of_mask: int = 1) -> tuple[Tensor, ...]:
    """Query, key, value and a mask under which the second sequence sees less."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, B, groups, LENGTH, WIDTH)
    mask = torch.zeros(B, heads_of_mask, queries, LENGTH)
    mask[1, ..., :3] = float("-inf")
    return torch.randn(B, HEADS, queries, WIDTH), keys, values, mask


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, *repeated(key, value), attn_mask=mask)


def attend_unmasked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, *repeated(key, value))


def attend_causally(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, *repeated(key, value), is_causal=True)


def repeated(*tensors: Tensor) -> list[Tensor]:
    return [repeat_kv(one, HEADS // one.shape[1]) for one in tensors]


def passed(function: Any, *tensors: Tensor) -> tuple[GraphModule, list[tuple[int, ...]]]:
    """The graph of a function behind the pass, and the shapes of keys that its attention reads."""
    with torch.no_grad():
        graph = make_fx(function, tracing_mode="fake")(*tensors)
    GroupedHeads()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    nodes = graph.graph.find_nodes(op="call_function", target=ATTENTION)
    return graph, [tuple(node.args[1].meta["val"].shape) for node in nodes]


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_one_query_reads_keys_where_they_lie(groups: int) -> None:
    tensors = given(groups)
    graph, keys = passed(attend, *tensors)
    assert keys == [(B, groups, LENGTH, WIDTH)]
    torch.testing.assert_close(graph(*tensors), attend(*tensors), atol=1e-6, rtol=0)


def test_without_a_mask() -> None:
    tensors = given(2)[:3]
    graph, keys = passed(attend_unmasked, *tensors)
    assert keys == [(B, 2, LENGTH, WIDTH)]
    torch.testing.assert_close(graph(*tensors), attend_unmasked(*tensors), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "tensors", [given(6), given(2, queries=3), given(2, heads_of_mask=6)], ids=["own keys", "a prompt", "own masks"]
)
def test_other_attention_stays_as_it_is(tensors: tuple[Tensor, ...]) -> None:
    graph, keys = passed(attend, *tensors)
    assert keys == [(B, HEADS, LENGTH, WIDTH)]
    assert torch.equal(graph(*tensors), attend(*tensors))


def test_a_query_that_sees_the_first_key_alone_stays_so() -> None:
    tensors = given(2)[:3]
    graph, keys = passed(attend_causally, *tensors)
    assert keys == [(B, HEADS, LENGTH, WIDTH)]
    assert torch.equal(graph(*tensors), attend_causally(*tensors))


def test_options_of_two_calls_are_the_same() -> None:
    """transformers compiles again when they are not, and copies them for each call."""
    one = GroupedHeads()
    assert copy.deepcopy(one) == one == GroupedHeads()
    assert hash(one) == hash(GroupedHeads())
    assert one.uuid() == GroupedHeads().uuid()
    assert one != nn.Identity()
