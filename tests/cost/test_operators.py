"""Kernels: as many launches as PyTorch's own modules make, counted while they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.cost import DecoderShape, TowerShape
from foveate.cost.operators import decoder_block, output_head, patch_embedding, tower_block
from foveate.families.shapes import Experts

# What changes how a tensor is read, but starts nothing on a device.
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "alias", "detach", "lift_fresh"
}  # fmt: skip


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def kernels(run: Callable[[], Any]) -> int:
    with Counting() as counting, torch.no_grad():
        run()
    return sum(count for name, count in counting.found.items() if name not in VIEWS)


def llama(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=50)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers)).bfloat16().eval()


@pytest.mark.parametrize("layers", [1, 3])
def test_a_decoder(layers: int) -> None:
    shape = DecoderShape(layers, 32, 48, 4, 4, 8, 50)
    ids = torch.arange(20)[None]
    model = llama(layers)
    launched = kernels(lambda: model(ids, use_cache=True, logits_to_keep=1))
    block = decoder_block(shape, queries=20, keys=20, batch=1, fused=True)
    counted = layers * sum(one.launches for one in block) + sum(one.launches for one in output_head(shape, batch=1))
    assert counted == launched


def test_experts() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, vocab_size=50)
    routed = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, num_hidden_layers=3)
    found = {}
    for dense in ([0, 1, 2], []):
        config = Qwen3MoeConfig(**sizes, **routed, mlp_only_layers=dense)
        config._experts_implementation = "grouped_mm"
        model = Qwen3MoeForCausalLM(config).bfloat16().eval()
        found[not dense] = kernels(lambda model=model: model(torch.arange(20)[None], use_cache=True, logits_to_keep=1))
    shape = DecoderShape(3, 32, 48, 4, 4, 8, 50)
    block = [
        sum(one.launches for one in decoder_block(shape, queries=20, keys=20, batch=1, fused=True, experts=experts))
        for experts in (None, Experts(8, 2, 24, (0, 1, 2)))
    ]
    assert 3 * (block[1] - block[0]) == pytest.approx(found[True] - found[False], abs=3)


@pytest.mark.parametrize("layers", [1, 3])
def test_an_encoder(layers: int) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, image_size=24, patch_size=4)
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=layers)).bfloat16().eval()
    pixels = torch.zeros(1, 3, 24, 24, dtype=torch.bfloat16)
    shape = TowerShape(layers, 32, 48, 4, tokens=36, cls=True, patch=4)
    block = tower_block(shape, tokens=37, keys=37, batch=1, fused=True)
    around = patch_embedding(shape, patches=36, batch=1)
    counted = layers * sum(one.launches for one in block) + sum(one.launches for one in around)
    # Random pixels would be two more; the count of the norm behind the last block differs between versions.
    assert counted == pytest.approx(kernels(lambda: model(pixels)), abs=2)
