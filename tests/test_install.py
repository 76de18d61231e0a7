"""What installs the environments takes packages from where pip is told to, in pip's order."""

from __future__ import annotations

import importlib.util
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
