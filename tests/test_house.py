"""House manners that a linter does not know: how a module opens, how long a function is, what no file may hold."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
from pathlib import Path

import pytest
from pytest_socket import SocketConnectBlockedError

ROOT = Path(__file__).parents[1]
BY_PRODUCTS = {".git", "dist", "build", "demo", "runs", "site", "__pycache__", ".hypothesis"} | {
    f".venv{which}" for which in ("", "-lowest", "-newest", "-torchvision", "-serve", "-vllm", "-docs")
}
CATCH_ALLS = {"utils", "util", "helpers", "common", "misc"}
LONGEST_FUNCTION, LONGEST_FILE = 60, 500  # lines

# Written in pieces, so that this file does not hold what it looks for.
MACHINE_PATH = re.compile(
    r"(?<![\w.~<>-])/(?:" + "|".join(["wo" + "rk", "tm" + "p", "ro" + "ot", "ho" + "me"]) + r")\b"
)
REGISTRIES = ["py" + "pi.org", "python" + "hosted.org", "download.py" + "torch.org", "ana" + "conda.org"]
REGISTRY = re.compile("|".join(map(re.escape, REGISTRIES)) + "|--(?:extra-)?in" + "dex-url|--find-" + "links")


def project_files() -> list[Path]:
    """The files of the project; where git is missing or this is no checkout, all that are not by-products."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        found = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        found = [path for path in ROOT.rglob("*") if not is_by_product(path)]
    return sorted(path for path in found if path.is_file())


def is_by_product(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return any(part in BY_PRODUCTS or part.endswith(("_cache", ".egg-info")) for part in parts)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def texts(suffix: str = "") -> dict[str, str]:
    """What the project's files say, by name; pictures and weights say nothing."""
    found = {}
    for path in project_files():
        if path.name.endswith(suffix):
            try:
                found[name_of(path)] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    return found


def opening_problem(text: str) -> str | None:
    """What is wrong with the first line of a module, or None."""
    first = text.partition("\n")[0]
    return None if re.fullmatch(r'"""\S.*[.!?](""")?', first) else f"not a sentence in a docstring: {first!r}"


def long_functions(text: str) -> list[str]:
    """Functions of more than LONGEST_FUNCTION lines, with their lengths."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in nodes]
    return [f"{name} has {length} lines" for name, length in lengths if length > LONGEST_FUNCTION]


def foreign(text: str) -> list[str]:
    """Paths of one machine and addresses of package registries."""
    return [match.group() for pattern in (MACHINE_PATH, REGISTRY) for match in pattern.finditer(text)]


def test_the_files_of_the_project_are_found() -> None:
    names = texts().keys()
    assert {"pyproject.toml", "tests/test_house.py", "src/foveate/core.py", "src/foveate/cost/flops.py"} <= names
    assert not any(name.startswith((".venv/", ".git/")) for name in names)


def test_modules_open_with_what_lives_there() -> None:
    problems = {name: opening_problem(text) for name, text in texts(".py").items()}
    assert {name: problem for name, problem in problems.items() if problem} == {}


def test_functions_fit_on_a_screen() -> None:
    found = {name: long_functions(text) for name, text in texts(".py").items()}
    assert {name: functions for name, functions in found.items() if functions} == {}


def test_files_hold_one_subject() -> None:
    lengths = {name: text.count("\n") for name, text in texts(".py").items()}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def told_to_checkers(test: ast.expr) -> bool:
    """Whether an assertion only narrows a type: not None, or of a class."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return all(map(told_to_checkers, test.values))
    if isinstance(test, ast.Call):
        return isinstance(test.func, ast.Name) and test.func.id == "isinstance"
    return isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot)


def bare_assertions(text: str) -> list[str]:
    """Assertions that check a value: where a user's reaches them, they end in a traceback without a word."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]
    return [ast.unparse(node) for node in nodes if not told_to_checkers(node.test)]


def test_assertions_check_no_values() -> None:
    found = {name: bare_assertions(text) for name, text in texts(".py").items() if name.startswith("src/")}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_files_are_written_and_paths_checked_in_one_place() -> None:
    own = re.compile(r"os\.(?:replace|rename|mkdir|makedirs)|\.mkdir\(|tempfile|expanduser|shutil\.move")
    rooms = {"src/foveate/runs.py", "src/foveate/paths.py"}
    sources = {name: text for name, text in texts(".py").items() if name.startswith("src/")}
    found = {name: own.findall(text) for name, text in sources.items() if own.search(text)}
    assert found.keys() >= rooms
    assert {name: words for name, words in found.items() if name not in rooms} == {}


def test_no_module_is_a_catch_all() -> None:
    assert [name for name in texts(".py") if CATCH_ALLS & set(Path(name).with_suffix("").parts)] == []


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = {name: foreign(text) for name, text in texts().items()}
    assert {name: words for name, words in found.items() if words} == {}


def test_the_checks_above_can_fail() -> None:
    assert opening_problem("import os\n") == "not a sentence in a docstring: 'import os'"
    assert opening_problem('"""\nA sentence."""\n') is not None
    assert opening_problem('"""No full stop"""\n') is not None
    assert opening_problem('"""A sentence.\n\nMore."""\n') is None
    body = "\n    pass" * 60
    assert long_functions(f"class A:\n  def long(self):{body}\n  def short(self):\n    pass") == ["long has 61 lines"]
    assert long_functions(f"def fits():{body[:-9]}") == []
    assert bare_assertions("assert a is not None and isinstance(b, int)") == []
    assert bare_assertions("assert a > 1") == ["assert a > 1"]
    assert bare_assertions("assert a is not None or b") == ["assert a is not None or b"]
    assert foreign("see /" + "tmp/x and frame/" + "work") == ["/" + "tmp"]
    assert foreign("https://py" + "pi.org/simple") == ["py" + "pi.org"]


def test_the_network_is_closed() -> None:
    with socket.socket() as outside, pytest.raises(SocketConnectBlockedError):
        outside.connect(("192.0.2.1", 80))
    with socket.socket() as here, pytest.raises(ConnectionRefusedError):
        here.connect(("127.0.0.1", 1))
