"""Draws an analysis: attention by encoder block, what prompts are made of, where the similarity to CLS falls off."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.core import FoveateError
from foveate.evaluate.analysis import HELD, PARTS, PERCENT, QUARTER, Analysis, Input
from foveate.runs import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 12
"""Pictures with a panel or a bar of their own; the means are always over all."""

_INK, _QUIET, _GRID = "#22262b", "#6b7280", "#e4e7eb"
_ACCENT = "#d1495b"
_PART_COLORS = {"before": "#edae49", "visual": "#30638e", "after": "#d1495b", "special": "#9aa5b1"}
_PART_NAMES = {"before": "text before", "visual": "visual", "after": "text after", "special": "special"}
_HELD = round(100 * HELD)
_DPI = 160


def check_drawing() -> None:
    """Refuse to start work that ends in figures where matplotlib is missing.

    Raises:
        FoveateError: matplotlib cannot be imported.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise FoveateError(
            "figures need matplotlib, which is not installed; install it with: pip install 'foveate[draw]'"
        ) from error


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, all of it or nothing; FoveateError where it cannot be written."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI, facecolor="white")


def _figure(width: float, height: float) -> Figure:
    """An empty figure in inches; made without pyplot, which would keep it in a global list."""
    check_drawing()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(axes: Axes, title: str = "", *, across: str = "", up: str = "") -> None:
    """The look of every panel: two spines, quiet ticks, title on the left."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_QUIET)
    axes.tick_params(colors=_QUIET, labelcolor=_INK, labelsize=8.5, length=3)
    axes.set_title(title, loc="left", fontsize=11, color=_INK, pad=10)
    axes.set_xlabel(across, fontsize=9.5, color=_INK)
    axes.set_ylabel(up, fontsize=9.5, color=_INK)


def _halo() -> list[Any]:
    """A white edge around text, so that lines behind it do not cross it."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3, foreground="white")]


def _shortened(text: str, longest: int) -> str:
    """One line of at most `longest` characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1].rstrip()}…"


def _over(analysis: Analysis) -> str:
    count = len(analysis.inputs)
    return "1 picture" if count == 1 else f"mean over {count} pictures"


# ---------------------------------------------------------------------------------------------------------------------
# attention


def attention_figure(analysis: Analysis) -> Figure:
    """How unevenly each encoder block's attention falls on the tokens, and how few tokens hold 80 % of it."""
    figure = _figure(10.6, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_curves(left, analysis)
    _draw_holding(right, analysis)
    figure.suptitle(
        f"Attention in the encoder's {analysis.blocks} blocks, {_over(analysis)}",
        x=0.01, ha="left", fontsize=13, color=_INK, fontweight="bold",
    )  # fmt: skip
    return figure


def _block_colors(analysis: Analysis) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.92 - 0.77 * (block + 0.5) / analysis.blocks) for block in range(analysis.blocks)]


def _draw_curves(axes: Axes, analysis: Analysis) -> None:
    percents = range(PERCENT + 1)
    axes.plot([0, 100], [0, 100], color=_QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "all tokens alike", (62, 62), (0, -11), textcoords="offset points", fontsize=8.5, color=_QUIET,
        rotation=45, rotation_mode="anchor", transform_rotates_text=True, ha="center", va="center",
    )  # fmt: skip
    colors = _block_colors(analysis)
    named = {0, analysis.read, analysis.blocks - 1} if analysis.blocks > 8 else set(range(analysis.blocks))
    for block, color in enumerate(colors):
        reads = block == analysis.read
        label = f"block {block}" + (" (read)" if reads else "") if block in named else None
        shares = [100 * share for share in analysis.curve(block)]
        axes.plot(percents, shares, color=color, linewidth=2.8 if reads else 1.5, label=label, zorder=3 if reads else 2)
    axes.plot([QUARTER, QUARTER, 0], [0, 100 * HELD, 100 * HELD], color=_ACCENT, linewidth=0.9, linestyle=":")
    axes.plot(QUARTER, 100 * HELD, "o", color=_ACCENT, markersize=4.5, zorder=4)
    axes.annotate(
        f"{_HELD} % on {QUARTER} %", (QUARTER, 100 * HELD), (7, -11), textcoords="offset points", fontsize=8.5,
        color=_ACCENT, path_effects=_halo(), zorder=4,
    )  # fmt: skip
    axes.set(xlim=(0, 100), ylim=(0, 101), xticks=range(0, 101, 25), yticks=range(0, 101, 20))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", frameon=False, fontsize=8.5, labelcolor=_INK, handlelength=1.6)
    _plain(
        axes, "What the most attended tokens receive", across="most attended tokens, % of all",
        up="attention that they receive, %",
    )  # fmt: skip


def _draw_holding(axes: Axes, analysis: Analysis) -> None:
    blocks = range(analysis.blocks)
    rows = [[100 * share for share in analysis.holding(block)] for block in blocks]
    means = [statistics.fmean(row) for row in rows]
    axes.bar(blocks, means, width=0.72, color=_block_colors(analysis), zorder=2)
    if len(analysis.inputs) > 1:
        ends = [[mean - min(row) for mean, row in zip(means, rows, strict=True)],
                [max(row) - mean for mean, row in zip(means, rows, strict=True)]]  # fmt: skip
        axes.errorbar(blocks, means, yerr=ends, fmt="none", ecolor=_INK, elinewidth=1, capsize=2.5, zorder=3)
    if analysis.blocks <= 12:
        for block, row in zip(blocks, rows, strict=True):
            axes.annotate(
                f"{means[block]:.0f} %", (block, max(row)), (0, 4), textcoords="offset points", ha="center",
                fontsize=8.5, color=_INK, path_effects=_halo(), zorder=5,
            )  # fmt: skip
    axes.axhline(QUARTER, color=_ACCENT, linewidth=0.9, linestyle=":", zorder=4)
    axes.annotate(
        f"{QUARTER} %", (1, QUARTER), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
        fontsize=8.5, color=_ACCENT, va="center",
    )  # fmt: skip
    step = math.ceil(analysis.blocks / 12)
    ticks = [
        block
        for block in blocks
        if block == analysis.read or (block % step == 0 and abs(block - analysis.read) >= step)
    ]
    axes.set_xticks(ticks, [f"{block}\nread" if block == analysis.read else str(block) for block in ticks])
    axes.set_ylim(0, max(map(max, rows)) * 1.12)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    spread = "; lines: least and most of a picture" if len(analysis.inputs) > 1 else ""
    _plain(axes, f"Tokens that hold {_HELD} % of it", across=f"encoder block{spread}", up="tokens, % of all")


# ---------------------------------------------------------------------------------------------------------------------
# prompts


def tokens_figure(analysis: Analysis) -> Figure:
    """What each prompt is made of: text before the picture, visual tokens, text after, special tokens."""
    shown = analysis.inputs[:MOST_PANELS]
    mean = {part: statistics.fmean(one.tokens[part] for one in analysis.inputs) for part in PARTS}
    rows: list[tuple[str, Mapping[str, float]]] = [(_bar_name(one), one.tokens) for one in shown]
    if len(analysis.inputs) > 1:
        rows.append((f"mean of {len(analysis.inputs)}", mean))
    figure = _figure(9.6, 1.7 + 0.42 * len(rows))
    axes = figure.subplots()
    for row, (_, counts) in enumerate(rows):
        _draw_bar(axes, row, counts)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], parse_math=False)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, 100), xticks=range(0, 101, 20))
    _plain(axes, across="share of the prompt's tokens, %")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if len(rows) > 1:
        axes.get_yticklabels()[-1].set_fontweight("bold")
    _legend(axes, [part for part in PARTS if mean[part]])
    visual = statistics.fmean(one.visual_share for one in analysis.inputs)
    figure.suptitle(
        f"What the prompts are made of: {visual:.1%} visual tokens", x=0.01, ha="left", fontsize=13, color=_INK,
        fontweight="bold",
    )  # fmt: skip
    return figure


def _bar_name(one: Input) -> str:
    return f"{_shortened(one.name, 34)}\n{_shortened(one.question, 34)}"


def _draw_bar(axes: Axes, row: int, counts: Mapping[str, float]) -> None:
    total, start = sum(counts.values()), 0.0
    for part in PARTS:
        share = 100 * counts[part] / total
        axes.barh(row, share, left=start, height=0.62, color=_PART_COLORS[part], edgecolor="white", linewidth=0.6)
        start += share
    told = f"{counts['visual']:.4g} of {total:.4g} tokens"
    place = 100 * (counts["before"] + counts["visual"] / 2) / total
    axes.text(place, row, told, ha="center", va="center", fontsize=8.5, color="white")


def _legend(axes: Axes, parts: list[str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=_PART_COLORS[part], label=_PART_NAMES[part]) for part in parts]
    axes.legend(
        handles=patches, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(parts), frameon=False, fontsize=9,
        labelcolor=_INK, handlelength=1, handleheight=1, borderaxespad=0.3, columnspacing=1.6,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# similarity


def similarity_figure(analysis: Analysis) -> Figure:
    """The sorted similarity to CLS of each picture, its head, and the split.

    Raises:
        FoveateError: the encoder has no CLS token.
    """
    splits = analysis.similarities()
    if not splits:
        raise FoveateError(f"the encoder {analysis.encoder} has no CLS token, so there is no similarity to it to draw")
    shown = analysis.inputs[:MOST_PANELS]
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = _figure(max(6.4, 2.9 * columns), 1.2 + 2.3 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for number, axes in enumerate(grid.flat):
        if number < len(shown):
            _draw_similarity(axes, shown[number])
        else:
            axes.set_axis_off()
    figure.supxlabel("patches, the most similar first", fontsize=9.5, color=_INK)
    figure.supylabel("similarity to CLS, % of the sum", fontsize=9.5, color=_INK)
    depths = analysis.method.depths(analysis.blocks)
    place = f"after {depths[0]} encoder block{'s' if depths[0] > 1 else ''}" if depths else "at the encoder's output"
    mean = statistics.fmean(one.split for one in splits)
    told = f"split i* (red): {mean:.4g} of {len(splits[0].curve)} patches, {_over(analysis)}"
    told += f"; the first {len(shown)} are shown" if len(shown) < len(splits) else ""
    figure.suptitle(
        f"Similarity of the patches to CLS {place}\n", x=0.01, ha="left", fontsize=13, color=_INK, fontweight="bold"
    )
    figure.text(0.01, 1, f"\n\n{told}", va="top", fontsize=9.5, color=_QUIET)
    return figure


def _draw_similarity(axes: Axes, one: Input) -> None:
    found = one.similarity
    assert found is not None
    curve = [100 * value for value in found.curve]
    places, color = range(1, len(curve) + 1), _PART_COLORS["visual"]
    axes.fill_between(places, curve, color=_GRID, linewidth=0)
    axes.fill_between(places[: found.split], curve[: found.split], color=color, alpha=0.55, linewidth=0)
    axes.plot(places, curve, color=color, linewidth=1.6)
    axes.axvline(found.split, color=_ACCENT, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(found.split, curve[found.split - 1], "o", color=_ACCENT, markersize=4.5)
    kept = "" if found.count == found.split else f"\nkept: {found.count}"
    axes.text(
        0.97, 0.93, f"i* = {found.split}{kept}", transform=axes.transAxes, ha="right", va="top", fontsize=9.5,
        color=_ACCENT,
    )  # fmt: skip
    axes.set(xlim=(0, len(curve)), ylim=(0, max(curve) * 1.06))
    _plain(axes)
    axes.set_title(_shortened(one.name, 30), loc="left", fontsize=9.5, color=_INK, pad=4, parse_math=False)
