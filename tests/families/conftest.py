"""What contract tests of families record while a method runs."""

from __future__ import annotations

from typing import Any

import pytest
from references.contract import Asked

from foveate.core import Method, Signals


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Record what a method answers: the reference takes merged features from there."""

    def record(method: Method) -> list[Asked]:
        seen: list[Asked] = []
        for kind in {type(part) for part in method.parts() if part.site == "input"}:
            stock = kind.select

            def select(self: Method, signals: Signals, stock: Any = stock) -> Any:
                seen.append(Asked(self, signals.original, stock(self, signals)))
                return seen[-1].selection

            monkeypatch.setattr(kind, "select", select)
        return seen

    return record
