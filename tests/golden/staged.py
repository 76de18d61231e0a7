"""Golden cases of the methods that act in stages inside the decoder, and of those on the cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from golden.checks import Check, Seen, equal_to, same_set_as, scores_are
from golden.files import Arrays, Builder, Built, Settings, place, raster, stages_of
from torch import Tensor

from foveate import methods
from foveate.core import CacheSelection, Selection, Signals
from foveate.ops.scores import causal_received, rated, window_attention
from foveate.ops.subsets import descending

PATHS: dict[str, dict[str, str]] = {
    "fastv": {"last_query": "decoder.last_query"},
    "pyramiddrop": {"last_query": "decoder.next_query"},
    "sparsevlm": {
        "features": "features",
        "text": "text",
        "text_query": "decoder.text_query",
        "recycle_hidden": "decoder.hidden",  # at the rows that `recycle` names
    },
    "h2o": {"received_sum": "cache.scores", "attention": "cache.scores"},  # a whole map: summed over its queries
    "snapkv": {"keys": "cache.keys", "window_queries": "cache.window_queries"},
}


# ---------------------------------------------------------------------------------------------------------------------
# builders


def fastv(settings: Settings, arrays: Arrays) -> Built:
    method = methods.get("fastv")(layer=settings["fastv_k"], keep=settings["kept"])
    attention = torch.from_numpy(arrays["last_query"])
    signals = place(PATHS["fastv"], {"last_query": attention}, raster(attention.shape[2], attention.shape[0]))
    return method, [signals], [Selection(list(torch.from_numpy(arrays["keep_sorted"])))]


def pyramiddrop(settings: Settings, arrays: Arrays) -> Built:
    method = methods.get("pyramiddrop")(
        layers=tuple(settings["layer_list"]), keep=tuple(settings["image_token_ratio_list"])
    )
    batch, _, original = arrays["last_query"].shape
    signals: list[Signals] = []
    expected: list[Selection | CacheSelection] = []
    index, memory = raster(original, batch), {}
    for stage, suffix in enumerate(stages_of(arrays)):
        values = {"last_query": torch.from_numpy(arrays["last_query" + suffix])}
        signals.append(place(PATHS["pyramiddrop"], values, index, original=original, stage=stage, memory=memory))
        index = torch.from_numpy(arrays["kept_original" + suffix])
        expected.append(Selection(list(index)))
    return method, signals, expected


def h2o(settings: Settings, arrays: Arrays) -> Built:
    method = methods.get("h2o")(heavy=settings["hh_size"], recent=settings["recent_size"])
    whole = "attention" in arrays
    scores = torch.from_numpy(arrays["attention"].sum(axis=2) if whole else arrays["received_sum"])
    cache = {"age": torch.arange(scores.shape[2]).expand_as(scores), "prompt_length": settings["prompt_length"]}
    signals = place(PATHS["h2o"], {"attention" if whole else "received_sum": scores}, raster(1, 1), cache=cache)
    return method, [signals], [CacheSelection(torch.from_numpy(arrays["keep_sorted"]))]


def snapkv(settings: Settings, arrays: Arrays) -> Built:
    method = methods.get("snapkv")(
        capacity=settings["max_capacity_prompt"], window=settings["window_size"], kernel=settings["kernel_size"]
    )
    values = {name: torch.from_numpy(arrays[name]) for name in ("keys", "window_queries")}
    entries = torch.arange(values["keys"].shape[2]).expand(values["keys"].shape[:3])
    cache = {"age": entries, "prompt_length": settings["prompt_length"]}
    signals = place(PATHS["snapkv"], values, raster(1, 1), cache=cache)
    return method, [signals], [CacheSelection(torch.from_numpy(arrays["keep_sorted"]))]


def sparsevlm(settings: Settings, arrays: Arrays) -> Built:
    """The cited code lists recycled tokens behind the kept ones; here a stage's tokens ascend by original index."""
    counts = zip(settings["kept_per_stage"], settings["clusters_per_stage"], strict=True)
    method = methods.get("sparsevlm")(
        layers=tuple(layer + 1 for layer in settings["pruning_layers"]), keep=tuple(map(sum, counts)), recycle=True
    )
    original = arrays["features"].shape[1]
    everything = torch.ones(arrays["text"].shape[:2], dtype=torch.bool)
    more: dict[str, Any] = {"original": original, "memory": {}, "text_mask": everything, "after_image": everything}
    signals: list[Signals] = []
    expected: list[Selection | CacheSelection] = []
    tokens = np.arange(original)  # original index of each token, in the order of the cited code
    for stage, suffix in enumerate(stages_of(arrays)):
        order = tokens.argsort()
        values = {"text": torch.from_numpy(arrays["text"])}
        if stage == 0:
            values["features"] = torch.from_numpy(arrays["features"])
        values["text_query"] = torch.from_numpy(arrays["text_query" + suffix][..., order])
        pool, pooled = arrays["recycle" + suffix][0], arrays["recycle_hidden" + suffix][0]
        hidden = np.zeros((len(tokens), pooled.shape[-1]), dtype=pooled.dtype)
        hidden[pool] = pooled
        values["recycle_hidden"] = torch.from_numpy(hidden[order][None])
        index = torch.from_numpy(tokens[order][None])
        signals.append(place(PATHS["sparsevlm"], values, index, stage=stage, **more))

        merged = arrays["recycled" + suffix][0]
        # A cluster stands where its highest-rated member stood, and `recycle` descends by rating.
        stands = [tokens[pool[members.min()]] for members in clusters(pooled, merged)]
        kept = arrays["keep_sorted" + suffix][0]
        tokens, features = np.concatenate([tokens[kept], stands]), np.concatenate([hidden[kept], merged])
        order = tokens.argsort()
        chosen, rows = torch.from_numpy(tokens[order]), torch.from_numpy(features[order])
        expected.append(Selection([chosen], features=[rows]))
    return method, signals, expected


BUILDERS: dict[str, Builder] = {
    "fastv": fastv,
    "pyramiddrop": pyramiddrop,
    "sparsevlm": sparsevlm,
    "h2o": h2o,
    "snapkv": snapkv,
}


def clusters(points: np.ndarray, means: np.ndarray) -> list[np.ndarray]:
    """Which of the (M, D) points each of the (C, D) stored means was made of.

    Density peaks as the index describes them, written out point by point in float64; whether they are the cited code's
    clusters shows in the means.
    """
    points = points.astype(np.float64)
    count = len(means)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) / np.sqrt(points.shape[1])
    density = np.array([np.exp(-np.mean(np.sort(row)[:count] ** 2)) for row in distance])
    score = np.empty(len(points))
    for point, own in enumerate(density):
        denser = [other for other, its in enumerate(density) if (its, -other) > (own, -point)]
        score[point] = (distance[point, denser].min() if denser else distance.max()) * own
    centres = np.argsort(-score, kind="stable")[:count]
    nearest = distance[:, centres].argmin(axis=1)
    nearest[centres] = np.arange(count)
    found = [np.flatnonzero(nearest == number) for number in range(count)]
    own_means = np.stack([points[members].mean(axis=0) for members in found])
    matching = np.linalg.norm(means[:, None] - own_means[None], axis=-1).argmin(axis=1)
    np.testing.assert_array_equal(np.sort(matching), np.arange(count))
    np.testing.assert_allclose(own_means[matching], means, rtol=1e-4, atol=1e-5)
    return [found[number] for number in matching]


# ---------------------------------------------------------------------------------------------------------------------
# checks


def fastv_positions(seen: Seen) -> np.ndarray:
    """(1, P + K + T): every kept token has its original position."""
    start, tokens = seen.settings["image_token_start_index"], seen.settings["image_token_length"]
    after = start + tokens + np.arange(seen.settings["text_tokens"])
    return np.concatenate([np.arange(start), start + seen.indices[0], after])[None]


def places(seen: Seen) -> np.ndarray:
    """(B, K) where the kept tokens stood among those present."""
    present = seen.signals.index.numpy()
    return np.stack([np.searchsorted(row, kept) for row, kept in zip(present, seen.indices, strict=True)])


def raters(seen: Seen) -> Tensor:
    memory: dict[str, Any] = {}
    seen.case.method.select(dataclasses.replace(seen.case.signals[0], memory=memory))
    return memory["raters"]


def sparse_tokens(seen: Seen) -> np.ndarray:
    """(N,) original index of each token of this SparseVLM stage, in the order of the cited code: kept, recycled."""
    if seen.stage == 0:
        return seen.signals.index[0].numpy()
    before = "" if seen.stage == 1 else f"_stage{seen.stage}"
    earlier = Seen(seen.case, seen.stage - 1, seen.case.signals[seen.stage - 1], None, {}, seen.arrays, before)
    kept = sparse_tokens(earlier)[seen.arrays["keep_sorted" + before][0]]
    return np.concatenate([kept, stand_ins(earlier)])


def stand_ins(seen: Seen) -> np.ndarray:
    """(C,) where the recycled tokens of this stage stand, in the order of the cited code."""
    expected = seen.case.expected[seen.stage]
    assert isinstance(expected, Selection) and expected.features is not None
    distance = torch.cdist(torch.from_numpy(seen.arrays["recycled" + seen.suffix][0]), expected.features[0])
    return expected.indices[0][distance.argmin(dim=1)].numpy()


def sparse_scores(seen: Seen) -> np.ndarray:
    """(1, N) in the order of the cited code."""
    assert seen.signals.decoder is not None and seen.signals.decoder.text_query is not None
    ascending = rated(seen.signals.decoder.text_query, raters(seen)).numpy()
    return ascending[:, np.searchsorted(np.sort(sparse_tokens(seen)), sparse_tokens(seen))]


def sparse_ranks(seen: Seen, first: int, last: int) -> np.ndarray:
    """(1, n) places, in the order of the cited code, of the tokens rated `first` to `last`."""
    return np.sort(descending(torch.from_numpy(sparse_scores(seen))).numpy()[:, first:last])


def sparse_own(seen: Seen) -> np.ndarray:
    kept = seen.settings["kept_per_stage"][seen.stage]
    found = sparse_ranks(seen, 0, kept)
    assert set(sparse_tokens(seen)[found[0]]) <= set(seen.indices[0])
    return found


def sparse_pool(seen: Seen) -> np.ndarray:
    kept, size = seen.settings["kept_per_stage"][seen.stage], seen.arrays["recycle" + seen.suffix].shape[1]
    return sparse_ranks(seen, kept, kept + size)


def sparse_merged(seen: Seen) -> np.ndarray:
    """(1, C, D) features of the recycled tokens, in the order of the cited code."""
    where = np.searchsorted(seen.indices[0], stand_ins(seen))
    return seen.got.features[0].numpy()[where][None]


def h2o_scores(seen: Seen) -> Tensor:
    """From a whole map by way of queries and keys that have it as their attention."""
    assert seen.signals.cache is not None and seen.signals.cache.scores is not None
    if "attention" not in seen.arrays:
        return seen.signals.cache.scores
    attention = torch.from_numpy(seen.arrays["attention"])
    identity = torch.eye(attention.shape[-1]).expand_as(attention)
    return causal_received(attention.clamp(min=1e-30).log(), identity, scale=1.0)


def snapkv_scores(seen: Seen) -> Tensor:
    assert seen.signals.cache is not None
    queries, keys = seen.signals.cache.window_queries, seen.signals.cache.keys
    assert queries is not None and keys is not None
    return window_attention(queries, keys, seen.settings["kernel_size"])


def older(seen: Seen) -> np.ndarray:
    """(1, H, K) kept positions before the newest ones."""
    newest = seen.settings.get("recent_size", seen.settings.get("window_size"))
    return seen.got.positions[..., :-newest].numpy()


CHECKS: dict[str, dict[str, Check]] = {
    "fastv": {
        "scores": scores_are(lambda seen: seen.case.method.score(seen.signals)),
        "keep": same_set_as(lambda seen: seen.indices),
        "keep_sorted": equal_to(lambda seen: seen.indices),
        "position_ids": equal_to(fastv_positions),
    },
    "pyramiddrop": {
        "keep": same_set_as(places),
        "keep_sorted": equal_to(places),
        "kept_original": equal_to(lambda seen: seen.indices),
    },
    "sparsevlm": {
        "raters": equal_to(lambda seen: raters(seen)[0].nonzero().T),
        "scores": scores_are(sparse_scores),
        "keep": same_set_as(sparse_own),
        "keep_sorted": equal_to(sparse_own),
        "recycle": same_set_as(sparse_pool),
        "recycled": scores_are(sparse_merged),
    },
    "h2o": {
        "scores": scores_are(h2o_scores),
        "keep": same_set_as(older),
        "keep_sorted": equal_to(lambda seen: seen.got.positions),
    },
    "snapkv": {
        "scores": scores_are(snapkv_scores),
        "keep": same_set_as(older),
        "keep_sorted": equal_to(lambda seen: seen.got.positions),
        "keep_all": same_set_as(lambda seen: seen.got.positions),
    },
}
