"""Golden cases of the methods that choose a set of tokens which differ from each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from golden.checks import Check, Seen, equal_to, scores_are
from golden.files import Arrays, Builder, Built, Settings, place, raster
from torch import Tensor

from foveate import methods
from foveate.core import Selection
from foveate.ops.greedy import diverse, farthest

PATHS: dict[str, dict[str, str]] = {
    "divprune": {"features": "features"},
    "cdpruner": {"features": "features", "image_clip": "image_clip", "text_clip": "text_clip"},
}


# ---------------------------------------------------------------------------------------------------------------------
# builders


def built(name: str, arrays: Arrays, settings: Settings, **fields: Any) -> Built:
    values = {array: torch.from_numpy(arrays[array]) for array in PATHS[name]}
    batch, tokens, _ = values["features"].shape
    signals = place(PATHS[name], values, raster(tokens, batch), grid=tuple(settings["grid"]))
    return methods.get(name)(**fields), [signals], [Selection(list(torch.from_numpy(arrays["keep_sorted"])))]


def divprune(settings: Settings, arrays: Arrays) -> Built:
    """The share, so that its rounding is the code's too."""
    return built("divprune", arrays, settings, keep=settings["threshold_ratio"])


def cdpruner(settings: Settings, arrays: Arrays) -> Built:
    return built("cdpruner", arrays, settings, keep=settings["visual_token_num"], official=True)


BUILDERS: dict[str, Builder] = {"divprune": divprune, "cdpruner": cdpruner}


# ---------------------------------------------------------------------------------------------------------------------
# checks


def farthest_first(seen: Seen) -> Tensor:
    """(1, K) in the order in which they were taken."""
    assert seen.signals.features is not None
    return farthest(seen.signals.features, seen.settings["kept"])


def most_diverse_first(seen: Seen) -> Tensor:
    """(B, K) in the order in which they were taken."""
    assert seen.signals.features is not None
    return diverse(seen.signals.features, seen.settings["visual_token_num"], squared_relevance(seen))


def squared_relevance(seen: Seen) -> Tensor:
    """(B, N): the kernel's diagonal, as cosines of a token to itself are 1."""
    method: Any = seen.case.method
    relevance: Tensor = method.relevances(seen.signals)
    return relevance.square()


def kept(seen: Seen) -> np.ndarray:
    return seen.indices


CHECKS: dict[str, dict[str, Check]] = {
    "divprune": {"keep": equal_to(farthest_first), "keep_sorted": equal_to(kept)},
    "cdpruner": {
        "keep": equal_to(most_diverse_first),
        "keep_sorted": equal_to(kept),
        "kernel_diagonal": scores_are(squared_relevance),
    },
}
