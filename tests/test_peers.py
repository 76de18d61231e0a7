"""Peers of the benchmarks: a process of another Python is asked over a pipe, and what is not there is passed over."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from outside import ROOT, loaded

WORKING = """
from answering import Ticks, answer_commands

def made(asked):
    def answer(tokens):
        print("no answer")
        ticks = Ticks()
        for _ in range(tokens):
            ticks.note()
        return {**ticks.figures(), "threads": asked["threads"]}
    return {"answer": answer, "fall": lambda: __import__("os")._exit(7)}

answer_commands(made)
"""
LACKING = """
from answering import answer_commands

def made(asked):
    import a_package_that_nobody_has

answer_commands(made)
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield loaded("benchmarks/peers.py")
    for name in ("peers", "cpu", "overhead", "selection", "in_peers", "in_peers.answering"):
        if name not in before:
            sys.modules.pop(name, None)


def written(folder: Path, text: str) -> str:
    """A script that a peer runs, as `Peer` finds it."""
    (folder / "answering.py").write_text((ROOT / "benchmarks/in_peers/answering.py").read_text(encoding="utf-8"))
    (folder / "peer.py").write_text(text, encoding="utf-8")
    return str(folder / "peer.py")


def test_a_peer_answers_until_it_falls(peers: ModuleType, tmp_path: Path) -> None:
    with peers.started(Path(sys.executable), written(tmp_path, WORKING), threads=1) as peer:
        figures = peer.ask("answer", tokens=3)
        assert figures.keys() == {"first, clock", "first, process", "token, clock", "token, process", "threads"}
        assert figures["threads"] == 1
        with pytest.raises(peers.Missing, match="ended with 7 when it was sent"):
            peer.ask("fall")


def test_a_peer_that_lacks_a_package_or_is_not_there_is_passed_over(
    peers: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(peers.Missing, match="lacks a package: No module named 'a_package_that_nobody_has'"),
        peers.started(Path(sys.executable), written(tmp_path, LACKING), threads=1),
    ):
        pass
    nowhere = tmp_path / "python"
    asked = SimpleNamespace(quick=True, threads=1, parts="kvpress,float32", kvpress=nowhere, openvino=nowhere)
    assert peers.measured(asked, tmp_path) == ([], {})
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" is passed over: ")[0] for line in said] == ["kvpress", "float32"]
    assert all(f"{nowhere} is not there; " in line for line in said)


def test_medians_leave_the_first_round_out(peers: ModuleType) -> None:
    values = {"one": iter([90.0, 1.0, 3.0, 2.0]), "other": iter([80.0, 7.0, 7.0, 9.0])}
    rivals = {name: lambda mine=mine: {"first": next(mine)} for name, mine in values.items()}
    assert peers.in_turns(rivals, 3) == {"one": {"first": 2.0}, "other": {"first": 7.0}}
