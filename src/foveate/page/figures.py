"""What an answer took with and without pruning, and what the cost model says it would take elsewhere, as tables."""

from __future__ import annotations

from typing import Any

from foveate.core import FoveateError
from foveate.cost import estimate, shape
from foveate.page.asking import Asked
from foveate.page.seen import Seen
from foveate.trace import readable

STEPS = 64
"""Tokens of the answers that are predicted."""


def measured(sides: tuple[Asked, Asked], seen: Seen) -> str:
    """Markdown: tokens, times and bytes of the unpruned and the pruned answer."""
    call = seen.call
    before, after = (side.told for side in sides)
    rows = [
        ("visual tokens", f"{call.unpruned.equivalent_tokens:.4g}", f"{call.budget.equivalent_tokens:.4g}"),
        ("tokens of the prompt", str(call.prompt_length), str(call.length)),
        ("first token", *(_milliseconds(one["first_token_ms"]) for one in (before, after))),
        ("whole answer", *(_milliseconds(one["total_ms"] - one["queue_ms"]) for one in (before, after))),
        ("keys and values", readable(call.unpruned.kv_bytes, "B"), readable(call.kv_bytes, "B")),
    ]
    return _table(("measured here", "unpruned", "pruned"), rows)


def predicted(model: Any, seen: Seen, spec: str, device: str) -> str:
    """Markdown: what the cost model says of the same prompt on a device, unpruned and with a spec."""
    options: dict[str, Any] = {
        "visual": seen.call.images[0].original,
        "text": seen.text,
        "answer": STEPS,
        "hardware": device,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    try:
        sizes = shape(model.config)
        costs = [estimate(sizes, methods=methods, **options) for methods in (None, spec)]
    except FoveateError as error:
        return f"No prediction: {error}"
    rows = []
    for name, values, unit in (
        ("first token", [cost.first_token.seconds for cost in costs], "s"),
        (f"answer of {STEPS} tokens", [cost.total.seconds for cost in costs], "s"),
        ("operations to the first token", [cost.first_token.flops for cost in costs], "FLOPs"),
        ("keys and values", [cost.kv_bytes for cost in costs], "B"),
    ):
        shown = [_milliseconds(value * 1e3) if unit == "s" else readable(value, unit) for value in values]
        rows.append((name, *shown, f"{round(1 - values[1] / values[0], 2) + 0.0:.0%}"))
    told = _table((f"predicted on {device}", "unpruned", spec, "saved"), rows)
    return f"{told}\n\nBy arithmetic: the bound that the device's data sheet sets; a run takes longer."


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1e3:.3g} s"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rule = ("---", *("---:" for _ in head[1:]))
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
