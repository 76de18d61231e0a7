"""Every method survives the way to text and back, and any text is a method or refused."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from models import spec_methods
from models.spec_methods import REGISTERED, exactly, told

from foveate import methods
from foveate.core import FoveateError, Keep, Method, check_keep
from foveate.methods.random import Random
from foveate.spec import format as format_spec
from foveate.spec import parse, parse_stages


@pytest.fixture(autouse=True, scope="module")
def own_methods() -> Iterator[None]:
    with spec_methods.named():
        yield


@given(st.text(alphabet="fopru:keep=0.15,/+@%\"'\\ \n-e", max_size=30))
def test_no_text_is_answered_with_anything_but_a_method_or_an_error_of_ours(text: str) -> None:
    try:
        stages = parse_stages(text)
    except FoveateError:
        return
    assert all(isinstance(stage, Method) for stage in stages)
    assert exactly(parse_stages(format_spec(stages)), stages)


@st.composite
def _nearly_specs(draw: st.DrawFn) -> str:
    """Names and fields that there are, with whatever a user may write behind them."""
    name = draw(st.sampled_from(REGISTERED))
    fields = [field.name for field in dataclasses.fields(methods.get(name)) if field.init and field.name != "path"]
    value = (
        st.text(max_size=20)
        | st.text(alphabet="0123456789.eE+-/%,:\"'\\ ", max_size=20)
        | st.integers().map(str)
        | st.floats().map(str)
        | st.text(alphabet="9", min_size=400, max_size=500)
    )
    items = draw(st.lists(st.tuples(st.sampled_from([*fields, "nothing"]), value), max_size=3))
    return f"{name}:{','.join(f'{field}={text}' for field, text in items)}"


@given(st.text() | st.text(st.characters()) | _nearly_specs())
def test_arbitrary_text_is_a_method_or_refused(text: str) -> None:
    try:
        stages = parse_stages(text)
    except FoveateError:
        return
    assert exactly(parse_stages(format_spec(stages)), stages)


# ---------------------------------------------------------------------------------------------------------------------
# there and back


_FLOATS = st.floats(allow_nan=False) | st.floats(0, 1, exclude_min=True) | st.sampled_from([1.0, 1e16, 1e-7, math.inf])
_TEXTS = (
    st.text(max_size=12)
    | st.text(alphabet="ab ,:+/\"'\\=@%\n\t1e.-", max_size=12)
    | st.sampled_from(["none", "True", "false", "1", "1.0", "25%", "nan", "-inf", "3e", "1e5", "/", "@x", "a ", " a"])
)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field annotated with `hint` may hold."""
    origin, items = typing.get_origin(hint), typing.get_args(hint)
    if origin in {typing.Union, types.UnionType}:
        return st.one_of(*map(values, items))
    if origin is Literal:
        return st.sampled_from(items)
    if origin is tuple and items[1:] == (Ellipsis,):
        return st.lists(values(items[0]), max_size=4).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, items))
    plain = {int: st.integers(), float: _FLOATS, bool: st.booleans(), str: _TEXTS, type(None): st.none()}
    return plain[hint]


@st.composite
def instances(draw: st.DrawFn, kind: type[Method]) -> Method:
    """A method with drawn fields; fields that its own rules refuse keep their example, as does what names a file."""
    hints = typing.get_type_hints(kind)
    method = kind.example()
    for field in dataclasses.fields(kind):
        if field.name == "path" and hasattr(kind, "from_pretrained"):
            continue
        if field.init and draw(st.booleans()):
            drawn = draw(_likely(field.name, hints[field.name]))
            try:
                method = dataclasses.replace(method, **{field.name: drawn})
            except FoveateError:
                continue
    return method


def _likely(name: str, hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field allows, those first that methods are known to accept."""
    found = values(hint)
    if hint == Keep:
        found = st.integers(1, 600) | st.floats(0, 1, exclude_min=True)
    if hint is int:
        found = st.integers(0, 10**6) | found
    return found


@pytest.mark.parametrize("name", [*REGISTERED, "probe"])
@given(data=st.data())
def test_every_method_survives_the_way_to_text_and_back(name: str, data: st.DataObject) -> None:
    method = data.draw(instances(methods.get(name)))
    again = parse(format_spec(method))
    assert again == method
    assert exactly(again, method)


@given(data=st.data())
def test_stages_survive_the_way_to_text_and_back(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from([*REGISTERED, "probe"]), min_size=1, max_size=3))
    stages = tuple(data.draw(instances(methods.get(name))) for name in names)
    assert exactly(parse_stages(format_spec(stages)), stages)


@given(data=st.data())
def test_the_generator_reaches_more_than_the_example(data: st.DataObject) -> None:
    """Fields of every registered method do vary, so that the tests above are about more than defaults."""
    kind = methods.get(data.draw(st.sampled_from(REGISTERED)))
    method = data.draw(instances(kind))
    assert type(method) is kind
    assume(method != kind.example())
    assert format_spec(method) != format_spec(kind.example())


@given(keep=st.integers() | _FLOATS)
def test_keep_is_read_as_it_is_in_python(keep: float) -> None:
    try:
        check_keep(keep)
        refusal = ""
    except FoveateError as error:
        refusal = str(error)
    if refusal:
        assert told(f"random:keep={keep!r}") == refusal
    else:
        assert exactly(parse(f"random:keep={keep!r}"), Random(keep=keep))
