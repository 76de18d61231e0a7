"""Golden cases of the methods that rank tokens by the encoder's CLS attention, and of DART."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from golden.checks import Check, Seen, equal_to, same_set_as, scores_are
from golden.files import Arrays, Builder, Built, Settings, place, raster
from torch import Tensor

from foveate import methods
from foveate.core import Selection
from foveate.methods.dart import _in_prompt, _set_order

PATHS: dict[str, dict[str, str]] = {
    "fastervlm": {"cls_attention": "tower.read.cls_attention"},
    "vispruner": {"encoded": "tower.read.hidden", "cls_attention": "tower.read.cls_attention"},
    "hired": {"cls_attention_first": "tower.0.cls_attention", "cls_attention": "tower.read.cls_attention"},
    "hired_single": {"cls_attention": "tower.read.cls_attention"},
    "dart": {
        "hidden": "decoder.normed",
        "keys": "decoder.keys",
        "text_hidden": "decoder.text_normed",
        "text_keys": "decoder.text_keys",
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# builders


def tensors(name: str, arrays: Arrays) -> dict[str, Tensor]:
    return {array: torch.from_numpy(arrays[array]) for array in PATHS[name]}


def fastervlm(settings: Settings, arrays: Arrays) -> Built:
    method = methods.get("fastervlm")(keep=settings["visual_token_num"])
    values = tensors("fastervlm", arrays)
    batch, _, tokens = values["cls_attention"].shape
    signals = place(PATHS["fastervlm"], values, raster(tokens, batch), grid=tuple(settings["grid"]))
    return method, [signals], [Selection(list(torch.from_numpy(arrays["keep_sorted"])))]


def vispruner(settings: Settings, arrays: Arrays) -> Built:
    assert settings["removed_per_round"] == 8
    method = methods.get("vispruner")(keep=settings["visual_token_num"], ratio=settings["important_ratio"])
    values = tensors("vispruner", arrays)
    batch, tokens, _ = values["encoded"].shape
    signals = place(PATHS["vispruner"], values, raster(tokens, batch), grid=tuple(settings["grid"]))
    return method, [signals], [Selection(list(torch.from_numpy(arrays["keep_sorted"])))]


def hired(settings: Settings, arrays: Arrays) -> Built:
    """The tiles of the one image stand on the leading axis; here they follow each other on the token axis."""
    method = methods.get("hired")(
        keep=settings["token_budget_rate"],
        alpha=settings["alpha"],
        layout=tuple(settings["subgrid"]),
        official=True,
    )
    tiles, _, tokens = arrays["cls_attention"].shape
    values = {
        name: value.permute(1, 0, 2).reshape(1, -1, tiles * tokens) for name, value in tensors("hired", arrays).items()
    }
    tile = torch.arange(tiles).repeat_interleave(tokens)[None]
    signals = place(PATHS["hired"], values, raster(tiles * tokens, 1), tile=tile)
    return method, [signals], [Selection(list(torch.from_numpy(arrays["keep_sorted"])))]


def hired_single(settings: Settings, arrays: Arrays) -> Built:
    method = methods.get("hired")(keep=settings["token_budget_rate"])
    values = tensors("hired_single", arrays)
    # One tile has nothing to share, so that the first block's attention is not stored and must not matter.
    nothing = torch.zeros_like(values["cls_attention"])
    paths = {**PATHS["hired_single"], "cls_attention_first": PATHS["hired"]["cls_attention_first"]}
    index = raster(nothing.shape[2], nothing.shape[0])
    signals = place(paths, {**values, "cls_attention_first": nothing}, index, grid=tuple(settings["grid"]))
    return method, [signals], [Selection(list(torch.from_numpy(arrays["keep_sorted"])))]


def dart(settings: Settings, arrays: Arrays) -> Built:
    """The text before the image is not stored: it is here for its length, which decides the places in the prompt."""
    image, text = settings["pivot_image_token"], settings["pivot_text_token"]
    method = methods.get("dart")(
        keep=(image + text) * settings["picks_per_pivot"] + image, pivots=image, text_pivots=text, official=True
    )
    values, before = tensors("dart", arrays), settings["vision_token_start_index"]
    values["text_hidden"] = torch.nn.functional.pad(values["text_hidden"], (0, 0, before, 0))
    values["text_keys"] = torch.nn.functional.pad(values["text_keys"], (0, 0, before, 0), value=1e3)
    words = torch.arange(before + settings["text_tokens"])[None]
    more = {"text_mask": words >= 0, "after_image": words >= before}
    signals = place(PATHS["dart"], values, raster(values["hidden"].shape[1], 1), **more)
    return method, [signals], [Selection(list(torch.from_numpy(arrays["keep_sorted"])))]


BUILDERS: dict[str, Builder] = {
    "fastervlm": fastervlm,
    "vispruner": vispruner,
    "hired": hired,
    "hired_single": hired_single,
    "dart": dart,
}


# ---------------------------------------------------------------------------------------------------------------------
# checks


def vispruner_parts(seen: Seen) -> tuple[Tensor, Tensor]:
    """(B, I) important and (B, K - I) diverse tokens, in the order of the cited code."""
    read, method = seen.signals.tower["read"], seen.case.method
    assert read.cls_attention is not None and read.hidden is not None
    return method.chosen(read.cls_attention.mean(dim=1), read.hidden, method.keep)  # type: ignore[attr-defined]


def hired_counts(seen: Seen) -> np.ndarray:
    assert seen.signals.tile is not None
    return np.bincount(seen.signals.tile[0].numpy()[seen.indices[0]])


def hired_mask(seen: Seen) -> np.ndarray:
    assert seen.signals.tile is not None
    tokens = seen.signals.tile.shape[1]
    return np.isin(np.arange(tokens), seen.indices[0]).astype(np.int64).reshape(seen.settings["tiles"], -1)


def hired_budgets(seen: Seen) -> list[int]:
    """Of the tiles beside the base tile."""
    first = seen.signals.tower[0].cls_attention
    assert first is not None
    total = seen.settings["total_budget"]
    method: Any = seen.case.method
    contents = method.contents(first.sum(dim=1), seen.signals)
    return method.budgets(contents, seen.signals.by_tile(), total)[0][1:]


def dart_pivots(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """(1, P) visual pivots and (1, Q) text pivots among the tokens after the image."""
    visual, words, present = seen.case.method.pivots_of(seen.signals, seen.case.method.keep)  # type: ignore[attr-defined]
    assert present.all()
    return visual.numpy(), words.numpy() - seen.settings["vision_token_start_index"]


def dart_order(seen: Seen) -> np.ndarray:
    """(1, P + Q) pivots in the order in which they choose; text ones count from N."""
    visual, words, present = seen.case.method.pivots_of(seen.signals, seen.case.method.keep)  # type: ignore[attr-defined]
    there = torch.cat([torch.ones_like(visual, dtype=torch.bool), present], dim=1)
    order = _set_order(_in_prompt(seen.signals, visual, words), there)
    after = words - seen.settings["vision_token_start_index"] + seen.signals.original
    return torch.cat([visual, after], dim=1).gather(1, order).numpy()


CHECKS: dict[str, dict[str, Check]] = {
    "fastervlm": {
        "scores": scores_are(lambda seen: seen.case.method.score(seen.signals)),
        "keep": same_set_as(lambda seen: seen.indices),
        "keep_sorted": equal_to(lambda seen: seen.indices),
    },
    "vispruner": {
        "important": equal_to(lambda seen: vispruner_parts(seen)[0]),
        "diverse": equal_to(lambda seen: vispruner_parts(seen)[1]),
        "keep": equal_to(lambda seen: torch.cat(vispruner_parts(seen), dim=1)),
        "keep_sorted": equal_to(lambda seen: seen.indices),
    },
    "hired": {
        "sub_budgets": equal_to(hired_budgets),
        "counts": equal_to(hired_counts),
        "mask": equal_to(hired_mask),
        "keep_sorted": equal_to(lambda seen: seen.indices),
    },
    "hired_single": {
        "keep": same_set_as(lambda seen: seen.indices),
        "keep_sorted": equal_to(lambda seen: seen.indices),
    },
    "dart": {
        "pivot_image": equal_to(lambda seen: dart_pivots(seen)[0]),
        "pivot_text": equal_to(lambda seen: dart_pivots(seen)[1]),
        "pivot_order": equal_to(dart_order),
        "keep_sorted": equal_to(lambda seen: seen.indices),
    },
}
