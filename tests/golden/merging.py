"""Golden cases of the methods that hand on merged tokens: PruMerge and PruMerge+, VisionZip, TRIM."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from golden.checks import CLOSE, Check, Seen, equal_to, same_set_as, scores_are
from golden.files import Arrays, Builder, Built, Settings, place, raster
from torch import Tensor

from foveate import methods
from foveate.core import Selection
from foveate.ops.pooling import most_similar
from foveate.ops.scores import unsplit_cls_attention
from foveate.ops.subsets import descending

OF_PRUMERGE = {
    "encoded": "tower.read.hidden",
    "cls_encoded": "tower.read.cls",  # which the code does not use either
    "tower_query_cls": "tower.last.query_cls",
    "tower_keys": "tower.last.keys",
    "tower_key_cls": "tower.last.key_cls",
}

PATHS: dict[str, dict[str, str]] = {
    "prumerge": OF_PRUMERGE,
    "prumerge_plus": OF_PRUMERGE,
    "visionzip": {
        "encoded": "tower.read.hidden",
        "cls_encoded": "tower.read.cls",
        "cls_attention": "tower.read.cls_attention",
        "keys_mean": "tower.read.keys",
    },
    "trim": {
        "encoded": "tower.read.hidden",
        "ln_weight": "image_clip",  # what norm and projection make of the encoded tokens
        "ln_bias": "image_clip",
        "projection": "image_clip",
        "text_clip": "text_clip",
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# builders


def one_head(values: Tensor) -> Tensor:
    """(B, ..., E) -> (B, 1, ..., E): stored arrays whose heads are side by side."""
    return values[:, None]


def merged(chosen: list[np.ndarray], features: list[np.ndarray], extra: list[np.ndarray]) -> list[Selection]:
    """One selection of rows in the order of the cited code; here a stage's tokens ascend by original index."""
    order = [row.argsort() for row in chosen]

    def sorted_rows(rows: list[np.ndarray]) -> list[Tensor]:
        return [torch.from_numpy(row[places]) for row, places in zip(rows, order, strict=True)]

    return [Selection(sorted_rows(chosen), sorted_rows(features), "encoded", sorted_rows(extra))]


def with_rest(keep: np.ndarray, features: np.ndarray, tokens: int) -> list[Selection]:
    """(B, K) kept patches and (B, K + 1, E), the last for the rest, which stands at the largest index that is free.

    A patch that the cited code lists twice stands here once.
    """
    chosen, rows, extra = [], [], []
    for kept, made in zip(keep, features, strict=True):
        once, first = np.unique(kept, return_index=True)
        rest = max(set(range(tokens)) - set(kept.tolist()))
        chosen.append(np.append(once, rest))
        rows.append(made[np.append(first, len(kept))])
        extra.append(np.arange(len(once) + 1) == len(once))
    return merged(chosen, rows, extra)


def prumerge_of(name: str) -> Builder:
    def build(settings: Settings, arrays: Arrays) -> Built:
        keep = None if settings["if_adaptive"] else settings["kept"] + 1
        method = methods.get(name)(keep=keep, neighbours=settings["neighbours"], official=True)
        values = {array: torch.from_numpy(arrays[array]) for array in OF_PRUMERGE}
        values.update({array: one_head(value) for array, value in values.items() if array.startswith("tower_")})
        batch, tokens, _ = values["encoded"].shape
        signals = place(OF_PRUMERGE, values, raster(tokens, batch), grid=tuple(settings["grid"]))
        return method, [signals], [*with_rest(arrays["keep"], arrays["features_out"], tokens)]

    return build


def visionzip(settings: Settings, arrays: Arrays) -> Built:
    method = methods.get("visionzip")(keep=settings["total"], official=True)
    values = {name: torch.from_numpy(arrays[name]) for name in PATHS["visionzip"]}
    values["keys_mean"] = one_head(values["keys_mean"])
    batch, tokens, _ = values["encoded"].shape
    signals = place(PATHS["visionzip"], values, raster(tokens, batch), grid=tuple(settings["grid"]))
    chosen = []
    for dominant, contextual in zip(arrays["keep_sorted"], arrays["contextual_index"], strict=True):
        patches = np.append(dominant, contextual)
        free = min(set(range(tokens)) - set(patches.tolist()))  # where CLS stands
        chosen.append(np.append(free, patches))
    extra = [np.arange(len(row)) == 0 for row in chosen]
    return method, [signals], [*merged(chosen, list(arrays["features_out"]), extra)]


def trim(settings: Settings, arrays: Arrays) -> Built:
    keep = None if isinstance(settings["k"], str) else settings["kept"] + 1
    method = methods.get("trim")(keep=keep, official=True)
    encoded, weight, bias, projection, text = (torch.from_numpy(arrays[name]) for name in PATHS["trim"])
    normed = torch.nn.functional.layer_norm(encoded, encoded.shape[2:], weight, bias, eps=1e-5)
    values = {"encoded": encoded, "projection": normed @ projection.T, "text_clip": text}
    batch, tokens, _ = encoded.shape
    signals = place(PATHS["trim"], values, raster(tokens, batch), grid=tuple(settings["grid"]))
    return method, [signals], [*with_rest(arrays["keep"], arrays["features_out_full"], tokens)]


BUILDERS: dict[str, Builder] = {
    "prumerge": prumerge_of("prumerge"),
    "prumerge_plus": prumerge_of("prumerge_plus"),
    "visionzip": visionzip,
    "trim": trim,
}


# ---------------------------------------------------------------------------------------------------------------------
# checks


def patches_are(seen: Seen, stored: np.ndarray) -> None:
    """Kept patches row by row, each once and in raster order."""
    for row, (index, extra) in enumerate(zip(seen.got.indices, seen.got.extra, strict=True)):
        np.testing.assert_array_equal(index[~extra].numpy(), np.unique(stored[row]))


def features_are(order: Callable[[Seen], np.ndarray], first: bool, **close: float) -> Check:
    """(B, K + 1, E): the patches in the code's order, the extra token before (`first`) or behind them."""

    def check(seen: Seen, stored: np.ndarray) -> None:
        for row, wanted in enumerate(order(seen)):
            index, extra = seen.got.indices[row].numpy(), seen.got.extra[row].numpy()
            places = np.searchsorted(index, wanted)
            np.testing.assert_array_equal(index[places], wanted)
            of_extra = np.flatnonzero(extra)
            assert len(of_extra) == 1
            places = np.append(of_extra, places) if first else np.append(places, of_extra)
            np.testing.assert_allclose(seen.got.features[row].numpy()[places], stored[row], **close)

    return check


def cls_attention(seen: Seen) -> Tensor:
    last = seen.signals.tower["last"]
    return unsplit_cls_attention(last.query_cls, last.key_cls, last.keys).exp()[:, None]


def dominant(seen: Seen) -> np.ndarray:
    """(B, D) those of the kept patches that CLS attends to most."""
    attention = seen.signals.tower["read"].cls_attention.sum(dim=1)
    best = descending(attention)[:, : seen.settings["dominant_patches"]].sort(dim=-1).values.numpy()
    assert all(set(row) <= set(kept) for row, kept in zip(best, patches(seen), strict=True))
    return best


def patches(seen: Seen) -> np.ndarray:
    """(B, K - 1) without the index that CLS takes."""
    rows = zip(seen.got.indices, seen.got.extra, strict=True)
    return np.stack([index[~extra].numpy() for index, extra in rows])


def contextual(seen: Seen) -> np.ndarray:
    return np.stack([np.setdiff1d(*rows) for rows in zip(patches(seen), dominant(seen), strict=True)])


def joining(seen: Seen) -> np.ndarray:
    return np.stack([np.setdiff1d(np.arange(seen.signals.original), row) for row in patches(seen)])


def assignment(seen: Seen) -> Tensor:
    keys = seen.signals.tower["read"].keys[:, 0]
    return most_similar(keys, torch.from_numpy(joining(seen)), torch.from_numpy(contextual(seen)))


CHECKS_OF_PRUMERGE: dict[str, Check] = {
    "cls_attention": scores_are(cls_attention),
    "keep": patches_are,
    "keep_sorted": patches_are,
    "features_out": features_are(lambda seen: seen.arrays["keep"], first=False, **CLOSE),
}

CHECKS: dict[str, dict[str, Check]] = {
    "prumerge": CHECKS_OF_PRUMERGE,
    "prumerge_plus": CHECKS_OF_PRUMERGE,
    "visionzip": {
        "keep": same_set_as(dominant),
        "keep_sorted": equal_to(dominant),
        "contextual_index": equal_to(contextual),
        "merged_index": equal_to(joining),
        "assignment": equal_to(assignment),
        "features_out": features_are(
            lambda seen: np.concatenate([dominant(seen), contextual(seen)], axis=1), first=True, **CLOSE
        ),
    },
    "trim": {
        "image_clip": scores_are(lambda seen: seen.signals.image_clip),
        "scores": scores_are(lambda seen: seen.case.method.scores(seen.signals)),
        "keep": patches_are,
        "keep_sorted": patches_are,
        # Rounded to float16 by the cited code.
        "features_out": features_are(lambda seen: seen.arrays["keep"], first=False, rtol=1e-3, atol=5e-3),
        "features_out_full": features_are(lambda seen: seen.arrays["keep"], first=False, **CLOSE),
    },
}
