"""The registry: one file, one method, no list; and what every registered method promises about its counts."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import batches, synthetic

from foveate import methods
from foveate.core import FoveateError, Keep, Method, Selection, Signals
from foveate.forms import Scorer
from foveate.methods.fopru import FoPru
from foveate.methods.random import Random
from foveate.methods.uniform import Uniform
from foveate.spec import format as format_spec
from foveate.spec import parse

FOLDER = Path(methods.__file__).parent
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
BASELINES = {Random, Uniform}
SIGNALS = {field.name for field in dataclasses.fields(Signals)}

each_method = pytest.mark.parametrize("name", methods.names())


@pytest.fixture
def fresh() -> Iterator[None]:
    """The registry looks again, before the test and after it."""

    def forget() -> None:
        methods.names.cache_clear()
        methods.get.cache_clear()

    forget()
    yield
    forget()


# ---------------------------------------------------------------------------------------------------------------------
# what is registered


def test_the_files_are_the_names() -> None:
    assert {"fopru", "pool", "random", "uniform"} <= set(FILES)
    assert list(methods.names()) == FILES


@each_method
def test_a_file_holds_one_public_method(name: str) -> None:
    kind = methods.get(name)
    classes = [
        node.name for node in ast.parse((FOLDER / f"{name}.py").read_text()).body if isinstance(node, ast.ClassDef)
    ]
    public = [one for one in classes if not one.startswith("_")]
    module = importlib.import_module(f"foveate.methods.{name}")
    assert [one for one in public if issubclass(getattr(module, one), Method)] == [kind.__name__]
    assert kind.__name__.lower() == name.replace("_", "")
    assert methods.by_class_name(kind.__name__) is kind
    assert methods.name_of(kind) == methods.name_of(kind.example()) == name


@each_method
def test_a_method_says_what_it_keeps_and_why(name: str) -> None:
    kind = methods.get(name)
    first = (kind.__doc__ or "").splitlines()[0]
    assert re.fullmatch(rf"{kind.__name__}: [a-z].*\.", first)
    assert methods.summary(kind) == first.removeprefix(f"{kind.__name__}: ")


@each_method
def test_a_method_names_its_paper(name: str) -> None:
    kind = methods.get(name)
    if kind in BASELINES:
        assert kind.paper == ""
    else:
        assert re.fullmatch(r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|\S+\.\S+/\S+)", kind.paper)


@each_method
def test_a_method_needs_signals_that_exist(name: str) -> None:
    block = {field.name for field in dataclasses.fields(synthetic.Block)}
    for part in methods.get(name).example().parts():
        assert part.site in {"picture", "pixels", "tower", "input", "layer", "cache"}
        assert isinstance(part.needs, tuple) and len(set(part.needs)) == len(part.needs)
        for need in part.needs:
            room, _, field = need.partition(".")
            assert room in SIGNALS
            if room == "tower":
                number, _, field = field.partition(".")
                assert re.fullmatch(r"read|last|latest|\d+(/\d+)?", number)
                assert number != "latest" or part.site == "tower"
            assert field in block if room in {"tower", "decoder"} else field == "" or room == "cache"


# ---------------------------------------------------------------------------------------------------------------------
# what every method promises


@st.composite
def budgeted(draw: st.DrawFn, name: str) -> Method:
    """A method with a drawn budget, where one number sets it."""
    kind = methods.get(name)
    method = kind.example()
    if typing.get_type_hints(kind).get("keep") == Keep:
        share = draw(st.floats(0, 1, exclude_min=True) | st.integers(1, 40))
        method = dataclasses.replace(method, keep=share)  # type: ignore[call-arg]
    return method


@each_method
@given(
    data=st.data(),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    batch=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_as_many_stay_as_are_counted(
    name: str, data: st.DataObject, grid: tuple[int, int], batch: int, seed: int
) -> None:
    method = data.draw(budgeted(name))
    tokens = grid[0] * grid[1]
    for part in method.parts():
        if part.site in ("picture", "cache"):
            continue
        try:
            counted = part.count(tokens, grid)
        except FoveateError as error:
            refusal = str(error)
            assert re.search(r"the most is|the least is|the nearest", refusal), refusal
            continue
        left = tokens
        for stage, (seen, answer) in enumerate(synthetic.walk(part, synthetic.signals(part, batch, grid, seed))):
            answer.check(tokens, batch, format_spec(part))
            lengths = {row.numel() for row in answer.indices}
            if counted is not None:
                assert lengths == {counted[stage]}
            assert max(lengths) <= left
            assert all(
                set(row.tolist()) <= set(old.tolist()) for row, old in zip(answer.indices, seen.index, strict=True)
            )
            left = max(lengths)


@each_method
@given(data=st.data(), grid=st.tuples(st.integers(2, 6), st.integers(2, 6)), seed=st.integers(0, 100))
def test_an_image_in_a_batch_keeps_what_it_keeps_alone(
    name: str, data: st.DataObject, grid: tuple[int, int], seed: int
) -> None:
    method = data.draw(budgeted(name))
    for part in method.parts():
        if part.site in ("picture", "cache"):
            continue
        try:
            stages = [seen for seen, _ in synthetic.walk(part, synthetic.signals(part, 3, grid, seed))]
        except FoveateError:
            continue
        memory: dict[str, object] = {}
        fresh_memory = [dataclasses.replace(stage, memory=memory) for stage in stages]
        together = [part.select(stage) for stage in fresh_memory]
        for row in range(3):
            single = batches.answers(part, [batches.alone(stage, row) for stage in stages])
            for got, expected in zip(single, together, strict=True):
                batches.assert_same(got, batches.row_of(expected, row))


@each_method
def test_a_stage_after_one_without_order_answers_in_raster_order(name: str) -> None:
    """FoPru with reorder=False hands its tokens on in order of significance."""
    for part in methods.get(name).example().parts():
        if part.site in ("picture", "cache"):
            continue
        whole = synthetic.signals(part, 2, (6, 6))
        chaos = [torch.randperm(36)[:30] for _ in range(2)]
        seen = synthetic.narrowed(whole, Selection(chaos, ordered=False), 0)
        try:
            answer = part.select(seen)
        except FoveateError as error:
            assert "needs the whole grid of the image" in str(error)  # noqa: PT017 - grids are lost by now
            continue
        answer.check(36, 2, name)
        assert answer.ordered
        assert all(set(row.tolist()) <= set(old.tolist()) for row, old in zip(answer.indices, chaos, strict=True))


@each_method
def test_choosing_leaves_the_signals_and_the_random_state_alone(name: str) -> None:
    for part in methods.get(name).example().parts():
        if part.site in ("picture", "cache"):
            continue
        seen = synthetic.signals(part, 2, (6, 6))
        tensors = [value for value in vars(seen).values() if isinstance(value, torch.Tensor)]
        tensors += [value for block in seen.tower.values() for value in vars(block).values() if value is not None]
        before = [tensor.clone() for tensor in tensors]
        state = torch.get_rng_state()
        part.select(seen)
        assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
        assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------------
# unknown names


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("forpu", "did you mean 'fopru'? "),
        ("FoPru", "did you mean 'fopru'? "),
        ("__init__", ""),
        ("", ""),
        ("../random", "did you mean 'random'? "),
    ],
)
def test_an_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(FoveateError) as error:
        methods.get(name)
    assert str(error.value) == f"unknown method {name!r}; {hint}Choices: {', '.join(methods.names())}."


def test_no_class_has_another_name() -> None:
    for name in ("Fopru", "FOPRU", "fopru", "FoPru2", "Stages", "_stages", ""):
        assert methods.by_class_name(name) is None


# ---------------------------------------------------------------------------------------------------------------------
# methods from elsewhere


@dataclass(frozen=True)
class Notebook(Scorer):
    """A method that somebody tries out."""

    power: float = 2.0

    def score(self, signals: Signals) -> torch.Tensor:
        return signals.index.float() ** self.power


def test_a_class_from_a_notebook_works_unregistered() -> None:
    method = Notebook(keep=2, power=1.5)
    assert methods.name_of(method) == methods.name_of(Notebook) == "notebook"
    assert format_spec(method) == str(method) == "notebook:keep=2,power=1.5"
    selection = method.select(Signals(original=4, index=torch.arange(4)[None]))
    assert [row.tolist() for row in selection.indices] == [[2, 3]]
    assert method.count(4) == (2,)
    assert methods.summary(Notebook) == "A method that somebody tries out."
    with pytest.raises(FoveateError, match="unknown method 'notebook'"):
        parse(str(method))


def test_a_class_that_says_nothing_has_an_empty_summary() -> None:
    class Silent(Scorer):
        pass

    assert methods.summary(Silent) == ""


def test_a_class_of_a_known_name_is_not_taken_for_it() -> None:
    impostor = dataclass(frozen=True)(type("FoPru", (Method,), {"__module__": "notebook", "__doc__": "FoPru: mine."}))
    assert impostor is not FoPru
    assert methods.by_class_name("FoPru") is methods.get("fopru") is FoPru


def install(monkeypatch: pytest.MonkeyPatch, name: str, value: str, **contents: object) -> None:
    """Pretend that a package with `contents` is installed, whose entry point `name` is `value`."""
    module, _, _ = value.partition(":")
    package = types.ModuleType(module)
    vars(package).update(contents)
    monkeypatch.setitem(sys.modules, module, package)
    point = EntryPoint(name=name, value=value, group="foveate.methods")
    monkeypatch.setattr(methods, "entry_points", lambda group: [point] if group == "foveate.methods" else [])


@pytest.mark.usefixtures("fresh")
def test_a_method_of_another_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = dataclass(frozen=True)(
        type(
            "Fancy", (Notebook,), {"__module__": "other.pruners", "__doc__": "Fancy: keeps all.", "__annotations__": {}}
        )
    )
    install(monkeypatch, "other-one", "other.pruners:Fancy", Fancy=kind)
    assert set(methods.names()) == {*FILES, "other-one"}
    assert list(methods.names()) == sorted(methods.names())
    assert methods.get("other-one") is kind
    # The entry point's name is the public one: neither the module nor the class is called so.
    assert methods.name_of(kind) == "other-one"
    method = kind(keep=3, power=4.0)
    assert str(method) == "other-one:keep=3,power=4.0"
    assert parse(str(method)) == method
    assert methods.get("fopru") is FoPru


@pytest.mark.usefixtures("fresh")
def test_a_method_whose_file_is_its_name_is_found_by_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = dataclass(frozen=True)(
        type("Mine", (Notebook,), {"__module__": "other.mine", "__doc__": "Mine: keeps all."})
    )
    install(monkeypatch, "mine", "other.mine:Mine", Mine=kind)
    assert methods.name_of(kind) == "mine"
    assert methods.by_class_name("Mine") is kind


@pytest.mark.usefixtures("fresh")
def test_another_package_is_loaded_when_its_method_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="broken", value="a_package_that_is_not_here:Broken", group="foveate.methods")
    monkeypatch.setattr(methods, "entry_points", lambda group: [point])
    assert "broken" in methods.names()
    assert methods.get("random") is Random
    assert methods.name_of(FoPru()) == "fopru"
    assert methods.name_of(Notebook()) == "notebook"
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_here"):
        methods.get("broken")


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("value", [int, Notebook(), "Notebook", None])
def test_an_entry_point_that_is_no_method_is_refused(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "odd", "other.odd:Odd", Odd=value)
    with pytest.raises(FoveateError) as error:
        methods.get("odd")
    assert str(error.value) == f"entry point 'odd' of group foveate.methods is {value!r}, not a Method class"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> Iterator[Path]:
    """A folder whose files the registry takes for files of its own."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(f"foveate.methods.{path.stem}", None)
        vars(methods).pop(path.stem, None)


HEAD = "from dataclasses import dataclass\nfrom foveate.core import Method\nfrom foveate.forms import Scorer\n"
METHOD = '@dataclass(frozen=True)\nclass {name}(Scorer):\n    """{name}: keeps all."""\n'


def test_a_new_file_is_a_new_method(shelf: Path) -> None:
    (shelf / "brand_new.py").write_text(HEAD + METHOD.format(name="BrandNew") + METHOD.format(name="_Hidden"))
    (shelf / "_aside.py").write_text("raise RuntimeError('nobody asked')\n")
    assert set(methods.names()) == {*FILES, "brand_new"}
    kind = methods.get("brand_new")
    assert kind.__name__ == "BrandNew"
    assert methods.by_class_name("BrandNew") is kind
    assert str(parse("brand_new:keep=3")) == "brand_new:keep=3"


@pytest.mark.parametrize("count", [0, 2])
def test_a_file_with_another_number_of_methods_is_refused(shelf: Path, count: int) -> None:
    (shelf / "several.py").write_text(HEAD + "".join(METHOD.format(name=f"Method{number}") for number in range(count)))
    with pytest.raises(FoveateError) as error:
        methods.get("several")
    assert str(error.value) == f"methods/several.py has {count} public methods; one file holds exactly one"
