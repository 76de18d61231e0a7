"""Charts as inline SVG: accuracy against cost with the Pareto front, and the staircase of tokens over the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveate.report.markup import Markup, element, join

MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 46, 16, 14, 42
WIDE, NARROW = (760, 440), (360, 340)
"""Sizes in pixels of CSS: on a desktop, and on a phone."""

_LOG_FROM = 8  # of the largest cost over the smallest: from here on steps of the axis are factors


@dataclass(frozen=True)
class Point:
    """One rival in a chart.

    Attributes:
        name: its spec.
        cost, worth: where it stands.
        interval: of the worth.
        kind: "plain" (unpruned), "baseline", "bound" or "rival".
        number: on the Pareto front its number, else None.
    """

    name: str
    cost: float
    worth: float
    interval: tuple[float, float] | None
    kind: str
    number: int | None = None


def against(points: Sequence[Point], across: str, title: str) -> Markup:
    """Accuracy against a cost, drawn for two widths of which a page shows one.

    Args:
        points: at least one.
        across: what the cost is.
        title: for those who do not see it.
    """
    return join(*(_against(points, across, title, size) for size in (WIDE, NARROW)))


def _against(points: Sequence[Point], across: str, title: str, size: tuple[int, int]) -> Markup:
    width, height = size
    costs = [point.cost for point in points]
    ends = [end for point in points for end in (point.interval or (point.worth, point.worth)) if point.number]
    worths = [*(point.worth for point in points), *ends]
    x, ticks_x = _cost_axis(min(costs), max(costs), MARGIN_LEFT + 8, width - MARGIN_RIGHT - 8, width // 110)
    low, high = _around(min(worths), max(worths))
    ticks_y = _nice(low, high, 6)
    y = _linear(low, high, height - MARGIN_BOTTOM, MARGIN_TOP)
    bottom, right = height - MARGIN_BOTTOM, width - MARGIN_RIGHT
    parts: list[Markup] = []
    for value in ticks_y:
        parts.append(element("line", class_="grid", x1=MARGIN_LEFT, x2=right, y1=_r(y(value)), y2=_r(y(value))))
        parts.append(_text(f"{100 * value:g}", MARGIN_LEFT - 6, y(value) + 4, "end"))
    for value in ticks_x:
        parts.append(element("line", class_="grid", x1=_r(x(value)), x2=_r(x(value)), y1=MARGIN_TOP, y2=bottom))
        parts.append(_text(f"{value:g}", x(value), bottom + 16, "middle"))
    parts.append(_text(across, (MARGIN_LEFT + right) / 2, height - 6, "middle"))
    parts.append(_text("%", MARGIN_LEFT - 6, MARGIN_TOP - 3, "end"))
    best = sorted((point for point in points if point.number is not None), key=lambda point: point.cost)
    if len(best) > 1:
        steps = f"M{_r(x(best[0].cost))} {_r(y(best[0].worth))}"
        steps += "".join(f"H{_r(x(point.cost))}V{_r(y(point.worth))}" for point in best[1:])
        parts.append(element("path", class_="front", d=steps))
    # What is on the front is drawn last, above everything else.
    parts += [_mark(point, x, y) for point in sorted(points, key=lambda point: -(point.number or len(points) + 1))]
    kind = "wide" if size == WIDE else "narrow"
    return element(
        "svg", *parts, class_=f"chart {kind}", viewBox=f"0 0 {width} {height}", role="img", aria_label=title
    )  # fmt: skip


def _mark(point: Point, x: Callable[[float], float], y: Callable[[float], float]) -> Markup:
    """A point in the form of its kind, told from others without its colour too."""
    across, up = x(point.cost), y(point.worth)
    told = element("title", f"{point.name}: {100 * point.worth:.1f} % at {point.cost:.4g}")
    parts: list[Markup] = []
    if point.number is not None and point.interval is not None:
        low, high = (_r(y(end)) for end in point.interval)
        parts.append(element("line", class_="interval", x1=_r(across), x2=_r(across), y1=low, y2=high))
    form = shape(point.kind, across, up, 9 if point.number is not None else 5)
    parts.append(form)
    if point.number is not None:
        parts.append(_text(str(point.number), across, up + 4, "middle", "number"))
    on = " best" if point.number is not None else ""
    return element("g", told, *parts, class_=f"mark {point.kind}{on}")


def shape(kind: str, x: float, y: float, r: float) -> Markup:
    """The form of a kind of point around a place, `r` pixels wide to each side."""
    if kind == "baseline":
        return element("rect", x=_r(x - r * 0.9), y=_r(y - r * 0.9), width=_r(1.8 * r), height=_r(1.8 * r))
    if kind == "plain":
        return element("path", d=f"M{_r(x)} {_r(y - 1.3 * r)}l{_r(1.3 * r)} {_r(1.3 * r)}l{_r(-1.3 * r)} {_r(1.3 * r)}"
                                 f"l{_r(-1.3 * r)} {_r(-1.3 * r)}z")  # fmt: skip
    if kind == "bound":
        return element("path", d=f"M{_r(x)} {_r(y - 1.2 * r)}l{_r(1.2 * r)} {_r(2.1 * r)}h{_r(-2.4 * r)}z")
    return element("circle", cx=_r(x), cy=_r(y), r=_r(r))


def staircase(layers: Sequence[float], most: float, title: str) -> Markup:
    """Visual tokens that each decoder layer sees, over the layers.

    Args:
        layers: tokens of each, at least one layer.
        most: where the axis ends: the tokens of the unpruned model.
        title: for those who do not see it.
    """
    width, height, left, bottom = 220, 104, 34, 84
    x = _linear(0, len(layers), left, width - 8)
    y = _linear(0, most or 1, bottom, 12)
    line = f"M{left} {_r(y(layers[0]))}" + "".join(
        f"V{_r(y(count))}H{_r(x(place + 1))}" for place, count in enumerate(layers)
    )
    parts = [
        element("line", class_="whole", x1=left, x2=width - 8, y1=_r(y(most)), y2=_r(y(most))),
        element("path", class_="area", d=f"{line}V{bottom}H{left}z"),
        element("path", class_="stairs", d=line),
        _text(f"{most:.4g}", left - 4, y(most) + 4, "end"),
        _text("0", left - 4, bottom + 4, "end"),
        _text("1", left, bottom + 16, "start"),
        _text(f"layer {len(layers)}", width - 8, bottom + 16, "end"),
    ]
    return element("svg", *parts, class_="steps", viewBox=f"0 0 {width} {height}", role="img", aria_label=title)


# ---------------------------------------------------------------------------------------------------------------------
# axes


def _text(words: str, x: float, y: float, anchor: str, kind: str | None = None) -> Markup:
    return element("text", words, x=_r(x), y=_r(y), text_anchor=anchor, class_=kind)


def _r(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)


def _around(low: float, high: float) -> tuple[float, float]:
    """A little room below and above; a single value gets some, too."""
    room = (high - low) * 0.06 or 0.02
    return max(0.0, low - room), high + room


def _cost_axis(
    low: float, high: float, start: float, end: float, ticks: int
) -> tuple[Callable[[float], float], list[float]]:
    """Where a cost stands, and the costs that are written down: by factors of two where they lie far apart."""
    if low > 0 and high / low >= _LOG_FROM:
        place = _linear(math.log(low), math.log(high), start, end)
        powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
        return lambda value: place(math.log(value)), [2.0**power for power in powers]
    low, high = _around(low, high)
    return _linear(low, high, start, end), _nice(low, high, max(3, ticks))


def _nice(low: float, high: float, most: int) -> list[float]:
    """Round values from `low` to `high`, about `most` of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * (first + number), 10) for number in range(int((high - first * step) / step + 1e-9) + 1)]
