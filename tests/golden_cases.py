"""Golden files as cases: what a method was shown and what its official code answered, one entry per stage.

Each file holds arrays that the code of a paper read and wrote; `index.json` beside them says which are inputs, with
what settings the code ran, and how its answers compare. `PATHS` says where in `Signals` each input array belongs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from foveate import methods
from foveate.core import Block, CacheBlock, CacheSelection, Method, Selection, Signals

FOLDER = Path(os.environ.get("FOVEATE_GOLDEN") or Path(__file__).parent / "golden")

Arrays: TypeAlias = dict[str, np.ndarray]
Settings: TypeAlias = dict[str, Any]


class Case(NamedTuple):
    """One golden file; `signals` and `expected` have one entry per stage, to be asked in order."""

    name: str
    method: Method
    signals: list[Signals]
    expected: list[Selection | CacheSelection]


Builder: TypeAlias = Callable[[Settings, Arrays], tuple[Method, list[Signals], list[Selection | CacheSelection]]]

PATHS = {
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
"""Where each input array belongs; `_stage2` and later suffixes are left out."""

UNCOVERED = frozenset(
    "cdpruner clip_probe crossget dart divprune fastervlm hired hired_single prumerge prumerge_plus tome trim "
    "visionzip vispruner".split()
)
"""Golden methods that have no builder here."""


def load(folder: str | Path = FOLDER) -> Iterator[Case]:
    """Every case of a folder whose method is registered.

    Raises:
        FileNotFoundError: the folder or a file that its index names is missing.
        LookupError: a registered method has golden files but no builder.
    """
    for entry in index_of(folder):
        name = entry["method"]
        if name in BUILDERS:
            method, signals, expected = BUILDERS[name](entry["hyperparameters"], arrays_of(folder, entry["file"]))
            yield Case(entry["file"], method, signals, expected)
        elif name in methods.names():
            raise LookupError(f"{entry['file']}: method {name!r} is registered, but no builder makes its cases")


def index_of(folder: str | Path = FOLDER) -> list[dict[str, Any]]:
    """What the folder says about each of its files."""
    entries: list[dict[str, Any]] = json.loads((Path(folder) / "index.json").read_text(encoding="utf-8"))["files"]
    return entries


def arrays_of(folder: str | Path, file: str) -> Arrays:
    """The arrays of one file, by name."""
    with np.load(Path(folder) / file) as stored:
        return {name: stored[name] for name in stored.files}


def stages_of(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The suffixes of the stages that a file holds: "", "_stage2", ..."""
    later = {"_stage" + name.rpartition("_stage")[2] for name in arrays if "_stage" in name}
    return ["", *sorted(later, key=lambda suffix: int(suffix.removeprefix("_stage")))]


def place(method: str, values: Mapping[str, Tensor], index: Tensor, **more: Any) -> Signals:
    """Signals with each array where PATHS says it belongs."""
    parts: dict[str, dict[str, Tensor]] = {"": {}, "decoder": {}, "cache": {}}
    for name, value in values.items():
        room, _, field = PATHS[method][name].rpartition(".")
        parts[room][field] = value
    cache = more.pop("cache", {})
    return Signals(
        original=more.pop("original", index.shape[1]),
        index=index,
        decoder=Block(**parts["decoder"]) if parts["decoder"] else None,
        cache=CacheBlock(**parts["cache"], **cache) if parts["cache"] else None,
        **parts[""],
        **more,
    )


def raster(tokens: int, batch: int) -> Tensor:
    return torch.arange(tokens).repeat(batch, 1)


# ---------------------------------------------------------------------------------------------------------------------
# builders


def fastv(settings: Settings, arrays: Arrays) -> tuple[Method, list[Signals], list[Selection | CacheSelection]]:
    method = methods.get("fastv")(layer=settings["fastv_k"], keep=settings["kept"])
    attention = torch.from_numpy(arrays["last_query"])
    signals = place("fastv", {"last_query": attention}, raster(attention.shape[2], attention.shape[0]))
    return method, [signals], [Selection(list(torch.from_numpy(arrays["keep_sorted"])))]


def pyramiddrop(settings: Settings, arrays: Arrays) -> tuple[Method, list[Signals], list[Selection | CacheSelection]]:
    method = methods.get("pyramiddrop")(
        layers=tuple(settings["layer_list"]), keep=tuple(settings["image_token_ratio_list"])
    )
    batch, _, original = arrays["last_query"].shape
    signals: list[Signals] = []
    expected: list[Selection | CacheSelection] = []
    index, memory = raster(original, batch), {}
    for stage, suffix in enumerate(stages_of(arrays)):
        values = {"last_query": torch.from_numpy(arrays["last_query" + suffix])}
        signals.append(place("pyramiddrop", values, index, original=original, stage=stage, memory=memory))
        index = torch.from_numpy(arrays["kept_original" + suffix])
        expected.append(Selection(list(index)))
    return method, signals, expected


def h2o(settings: Settings, arrays: Arrays) -> tuple[Method, list[Signals], list[Selection | CacheSelection]]:
    method = methods.get("h2o")(heavy=settings["hh_size"], recent=settings["recent_size"])
    whole = "attention" in arrays
    scores = torch.from_numpy(arrays["attention"].sum(axis=2) if whole else arrays["received_sum"])
    cache = {"age": torch.arange(scores.shape[2]).expand_as(scores), "prompt_length": settings["prompt_length"]}
    signals = place("h2o", {"attention" if whole else "received_sum": scores}, raster(1, 1), cache=cache)
    return method, [signals], [CacheSelection(torch.from_numpy(arrays["keep_sorted"]))]


def snapkv(settings: Settings, arrays: Arrays) -> tuple[Method, list[Signals], list[Selection | CacheSelection]]:
    method = methods.get("snapkv")(
        capacity=settings["max_capacity_prompt"], window=settings["window_size"], kernel=settings["kernel_size"]
    )
    values = {name: torch.from_numpy(arrays[name]) for name in ("keys", "window_queries")}
    entries = torch.arange(values["keys"].shape[2]).expand(values["keys"].shape[:3])
    cache = {"age": entries, "prompt_length": settings["prompt_length"]}
    signals = place("snapkv", values, raster(1, 1), cache=cache)
    return method, [signals], [CacheSelection(torch.from_numpy(arrays["keep_sorted"]))]


def sparsevlm(settings: Settings, arrays: Arrays) -> tuple[Method, list[Signals], list[Selection | CacheSelection]]:
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
        signals.append(place("sparsevlm", values, index, stage=stage, **more))

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
