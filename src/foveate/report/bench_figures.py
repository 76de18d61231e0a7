"""Draws what answers cost: predicted stages, curves over what is kept, and measured rivals with their spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from foveate.cost.estimates import STAGES
from foveate.report.figures import check_drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from foveate.evaluate.bench import Result

_INK, _QUIET, _GRID = "#22262b", "#6b7280", "#e4e7eb"
_COLORS = ("#30638e", "#d1495b", "#edae49", "#00798c", "#66518a", "#8d6a4f")
_STAGE_COLORS = dict(zip(STAGES, ("#00798c", "#d1495b", "#edae49", "#30638e", "#9aa5b1"), strict=True))


def sweep_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Operations up to the first token over the share that is kept, and the unpruned model's as a line.

    Args:
        rows: with the entries `method`, `keep` and `cost`; one without method is the unpruned model.
    """
    figure, axes = _panel(7.2, 4.4)
    names = dict.fromkeys(row["method"] for row in rows if row["method"] is not None)
    for color, name in zip(_COLORS * (1 + len(names) // len(_COLORS)), names, strict=False):
        points = [(row["keep"], _tera(row["cost"])) for row in rows if row["method"] == name]
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=3.5, linewidth=1.6, label=name)
    whole = next((_tera(row["cost"]) for row in rows if row["method"] is None), None)
    if whole is not None:
        axes.axhline(whole, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)), label="unpruned")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK)
    _finish(axes, "share of the visual tokens that the first stage keeps", "TFLOPs up to the first token")
    return figure


def stages_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Roofline milliseconds of each stage up to the first token, one bar per rival."""
    figure, axes = _panel(8.0, 1.4 + 0.5 * len(rows))
    left = [0.0] * len(rows)
    places = range(len(rows) - 1, -1, -1)
    for stage in STAGES[:-1]:
        spans = [getattr(row["cost"], stage).seconds * 1e3 for row in rows]
        axes.barh(places, spans, left=left, height=0.62, color=_STAGE_COLORS[stage], label=stage)
        left = [before + span for before, span in zip(left, spans, strict=True)]
    axes.set_yticks(places, [row["prune"] or "unpruned" for row in rows])
    axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    _finish(axes, "roofline milliseconds up to the first token", "")
    return figure


def bench_figure(results: Sequence[Result]) -> Figure:
    """Measured medians with their inter-quartile range: first token on the left, each further one on the right."""
    figure, axes = _panel(10.0, 1.6 + 0.5 * len(results), panels=2)
    places = list(range(len(results) - 1, -1, -1))
    for panel, name, title in zip(
        axes, ("first_token_ms", "per_token_ms"), ("first token, ms", "each further token, ms"), strict=True
    ):
        for place, result in zip(places, results, strict=True):
            spread = getattr(result, name)
            if spread is None:
                continue
            panel.barh(place, spread.median, height=0.62, color=_COLORS[0] if place == places[0] else _COLORS[3])
            panel.errorbar(
                spread.median, place, xerr=[[spread.median - spread.low], [spread.high - spread.median]],
                fmt="none", ecolor=_INK, elinewidth=1, capsize=3,
            )  # fmt: skip
        panel.set_yticks(places, [result.prune or "unpruned" for result in results])
        _finish(panel, title, "")
    axes[1].set_yticklabels([])
    return figure


def _tera(cost: Any) -> float:
    return float(cost.first_token.flops / 1e12)


def _panel(width: float, height: float, panels: int = 1) -> tuple[Figure, Any]:
    """An empty figure in inches and its axes; made without pyplot, which would keep it in a global list."""
    check_drawing()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels)


def _finish(axes: Axes, across: str, up: str) -> None:
    """The look of every panel: two spines, quiet ticks, a grid behind."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_QUIET)
    axes.tick_params(colors=_QUIET, labelcolor=_INK, labelsize=8.5, length=3)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(across, fontsize=9.5, color=_INK)
    axes.set_ylabel(up, fontsize=9.5, color=_INK)
