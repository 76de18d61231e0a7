"""How a step is divided: the arithmetic against what autograd holds, and what it gives for models of known size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from foveate.core import FoveateError
from foveate.cost import ModelShape, shape, training_memory
from foveate.modules.lvpruning import for_model
from foveate.train.conversations import Extent
from foveate.train.losses import IGNORED
from foveate.train.memory import divide
from foveate.train.softened import Softened, can_recompute

WIDTH, INNER, HEADS, LAYERS, WORDS, IMAGE = 64, 176, 4, 6, 32, 5
ROWS, VISUAL, TEXT = 2, 16, 40
DEPTHS = (1, 2, 3)


def small(dtype: torch.dtype, kv_heads: int) -> Any:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=kv_heads, vocab_size=WORDS,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config).to(dtype).eval()


class Fused(torch.autograd.Function):
    """Attention as kernels for devices do it: no map of it is kept, it is made anew for the gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            output = attention(query, key, value, mask)
        ctx.save_for_backward(query, key, value, mask, output, query[..., 0].float())  # the last: a sum for each query
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with torch.enable_grad():
            given = [one.detach().requires_grad_() for one in ctx.saved_tensors[:4]]
            return torch.autograd.grad(attention(*given), given, gradients)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + mask
    return scores.softmax(dim=-1) @ value


def held(model: Any, modules: nn.Module, bf16: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that a forward pass leaves for the backward pass, weights and the loss's own not counted."""
    stock = nn.functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if attn_mask is None or not attn_mask.requires_grad:
            return stock(query, key, value, attn_mask, **options)
        output: Tensor = Fused.apply(query, key, value, attn_mask)
        return output

    softened = Softened(model, modules, (0.5, 0.3, 0.1), checkpointing=checkpointing)
    ids = torch.randint(10, WORDS, (ROWS, VISUAL + TEXT))
    ids[:, 2 : 2 + VISUAL] = IMAGE
    labels = ids.clone()
    labels[:, :50] = IGNORED
    features = torch.randn(ROWS, VISUAL, WIDTH).to(model.dtype)
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *modules.parameters())}
    found: dict[int, int] = {}
    alive = []

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(value)
        return value

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", fused)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            softened(ids, torch.ones_like(ids), labels, features=features)
    return sum(found.values())


@pytest.mark.parametrize(
    ("dtype", "bf16", "kv_heads"),
    [(torch.bfloat16, True, 4), (torch.float32, True, 4), (torch.float32, False, 4), (torch.bfloat16, True, 2),
     (torch.bfloat16, False, 4)],
)  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_kept_is_what_autograd_holds(
    dtype: torch.dtype, bf16: bool, kv_heads: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(dtype, kv_heads)
    if checkpointing and not can_recompute(model):
        pytest.skip("older versions recompute hooks as well")
    modules = for_model(model.config, layers=DEPTHS).train()
    stored, learned = dtype.itemsize, 2 if bf16 else 4
    computed = 2 if bf16 else stored
    sizes = {"stored": stored, "computed": computed, "learned": learned, "checkpointing": checkpointing}
    memory = training_memory(ModelShape.from_config(model.config), layers=DEPTHS, visual=VISUAL, text=TEXT, **sizes)
    weights = sum(one.numel() for one in modules.parameters())
    assert memory.modules == weights * (16 + (learned if bf16 else 0))
    expected = ROWS * memory.kept
    expected += weights * learned if bf16 else 0  # the copies in 16 bits
    decoder = ModelShape.from_config(model.config).decoder
    expected += decoder.weights * 2 if stored > computed and not checkpointing else 0
    if checkpointing:  # a block that is recomputed holds its arguments, which no hook sees, the mask among them
        expected -= ROWS * (LAYERS - 1) * (VISUAL + TEXT) ** 2 * computed
    assert held(model, modules, bf16, checkpointing, monkeypatch) == pytest.approx(expected, rel=0.07)


def sized(name: str) -> Any:
    """A model of which only the sizes are there."""
    width, inner, layers, heads = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40)}[name]
    text = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=32064,
    )  # fmt: skip
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig(text_config=text.to_dict())).bfloat16()


LONG = Extent(visual=576, text=1472)
"""The longest row that LLaVA-1.5 is trained with."""


def divided(base: Any, layers: tuple[int, ...] = (1, 8, 16), **changes: Any) -> Any:
    options: dict[str, Any] = {
        "batch": 64,
        "processes": 1,
        "micro": None,
        "checkpointing": None,
        "bf16": True,
        **changes,
    }
    return divide(base, LONG, layers, **options)


def test_the_defaults_fit_one_card() -> None:
    seven = sized("7b")
    made = divided(seven)
    assert (made.micro, made.parts, made.checkpointing) == (4, 16, False)
    assert made.memory.total(4) < 72e9 < made.memory.total(8), "nine tenths of the card; twice the rows would not fit"
    assert str(made) == (
        "4 rows at once, 16 times a step, blocks kept: "
        "68.9 GB by arithmetic for rows of 576 visual tokens and 1472 others"
    )
    assert (divided(seven, processes=8).micro, divided(seven, processes=8).parts) == (4, 2)
    again = divided(seven, checkpointing=True)
    assert (again.micro, again.parts) == (16, 4) and again.memory.total(16) < 72e9 < again.memory.total(32)
    more = divided(seven, micro=16)
    assert (more.micro, more.checkpointing) == (16, True), "more rows than fit with their blocks kept"
    assert str(divided(seven, micro=64)).endswith("others, more than a card of 80 GB")
    assert divided(seven, micro=8, checkpointing=False).micro == 8
    larger = divided(sized("13b"), (1, 10, 20))
    assert (larger.micro, larger.checkpointing) == (8, True), "one row alone would fit with its blocks kept"


def test_seven_billion_by_hand() -> None:
    """One row of 2,048 tokens: what its blocks keep, the weights, and three modules with AdamW."""
    memory = training_memory(shape("llava-1.5-7b"), layers=(1, 8, 16), visual=576, text=1472)
    block = 2048 * (2 * 4 * 4096 + 2 * (4 * 4096 + 3 * 11008) + 4 * 32) + 2 * 2048**2
    module = 576 * (21 * 4096 + 8 * 1472 * 6) + 1472 * 5 * 4096
    assert memory.kept == 31 * block + 3 * 2 * module
    assert memory.weights == 2 * shape("llava-1.5-7b").weights
    assert memory.modules == 18 * 3 * (2 * (8 * 4096**2 + 7 * 4096) + 2 * 4096 + 2)
    assert memory.rows(memory.total(3)) == 3 and memory.rows(memory.total(3) - 1) == 2 and memory.rows(0) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 5, "micro": 2}, "batch=5 cannot be split over 1 processes of 2 rows at once; nearest: batch=4"),
        (
            {"batch": 64, "processes": 3},
            "batch=64 cannot be split over 3 processes of 1 rows at once; nearest: batch=63",
        ),
    ],
)
def test_a_step_that_cannot_be_divided_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        divided(small(torch.float32, 4), DEPTHS, **change)


def test_sizes_that_cannot_be_are_refused() -> None:
    seven = shape("llava-1.5-7b")
    with pytest.raises(FoveateError, match="a row of 0 visual tokens and 9 others cannot be trained on"):
        training_memory(seven, layers=(1,), visual=0, text=9)
    with pytest.raises(FoveateError, match=r"layers=\(1, 32\) are not all in 1\.\.31"):
        training_memory(seven, layers=(1, 32), visual=9, text=9)
