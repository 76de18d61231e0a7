"""A pass over graphs of torch's compiler: query heads that share keys and values read them where they lie.

Under a mask, which every static cache needs, transformers copies the keys and values of grouped heads once for each
query head, and a compiled token moves the whole cache several times. Of one token the query heads of a group are as
well rows of one head, which sees the same keys under the same mask.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

_aten = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu.default
_SAME_VALUES = {_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.clone.default}


class GroupedHeads(CustomGraphPass):
    """Attention of one query over repeated keys, without the repeating; what it does not know it leaves as it is."""

    def __call__(self, graph: Graph) -> None:
        """Change this graph in place."""
        for attention in graph.find_nodes(op="call_function", target=_ATTENTION):
            keys, values = (_before_repeating(node) for node in attention.args[1:3])
            if keys is not None and values is not None and _may_group(attention):
                _group(graph, attention, keys, values)

    def __eq__(self, other: object) -> bool:
        """Any two are the same: transformers compiles again where options differ from those of the call before."""
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def uuid(self) -> bytes:
        """What graphs that torch keeps are told apart by."""
        return get_hash_for_files((__file__,))


def _before_repeating(node: Any) -> Node | None:
    """The (B, G, L, D) of which a (B, H, L, D) holds each head H / G times; None where it is something else."""
    while node.target in _SAME_VALUES:
        node = node.args[0]
    if node.target is not _aten.expand.default:
        return None
    inserted = node.args[0]
    return inserted.args[0] if inserted.target is _aten.unsqueeze.default and inserted.args[1] == 2 else None


def _shape(node: Any) -> torch.Size:
    return node.meta["val"].shape


def _may_group(attention: Node) -> bool:
    """Whether it is of one query, which sees what a mask that all heads share lets it see."""
    mask = attention.kwargs.get("attn_mask")
    causal = len(attention.args) > 4 and attention.args[4]
    shared = mask is None or (len(_shape(mask)) == 4 and _shape(mask)[1] == 1)
    output_alone = all(part.args[1] == 0 or not part.users for part in attention.users)
    return _shape(attention.args[0])[2] == 1 and shared and not causal and output_alone


def _group(graph: Graph, attention: Node, keys: Node, values: Node) -> None:
    query, groups = attention.args[0], _shape(keys)[1]
    _, heads, _, width = _shape(query)
    with graph.inserting_before(attention):
        rows = graph.call_function(_aten.reshape.default, (query, [-1, groups, heads // groups, width]))
        grouped = graph.call_function(_ATTENTION, (rows, keys, values, *attention.args[3:]), dict(attention.kwargs))
        output = graph.call_function(operator.getitem, (grouped, 0))
        output = graph.call_function(_aten.reshape.default, (output, [-1, heads, 1, _shape(values)[3]]))
    for part in list(attention.users):
        part.replace_all_uses_with(output)
        graph.erase_node(part)
    graph.erase_node(attention)
