"""The site of docs/ can be built: pages stand in its navigation, links lead somewhere, nothing comes from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from outside import loaded

import foveate
from foveate import methods

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
HOMES = {"cost": "foveate.cost.estimates.estimate", "vllm": "foveate.serve.vllm.options"}
"""Rooms that are public by their own name, and what of each the reference must hold."""


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return loaded("tools/site_hooks.py")


def settings() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return found


def named(entries: Any) -> list[str]:
    """The files of a part of the navigation."""
    if isinstance(entries, str):
        return [entries]
    parts = entries.values() if isinstance(entries, dict) else entries
    return [file for part in parts for file in named(part)]


def anchors(page: Path) -> set[str]:
    """What links into a page may point at: its headings, as the site writes them."""
    from markdown.extensions.toc import slugify

    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {slugify(re.sub(r"[`*]", "", heading), "-") for heading in headings}


def broken(page: str, text: str) -> list[str]:
    """Links of a page whose file or heading does not exist."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text)):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = (DOCS / page).parent / target if target else DOCS / page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            found.append(link)
    return found


def test_every_page_stands_in_the_navigation_once(hooks: ModuleType) -> None:
    config = hooks.on_config({**settings(), "docs_dir": str(DOCS)})
    assert sorted(named(config["nav"])) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    assert broken(page, (DOCS / page).read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found() -> None:
    text = (
        "[a](cost.md#the-stages) [b](cost.md#no-such) [c](none.md) [d](https://example.org)\n```\n[e](none.md)\n```\n"
    )
    assert broken("index.md", text) == ["cost.md#no-such", "none.md"]


def test_the_reference_has_every_public_name() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    for name in set(dir(foveate)) - {"MINI", "__version__"} - {methods.get(one).__name__ for one in methods.names()}:
        if name in HOMES:
            assert HOMES[name] in shown
        else:
            value = getattr(foveate, name)
            assert f"{value.__module__}.{value.__qualname__}" in shown, name
    assert "`foveate.MINI`" in text


def test_links_out_of_docs_are_shown_as_paths(hooks: ModuleType) -> None:
    text = "the [results](../../benchmarks/serve.py) and [all](../methods.md), see [it](https://example.org)"
    told = "the results (`benchmarks/serve.py`) and [all](../methods.md), see [it](https://example.org)"
    assert hooks.inward(text, "methods/fopru.md") == told
    with pytest.raises(FileNotFoundError, match=r"docs/a\.md points at benchmarks/none\.json, which does not exist"):
        hooks.inward("[b](../benchmarks/none.json)", "a.md")


@pytest.mark.parametrize(
    ("html", "load"),
    [
        ('<script src="https://example.org/a.js"></script>', '<script src="https://example.org/a.js'),
        ('<link rel="stylesheet" href="//example.org/a.css">', '<link rel="stylesheet" href="//example.org/a.css'),
        ("<link href=https://example.org rel=preconnect>", "<link href=https://example.org"),
        ("<style>@import 'https://example.org/a.css'</style>", "@import 'https://example.org/a.css"),
        ('<a href="https://example.org">a paper</a><img src="kept.png"><link rel="icon" href="a.png">', None),
    ],
)
def test_loads_from_other_hosts_are_found(html: str, load: str | None, hooks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(hooks.guarded(f"<html><head></head>{html}</html>"), encoding="utf-8")
    assert hooks.loads(tmp_path) == ([f"a.html: {load}"] if load else [])


def test_a_site_that_loads_from_other_hosts_is_refused(hooks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<html><head></head></html>", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"^the site loads from other hosts: a\.html: no policy$"):
        hooks.on_post_build({"site_dir": str(tmp_path)})
