"""What the README shows works: its Python runs, its commands run, its files and make targets exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ANSWERING = ("run", "eval", "check", "bench")  # here in float32, in which every CPU is fast
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def fences(*languages: str) -> list[str]:
    """The contents of the README's fenced blocks in these languages."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [body for language, body in found if language in languages]


def command_lines(program: str) -> list[list[str]]:
    """The arguments of every shown call of `program`."""
    lines = [shlex.split(line, comments=True) for body in fences("sh", "bash") for line in body.splitlines()]
    return [words[1:] for words in lines if words[:1] == [program]]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the README's examples read."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_blocks_run_in_one_namespace(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = fences("python")
    assert blocks
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, Python block {number}", "exec"), namespace)
    assert "576 -> 144 tokens" in capsys.readouterr().out
    assert (checkout / "kept.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", command_lines("foveate"), ids=shlex.join)
def test_a_shown_command_runs(arguments: list[str], checkout: Path) -> None:
    if "--samples" in arguments:
        arguments = [*arguments, "--samples", "3"]  # the last one counts
    if arguments[0] in ANSWERING:
        arguments = [*arguments, "--dtype", "float32"]
    run = subprocess.run([sys.executable, "-m", "foveate", *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_the_commands_are_shown() -> None:
    assert {words[0] for words in command_lines("foveate")} >= {"run", "methods", "models", "eval"}
    assert {words[0] for words in command_lines("make")} >= {"demo", "test"}


@pytest.mark.parametrize("target", sorted({words[0] for words in command_lines("make")}))
def test_a_shown_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    local = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in local if not (ROOT / link).exists()] == []
