"""The rooms of the house import each other one way, and the front door opens without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "foveate"

# Room -> rooms that its modules may import when they are loaded.
# `registry` is methods/__init__.py: it loads no method until one is asked for.
AT_LOAD = {
    "core": set(),
    "trace": {"core"},
    "forms": {"core"},
    "depths": {"core"},
    "paths": {"core"},
    "runs": {"core", "paths"},
    "texts": {"core"},
    "checkpoints": {"core", "paths"},
    "ops": {"core"},
    "registry": {"core", "forms"},
    "methods": {"core", "forms", "depths", "ops"},
    "modules": {"core", "ops", "paths", "runs"},
    "spec": {"core", "registry", "paths"},
    "families": {"core"},
    "cost": {"core", "forms", "paths", "families"},
    "scenes": {"core", "paths", "runs", "checkpoints", "ops"},
}
AT_LOAD["choosing"] = {"core", "trace", "forms", "ops", "spec", "families", "cost"}
AT_LOAD["runtime"] = AT_LOAD["choosing"] | {"choosing", "registry", "depths", "texts", "paths", "checkpoints"}
AT_LOAD["prune"] = {"core", "spec", "runtime"}
AT_LOAD["inference"] = AT_LOAD["runtime"] | {"runtime", "prune", "runs"}
AT_LOAD["calibrate"] = {"core", "prune", "inference", "runtime"}
AT_LOAD["evaluate"] = AT_LOAD["inference"] | {"inference", "methods", "scenes"}
AT_LOAD["train"] = AT_LOAD["evaluate"] | {"evaluate", "modules"}
AT_LOAD["reproduce"] = AT_LOAD["evaluate"] | {"evaluate"}
AT_LOAD["report"] = {"core", "trace", "cost", "paths", "runs", "inference", "evaluate"}
# An engine brings a runtime of its own: what it takes of ours is named in serve/vllm/rooms.py.
AT_LOAD["serve"] = AT_LOAD["inference"] | {"inference", "foveate"}
AT_LOAD["page"] = AT_LOAD["serve"] | {"serve", "evaluate", "report", "registry", "scenes"}
AT_LOAD["batch"] = AT_LOAD["serve"] | {"serve"}
AT_LOAD["cli"] = {*AT_LOAD, "foveate"}
AT_LOAD["foveate"] = set()

# Room -> rooms that its functions may import besides, when they are called.
WHEN_CALLED = {
    "core": {"spec", "ops"},
    "forms": {"ops"},
    "registry": {"methods"},
    "methods": {"modules"},
    "spec": {"methods"},
    "cost": {"registry", "methods", "spec"},
    "inference": {"foveate"},
    "foveate": set(AT_LOAD),
}

NO_TRANSFORMERS = {
    "core",
    "depths",
    "trace",
    "forms",
    "ops",
    "registry",
    "methods",
    "spec",
    "cost",
    "choosing",
    "texts",
    "runs",
}
NO_TORCH = {"cost", "depths", "texts", "paths", "runs"}
ONLY_STANDARD_AT_LOAD = {"foveate", "core", "depths", "trace", "forms", "registry", "spec", "cost"}
SCENES_MAY = {"torch", "transformers", "tokenizers", "safetensors", "numpy", "PIL"}


@dataclass(frozen=True)
class Import:
    """One imported module, where it stands, and when it is loaded."""

    target: str
    line: int
    when: str  # "load", "call" or "typing"


def room_of(module: Path) -> str:
    if module == Path("methods/__init__.py"):
        return "registry"
    if module == Path("__main__.py"):
        return "cli"
    return "foveate" if module == Path("__init__.py") else module.parts[0].removesuffix(".py")


def imports_of(tree: ast.AST, when: str = "load") -> Iterator[Import]:
    """Every import below `tree`, and whether loading the module, a call or only a type checker follows it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            base = node.module or ""
            yield from (Import(f"{base}.{alias.name}", node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.Call) and is_import_module(node):
            yield from imports_of(node, when)
            if isinstance(node.args[0], ast.Constant):
                yield Import(str(node.args[0].value), node.lineno, when)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from imports_of(ast.Module([child], []), "typing")
            for child in node.orelse:
                yield from imports_of(ast.Module([child], []), when)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(node, "call" if inside and when == "load" else when)


def is_import_module(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__") and bool(node.args)


def imported_room(target: str) -> str | None:
    """The room that `target` is in; None for a module of another package."""
    parts = target.split(".")
    if parts[0] != "foveate":
        return None
    if parts[1:2] == ["methods"] and not (len(parts) > 2 and is_module(SOURCE / "methods" / parts[2])):
        return "registry"
    return parts[1] if len(parts) > 1 and (parts[1] in AT_LOAD or is_module(SOURCE / parts[1])) else "foveate"


def is_module(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").is_file()


def refusal(room: str, found: Import) -> str | None:
    """Why `room` may not hold the import, or None."""
    target = imported_room(found.target)
    if target is not None:
        allowed = AT_LOAD[room] | {room} | (WHEN_CALLED.get(room, set()) if found.when != "load" else set())
        return None if target in allowed else f"{room} may not import {target} at {found.when}"
    package = found.target.split(".")[0]
    if package in sys.stdlib_module_names or found.when == "typing":
        return None
    if (package == "transformers" and room in NO_TRANSFORMERS) or (package == "torch" and room in NO_TORCH):
        return f"{room} may never import {package}"
    if room in ONLY_STANDARD_AT_LOAD and found.when == "load":
        return f"{room} loads nothing beyond the standard library, so not {package}"
    if room == "scenes" and package not in SCENES_MAY:
        return f"scenes may not import {package}"
    return None


def refusals(module: Path, text: str) -> list[str]:
    room = room_of(module)
    if room not in AT_LOAD:
        return [f"{module}: {room!r} is no room of the house"]
    found = [(item, refusal(room, item)) for item in imports_of(ast.parse(text))]
    return [f"{module}:{item.line}: {reason} ({item.target})" for item, reason in found if reason]


def test_imports_go_one_way() -> None:
    modules = {path.relative_to(SOURCE): path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}
    assert len(modules) > 10
    assert [problem for module, text in modules.items() for problem in refusals(module, text)] == []


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(("foveate", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def loads(texts: dict[Path, str]) -> dict[str, set[str]]:
    """Module -> modules of the library that are loaded with it."""
    names = {module_name(path): text for path, text in texts.items()}
    found: dict[str, set[str]] = {}
    for name, text in names.items():
        targets = [item.target for item in imports_of(ast.parse(text)) if item.when == "load"]
        owners = (target if target in names else target.rpartition(".")[0] for target in targets)
        found[name] = {owner for owner in owners if owner in names} - {name}
    return found


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that, by way of others, load themselves: what is left once all that loads nothing else is taken away."""
    left = {name: set(others) for name, others in graph.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    wanted = set().union(*left.values()) if left else set()
    return sorted(left.keys() & wanted)


def test_no_module_loads_itself_by_way_of_others() -> None:
    texts = {path.relative_to(SOURCE): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
    graph = loads(texts)
    assert graph["foveate.choosing.choose"] >= {"foveate.choosing.images", "foveate.core", "foveate.spec"}
    assert circles(graph) == []


def test_a_circle_is_found() -> None:
    """Of modules that load each other; one that only loads them is not part of it, nor is one that waits for a call."""
    texts = {
        Path("ops/scores.py"): "from foveate.ops.subsets import top_k",
        Path("ops/subsets.py"): "from foveate.ops import scores",
        Path("core.py"): "def f():\n    import foveate.ops.scores",
        Path("forms.py"): "import foveate.ops.scores, foveate.core",
    }
    assert circles(loads(texts)) == ["foveate.ops.scores", "foveate.ops.subsets"]


LAZY = "def f():\n    "
GUARDED = "try:\n    from foveate.prune import Handle\nexcept ImportError:\n    pass"


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        ("ops/scores.py", "from foveate.methods import fopru", "ops may not import methods at load"),
        ("ops/scores.py", LAZY + "import transformers", "ops may never import transformers"),
        ("methods/fopru.py", "from transformers.models import clip", "methods may never import transformers"),
        ("methods/learned.py", "from foveate import runtime", "methods may not import runtime at load"),
        ("methods/learned.py", "import foveate", "methods may not import foveate at load"),
        ("methods/learned.py", LAZY + "from foveate.prune import prune", "methods may not import prune at call"),
        ("cost/flops.py", LAZY + "import torch", "cost may never import torch"),
        ("cost/flops.py", LAZY + "import_module('torch')", "cost may never import torch"),
        ("core.py", "import numpy as np", "core loads nothing beyond the standard library"),
        ("core.py", "class A:\n    import torch", "core loads nothing beyond the standard library"),
        ("core.py", LAZY + "from foveate import families", "core may not import families at call"),
        ("spec.py", "import foveate.methods.fopru", "spec may not import methods at load"),
        ("spec.py", "from foveate.methods import fopru", "spec may not import methods at load"),
        ("scenes/recipe.py", "import matplotlib.pyplot", "scenes may not import matplotlib"),
        ("scenes/recipe.py", "from foveate.methods import names", "scenes may not import registry at load"),
        ("runtime/probe.py", GUARDED, "runtime may not import prune at load"),
        ("helpers.py", "", "'helpers' is no room of the house"),
    ],
)
def test_a_wrong_import_is_refused(module: str, text: str, complaint: str) -> None:
    found = refusals(Path(module), text)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("core.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor"),
        ("core.py", LAZY + "from foveate.spec import format"),
        ("spec.py", "from foveate import methods\nfrom foveate.methods import get"),
        ("methods/learned.py", "import torch\n" + LAZY + "from foveate.ops import scores"),
        ("cli/run.py", "import foveate\nfrom foveate import prune"),
    ],
)
def test_a_right_import_is_let_through(module: str, text: str) -> None:
    assert refusals(Path(module), text) == []


@pytest.mark.parametrize("module", ["foveate", "foveate.core", "foveate.spec", "foveate.cost", "foveate.cli"])
def test_heavy_packages_wait_until_they_are_needed(module: str) -> None:
    heavy = "torch transformers numpy PIL matplotlib safetensors"
    code = f"import sys, {module}; print(*sorted(sys.modules.keys() & set('{heavy}'.split())))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
