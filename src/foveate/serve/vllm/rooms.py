"""What this room takes from the others, in one place: the rest of it imports from here."""

from foveate.choosing.choose import choose, choose_inside
from foveate.choosing.images import Image
from foveate.choosing.lanes import Lane, Lanes, settled
from foveate.choosing.packing import to_tokens
from foveate.choosing.signals import JOINT, Depth, Prompt
from foveate.core import Block, FoveateError, Method, did_you_mean, short
from foveate.cost.plan import visual_per_layer
from foveate.families.family import Family
from foveate.families.layouts import Encoded, Layout, tiles_of
from foveate.families.rows import FAMILIES
from foveate.families.towers import Tower
from foveate.runtime.encoder.joint_space import JointSpace, Questions
from foveate.runtime.encoder.pixels import Pixels
from foveate.runtime.encoder.probe import Probe, tower_needs
from foveate.runtime.encoder.tower import Brought, TowerStages
from foveate.runtime.encoder.watch import PackedWatch, Watch
from foveate.runtime.limits import check_reach, context_of
from foveate.runtime.support import why_not, working_methods
from foveate.runtime.wrapped import check_version
from foveate.spec import format as format_spec
from foveate.spec import parse_stages

__all__ = [
    "FAMILIES",
    "JOINT",
    "Block",
    "Brought",
    "Depth",
    "Encoded",
    "Family",
    "FoveateError",
    "Image",
    "JointSpace",
    "Lane",
    "Lanes",
    "Layout",
    "Method",
    "PackedWatch",
    "Pixels",
    "Probe",
    "Prompt",
    "Questions",
    "Tower",
    "TowerStages",
    "Watch",
    "check_reach",
    "check_version",
    "choose",
    "choose_inside",
    "context_of",
    "did_you_mean",
    "format_spec",
    "parse_stages",
    "settled",
    "short",
    "tiles_of",
    "to_tokens",
    "tower_needs",
    "visual_per_layer",
    "why_not",
    "working_methods",
]
