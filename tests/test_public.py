"""The front door: public names, imported when first used, and the verbs that share a name with their module."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import tiny
from transformers import PreTrainedModel

import foveate
from foveate import methods
from foveate.core import FoveateError
from foveate.spec import format as format_spec

NOUNS = {"Block", "Budget", "CacheSelection", "FoveateError", "Method", "Scorer", "Selection", "Signals", "Trace"}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# ---------------------------------------------------------------------------------------------------------------------
# names


def test_dir_names_everything_that_can_be_had() -> None:
    names = dir(foveate)
    assert names == sorted(set(names))
    assert {*NOUNS, "Handle", "prune", "draw", "MINI", "__version__"} <= set(names)
    assert {"FoPru", "Random", "Uniform", "Pool"} <= set(names)
    for name in names:
        assert getattr(foveate, name) is not None


def test_the_nouns_are_those_of_their_rooms() -> None:
    homes = {"Budget": "trace", "Trace": "trace", "Scorer": "forms", "Merger": "forms", "Stepwise": "forms"}
    for name in {*NOUNS, "Merger", "Stepwise"}:
        room = importlib.import_module(f"foveate.{homes.get(name, 'core')}")
        assert getattr(foveate, name) is getattr(room, name)


@pytest.mark.parametrize("name", methods.names())
def test_every_method_is_a_public_name(name: str) -> None:
    kind = methods.get(name)
    assert getattr(foveate, kind.__name__) is kind


@pytest.mark.parametrize("name", ["FoPrue", "Fopru", "fopru", "prunes", "_private", "Notebook", ""])
def test_no_other_name(name: str) -> None:
    with pytest.raises(AttributeError, match=f"^module 'foveate' has no attribute '{name}'$"):
        getattr(foveate, name)
    assert not hasattr(foveate, name)


def test_what_type_checkers_are_told_is_true() -> None:
    tree = ast.parse(Path(foveate.__file__).read_text(encoding="utf-8"))
    (told,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    names = set()
    for line in told.body:
        assert isinstance(line, ast.ImportFrom) and line.module
        for alias in line.names:
            assert alias.asname == alias.name, "a checker takes only `X as X` for a public name"
            assert getattr(foveate, alias.name) is getattr(importlib.import_module(line.module), alias.name)
            names.add(alias.name)
    assert {*NOUNS, "Handle", "prune", "draw"} <= names <= set(dir(foveate))


def test_the_shipped_model_is_a_folder_of_the_package() -> None:
    assert Path(foveate.MINI).parent.parent == Path(foveate.__file__).parent


# ---------------------------------------------------------------------------------------------------------------------
# verbs and modules of one name

CHECK = (
    "; import foveate, sys, types"
    "; print(foveate.prune.__module__, foveate.draw.__module__)"
    "; assert all(isinstance(verb, types.FunctionType) for verb in (foveate.prune, foveate.draw))"
    "; assert foveate.prune is sys.modules['foveate.prune'].prune"
    "; assert foveate.draw is sys.modules['foveate.report.draw'].draw"
    "; assert not {'torch', 'transformers'} & sys.modules.keys(), 'heavy'"
)


@pytest.mark.parametrize(
    "order",
    [
        "import foveate",
        "import foveate.prune",
        "import foveate.report.draw",
        "import foveate.report.draw, foveate.prune",
        "from foveate.prune import prune",
        "from foveate.report.draw import draw",
        "from foveate import prune",
        "from foveate import draw, prune",
        "import foveate; foveate.prune; import foveate.prune",
        "import foveate; foveate.draw; from foveate.report.draw import draw",
        "import foveate.prune as prune; assert prune.__name__ == 'prune'",
        "import importlib; importlib.import_module('foveate.prune'); importlib.import_module('foveate.report.draw')",
        "import foveate.spec; import foveate.prune; import foveate.cli",
    ],
)
def test_prune_and_draw_are_functions_whoever_imports_what_first(order: str) -> None:
    assert python(order + CHECK) == "foveate.prune foveate.report.draw"


def test_the_modules_can_still_be_patched() -> None:
    module = importlib.import_module("foveate.prune")
    assert module is sys.modules["foveate.prune"] is not foveate.prune
    assert module.prune is foveate.prune


def test_other_modules_stay_modules() -> None:
    code = "import foveate.core, foveate.spec; print(type(foveate.core).__name__, type(foveate.spec).__name__)"
    assert python(code) == "module module"


def test_a_name_can_be_replaced_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = foveate.prune
    with monkeypatch.context() as patch:
        patch.setattr(foveate, "prune", len)
        assert foveate.prune is len
    assert foveate.prune is before


def test_nothing_heavy_before_it_is_needed() -> None:
    code = (
        "import sys, foveate; foveate.FoveateError, foveate.Method, foveate.Trace, foveate.MINI"
        "; print(sorted({'torch', 'transformers', 'numpy', 'PIL'} & sys.modules.keys()))"
        "; foveate.FoPru; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert python(code) == "[]\nTrue False"


# ---------------------------------------------------------------------------------------------------------------------
# the verb


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made: PreTrainedModel = tiny.model()
    return made


def parts(handle: Any) -> list[str]:
    handle.discard()
    return [format_spec(part) for part in handle.parts]


def test_a_method_its_spec_or_several_of_both(model: PreTrainedModel) -> None:
    uniform, fopru = foveate.Uniform(keep=18), foveate.FoPru(keep=9)
    assert parts(foveate.prune(model, uniform)) == ["uniform:keep=18"]
    assert parts(foveate.prune(model, "uniform:keep=18")) == ["uniform:keep=18"]
    both = ["uniform:keep=18", "fopru:keep=9"]
    for given in ("uniform:keep=18+fopru:keep=9", [uniform, "fopru:keep=9"], ("uniform:keep=18", fopru)):
        assert parts(foveate.prune(model, given)) == both
    assert parts(foveate.prune(model, (one for one in (uniform, fopru)))) == both  # type: ignore[arg-type]


@pytest.mark.parametrize("what", [None, 7, 0.25, object, foveate.FoPru, [foveate.FoPru], [None], {7: 1}])
def test_what_is_no_method_is_refused(what: Any, model: PreTrainedModel) -> None:
    with pytest.raises(FoveateError) as error:
        foveate.prune(model, what)
    wrong = next(iter(what)) if isinstance(what, list | dict) else what
    assert str(error.value) == (f"{wrong!r} is no method; give a Method such as foveate.FoPru(keep=0.25), or its spec")


def test_no_method_at_all_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(FoveateError) as error:
        foveate.prune(model, [])
    assert str(error.value) == "no method was given; to run without pruning, call the model outside prune()"
    with pytest.raises(FoveateError, match="has an empty stage"):
        foveate.prune(model, "")


def test_costs_are_reached_through_the_package() -> None:
    code = "import foveate, sys; print(foveate.cost.estimate('mini').kv_bytes); assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0


def test_type_checkers_know_every_method() -> None:
    text = Path(foveate.__file__).read_text(encoding="utf-8")
    for name in methods.names():
        kind = methods.get(name).__name__
        assert f"from foveate.methods.{name} import {kind} as {kind}" in text
