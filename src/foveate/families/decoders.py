"""Reads the sizes of a decoder from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from foveate.core import FoveateError, did_you_mean
from foveate.families.entries import Entries, entries, size
from foveate.families.shapes import DecoderShape, Experts, UnknownShape

# Decoders of gated blocks, each with the sizes that its config.json may leave out.
DECODERS: Mapping[str, Mapping[str, int]] = {
    "llama": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "mistral": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "qwen2": {},
    "qwen3": {},
    "qwen2_vl_text": {},
    "qwen2_5_vl_text": {},
    "qwen3_vl_text": {},
    "glm4v_text": {},
    "glm_ocr_text": {},
    "gemma4_text": {},
    "cohere2": {},
    "qwen3_vl_moe_text": {},
    "glm4v_moe_text": {},
    "paddleocr_vl_text": {},
}

# ... those of them whose blocks have experts.
_SPARSE = ("qwen3_vl_moe_text", "glm4v_moe_text")


def decoder_of(top: Entries, own: str | None = None) -> DecoderShape:
    """The decoder of a configuration, or of its `text_config`.

    Args:
        own: its type, where the configuration of the whole names none.

    Raises:
        UnknownShape: a decoder of unknown type.
        FoveateError: a size that the configuration does not state.
    """
    given = entries(top.get("text_config") or top)
    kind = str(own or given.get("model_type") or ("llama" if "text_config" in top else None))
    if kind not in DECODERS:
        raise UnknownShape(f"the shape of a {kind!r} decoder is not known; {did_you_mean(kind, DECODERS)}")
    text = {**DECODERS[kind], **{key: value for key, value in given.items() if value is not None}}
    where = f"the {kind} config"
    # By default this one says that the head is tied, and stock transformers asks the whole model alone.
    heard = kind != "qwen3_vl_moe_text" and text.get("tie_word_embeddings")
    shape = dataclasses.replace(
        _dense(text, where),
        tied=bool(top.get("tie_word_embeddings") or heard),
        experts=_experts(text, where) if kind in _SPARSE else None,
    )
    return _gemma4_decoder(text, shape) if kind == "gemma4_text" else shape


def assume_decoder(top: Entries) -> DecoderShape:
    """A decoder of unknown type, as if its blocks were dense and gated, by the usual names of sizes.

    Raises:
        FoveateError: a size that the configuration does not state.
    """
    text = {key: value for key, value in entries(top.get("text_config") or top).items() if value is not None}
    return _dense(text, f"the {text.get('model_type')} config")


def _dense(text: Entries, where: str) -> DecoderShape:
    width, heads = size(text, "hidden_size", where), size(text, "num_attention_heads", where)
    return DecoderShape(
        layers=size(text, "num_hidden_layers", where),
        width=width,
        ffn=size(text, "intermediate_size", where),
        heads=heads,
        kv_heads=size({"num_key_value_heads": heads, **text}, "num_key_value_heads", where),
        head_width=size({"head_dim": width // max(1, heads), **text}, "head_dim", where),
        vocabulary=size(text, "vocab_size", where),
    )


def _experts(text: Entries, where: str) -> Experts | None:
    """The experts of a decoder, in the blocks that have them: from some block on, every so many, or not in a list."""
    layers, every = size(text, "num_hidden_layers", where), int(text.get("decoder_sparse_step") or 1)
    dense = {*range(int(text.get("first_k_dense_replace") or 0)), *(text.get("mlp_only_layers") or ())}
    blocks = tuple(block for block in range(layers) if block not in dense and (block + 1) % every == 0)
    if not blocks:
        return None
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    width = size(text, "moe_intermediate_size", where)
    return Experts(
        count=size(text, next((name for name in names if name in text), names[-1]), where),
        chosen=size(text, "num_experts_per_tok", where),
        width=width,
        blocks=blocks,
        shared=int(text.get("n_shared_experts") or 0) * width,
    )


def _gemma4_decoder(text: Entries, shape: DecoderShape) -> DecoderShape:
    """Wide heads where a layer has no window, the last layers without keys and values, inputs of each layer's own.

    Every layer counts on all tokens, though transformers runs the last ones on the last token alone where it can.
    """
    where = "the gemma4_text config"
    if text.get("enable_moe_block"):
        raise FoveateError("the shape of a gemma4 decoder with experts is not known")
    count, kinds = shape.layers, text.get("layer_types")
    if kinds is None or len(kinds) != count:
        raise FoveateError(f"{where} states layer_types={kinds!r}; a config object made by transformers fills them in")
    inner = int(text.get("hidden_size_per_layer_input") or 0)
    # The map that makes a layer's input of the token, the gate, and the way back.
    beside = ((shape.width, inner), (shape.width, inner), (inner, shape.width)) if inner else ()
    shared = int(text.get("num_kv_shared_layers") or 0)
    stated = text.get("per_layer_config")
    blocks = []
    for number, kind in enumerate(kinds):
        whole, own = kind == "full_attention", number < count - shared
        # An object of transformers says it of each layer that differs, a config.json of all without a window.
        mine = {} if stated is None else stated.get(str(number)) or stated.get(number) or {}
        if whole and stated is None:
            mine = {"head_dim": text.get("global_head_dim", 512)}
            if text.get("attention_k_eq_v"):
                mine["num_key_value_heads"] = text.get("num_global_key_value_heads") or shape.kv_heads
        blocks.append(
            dataclasses.replace(
                shape,
                layers=1,
                ffn=shape.ffn * (2 if text.get("use_double_wide_mlp") and not own else 1),
                kv_heads=size({"num_key_value_heads": shape.kv_heads, **mine}, "num_key_value_heads", where),
                head_width=size({"head_dim": shape.head_width, **mine}, "head_dim", where),
                own_keys=own,
                own_values=own and not (whole and text.get("attention_k_eq_v")),
                beside=beside,
            )
        )
    tables = ((size(text, "vocab_size_per_layer_input", where), count * inner),) if inner else ()
    return dataclasses.replace(shape, tables=tables, blocks=tuple(blocks))
