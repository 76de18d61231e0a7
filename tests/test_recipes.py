"""What CONTRIBUTING says of adding a method or a family is all there is to do: held on a copy of the tree with both."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHOD = '''"""Backwards: keeps the last tokens of each picture, to show what one file brings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.core import Keep, Signals, Site
from foveate.forms import Scorer


@dataclass(frozen=True)
class Backwards(Scorer):
    """Backwards: keeps the last tokens of each picture, so that nobody would use it.

    Args:
        keep: tokens per image, or a share of them, rounded half to even.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/0000.00000"
    site: ClassVar[Site] = "input"

    keep: Keep = 0.25

    def score(self, signals: Signals) -> Tensor:
        return signals.index.float()
'''


# LLaVA-1.5 under another name.
ROW = """    Family(
        name="throwaway",
        types=("throwaway",),
        hub_ids=("nobody/throwaway-7b",),
        towers=("siglip_vision_model",),
        shape=sizes.llava,
        read=_llava_read,
        grid=_grid,
        check=_llava_check,
    ),
"""
KIND = """    "throwaway": Kind("throwaway", "Llava", single.throwaway, single.square(24, 36), single.collate_square),
"""
TINY = """

class Throwaway(transformers.LlavaConfig):
    model_type = "throwaway"


def throwaway(blocks: int, settings: Settings) -> Any:
    vision, text = encoder("siglip", blocks, image_size=24), transformers.Qwen2Config(**SIZES)
    read = dict(vision_feature_select_strategy="full", vision_feature_layer=-1)
    return joined(Throwaway, vision, text, settings, **read)
"""


def add_family(tree: Path) -> None:
    """A row, and a tiny model with a row of its own."""
    for name, end, more in (
        ("src/foveate/families/rows.py", ")\n\n\nUNFIT = {", ROW),
        ("tests/models/tiny_families.py", "}\n\n\ndef kind_of", KIND),
    ):
        text = (tree / name).read_text(encoding="utf-8")
        assert text.count(end) == 1, name
        (tree / name).write_text(text.replace(end, more + end), encoding="utf-8")
    with (tree / "tests/models/tiny_single.py").open("a", encoding="utf-8") as file:
        file.write(TINY)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with one method more and one family more, and what the one command then writes."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("src", "tools", "docs", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "src" / "foveate" / "methods" / "backwards.py").write_text(METHOD)
    add_family(tree)
    run(tree, "tools/render_docs.py")
    return tree


def run(tree: Path, *arguments: str) -> str:
    """What Python prints in the copy, whose package comes before the installed one."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_contributing_names_the_commands() -> None:
    said = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "`.venv/bin/python tools/render_docs.py` writes" in said
    command = re.search(r"`\.venv/bin/foveate (eval --append (\S+) --every (\S+) [^`]*)` measures", said)
    assert command is not None
    found = json.loads((ROOT / command[2]).read_text(encoding="utf-8"))
    assert "/".join(map(str, found["every"])) == command[3], "the columns are those of the file"
    assert commands_of_a_family() == ["tools/render_docs.py", "-m pytest -q -k NAME"]


def commands_of_a_family() -> list[str]:
    """What that section of CONTRIBUTING has its reader run with Python."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("\n## Add a family")[2].partition("\n## ")[0]
    return re.findall(r"`\.venv/bin/python (.*?)`", section)


@pytest.mark.slow
def test_one_command_writes_whatever_names_a_method(tree: Path) -> None:
    front = (tree / "src" / "foveate" / "__init__.py").read_text(encoding="utf-8")
    assert "    from foveate.methods.backwards import Backwards as Backwards\n" in front
    page = (tree / "docs" / "methods" / "backwards.md").read_text(encoding="utf-8")
    assert "keeps the last tokens" in page.lower() and "(backwards.png)" in page
    assert (tree / "docs" / "methods" / "backwards.png").stat().st_size > 1_000
    assert "[`backwards`](docs/methods/backwards.md)" in (tree / "README.md").read_text(encoding="utf-8")
    accuracy = (tree / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert "| [`backwards`](methods/backwards.md) | - | - | - | - |" in accuracy
    run(tree, "tools/render_docs.py", "--check")  # a second time there is nothing to write


@pytest.mark.slow
def test_a_row_of_accuracies_is_added_for_it(tree: Path, tmp_path: Path) -> None:
    """On five questions, in a file of their own: the command asks for what the file lacks, here one method."""
    file = tmp_path / "rows.json"
    asked = ("--model", "mini", "--tasks", "scenes", "--samples", "5", "--dtype", "float32")
    run(tree, "-m", "foveate", "eval", *asked, "--json", str(file))
    run(tree, "-m", "foveate", "eval", "--append", str(file), "--prune", "backwards:keep=144", "--dtype", "float32")
    rows = {row["method"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == ["none", "backwards:keep=144"]
    assert rows["backwards:keep=144"]["tokens"] == 144 and rows["none"]["tokens"] == 576


@pytest.mark.slow
def test_the_tests_then_hold_the_new_method(tree: Path) -> None:
    tests = ("tests/test_public.py", "tests/test_docs.py", "tests/methods/test_registry.py")
    found = run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "backwards or type_checkers")
    assert " passed" in found and "failed" not in found


@pytest.mark.slow
def test_one_command_writes_whatever_names_a_family(tree: Path) -> None:
    for page in ("README.md", "docs/families.md"):
        text = (tree / page).read_text(encoding="utf-8")
        assert "| throwaway | `nobody/throwaway-7b` | a picture | no | >= 5.18 |" in text
    assert "| video-llava | throwaway |" in (tree / "docs" / "families.md").read_text(encoding="utf-8")
    assert "| throwaway | " in (tree / "docs" / "vllm.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_contracts_then_hold_the_new_family(tree: Path) -> None:
    """The last command of the recipe, on some of what it names."""
    some = "throwaway and (said_to or known or parts or computed or sdpa and (fastv or fopru or tome or leave))"
    files = (
        "tests/families/test_families.py",
        "tests/families/test_contracts.py",
        "tests/families/test_contracts_calls.py",
        "tests/runtime/encoder/test_tower_families.py",
    )
    command = [some if word == "NAME" else word for word in commands_of_a_family()[-1].split()]
    found = run(tree, *command, "-p", "no:cacheprovider", *files)
    (passed,) = re.findall(r"(\d+) passed", found)
    assert int(passed) >= 10 and "failed" not in found and "skipped" not in found
