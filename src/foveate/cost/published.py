"""Figures that papers print, beside what the estimate gives for the same setting.

Table 6 of image-text interaction is not consistent with itself. Its FLOPs at 8 and 4 bits are those at 16 bits halved
and quartered, and so are all figures of its pruned rows, although the simulator that it names computes 4-bit values no
faster than 8-bit ones. Its own row's 2.3 T, 9.7 ms and 0.8 G belong to 114 to 120 visual tokens, and its 13.2 G are the
bytes of the weights alone. Its "Total Memory" is what a prefill moves, not what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from foveate.cost.estimates import estimate

# method, visual tokens, dtype; TFLOPs, ms, GB moved, GB of activations stored. Yu et al., Table 6: LLaVA-1.5-7B on an
# A100, 60 text tokens; tokens are the averages over its tasks that the text states.
_TABLE_6 = (
    ("LLaVA-1.5", 576, "fp16", 8.5, 30.3, 22.2, 4.1),
    ("PruMerge+", 144, "fp16", 2.7, 9.9, 15.4, 0.9),
    ("image-text interaction", 127, "fp16", 2.3, 9.7, 13.2, 0.8),
    ("LLaVA-1.5", 576, "int8", 4.3, 15.2, 11.1, 2.0),
    ("PruMerge+", 144, "int8", 1.4, 5.0, 7.7, 0.5),
    ("image-text interaction", 127, "int8", 1.2, 4.9, 6.6, 0.4),
    ("LLaVA-1.5", 576, "int4", 2.1, 14.2, 5.6, 1.0),
    ("PruMerge+", 144, "int4", 0.7, 2.5, 3.9, 0.2),
    ("image-text interaction", 127, "int4", 0.6, 2.4, 3.3, 0.2),
)

# rho, TFLOPs. Sun et al., Table 1 and section 5.1: LLaVA-1.5-7B, one image and 30 text tokens; 0.45 is "66.7 % less".
_LVPRUNING = ((None, 8.38), (0.6, 3.97), (0.5, 3.18), (0.45, 8.38 * (1 - 0.667)))


@dataclass(frozen=True)
class Cell:
    """One figure: what the paper prints, and what the estimate gives.

    Attributes:
        digits: decimals that the paper prints.
    """

    paper: str
    row: str
    figure: str
    published: float
    computed: float
    digits: int

    @property
    def agrees(self) -> bool:
        """Whether the paper's rounding of the computed figure is the printed one."""
        return round(self.computed, self.digits) == round(self.published, self.digits)


def published() -> list[Cell]:
    """Every cell that can be computed, in the papers' order."""
    return [*_interaction(), *_lvpruning()]


def _interaction() -> list[Cell]:
    cells = []
    for method, visual, dtype, *printed in _TABLE_6:
        prefill = estimate("llava-1.5-7b", visual, 60, dtype=dtype).prefill
        computed = {
            "TFLOPs": prefill.flops / 1e12,
            "ms": prefill.seconds * 1e3,
            "GB moved": prefill.bytes_moved / 1e9,
            "GB stored": prefill.stored_activation_bytes / 1e9,
        }
        row = f"{method}, {visual} + 60 tokens, {dtype}"
        for (figure, value), cell in zip(computed.items(), printed, strict=True):
            cells.append(Cell("image-text interaction, Table 6", row, figure, cell, value, 1))
    return cells


def _lvpruning() -> list[Cell]:
    cells = []
    for rho, printed in _LVPRUNING:
        keep = None if rho is None else "/".join(str(round(rho - less, 10)) for less in (0.0, 0.2, 0.4))
        methods = None if keep is None else f"lvpruning:keep={keep}"
        flops = estimate("llava-1.5-7b", 576, 30, methods, convention="weights").first_token.flops
        row = "LLaVA-1.5-7B" if rho is None else f"rho = {rho}"
        cells.append(Cell("LVPruning, Table 1", row, "TFLOPs", printed, flops / 1e12, 2))
    whole = estimate("llava-1.5-7b", 576, 30, "lvpruning:keep=1.0/1.0/1.0", convention="weights")
    cells.append(Cell("LVPruning, appendix B", "decision modules", "TFLOPs", 0.71, whole.choosing.flops / 1e12, 2))
    return cells
