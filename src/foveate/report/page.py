"""One HTML file about a measurement: it asks nothing of a network, and runs no script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from foveate.evaluate.front import front
from foveate.evaluate.results import BASELINES, UNPRUNED
from foveate.report import charts, rasters
from foveate.report.markup import Child, Markup, element, join
from foveate.report.measured import Measured

DROPS = (1.0, 2.0, 5.0, 10.0)
"""Points below the unpruned model for which the cheapest rival is named."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_FEW = 8  # staircases that are shown before the others are folded away
_KNOWN = {"method", "accuracy", "interval", "tokens", "equivalent_tokens", "layers", "prefill_flops_share",
          "kv_bytes_share", "first_token_ms", "whole_ms", "samples", "questions", "measures", "against"}  # fmt: skip


def page(found: Measured) -> str:
    """The whole file.

    Raises:
        FoveateError: a picture is none.
    """
    title = f"{found.model} on {found.task}"
    sections = [
        _summary(found),
        _cost_section(
            found, "equivalent_tokens", "visual tokens, averaged over the decoder's layers", "tokens", "tokens"
        ),
        _cost_section(found, "first_token_ms", "milliseconds to the first token", "ms", "first-token"),
        _cost_section(found, "whole_ms", "milliseconds to the end of the answer", "ms", "answer"),
        _staircases(found),
        _pictures(found),
        _table(found),
        *_measures(found),
        _unreached(found),
        _command(found),
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8"))),
    )
    asked = f"{found.questions} questions, greedy answers. Every rival answered the same ones."
    header = element("header", element("h1", title), element("p", asked))
    body = element("body", element("main", header, *sections))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _section(name: str, title: str, *children: Child) -> Markup:
    return element("section", element("h2", title), *children, id=name)


def _kind(row: dict[str, Any]) -> str:
    name = row["method"]
    if name == UNPRUNED:
        return "plain"
    if name.startswith("ceiling"):
        return "bound"
    return "baseline" if name.partition(":")[0] in BASELINES and "+" not in name else "rival"


# ---------------------------------------------------------------------------------------------------------------------
# accuracy against cost


def _summary(found: Measured) -> Markup:
    """The cheapest rivals within some points of the unpruned model."""
    plain = found.rows[0]
    lines: list[list[Child]] = []
    for drop in DROPS:
        near = [row for row in _rivals(found) if row["accuracy"] >= plain["accuracy"] - drop / 100]
        best = min(near, key=lambda row: row["equivalent_tokens"], default=None)
        cells: list[Child] = ["none of the rivals", "-", "-"]
        if best is not None:
            share = best["equivalent_tokens"] / (plain["equivalent_tokens"] or 1)
            tokens = f"{best['equivalent_tokens']:.4g} ({share:.0%})"
            cells = [element("code", best["method"]), _points(best["accuracy"] - plain["accuracy"]), tokens]
        lines.append([f"{drop:g} point{'s' if drop != 1 else ''}", *cells])
    said = f"Unpruned, {plain['accuracy']:.1%} at {plain['equivalent_tokens']:.4g} visual tokens. "
    said += "Whatever lies within the interval of another rival may as well be luck."
    heads = ["at most below", "fewest tokens", "from unpruned", "equivalent tokens"]
    return _section("summary", "In short", element("p", said), _rows(heads, lines, left=2))


def _rivals(found: Measured) -> list[dict[str, Any]]:
    """Rows of what can be used: neither the unpruned model nor a bound."""
    return [row for row in found.rows if _kind(row) in ("rival", "baseline")]


def _cost_section(found: Measured, cost: str, across: str, unit: str, name: str) -> Markup | None:
    rows = [row for row in found.rows if cost in row]
    if not _rivals(found) or len(rows) < 2:
        return None
    usable = [row for row in rows if _kind(row) != "bound"]
    best = front([(row[cost], row["accuracy"]) for row in usable])
    numbers = {usable[place]["method"]: number for number, place in enumerate(best, start=1)}
    points = [
        charts.Point(
            row["method"], row[cost], row["accuracy"], tuple(row.get("interval") or ()) or None, _kind(row),
            numbers.get(row["method"]),
        )
        for row in rows
    ]  # fmt: skip
    lines: list[list[Child]] = [
        [number, element("code", row["method"]), f"{row['accuracy']:.1%}", f"{row[cost]:.4g}"]
        for number, row in ((number, usable[place]) for number, place in enumerate(best, start=1))
    ]
    title = f"Accuracy against {across}"
    return _section(
        name,
        title,
        element("p", "Numbered: the Pareto front, which nothing beats that costs no more; lines are 95 % intervals."),
        _legend({_kind(row) for row in rows}),
        charts.against(points, across, title),
        _rows(["", "on the front", "accuracy", unit], lines, left=2),
    )


def _legend(kinds: set[str]) -> Markup:
    words = {"plain": "unpruned", "baseline": "baseline", "rival": "method", "bound": "bound from the answers"}
    entries = []
    for kind, said in words.items():
        if kind in kinds:
            shape = element("g", charts.shape(kind, 8, 8, 5), class_=f"mark {kind}")
            key = element("svg", shape, class_="key", viewBox="0 0 16 16", aria_hidden="true")
            entries.append(element("li", key, said))
    return element("ul", *entries, class_="legend")


# ---------------------------------------------------------------------------------------------------------------------
# layers, pictures


def _staircases(found: Measured) -> Markup | None:
    stairs: dict[tuple[float, ...], list[str]] = {}
    for row in found.rows:
        if row.get("layers"):
            stairs.setdefault(tuple(round(count, 3) for count in row["layers"]), []).append(row["method"])
    if not stairs:
        return None
    most = max(max(layers) for layers in stairs)
    cards = []
    for layers, names in stairs.items():
        title = f"Tokens by layer of {', '.join(names)}"
        said = element("figcaption", *(join(element("code", name), " ") for name in names))
        cards.append(element("figure", charts.staircase(layers, most, title), said))
    shown: list[Child] = [element("div", *cards[:_FEW], class_="cards")]
    if len(cards) > _FEW:
        more = element("summary", f"{len(cards) - _FEW} more")
        shown.append(element("details", more, element("div", *cards[_FEW:], class_="cards")))
    told = "Visual tokens of a picture that each decoder layer sees; rivals with the same steps share a figure."
    return _section("layers", "Tokens by layer", element("p", told), *shown)


def _pictures(found: Measured) -> Markup | None:
    if not found.pictures:
        return None
    told = "As the model sees them, with the tokens that each stage left; heat shows how a method ranks the tokens."
    scale = element("p", "least ", *(element("i", style=f"background:{color}") for color in rasters.HEAT), " most",
                    class_="scale")  # fmt: skip
    shown = [_picture(number, one) for number, one in enumerate(found.pictures, start=1)]
    return _section("pictures", "What is kept", element("p", told), scale, *shown)


def _picture(number: int, found: dict[str, Any]) -> Markup:
    pixels, size = rasters.pixels(found["png"], number)
    grid = None if found["grid"] is None else (found["grid"][0], found["grid"][1])
    cards = []
    for name, one in found["rivals"].items():
        figures = [rasters.whole(number, size, f"picture {number}")] if not one["stages"] else []
        for place, stage in enumerate(one["stages"], start=1):
            if grid is None:
                continue
            at = f"{name}, stage {place}"
            if stage.get("scores") is not None:
                figures.append(rasters.heat(number, size, grid, stage["scores"], f"{at}: how tokens are ranked"))
            figures.append(rasters.kept(number, size, grid, stage["kept"], f"{at}: what is kept"))
        counts = [*(stage["before"] for stage in one["stages"][:1]), *(stage["after"] for stage in one["stages"])]
        if one.get("scaled"):  # the picture has no stages then
            counts = [one["scaled"]["before"], one["scaled"]["after"]]
        said = " → ".join(map(str, counts)) + " tokens" if counts else "all tokens"
        missing = "its tokens form no single raster" if one["stages"] and grid is None else None
        words = [element("code", name), element("br"), f"“{one['answer']}” · {said}", missing and f" · {missing}"]
        cards.append(element("figure", element("div", *figures, class_="stages"), element("figcaption", *words)))
    asked = element("h3", f"{number}. {found['question']}", " ", element("small", f"right: {found['right']}"))
    return join(pixels, asked, element("div", *cards, class_="cards"))


# ---------------------------------------------------------------------------------------------------------------------
# tables


def _table(found: Measured) -> Markup:
    """Every row with every figure."""
    plain = found.rows[0]
    more = [name for name in dict.fromkeys(key for row in found.rows for key in row) if name not in _KNOWN]
    heads = ["method", "accuracy", "95 %", "from unpruned", "p", *more, "tokens", "equivalent", "prefill FLOPs",
             "KV bytes", "first token ms", "answer ms"]  # fmt: skip
    lines: list[list[Child]] = []
    for row in found.rows:
        against = _difference(row, UNPRUNED)
        difference = None if row is plain else _points(row["accuracy"] - plain["accuracy"])
        ends = row.get("interval")
        lines.append([
            element("code", row["method"]),
            f"{row['accuracy']:.1%}",
            f"{ends[0]:.1%}-{ends[1]:.1%}" if ends else None,
            difference,
            f"{against['p']:.2g}" if against else None,
            *(_cell(row.get(name)) for name in more),
            *(_figure(row, name, "{:.4g}") for name in ("tokens", "equivalent_tokens")),
            *(_figure(row, name, "{:.0%}") for name in ("prefill_flops_share", "kv_bytes_share")),
            *(_figure(row, name, "{:.3g}") for name in ("first_token_ms", "whole_ms")),
        ])  # fmt: skip
    empty = {place for place in range(1, len(heads)) if all(line[place] is None for line in lines)}
    shown = [place for place in range(len(heads)) if place not in empty]
    kept = [[line[place] for place in shown] for line in lines]
    return _section("table", "All figures", _rows([heads[place] for place in shown], kept))


def _difference(row: dict[str, Any], other: str) -> dict[str, float] | None:
    found = row.get("against")
    one = found.get(other) if isinstance(found, dict) else None
    return one if isinstance(one, dict) and isinstance(one.get("p"), int | float) else None


def _measures(found: Measured) -> list[Markup]:
    """What the benchmarks of each type of question report."""
    kinds: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for row in found.rows:
        measures = row.get("measures")
        for kind, values in measures.items() if isinstance(measures, dict) else ():
            if isinstance(values, dict):
                kinds.setdefault(kind, []).append((row["method"], values))
    tables = []
    for number, (kind, rows) in enumerate(kinds.items(), start=1):
        names = [*dict.fromkeys(name for _, values in rows for name in values)]
        lines = [[element("code", method), *(_cell(values.get(name)) for name in names)] for method, values in rows]
        tables.append(_section(f"measures-{number}", f"Questions of type {kind}", _rows(["method", *names], lines)))
    return tables


def _unreached(found: Measured) -> Markup | None:
    if not found.unreached:
        return None
    lines: list[list[Child]] = [
        [element("code", one["method"]), "/".join(map(str, one.get("keep") or ())), str(one.get("why", ""))]
        for one in found.unreached
    ]
    return _section("unreached", "Not measured", _rows(["method", "budget", "why"], lines, left=3))


def _command(found: Measured) -> Markup | None:
    return _section("command", "Measured by", element("pre", found.command)) if found.command else None


def _rows(heads: Sequence[str], lines: Sequence[Sequence[Child]], left: int = 1) -> Markup:
    """A table; its first `left` columns are words, the others figures. It scrolls by itself where it is wide."""

    def cells(name: str, line: Sequence[Child]) -> list[Markup]:
        return [
            element(name, "-" if cell is None else cell, class_=None if place < left else "figure",
                    scope="col" if name == "th" else None)
            for place, cell in enumerate(line)
        ]  # fmt: skip

    head = element("thead", element("tr", *cells("th", heads)))
    body = element("tbody", *(element("tr", *cells("td", line)) for line in lines))
    return element("div", element("table", head, body), class_="scroll", tabindex=0)


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _cell(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return f"{value:.1%}" if 0 <= value <= 1 else f"{value:.4g}"


def _figure(row: dict[str, Any], name: str, form: str) -> str | None:
    write: Callable[[float], str] = form.format
    return write(row[name]) if name in row else None
