"""The page of a measurement: it asks nothing of a network, shows every figure, and turns no text into HTML."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.core import FoveateError
from foveate.evaluate.front import front
from foveate.report import charts
from foveate.report.markup import VOID
from foveate.report.measured import read
from foveate.report.page import page

HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>'
EXTERNAL = re.compile(r"(?:https?:)?//|url\(|@import|javascript:|file:", re.IGNORECASE)
KEPT = [0, 1, 2, 5]


@dataclass
class Read(HTMLParser):
    """Elements, attributes and tables of a page; an element without its end fails."""

    tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def parsed(text: str) -> Read:
    found = Read()
    found.feed(text)
    found.close()
    assert found.open == []
    return found


def png() -> str:
    file = io.BytesIO()
    Image.effect_noise((30, 20), 80).convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def row(method: str, accuracy: float, tokens: float, milliseconds: float, **more: Any) -> dict[str, Any]:
    ends = [max(0.0, accuracy - 0.05), min(1.0, accuracy + 0.05)]
    figures = {"tokens": tokens, "equivalent_tokens": tokens, "layers": [tokens] * 4, "color": accuracy / 2}
    shares = {"prefill_flops_share": 0.5, "kv_bytes_share": 0.25}
    times = {"first_token_ms": milliseconds, "whole_ms": 2 * milliseconds}
    return {"method": method, "accuracy": accuracy, "interval": ends, **figures, **shares, **times, **more}


@pytest.fixture
def found() -> dict[str, Any]:
    stage = {"method": "fopru:keep=4", "site": "input", "layer": None, "before": 6, "after": 4, "kept": KEPT}
    seen = {
        "none": {"answer": "yes", "stages": []},
        "fopru:keep=4": {"answer": HOSTILE, "stages": [{**stage, "scores": [6.0, 5.0, 4.0, 1.0, None, 3.0]}]},
        "resize:keep=4": {"answer": "no", "stages": [], "scaled": {"size": [28, 14], "before": 6, "after": 2}},
    }
    return {
        "command": "foveate eval --model mini & more",
        "model": "mini",
        "task": "scenes",
        "samples": 40,
        "rows": [
            row("random:keep=4", 0.5, 4, 10.0),
            row("none", 0.9, 36, 30.0),
            row("fopru:keep=4", 0.7, 4, 20.0),
            row("fastv:keep=4", 0.6, 20, 40.0, layers=[36, 36, 4, 4]),
            row("ceiling (tokens of the object asked about)", 0.95, 5, 1.0),
        ],
        "unreached": [{"method": "tome", "keep": [16, 8], "why": "too few <b>"}],
        "pictures": [{"question": HOSTILE, "right": "no", "png": png(), "grid": [2, 3], "rivals": seen}],
    }


def written(found: dict[str, Any], folder: Path) -> Path:
    file = folder / "rows.json"
    file.write_text(json.dumps(found))
    return file


def rendered(found: dict[str, Any], folder: Path) -> str:
    return page(read(written(found, folder)))


def hostile(value: Any) -> Any:
    """The same with every text that a user may have written in place of its own, and in keys."""
    if isinstance(value, dict):
        return {key if key in FIXED else key + HOSTILE: hostile(one) for key, one in value.items()}
    if isinstance(value, list):
        return [hostile(one) for one in value]
    return value + HOSTILE if isinstance(value, str) else value


FIXED = {
    "command", "model", "task", "samples", "rows", "unreached", "pictures", "method", "accuracy", "interval", "tokens",
    "equivalent_tokens", "layers", "prefill_flops_share", "kv_bytes_share", "first_token_ms", "whole_ms", "keep", "why",
    "question", "right", "png", "grid", "rivals", "answer", "stages", "kept", "scores", "site", "layer", "before",
    "after", "measures", "against", "scaled", "size",
}  # fmt: skip


def test_nothing_is_asked_of_a_network(found: dict[str, Any], tmp_path: Path) -> None:
    text = rendered(found, tmp_path)
    page_read = parsed(text)
    assert EXTERNAL.findall(re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)) == []
    links = [value for _, name, value in page_read.attributes if name in ("href", "src", "action", "xlink:href")]
    assert links and all(value.startswith(("#", "data:image/png;base64,")) for value in links)
    assert not {"script", "link", "iframe", "object", "embed", "form", "img", "a"} & set(page_read.tags)
    policy = [value for _, name, value in page_read.attributes if name == "content" and "default-src" in value]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_no_text_becomes_html(found: dict[str, Any], tmp_path: Path) -> None:
    """Every text of the file is hostile, names of figures and types of questions too; the tags stay the same."""
    found["rows"][1]["measures"] = {"pope": {"accuracy": 0.5, "f1": 0.25}}
    plain = parsed(rendered(found, tmp_path))
    bad = hostile(found)
    bad["rows"][1]["method"] = "none"
    bad["pictures"][0]["png"] = found["pictures"][0]["png"]
    again = parsed(rendered(bad, tmp_path))
    assert sorted(again.tags) == sorted(plain.tags)
    assert not any(name.startswith("on") or name == "src" for _, name, _ in again.attributes)
    assert "".join(again.words).count(HOSTILE) > 20, "it is shown as it was written"


def test_every_figure_of_every_row_is_there(found: dict[str, Any], tmp_path: Path) -> None:
    tables = parsed(rendered(found, tmp_path)).tables
    table = next(table for table in tables if table[0][0] == "method" and "95 %" in table[0])
    assert table[0] == [
        "method", "accuracy", "95 %", "from unpruned", "color", "tokens", "equivalent", "prefill FLOPs", "KV bytes",
        "first token ms", "answer ms",
    ]  # fmt: skip
    assert [line[0] for line in table[1:]] == [
        "none", "random:keep=4", "fopru:keep=4", "fastv:keep=4", "ceiling (tokens of the object asked about)",
    ]  # fmt: skip
    assert all(len(line) == len(table[0]) for line in table)
    fopru = ["fopru:keep=4", "70.0%", "65.0%-75.0%", "-20.0", "35.0%", "4", "4", "50%", "25%", "20", "40"]
    assert table[3] == fopru
    assert ["tome", "16/8", "too few <b>"] in [line for table in tables for line in table]


def test_the_front_is_named(found: dict[str, Any], tmp_path: Path) -> None:
    """The bound from the answers is in the figure but is none of those that can be used."""
    tables = parsed(rendered(found, tmp_path)).tables
    tokens, first = (next(table for table in tables if table[0][-1] == unit) for unit in ("tokens", "ms"))
    assert tokens[1:] == [["1", "fopru:keep=4", "70.0%", "4"], ["2", "none", "90.0%", "36"]]
    assert [line[1] for line in first[1:]] == ["random:keep=4", "fopru:keep=4", "none"]
    short = next(table for table in tables if table[0][0] == "at most below")
    assert short[1] == ["1 point", "none of the rivals", "-", "-"]
    found["rows"][3]["accuracy"] = 0.895
    short = next(table for table in parsed(rendered(found, tmp_path)).tables if table[0][0] == "at most below")
    assert short[1] == ["1 point", "fastv:keep=4", "-0.5", "20 (56%)"]


def test_pictures_show_what_stays(found: dict[str, Any], tmp_path: Path) -> None:
    """Of a raster of 2 x 3 tokens 0, 1, 2 and 5 stay: 3 and 4 are veiled as one strip, and 4 has no score."""
    paths = {
        (dict(attributes)["class"], dict(attributes)["d"])
        for attributes in re.findall(r"<path ([^>]*)>", rendered(found, tmp_path))
        for attributes in [re.findall(r'(\w+)="([^"]*)"', attributes)]
        if "class" in dict(attributes) and "transform" in dict(attributes)
    }
    assert {d for name, d in paths if name == "veil"} == {"M0 1h2v1h-2z", "M1 1h1v1h-1z"}
    assert len([d for name, d in paths if name == "heat"]) == 5


def test_a_picture_that_was_scaled_down_says_to_how_many_tokens(found: dict[str, Any], tmp_path: Path) -> None:
    assert "“no” · 6 → 2 tokens" in rendered(found, tmp_path)


def test_rivals_with_the_same_steps_share_a_figure(found: dict[str, Any], tmp_path: Path) -> None:
    text = rendered(found, tmp_path)
    assert 'aria-label="Tokens by layer of random:keep=4, fopru:keep=4"' in text
    assert text.count('class="steps"') == 4


def test_a_folder_and_a_file_without_extras_are_shown(found: dict[str, Any], tmp_path: Path) -> None:
    plain = {name: found[name] for name in ("model", "task")} | {"questions": 3}
    plain["rows"] = [{"method": name, "accuracy": 0.5, "equivalent_tokens": 4} for name in ("none", "pool:keep=4")]
    written(plain, tmp_path)
    tables = parsed(page(read(tmp_path))).tables
    assert tables[-1] == [
        ["method", "accuracy", "from unpruned", "equivalent"], ["none", "50.0%", "-", "4"],
        ["pool:keep=4", "50.0%", "+0.0", "4"],
    ]  # fmt: skip


def test_the_front_by_hand() -> None:
    points = [(4.0, 0.5), (4.0, 0.7), (2.0, 0.5), (8.0, 0.7), (16.0, 0.9), (1.0, 0.1)]
    assert front(points) == [5, 2, 1, 4]
    assert front([]) == []


def test_axes_by_hand() -> None:
    place, ticks = charts._cost_axis(16, 576, 0.0, 100.0, 6)
    assert ticks == [16, 32, 64, 128, 256, 512]
    assert (place(16), round(place(96), 6), place(576)) == (0.0, 50.0, 100.0)  # 96 is the geometric mean
    assert charts._nice(0.43, 0.91, 6) == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert charts._nice(100, 100.5, 4) == [100, 100.2, 100.4]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rows",), {}, "holds no list of rows"),
        (("rows", 1, "method"), "pool", "lacks the row of the unpruned model"),
        (("rows", 0, "method"), 3, "row 1 names no method"),
        (("rows", 0, "accuracy"), "much", "row 1, random:keep=4, has accuracy 'much', which is no number"),
        (("rows", 0, "tokens"), float("nan"), "has tokens nan"),
        (("rows", 0, "layers"), [1, "x"], "has layers"),
        (("rows", 0, "interval"), [0.5], "has interval"),
        (("model",), None, "lacks its model"),
        (("unreached",), "all", "its unreached are no list"),
        (("pictures", 0, "grid"), [0, 3], "picture 1 has the grid"),
        (("pictures", 0, "rivals", "fopru:keep=4", "stages", 0, "kept"), [6], "does not fit a raster of 6 tokens"),
        (("pictures", 0, "rivals", "fopru:keep=4", "stages", 0, "kept"), ["<b>"], "does not fit"),
        (("pictures", 0, "rivals", "fopru:keep=4", "stages", 0, "scores"), [1.0], "does not fit"),
        (("pictures", 0, "rivals", "fopru:keep=4", "stages", 0, "before"), "<b>", "does not fit"),
        (("pictures", 0, "rivals", "none", "answer"), None, "none lacks its answer"),
        (("pictures", 0, "rivals", "resize:keep=4", "scaled"), {"before": 6}, "to how many tokens it was scaled down"),
        (("pictures", 0, "rivals", "resize:keep=4", "scaled", "after"), "<b>", "to how many tokens it was scaled down"),
        (("pictures", 0, "png"), "no base64!", "its bytes are not written in base64"),
        (("pictures", 0, "png"), base64.b64encode(b"<svg onload=x>").decode(), "picture 1 of the report"),
    ],
)
def test_files_that_cannot_be_shown_are_refused(
    found: dict[str, Any], tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    changed = copy.deepcopy(found)
    place = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(FoveateError, match=re.escape(message)):
        rendered(changed, tmp_path)
