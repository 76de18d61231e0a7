"""Sums by the processor's fused kernel, against whole maps in float64; where it does not say the sums, nothing does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.ops import fused
from foveate.ops.scores import attention_sums

needs_kernel = pytest.mark.skipif(fused._KERNEL is None, reason="this torch has no such kernel")


def drawn(tokens: int, width: int, batch: int = 2, heads: int = 3, spread: float = 1.5) -> tuple[Tensor, ...]:
    """Queries, keys and values as an encoder has them: heads behind tokens in memory."""
    generator = torch.Generator().manual_seed(tokens + width)
    made = torch.randn(3, batch, tokens, heads, width, generator=generator) * spread
    return made.bfloat16().transpose(2, 3).unbind()


def logits(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    return torch.einsum("bhmd,bhnd->bhmn", queries.double(), keys.double()) * scale


@needs_kernel
@pytest.mark.parametrize("spread", [0.1, 1.5, 12.0], ids=["flat", "as usual", "peaked"])
@pytest.mark.parametrize(("tokens", "width"), [(5, 4), (40, 64), (90, 80), (1100, 7)])
def test_what_keys_are_given(tokens: int, width: int, spread: float) -> None:
    queries, keys, _ = drawn(tokens, width, spread=spread)
    queries = queries[:, :, 2:]  # fewer than keys
    table = logits(queries, keys, 0.3)
    found = fused.column_sums(queries, keys, 0.3, table.logsumexp(dim=-1).float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), table.softmax(dim=-1).sum(dim=2), rtol=2e-3, atol=1e-6)
    if spread < 12:  # where logits are thousands float32 itself is no finer
        torch.testing.assert_close(found.double(), table.softmax(dim=-1).sum(dim=2), rtol=1e-4, atol=1e-6)


@needs_kernel
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_all_three_sums(skip: int) -> None:
    queries, keys, values = drawn(60 + skip, 16)
    with fused.RowSums() as seen:
        scaled_dot_product_attention(queries, keys, values, scale=0.25)
    log_sums = seen.of(queries, keys)
    assert log_sums is not None
    sums = attention_sums(queries, keys, 0.25, skip, log_sums=log_sums)
    attention = logits(queries, keys, 0.25).softmax(dim=-1).mean(dim=1)
    wanted = {
        "received": attention[:, skip:, skip:].mean(dim=1),
        "given": attention[:, skip:, skip:].mean(dim=2),
        "received_all": attention[:, :, skip:].mean(dim=1),
    }
    for name, vector in wanted.items():
        torch.testing.assert_close(getattr(sums, name).double(), vector, rtol=1e-4, atol=1e-6)


@needs_kernel
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_models_own_attention_tells_the_rows_sums(mode: Callable[[], AbstractContextManager[None]]) -> None:
    queries, keys, values = drawn(33, 16)
    with mode():
        queries.requires_grad_(torch.is_grad_enabled())
        plain = scaled_dot_product_attention(queries, keys, values, scale=0.25)
        with fused.RowSums() as seen:
            looked_at = scaled_dot_product_attention(queries, keys, values, scale=0.25)
    assert torch.equal(looked_at, plain)
    log_sums = seen.of(queries, keys)
    assert log_sums is not None
    assert not log_sums.requires_grad
    torch.testing.assert_close(
        log_sums.double(), logits(queries, keys, 0.25).detach().logsumexp(dim=-1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {"attn_mask": torch.ones(9, 9).tril().bool()}, {"times": 2}, {"times": 0}, {"of": 4}],
    ids=["causal", "masked", "twice", "never", "of others"],
)
def test_sums_that_say_something_else_are_not_taken(options: dict[str, Any]) -> None:
    queries, keys, values = drawn(9, 16)
    times, of = options.pop("times", 1), options.pop("of", 9)
    with fused.RowSums() as seen:
        for _ in range(times):
            scaled_dot_product_attention(queries, keys, values, **options)
    assert seen.of(queries[:, :, :of], keys[:, :, :of]) is None
    assert seen.of(queries[:, :, :of], keys) is None
    assert seen.of(queries, keys[:, :, :of]) is None


def test_it_helps_where_products_are_cheap() -> None:
    queries = drawn(9, 16)[0]
    assert fused.helps(queries) == (fused._KERNEL is not None)
    assert not fused.helps(queries.float())
    assert not fused.helps(queries.to("meta"))
