"""Golden cases of the methods that merge inside the encoder: single merge steps of their codes, CLS rows included."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from golden.checks import Check, Seen, scores_are
from golden.files import Arrays, Builder, Built, Settings, place, raster
from torch import Tensor

from foveate import methods
from foveate.core import Selection
from foveate.ops.merging import (
    Matching,
    Merged,
    bipartite_merge,
    complete_matching,
    ensemble_merge,
    similarity_rank,
)

PATHS: dict[str, dict[str, str]] = {
    "tome": {
        "tokens": "tower.latest.hidden",
        "metric": "tower.latest.keys",
        "metric2": "tower.latest.keys",  # of the second step, and the third
        "metric3": "tower.latest.keys",
    },
    "crossget": {
        "tokens": "tower.latest.hidden",
        "metric": "tower.latest.keys",
        "received": "tower.latest.received_all",
        "cross_attention": "tower.latest.cross_attention",
        "attention": "tower.latest.received_all",  # a whole map, the cross token's row last
        "token_size": "size",
    },
}
_BESIDE = {"cls": "tower.latest.cls", "cross": "tower.latest.cross", "size": "size"}


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


# ---------------------------------------------------------------------------------------------------------------------
# ToMe: one step or several, each with a metric of its own


@dataclasses.dataclass(frozen=True)
class Steps:
    """The patches after some steps, and where those of the start are."""

    features: Tensor
    size: Tensor
    index: Tensor  # of the patch that each one grew from
    assignment: Tensor


def tome_steps(settings: Settings, arrays: Arrays, steps: int) -> Steps:
    given, cls = tensors(arrays), int(settings["class_token"])
    patches = given["tokens"][:, cls:]
    start = raster(patches.shape[1], patches.shape[0])
    done = Steps(patches, torch.ones(patches.shape[:2]), start, start)
    for number, r in enumerate(settings["r"][:steps]):
        metric = given["metric" + (str(number + 1) if number else "")][:, cls:]
        r = min(r, metric.shape[1] // 2)
        merged = bipartite_merge(done.features, metric, done.size, r, behind_cls=bool(cls))
        done = Steps(
            merged.features,
            merged.size,
            done.index.gather(1, merged.representative),
            merged.group.gather(1, done.assignment),
        )
    return done


def tome(settings: Settings, arrays: Arrays) -> Built:
    """The method is asked for the last step."""
    given, cls, steps = tensors(arrays), int(settings["class_token"]), len(settings["r"])
    before, after = (tome_steps(settings, arrays, number) for number in (steps - 1, steps))
    method = methods.get("tome")(keep=settings["kept"] - cls)
    metric = given["metric" + (str(steps) if steps > 1 else "")][:, None, cls:]
    values = {"tokens": before.features, "metric": metric, "size": before.size}
    if cls:
        values["cls"] = given["tokens"][:, 0]
    original = given["tokens"].shape[1] - cls
    signals = place(PATHS["tome"] | _BESIDE, values, before.index, original=original)
    index, order = after.index.sort(dim=-1)
    features = given["features_out"][:, cls:]
    features = features.gather(1, order[..., None].expand_as(features))
    return method, [signals], [Selection(list(index), list(features))]


def tome_all(seen: Seen) -> Steps:
    return tome_steps(seen.settings, seen.arrays, len(seen.settings["r"]))


def with_cls(seen: Seen, values: Tensor, cls: Tensor) -> Tensor:
    """What a step says of the patches behind what it says of CLS, where there is one."""
    return torch.cat([cls, values], dim=1) if seen.settings["class_token"] else values


TOME: dict[str, Check] = {
    "features_out": scores_are(
        lambda seen: with_cls(seen, tome_all(seen).features, torch.from_numpy(seen.arrays["tokens"][:, :1]))
    ),
    "size_out": scores_are(lambda seen: with_cls(seen, size := tome_all(seen).size, torch.ones_like(size[:, :1]))),
    "assignment": scores_are(
        lambda seen: with_cls(
            seen,
            (group := tome_all(seen).assignment) + int(seen.settings["class_token"]),
            torch.zeros_like(group[:, :1]),
        )
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# CrossGET: [CLS, patches, cross token]

PATCHES = slice(1, -1)


def rows_of_attention(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(B, N) each: attention received from all queries but the cross token's, and from the cross token."""
    if "attention" in given:
        return given["attention"][:, :-1].mean(dim=1), given["attention"][:, -1]
    return given["received"], given["cross_attention"]


def crossget(settings: Settings, arrays: Arrays) -> Built:
    given = tensors(arrays)
    received, cross_attention = rows_of_attention(given)
    tokens, patches = given["tokens"], given["tokens"].shape[1] - 2
    values = {
        "tokens": tokens[:, PATCHES],
        "metric": given["metric"][:, None, PATCHES],
        "received": received[:, PATCHES],
        "cross_attention": cross_attention[:, None, PATCHES],
        "token_size": given["token_size"][:, PATCHES],
        "cls": tokens[:, 0],
        "cross": tokens[:, -1],
    }
    method = methods.get("crossget")(keep=patches - settings["r"] + 1)
    signals = place(PATHS["crossget"] | _BESIDE, values, raster(patches, tokens.shape[0]))
    free = given["source_stable"].amax(dim=1, keepdim=True) - 1
    index, order = torch.cat([given["keep_sorted_stable"][:, PATCHES] - 1, free], dim=1).sort(dim=-1)
    features = given["features_out_stable"][:, 1:]
    features = features.gather(1, order[..., None].expand_as(features))
    return method, [signals], [Selection(list(index), list(features))]


def matching(seen: Seen, stable: bool) -> Matching:
    """Among the patches; without `stable`, with the order inside tied pairs that the code happened to have."""
    given = tensors(seen.arrays)
    rank = None if stable else given["rank"][:, PATCHES]
    importance = sum(rows_of_attention(given))[:, PATCHES]
    return complete_matching(given["metric"][:, PATCHES], importance, seen.settings["r"], rank)


def merged(seen: Seen, stable: bool) -> Merged:
    given = tensors(seen.arrays)
    return ensemble_merge(given["tokens"][:, PATCHES], given["token_size"][:, PATCHES], matching(seen, stable))


def between(seen: Seen, name: str, values: Tensor) -> Tensor:
    """What the step says of the patches between what CLS and the cross token came with."""
    stored = torch.from_numpy(seen.arrays[name])
    return torch.cat([stored[:, :1], values, stored[:, -1:]], dim=1)


def survivors(seen: Seen, stable: bool) -> Tensor:
    kept = merged(seen, stable).representative + 1
    last = torch.full_like(kept[:, :1], seen.arrays["tokens"].shape[1] - 1)
    return torch.cat([torch.zeros_like(last), kept, last], dim=1)


def rank_falls(seen: Seen, stored: np.ndarray) -> None:
    """Along the stored order the highest similarities fall, CLS and the cross token last; ties stand in any order."""
    metric = tensors(seen.arrays)["metric"][:, PATCHES].double()
    unit = metric / metric.norm(dim=-1, keepdim=True)
    highest = (unit @ unit.transpose(1, 2) - 9 * torch.eye(metric.shape[1])).amax(dim=-1).numpy()
    order = np.argsort(stored[:, PATCHES], axis=-1)
    falling = np.take_along_axis(highest, order, axis=-1)
    assert (np.diff(falling, axis=-1) < 1e-6).all()
    assert set(stored[:, [0, -1]].flatten().tolist()) == {stored.shape[1] - 2, stored.shape[1] - 1}


def ranks(seen: Seen) -> Tensor:
    found = similarity_rank(tensors(seen.arrays)["metric"][:, PATCHES])
    last = torch.full_like(found[:, :1], found.shape[1])
    return torch.cat([last, found, last + 1], dim=1)


def both(name: str, answer: Any) -> dict[str, Check]:
    """The check of an array and of its stable twin."""
    return {
        name: scores_are(lambda seen: answer(seen, False)),
        f"{name}_stable": scores_are(lambda seen: answer(seen, True)),
    }


CROSSGET: dict[str, Check] = {
    "rank": rank_falls,
    "rank_stable": scores_are(ranks),
    "importance": scores_are(lambda seen: sum(rows_of_attention(tensors(seen.arrays)))),
    "weight": scores_are(lambda seen: matching(seen, False).weight),
    **both("source", lambda seen, stable: matching(seen, stable).source + 1),
    **both("destination", lambda seen, stable: matching(seen, stable).destination + 1),
    **both("keep_sorted", survivors),
    **both("features_out", lambda seen, stable: between(seen, "tokens", merged(seen, stable).features)),
    **both("size_out", lambda seen, stable: between(seen, "token_size", merged(seen, stable).size)),
}

BUILDERS: dict[str, Builder] = {"tome": tome, "crossget": crossget}
CHECKS: dict[str, dict[str, Check]] = {"tome": TOME, "crossget": CROSSGET}
