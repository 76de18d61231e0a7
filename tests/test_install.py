"""What installs the environments takes packages from where pip is told to, in pip's order."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", Path(__file__).parents[1] / "tools" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings_of_pip_become_options_of_uv(install: ModuleType) -> None:
    printed = [
        ":env:.index-url='https://first.example/simple'",
        ":env:.disable-pip-version-check='1'",
        ":env:.find-links='/wheels'",
        "global.find-links='/wheels /more'",
        "global.index-url='https://second.example/simple'",
        "install.extra-index-url='\\nhttps://a.example\\nhttps://b.example'",
    ]
    assert [word.removeprefix("--") for word in install.options(install.settings(printed))] == [
        *("find-links", "/wheels", "find-links", "/more"),
        *("extra-index-url", "https://a.example", "extra-index-url", "https://b.example"),
        *("index-url", "https://first.example/simple"),
        *("index-strategy", "unsafe-best-match"),
    ]


def test_the_environment_goes_before_files_wherever_it_is_printed(install: ModuleType) -> None:
    found = install.settings(["global.index-url='https://file.example'", ":env:.index-url='https://variable.example'"])
    assert install.options(found)[1:] == ["https://variable.example"]


def test_without_settings_there_are_no_options(install: ModuleType) -> None:
    assert install.options(install.settings([])) == []


@pytest.mark.parametrize("works", [True, False])
def test_where_uv_fails_pip_installs_the_same(
    install: ModuleType, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 0 if works or command[0] != "/bin/ls" else 1, stdout="")

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["install.py", "/bin/ls", "there/python", "--no-deps", "one==1"])
    assert install.main() == 0
    assert ran[1] == ["/bin/ls", "pip", "install", "--quiet", "--python", "there/python", "--no-deps", "one==1"]
    by_pip = [command for command in ran[2:] if command[1:5] == ["-m", "pip", "--python", "there/python"]]
    assert len(by_pip) == (0 if works else 1)
    assert works or by_pip[0][-2:] == ["--no-deps", "one==1"]
