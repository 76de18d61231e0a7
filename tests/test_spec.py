"""The spec language: its grammar, its errors, and specs in files."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from models import spec_methods
from models.spec_methods import REGISTERED, Demanding, Elsewhere, Probe, Trained, exactly, told

from foveate.core import FoveateError, Method, check_keep
from foveate.methods.fopru import FoPru
from foveate.methods.random import Random
from foveate.methods.uniform import Uniform
from foveate.spec import format as format_spec
from foveate.spec import parse, parse_stages


@pytest.fixture(autouse=True, scope="module")
def own_methods() -> Iterator[None]:
    with spec_methods.named():
        yield


# ---------------------------------------------------------------------------------------------------------------------
# grammar


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("fopru", FoPru()),
        ("fopru:keep=0.5", FoPru(keep=0.5)),
        ("fopru:keep=64", FoPru(keep=64)),
        ("fopru:keep=1", FoPru(keep=1)),
        ("fopru:keep=1.0", FoPru(keep=1.0)),
        ("fopru:keep=1.", FoPru(keep=1.0)),
        ("fopru:keep=100%", FoPru(keep=1.0)),
        ("fopru:keep=25%", FoPru(keep=0.25)),
        ("fopru:keep=6.25%", FoPru(keep=0.0625)),
        ("fopru:keep=.5", FoPru(keep=0.5)),
        ("fopru:keep=5e-1", FoPru(keep=0.5)),
        ("fopru:keep=5E-1", FoPru(keep=0.5)),
        ("  fopru : keep = 64 , strategy = row ", FoPru(keep=64, strategy="row")),
        ("fopru:strategy=row,direction=low,reorder=false,budget=image", FoPru(0.25, "row", "low", False, "image")),
        ("fopru:reorder=FALSE", FoPru(reorder=False)),
        ('fopru:strategy="row"', FoPru(strategy="row")),
        ("fopru:strategy='row'", FoPru(strategy="row")),
        ("random:seed=7", Random(seed=7)),
        ("probe:shares=0.4/0.2", Probe(shares=(0.4, 0.2))),
        ("probe:shares=50%/25%", Probe(shares=(0.5, 0.25))),
        ("probe:shares=0.4", Probe(shares=(0.4,))),
        ("probe:shares=0.4/", Probe(shares=(0.4,))),
        ("probe:shares=1/0.5", Probe(shares=(1.0, 0.5))),
        ("probe:shares=1", Probe(shares=(1.0,))),
        ("probe:shares=/", Probe(shares=())),
        ("probe:shares= 0.4 / 0.2 ", Probe(shares=(0.4, 0.2))),
        ("probe:layers=8/16/24", Probe(layers=(8, 16, 24))),
        ("probe:layers=8", Probe(layers=(8,))),
        ("probe:layers=none", Probe(layers=None)),
        ("probe:layers=None", Probe(layers=None)),
        ("probe:budgets=1/1.0", Probe(budgets=(1, 1.0))),
        ("probe:pair=3/4.0", Probe(pair=(3, 4.0))),
        ("probe:words=a/b", Probe(words=("a", "b"))),
        ("probe:words=5/6", Probe(words=("5", "6"))),
        ("probe:words=5", Probe(words=("5",))),
        ('probe:words="a,b"/"c/d"/e', Probe(words=("a,b", "c/d", "e"))),
        ("probe:words='it/'", Probe(words=("it/",))),
        ("probe:note=plain", Probe(note="plain")),
        ("probe:note=5", Probe(note="5")),
        ("probe:note=none", Probe(note="none")),
        ("probe:label=none", Probe(label=None)),
        ('probe:label="none"', Probe(label="none")),
        ("probe:note=a/b", Probe(note="a/b")),
        ("probe:note=a=b", Probe(note="a=b")),
        ('probe:note=""', Probe(note="")),
        ('probe:note="a, b: c+d/e"', Probe(note="a, b: c+d/e")),
        ("probe:note='say \"yes\"'", Probe(note='say "yes"')),
        (r'probe:note="say \"yes\" \\ no"', Probe(note='say "yes" \\ no')),
        (r"probe:note='it\'s'", Probe(note="it's")),
        ("probe:flag=false", Probe(flag=False)),
        ("probe:maybe=true", Probe(maybe=True)),
        ("probe:level=2", Probe(level=2)),
        ('probe:level="none"', Probe(level="none")),
        ("probe:level=none", Probe(level="none")),
        ("probe:where=output", Probe(where="output")),
        ("probe:where=5", Probe(where=5)),
        ("probe:rate=2", Probe(rate=2.0)),
        ("probe:rate=inf", Probe(rate=math.inf)),
        ("probe:rate=-1e3", Probe(rate=-1000.0)),
        ("demanding:keep=1,alpha=2", Demanding(keep=1, alpha=2.0)),
    ],
)
def test_what_a_spec_means(text: str, method: Method) -> None:
    assert exactly(parse(text), method)


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("fopru+random", (FoPru(), Random())),
        ("fopru:keep=0.5 + random:keep=0.25", (FoPru(keep=0.5), Random(keep=0.25))),
        ("probe:rate=1e+3+random", (Probe(rate=1000.0), Random())),
        ("probe:shares=1e-1/1e+1,rate=2e+2+fopru:keep=1", (Probe(shares=(0.1, 10.0), rate=200.0), FoPru(keep=1))),
        ("probe:note=3e+random", (Probe(note="3e"), Random())),
        ("probe:note=some+3d", (Probe(note="some"), Uniform())),
        ("probe:note='a+b'+random", (Probe(note="a+b"), Random())),
        ("fopru+random+uniform", (FoPru(), Random(), Uniform())),
    ],
)
def test_plus_joins_stages(text: str, stages: tuple[Method, ...]) -> None:
    assert exactly(parse_stages(text), stages)


def test_one_method_is_one_stage() -> None:
    assert exactly(parse_stages("fopru"), (FoPru(),))
    with pytest.raises(FoveateError) as error:
        parse("fopru+random")
    assert str(error.value) == "'fopru+random' names 2 stages where one method is expected"


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (FoPru(), "fopru:keep=0.25"),
        (FoPru(keep=1.0), "fopru:keep=1.0"),
        (FoPru(keep=1), "fopru:keep=1"),
        (FoPru(strategy="row", reorder=False), "fopru:keep=0.25,strategy=row,reorder=false"),
        (Random(seed=3), "random:keep=0.25,seed=3"),
        (Probe(shares=(0.5,)), "probe:keep=0.25,shares=0.5/"),
        (Probe(layers=()), "probe:keep=0.25,layers=/"),
        (Probe(budgets=(1,)), "probe:keep=0.25,budgets=1/"),
        (Probe(made=(1, 2)), "probe:keep=0.25"),
        (Probe(made=(1,)), "probe:keep=0.25,made=1/"),
        (Probe(label="none"), 'probe:keep=0.25,label="none"'),
        (Probe(note="5%"), 'probe:keep=0.25,note="5%"'),
        (Probe(note="INF"), 'probe:keep=0.25,note="INF"'),
        (Probe(note="a\n"), 'probe:keep=0.25,note="a\n"'),
        (Probe(words=("a,b", "c")), 'probe:keep=0.25,words="a,b"/c'),
        (Probe(rate=1e16), "probe:keep=0.25,rate=1e+16"),
    ],
)
def test_how_a_method_is_written(method: Method, text: str) -> None:
    assert format_spec(method) == str(method) == text
    assert exactly(parse(text), method)


def test_a_number_of_numpy_is_written_as_a_number() -> None:
    assert format_spec(FoPru(keep=numpy.float64(0.1))) == "fopru:keep=0.1"


def test_stages_are_written_with_plus() -> None:
    assert format_spec([FoPru(keep=0.5), Random(keep=9)]) == "fopru:keep=0.5+random:keep=9"
    assert format_spec(()) == ""


def test_a_trained_method_takes_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(Trained, "loaded", loaded)
    assert parse("trained:from=runs/lvp,keep=9") == Trained("runs/lvp", 9)
    assert parse('trained:path="/data/lvp+1"') == Trained("/data/lvp+1", 0.5)
    assert parse("trained:from=7") == Trained("7")
    assert parse("elsewhere:from=runs/lvp,keep=0.1") == Elsewhere(0.1)
    assert loaded == [
        ("runs/lvp", {"keep": 9}),
        ("/data/lvp+1", {}),
        ("7", {}),
        ("runs/lvp", {"keep": 0.1}),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# errors


FIELDS = ", ".join(sorted(field.name for field in dataclasses.fields(Probe) if field.init))
ALL = f"Choices: {', '.join(REGISTERED)}."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' has an empty stage; write name[:field=value,...], stages joined by +"),
        ("fopru+", "'fopru+' has an empty stage; write name[:field=value,...], stages joined by +"),
        ("+fopru", "'+fopru' has an empty stage; write name[:field=value,...], stages joined by +"),
        ("fopru++random", "'fopru++random' has an empty stage; write name[:field=value,...], stages joined by +"),
        ("forpu", f"unknown method 'forpu'; did you mean 'fopru'? {ALL}"),
        ("FoPru:keep=1", f"unknown method 'FoPru'; did you mean 'fopru'? {ALL}"),
        (":keep=1", f"unknown method ''; {ALL}"),
        ("../../x", f"unknown method '../../x'; {ALL}"),
        ("fopru:", "'' in 'fopru:' is no field=value"),
        ("fopru:keep", "'keep' in 'fopru:keep' is no field=value"),
        ("fopru:keep=1,", "'' in 'fopru:keep=1,' is no field=value"),
        ("fopru:0.5", "'0.5' in 'fopru:0.5' is no field=value"),
        (
            "fopru:kep=1",
            "fopru has no field 'kep'; did you mean 'keep'? Choices: budget, direction, keep, reorder, strategy.",
        ),
        ("random:=1", "random has no field ''; Choices: keep, seed."),
        ("random:from=runs", "random has no field 'from'; Choices: keep, seed."),
        ("probe:derived=1", f"probe has no field 'derived'; did you mean 'where'? Choices: {FIELDS}."),
        ("fopru:keep=1,keep=2", "fopru is given 'keep' twice"),
        ("trained:from=a,path=b", "trained is given 'path' twice"),
        ("fopru:keep=half", "fopru: keep=half is str, not int or float"),
        ("fopru:keep='0.5'", "fopru: keep='0.5' is str, not int or float"),
        ("fopru:keep=true", "fopru: keep=true is bool, not int or float"),
        ("fopru:keep=none", "fopru: keep=none is none, not int or float"),
        ("fopru:keep=0.5/0.3", "fopru: keep=0.5/0.3 is tuple, not int or float"),
        (
            "fopru:keep=64.0",
            "keep=64.0 is no share in (0, 1]; the nearest is keep=1.0; write 64 without a point for tokens",
        ),
        (
            "fopru:keep=150%",
            "keep=1.5 is no share in (0, 1]; the nearest is keep=1.0; write 2 without a point for tokens",
        ),
        ("fopru:keep=0%", "keep=0.0 is no share in (0, 1]; the nearest is keep=0.01"),
        ("fopru:keep=nan", "keep=nan is no share in (0, 1]; the nearest is keep=0.01"),
        ("fopru:keep=inf", "keep=inf is no share in (0, 1]; the nearest is keep=1.0"),
        ("fopru:keep=" + "9" * 5000, "keep=inf is no share in (0, 1]; the nearest is keep=1.0"),
        ("fopru:keep=0", "keep=0 is below 1 token; the smallest budget is keep=1"),
        ("fopru:keep=-1", "keep=-1 is below 1 token; the smallest budget is keep=1"),
        (
            "fopru:keep=",
            "fopru: keep=(nothing): a string that is empty or holds , : + / or space is quoted",
        ),
        (
            "fopru:strategy=rows",
            "fopru: strategy=rows is not among its choices; did you mean 'row'? Choices: rank, row.",
        ),
        ("fopru:reorder=1", "fopru: reorder=1 is int, not bool"),
        ("random:seed=1.5", "random: seed=1.5 is float, not int"),
        ("random:seed=1e3", "random: seed=1e3 is float, not int"),
        ("random:seed=-1", "seed=-1 is negative; the smallest is seed=0"),
        ("probe:level=3", "probe: level=3 is not among its choices; Choices: 2, high, low, none."),
        (
            "probe:level=2.0",
            "probe: level=2.0 is not among its choices; did you mean '2'? Choices: 2, high, low, none.",
        ),
        ("probe:layers=1/x", "probe: layers=1/x is tuple, not tuple[int, ...] or none"),
        ("probe:layers=1/2.5", "probe: layers=1/2.5 is tuple, not tuple[int, ...] or none"),
        ("probe:layers=0.5", "probe: layers=0.5 is float, not tuple[int, ...] or none"),
        ("probe:shares=1//2", "probe: shares=1//2: a string that is empty or holds , : + / or space is quoted"),
        ("probe:pair=1/2.0/3.0", "probe: pair=1/2.0/3.0 is tuple, not tuple[int, float]"),
        ("probe:note=/data/x", "probe: note=/data/x: a string that is empty or holds , : + / or space is quoted"),
        ("probe:note=a b", "probe: note=a b: a string that is empty or holds , : + / or space is quoted"),
        ("probe:note=a:b", "probe: note=a:b: a string that is empty or holds , : + / or space is quoted"),
        ("probe:note='a", "\"probe:note='a\" has an open ' quote"),
        ("probe:note='a'b", "probe: note='a'b has an open quote"),
        ('probe:note="a\\"', '\'probe:note="a\\\\"\' has an open " quote'),
        ("demanding", "demanding needs keep and alpha; write demanding:keep=..."),
        ("demanding:keep=1", "demanding needs alpha; write demanding:alpha=..."),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(text: str, message: str) -> None:
    assert told(text) == message


LONG = "9" * 5000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "random:seed=" + "9" * 20_000,
            "'random:seed=9999.*9999' .20014 characters. is too long for a spec; the most is",
        ),
        ("+".join(["random"] * 5000), "'random.random.*random' .35001 characters. is too long for a spec; the most is"),
        (f"random:seed={LONG}", r"random: seed=9+\.\.\.9+ \(5000 characters\) is float, not int"),
        (f"random:note{LONG}=1", r"random has no field 'note9+\.\.\.9+' \(5006 characters\); Choices: keep, seed"),
        (
            f"random:{LONG}",
            r"'9+\.\.\.9+' \(5002 characters\) in 'random:9+\.\.\.9+' \(5009 characters\) is no field=value",
        ),
        (f"fopru:strategy=x{LONG}", r"fopru: strategy=x9+\.\.\.9+ \(5001 characters\) is not among its choices"),
        (f"probe:note='{LONG}", r"\"probe:note='9+\.\.\.9+\" \(5014 characters\) has an open ' quote"),
        (f"probe:note='{LONG}'b", r"probe: note='9+\.\.\.9+'b \(5003 characters\) has an open quote"),
        (f"probe:note={LONG} a", r"probe: note=9+\.\.\.9+ a \(5002 characters\): a string that is empty or holds"),
        (f"x{LONG}", r"unknown method 'x9+\.\.\.9+' \(5003 characters\); Choices"),
        (f"random+{LONG}+", r"'random\+9+\.\.\.9+\+' \(5010 characters\) has an empty stage"),
        (f"@{LONG}", r"9+\.\.\.9+ \(5000 characters\) holds a name of 5000 bytes"),
        ("lvpruning:from=" + "x" * 300, "holds a name of 300 bytes; the most is 255"),
        ("lvpruning:from=~no-such-user", "there is no user 'no-such-user' here"),
        ('lvpruning:from="a\0b"', "holds a NUL character"),
        ("@~no-such-user/x", "there is no user 'no-such-user' here"),
        ("@a\0b", "holds a NUL character"),
    ],
)
def test_a_long_text_is_neither_read_for_long_nor_repeated(text: str, message: str) -> None:
    said = told(text)
    assert re.search(message, said), said
    assert len(said) < 600


def test_keep_of_many_digits_is_not_repeated() -> None:
    with pytest.raises(FoveateError, match=r"keep='9+\.\.\.9+' \(5002 characters\) is neither a number of tokens"):
        check_keep(LONG)
    with pytest.raises(FoveateError, match=r"strategy='9+\.\.\.9+' \(5002 characters\) is not among its choices"):
        FoPru(keep=1, strategy=LONG)


# ---------------------------------------------------------------------------------------------------------------------
# @file


def test_a_file_holds_a_spec(tmp_path: Path) -> None:
    stored = tmp_path / "best+one.json"
    stored.write_text(json.dumps({"prune": "fopru:keep=0.5+random:keep=0.25", "score": 0.9}))
    assert exactly(parse_stages(f"@{stored}"), (FoPru(keep=0.5), Random(keep=0.25)))
    stored.write_text(json.dumps("fopru:keep=1"))
    assert exactly(parse(f"@{stored}"), FoPru(keep=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"keep": 1}', '@{path} has no "prune" entry that holds a spec'),
        (b"[1]", '@{path} has no "prune" entry that holds a spec'),
        (b'{"prune": ["fopru"]}', '@{path} has no "prune" entry that holds a spec'),
        (b'{"prune": "@{path}"}', "@{path} points on to @{{path}}; the file itself holds the spec"),
        (b"fopru", "@{path} cannot be read as JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"", "@{path} cannot be read as JSON: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_a_file_without_a_spec(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "best.json"
    path.write_bytes(content)
    assert told(f"@{path}") == message.format(path=path)


def test_a_file_of_brackets_or_without_end(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    assert told(f"@{path}") == f"@{path} cannot be read as JSON: its brackets are nested too deep"
    assert told("@/dev/zero") == "@/dev/zero cannot be read as JSON: it has more than 1 MB"
    path.write_text(json.dumps({"prune": "random:keep=" + "9" * 20_000}))
    assert "(20014 characters) is too long for a spec" in told(f"@{path}")


def test_a_file_that_points_at_itself_ends(tmp_path: Path) -> None:
    path = tmp_path / "loop.json"
    path.write_text(json.dumps({"prune": f"@{path}"}))
    assert told(f"@{path}") == f"@{path} points on to @{path}; the file itself holds the spec"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert told(f"@{tmp_path}").startswith(f"@{tmp_path} cannot be read as JSON: ")
    assert told(f"@{tmp_path / 'gone.json'}").startswith(f"@{tmp_path / 'gone.json'} cannot be read as JSON: ")
    (tmp_path / "picture").write_bytes(b"\xff\xd8\xff")
    assert told(f"@{tmp_path / 'picture'}").startswith(f"@{tmp_path / 'picture'} cannot be read as JSON: ")
