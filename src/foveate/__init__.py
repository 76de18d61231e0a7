"""Foveate prunes the visual tokens of multimodal LLMs. Public names only, imported when first used."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate import cost as cost
    from foveate.calibrate import calibrate as calibrate
    from foveate.core import Block as Block
    from foveate.core import CacheSelection as CacheSelection
    from foveate.core import FoveateError as FoveateError
    from foveate.core import Method as Method
    from foveate.core import Selection as Selection
    from foveate.core import Signals as Signals
    from foveate.forms import Merger as Merger
    from foveate.forms import Scorer as Scorer
    from foveate.forms import Stepwise as Stepwise
    from foveate.inference.resizing import scale_down as scale_down
    from foveate.methods.cdpruner import CDPruner as CDPruner
    from foveate.methods.crossget import CrossGET as CrossGET
    from foveate.methods.dart import DART as DART
    from foveate.methods.divprune import DivPrune as DivPrune
    from foveate.methods.dynamicvit import DynamicViT as DynamicViT
    from foveate.methods.eadp import EADP as EADP
    from foveate.methods.evocut import EvoCut as EvoCut
    from foveate.methods.fastervlm import FasterVLM as FasterVLM
    from foveate.methods.fastv import FastV as FastV
    from foveate.methods.fopru import FoPru as FoPru
    from foveate.methods.h2o import H2O as H2O
    from foveate.methods.hiprune import HiPrune as HiPrune
    from foveate.methods.hired import HiRED as HiRED
    from foveate.methods.image_text_interaction import ImageTextInteraction as ImageTextInteraction
    from foveate.methods.lvpruning import LVPruning as LVPruning
    from foveate.methods.mmtok import MMTok as MMTok
    from foveate.methods.pixelprune import PixelPrune as PixelPrune
    from foveate.methods.pool import Pool as Pool
    from foveate.methods.prumerge import PruMerge as PruMerge
    from foveate.methods.prumerge_plus import PruMergePlus as PruMergePlus
    from foveate.methods.pyramiddrop import PyramidDrop as PyramidDrop
    from foveate.methods.random import Random as Random
    from foveate.methods.resize import Resize as Resize
    from foveate.methods.scope import SCOPE as SCOPE
    from foveate.methods.score_cover import ScoreCover as ScoreCover
    from foveate.methods.snapkv import SnapKV as SnapKV
    from foveate.methods.sparsevlm import SparseVLM as SparseVLM
    from foveate.methods.tome import ToMe as ToMe
    from foveate.methods.trim import TRIM as TRIM
    from foveate.methods.uniform import Uniform as Uniform
    from foveate.methods.visionzip import VisionZip as VisionZip
    from foveate.methods.vispruner import VisPruner as VisPruner
    from foveate.methods.vscan import VScan as VScan
    from foveate.prune import prune as prune
    from foveate.prune import restore as restore
    from foveate.report.draw import draw as draw
    from foveate.runtime.handle import Handle as Handle
    from foveate.serve import vllm as vllm
    from foveate.trace import Budget as Budget
    from foveate.trace import Trace as Trace

__version__ = "0.1.0"

MINI = str(Path(__file__).parent / "scenes" / "checkpoint")
"""Folder of the small model that ships with the package; `from_pretrained(foveate.MINI)` loads it."""

_HOMES = {
    "Block": "core",
    "Budget": "trace",
    "CacheSelection": "core",
    "FoveateError": "core",
    "Merger": "forms",
    "Method": "core",
    "Scorer": "forms",
    "Selection": "core",
    "Signals": "core",
    "Stepwise": "forms",
    "Trace": "trace",
    "calibrate": "calibrate",
    "Handle": "runtime.handle",
    "prune": "prune",
    "scale_down": "inference.resizing",
    "restore": "prune",
    "draw": "report.draw",
}
_ROOMS = {"cost": "foveate.cost", "vllm": "foveate.serve.vllm"}
"""Rooms that are public by their own name; neither loads torch."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(_ROOMS[name])
    if name in _HOMES:
        value = getattr(importlib.import_module(f"foveate.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name[:1].isupper():
        from foveate import methods

        kind = methods.by_class_name(name)
        if kind is not None:
            globals()[name] = kind
            return kind
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")


def __dir__() -> list[str]:
    from foveate import methods

    return sorted([*_HOMES, *_ROOMS, "MINI", "__version__", *(methods.get(name).__name__ for name in methods.names())])


class _Front(ModuleType):
    """This package: `foveate.prune` and `foveate.draw` are the verbs, whoever imports the modules of the same names."""

    def __setattr__(self, name: str, value: object) -> None:
        # The import system binds a submodule to its package as soon as it is loaded.
        verb = isinstance(value, ModuleType) and _HOMES.get(name) == name
        super().__setattr__(name, getattr(value, name) if verb else value)


sys.modules[__name__].__class__ = _Front
