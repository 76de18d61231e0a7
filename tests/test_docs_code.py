"""What the pages of docs/ show: their Python runs and prints what stands behind it, their links lead somewhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<why>\S.*?) -->\n+)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)


def blocks(text: str) -> list[tuple[str, str]]:
    """The Python of a page that is to run, each with the text block that follows it at once: what it prints, or ""."""
    found: list[tuple[str, str]] = []
    end = -1  # of the last block of Python
    for fence in FENCE.finditer(text):
        if fence["language"] == "python" and not fence["why"]:
            found.append((fence["body"], ""))
            end = fence.end()
        elif fence["language"] == "text" and end >= 0 and not text[end : fence.start()].strip():
            found[-1] = (found[-1][0], fence["body"])
            end = -1
        else:
            end = -1
    return found


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(read(page))])
def test_the_python_of_a_page_runs_in_one_namespace(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for number, (code, printed) in enumerate(blocks(read(page))):
        exec(compile(code, f"docs/{page}, Python block {number}", "exec"), namespace)
        out = capsys.readouterr().out
        assert not printed or out == printed


def test_blocks_are_found_with_what_they_print() -> None:
    page = "```python\na\n```\n\n```text\n1\n```\n\n```python\nb\n```\nwords\n```text\nno output\n```\n"
    assert blocks(page) == [("a\n", "1\n"), ("b\n", "")]
    assert blocks("<!-- not run: it asks a server -->\n```python\na\n```\n\n```text\n1\n```\n") == []
    assert blocks("```sh\na\n```\n\n```text\n1\n```\n") == []
    assert {"index.md", "concepts.md", "cost.md", "scale.md", "troubleshooting.md"} <= {
        page for page in PAGES if blocks(read(page))
    }
