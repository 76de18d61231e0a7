"""Golden cases of the methods that act on pixels, before the encoder."""

from __future__ import annotations

import numpy as np
import torch
from golden.checks import Check, Seen, equal_to
from golden.files import Arrays, Builder, Built, Settings, place, raster

from foveate import methods
from foveate.core import Selection

PATHS: dict[str, dict[str, str]] = {"pixelprune": {"pixels": "pixels"}}


def pixelprune(settings: Settings, arrays: Arrays) -> Built:
    pixels = torch.from_numpy(arrays["pixels"])
    index = raster(pixels.shape[1], pixels.shape[0])
    fields = {name: settings[name] for name in ("threshold", "metric", "anchored")}
    signals = place(PATHS["pixelprune"], {"pixels": pixels}, index, grid=tuple(settings["grid"]))
    return methods.get("pixelprune")(**fields), [signals], [Selection(list(torch.from_numpy(arrays["keep_sorted"])))]


BUILDERS: dict[str, Builder] = {"pixelprune": pixelprune}


def kept(seen: Seen) -> np.ndarray:
    return seen.indices


CHECKS: dict[str, dict[str, Check]] = {"pixelprune": {"keep_sorted": equal_to(kept)}}
