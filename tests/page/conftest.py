"""A server with its page, and a browser that looks at it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from foveate.inference.loading import Loaded, load

SPEC = "fopru:keep=0.25"
BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def mini() -> Loaded:
    return load("mini", device="cpu", dtype="float32")  # in which every CPU is fast


@pytest.fixture(scope="session")
def address(mini: Loaded) -> Iterator[str]:
    pytest.importorskip("gradio", reason="the page is tested by make test-serve, in an environment of its own")
    from serve.local.running import running

    from foveate.page.mounting import mount
    from foveate.serve.local.server import application

    with running(mount(application(mini, SPEC), mini, SPEC, None, None)) as found:
        yield found


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="make test-serve installs it")
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"there is no browser here: none of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as started:
        # Root may not use the sandbox that browsers run pages in.
        arguments = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


class Visit:
    """One visit to the page, and what its browser asked of others than the server."""

    def __init__(self, browser: Any, address: str, **settings: Any) -> None:
        self.page = browser.new_context(**settings).new_page()
        self.elsewhere: list[str] = []
        self.page.on("request", lambda request: self._note(request.url, address))
        self.page.goto(address)
        self.page.wait_for_selector("#go")

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(url)

    def text(self, name: str) -> str:
        return str(self.page.locator(f"#{name}").inner_text())

    def answers(self) -> list[str]:
        return [self.page.locator(f"#{name} textarea").input_value().strip() for name in ("unpruned", "pruned")]

    def ask(self) -> None:
        """Ask, and wait until there is something to look at."""
        self.page.locator("#go").click()
        self.await_look()

    def await_look(self) -> None:
        self.page.locator("#measured table").wait_for(timeout=60_000)
        self.page.locator("#look img").wait_for(timeout=60_000)

    def await_text(self, name: str, words: str) -> None:
        self.page.locator(f"#{name}", has_text=words).wait_for(timeout=60_000)


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Any]:
    made: list[Visit] = []

    def start(**settings: Any) -> Visit:
        made.append(Visit(browser, address, **settings))
        return made[-1]

    yield start
    for one in made:
        assert one.elsewhere == []
        one.page.context.close()
