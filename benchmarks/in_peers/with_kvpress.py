"""A Llama of random weights whose cache kvpress shortens, beside the same one as transformers runs it."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

from answering import Ticks, answer_commands


def made(asked: dict[str, Any]) -> dict[str, Any]:
    """The model, and what can be asked of it.

    Args:
        asked: the number of `threads`, the `config` of the Llama, the `length` of its prompt, entries `kept` of it, the
            `window` of queries that look, and the tokens of an `answer`.
    """
    import torch
    from kvpress import ObservedAttentionPress, SnapKVPress
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**asked["config"])).eval()
    ids = torch.randint(5, 60, (1, asked["length"]))
    gone = 1 - asked["kept"] / asked["length"]
    presses = {
        "SnapKVPress": lambda: SnapKVPress(compression_ratio=gone, window_size=asked["window"]),
        "ObservedAttentionPress": lambda: ObservedAttentionPress(compression_ratio=gone),
    }
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": asked["answer"]}

    def answer(press: str | None, attention: str) -> dict[str, float]:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        cache, shortens = DynamicCache(config=model.config), presses[press]()(model) if press else nullcontext()
        with torch.no_grad(), shortens:
            ticks = Ticks()
            model.generate(ids, past_key_values=cache, streamer=ticks, **options)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return {**ticks.figures(), "bytes": held}

    return {
        "answer": answer,
        "versions": lambda: {name: version(name) for name in ("kvpress", "transformers", "torch")},
    }


if __name__ == "__main__":
    answer_commands(made)
