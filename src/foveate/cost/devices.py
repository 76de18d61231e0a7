"""What devices can do: operations per second, bytes per second, memory, and how far a model that runs falls short."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from foveate.core import FoveateError, did_you_mean


@dataclass(frozen=True)
class Precision:
    """Bits of a weight, of an activation and of a value in the cache."""

    name: str
    weights: int
    activations: int
    cache: int

    @property
    def widest(self) -> int:
        """Bits of the widest of them, which decides the units that compute."""
        return max(self.weights, self.activations, self.cache)


_NAMED = {
    "fp32": (32, 32, 32),
    "fp16": (16, 16, 16),
    "bf16": (16, 16, 16),
    "int8": (8, 8, 8),
    "int4": (4, 4, 4),
}
_ALIASES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_BITS = re.compile(r"w(\d+)a(\d+)kv(\d+)")


def precision(name: str | Precision) -> Precision:
    """The precision of a name: fp32, fp16, bf16, int8, int4, or bits such as w4a16kv8.

    Raises:
        FoveateError: no such precision, or a width that is none of 4, 8, 16 and 32 bits.
    """
    if isinstance(name, Precision):
        return name
    known = _ALIASES.get(name.lower(), name.lower())
    if known in _NAMED:
        return Precision(known, *_NAMED[known])
    bits = _BITS.fullmatch(known)
    if bits is None:
        raise FoveateError(f"unknown dtype {name!r}; {did_you_mean(known, [*_NAMED, 'w4a16kv16'])}")
    widths = [int(width) for width in bits.groups()]
    for width in widths:
        if width not in (4, 8, 16, 32):
            near = min((4, 8, 16, 32), key=lambda one: abs(one - width))
            raise FoveateError(f"dtype={name!r} has values of {width} bits; the nearest width is {near}")
    return Precision(known, *widths)


@dataclass(frozen=True)
class Hardware:
    """One device by its data sheet, dense (no sparsity) and with accumulation in 32 bits.

    Attributes:
        fp16: operations per second on 16-bit values; fp32 and int8 likewise. 4-bit values compute on the 8-bit units.
        bandwidth: bytes per second between memory and processor.
        memory: bytes.
        efficiency: share of the roofline's speed that a model of transformers reaches, fitted to measurements; None
            where none were made.
        launch: seconds from one kernel launch to the next when Python launches them one by one, fitted likewise.
    """

    name: str
    fp16: float
    fp32: float
    int8: float
    bandwidth: float
    memory: float
    efficiency: float | None = None
    launch: float | None = None

    def __post_init__(self) -> None:
        for field in ("fp16", "fp32", "int8", "bandwidth", "memory"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise FoveateError(f"Hardware.{field}={value} is no rate; it must be above 0")
        if (self.efficiency is None) != (self.launch is None):
            raise FoveateError("Hardware.efficiency and Hardware.launch are fitted together; give both or neither")

    def peak(self, precision: Precision) -> float:
        """Operations per second on values of this precision."""
        if precision.widest <= 8:
            return self.int8
        return self.fp16 if precision.widest <= 16 else self.fp32

    def seconds(self, flops: float, moved: float, precision: Precision) -> float:
        """The roofline: as long as the slower of computing and moving takes."""
        return max(flops / self.peak(precision), moved / self.bandwidth)

    def launched(self, seconds: float, launches: int) -> float | None:
        """Seconds of a stage whose kernels Python launches one by one; None without a fit.

        The device works off what is launched while Python launches more, so the slower of both decides.
        """
        if self.efficiency is None or self.launch is None:
            return None
        return max(launches * self.launch, seconds / self.efficiency)


_ROWS = (
    Hardware("a100-40gb", 312e12, 19.5e12, 624e12, 1555e9, 40e9),
    Hardware("a100-80gb", 312e12, 19.5e12, 624e12, 2039e9, 80e9),
    Hardware("h100", 989e12, 67e12, 1979e12, 3350e9, 80e9),
    # Fitted to eager prefills of LLaVA-1.5-7B in bfloat16, 64 to 576 visual tokens and 60 others, batches of 1 and 8.
    Hardware("h200", 989e12, 67e12, 1979e12, 4800e9, 141e9, efficiency=0.465, launch=16.1e-6),
    Hardware("l40s", 362e12, 91.6e12, 733e12, 864e9, 48e9),
    Hardware("4090", 165.2e12, 82.6e12, 660.6e12, 1008e9, 24e9),
    Hardware("3090", 71e12, 35.6e12, 284e12, 936.2e9, 24e9),
    # 16 cores at 2.5 GHz, two 512-bit multiply-adds a cycle (64 operations on 32 bits, 256 on 8); eight channels of
    # DDR5-4800. Values of 16 bits compute as 32.
    Hardware("cpu", 2.56e12, 2.56e12, 10.24e12, 307.2e9, 128e9),
)
HARDWARE: Mapping[str, Hardware] = MappingProxyType({row.name: row for row in _ROWS})


def hardware(name: str | Hardware) -> Hardware:
    """A row of `HARDWARE` by its name, or the hardware itself.

    Raises:
        FoveateError: no row has that name.
    """
    if isinstance(name, Hardware):
        return name
    found = HARDWARE.get(name.lower())
    if found is None:
        begun = next((row for row in HARDWARE if row.startswith(name.lower())), name.lower())
        raise FoveateError(f"no hardware is called {name!r}; {did_you_mean(begun, HARDWARE)}")
    return found


def hardware_of(device: str) -> Hardware | None:
    """The row of a device by the name that its driver gives it, such as "NVIDIA A100-SXM4-80GB"; None if unknown."""
    words = re.sub(r"[^a-z0-9]", "", device.lower())
    keys = {"h200": "h200", "h100": "h100", "l40s": "l40s", "rtx4090": "4090", "rtx3090": "3090"}
    for part, row in keys.items():
        if part in words:
            return HARDWARE[row]
    if "a100" in words:
        return HARDWARE["a100-80gb" if "80gb" in words else "a100-40gb"]
    return None


def fitted(row: Hardware, runs: list[tuple[int, float, float]]) -> Hardware:
    """`row` with the efficiency and the launch time that come nearest to measured runs, by their worst relative error.

    Args:
        runs: of each run its kernel launches, its roofline seconds, and the seconds that were measured.

    Raises:
        FoveateError: fewer than two runs, or one that took no time.
    """
    if len(runs) < 2 or any(min(run) <= 0 for run in runs):
        raise FoveateError(f"{len(runs)} runs fit no efficiency and launch time; give at least 2, each above 0")

    def worst(efficiency: float, launch: float) -> float:
        return max(abs(max(launches * launch, ideal / efficiency) / measured - 1) for launches, ideal, measured in runs)

    # A run is bound by its launches or by the device, so the best pair lies between what single runs ask for.
    efficiencies = _between([ideal / measured for _, ideal, measured in runs])
    launches = _between([measured / count for count, _, measured in runs])
    pairs = ((efficiency, launch) for efficiency in efficiencies for launch in launches)
    efficiency, launch = min(pairs, key=lambda pair: worst(*pair))
    return dataclasses.replace(row, efficiency=efficiency, launch=launch)


def _between(values: list[float], steps: int = 200) -> list[float]:
    """Values from the least to the most, in equal ratios."""
    low, high = min(values), max(values)
    return [low * (high / low) ** (step / steps) for step in range(steps + 1)]
