"""What mkdocs.yml cannot say: pages of methods in the navigation, links out of docs/, no loads from other hosts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTWARD = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)\s#]+)\)")
"""A link that climbs; those between pages of docs/ may do so, too."""
LOADS = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*?\s(?:src|data)=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|prefetch|preconnect|dns-prefetch|icon|modulepreload))"""
    r"""[^>]*\bhref=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|(?:@import\s*|url\()\s*["']?(?:https?:)?//[^"')\s]+"""
)
"""What a browser fetches from another host on its own; a link that a reader may follow is none."""
POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'self\' file: data: blob: '
    "'unsafe-inline' 'wasm-unsafe-eval'\">"
)
"""The theme's scripts know addresses for features that this site does not use; browsers are told to open none."""


def on_config(config: Any) -> Any:
    """Put every page of docs/methods behind the table of methods."""
    (section,) = [entry["Methods"] for entry in config["nav"] if "Methods" in entry]
    pages = sorted(path.stem for path in Path(config["docs_dir"], "methods").glob("*.md"))
    section.extend({name: f"methods/{name}.md"} for name in pages)
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Show a link to a file outside of docs/ as the file's path, since the site does not hold it."""
    return inward(markdown, page.file.src_uri)


def inward(markdown: str, name: str) -> str:
    """The text of docs/`name` whose links to files of the project outside of docs/ are their paths.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def path(link: re.Match[str]) -> str:
        words, target = link.groups()
        found = os.path.normpath(os.path.join("docs", os.path.dirname(name), target))
        if found.startswith("docs" + os.sep):
            return link.group()
        if not (ROOT / found).exists():
            raise FileNotFoundError(f"docs/{name} points at {found}, which does not exist")
        return f"{words} (`{found}`)"

    return OUTWARD.sub(path, markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Forbid a page to load anything from other hosts."""
    return guarded(output)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """The same of pages that are no documents, such as that of an address that does not exist."""
    return guarded(output_content) if template_name.endswith(".html") else output_content


def guarded(html: str) -> str:
    """A page with the policy at the head."""
    return html.replace("<head>", f"<head>{POLICY}", 1)


def on_post_build(config: Any) -> None:
    """Refuse a site that would load something from another host.

    Raises:
        RuntimeError: with each such load and the file that has it.
    """
    found = loads(Path(config["site_dir"]))
    if found:
        raise RuntimeError("the site loads from other hosts: " + "; ".join(found))


def loads(site: Path) -> list[str]:
    """What pages and style sheets below a folder load from other hosts, and pages that lack the policy."""
    found = []
    for file in sorted(site.rglob("*.html")) + sorted(site.rglob("*.css")):
        text = file.read_text(encoding="utf-8")
        shown = file.relative_to(site).as_posix()
        found += [f"{shown}: {load.group()}" for load in LOADS.finditer(text)]
        if file.suffix == ".html" and POLICY not in text:
            found.append(f"{shown}: no policy")
    return found
