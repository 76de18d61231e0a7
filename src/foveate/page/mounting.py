"""Puts the page on a server, where it reaches nothing but that server."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from foveate.core import FoveateError
from foveate.inference.loading import Loaded
from foveate.inference.pictures import MOST_BYTES

ROUTES = (
    "assets/",
    "static/",
    "theme.css",
    "favicon.ico",
    "config",
    "gradio_api/startup-events",
    "gradio_api/heartbeat/",
    "gradio_api/upload",
    "gradio_api/queue/",
    "gradio_api/cancel",
    "gradio_api/reset",
    "gradio_api/file=",
)
"""What of Gradio's application is served besides the page; the rest fetches from elsewhere, records, or describes."""

POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'"
)
"""What browsers may load: the server's own. The page is drawn by scripts and styles within it."""


def is_installed() -> bool:
    """Whether the page can be drawn here."""
    return find_spec("gradio") is not None


def mount(gate: Any, loaded: Loaded, spec: str, key: str | None, clip: str | None) -> Any:
    """The gate of a server, the page at its root.

    Args:
        spec: what the server prunes by where a request does not say.
        key: that it asks for.

    Raises:
        FoveateError: Gradio is not installed.
    """
    if not is_installed():
        raise FoveateError("the page needs gradio; install foveate[serve], or serve with --no-page")
    import gradio
    from fastapi import HTTPException

    from foveate.page.layout import CSS, Page

    async def unknown(rest: str) -> None:
        raise HTTPException(404, "Not Found")

    app = gate.app
    app.add_api_route("/v1/{rest:path}", unknown, methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
    blocks = Page(gate, loaded, spec, key, clip).blocks()
    gradio.mount_gradio_app(
        app,
        blocks.queue(max_size=64, default_concurrency_limit=8, api_open=False),
        path="/",
        footer_links=[],
        run_history=False,
        show_error=True,
        max_file_size=MOST_BYTES,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
    mounted = app.router.routes[-1]
    mounted.app = _Kept(mounted.app)
    return gate


class _Kept:
    """The page's application, cut down to what a page needs, whose answers tell browsers what they may load."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "/").removeprefix("/")
        if scope["type"] != "http" or not (path == "" or path.startswith(ROUTES)) or "://" in path:
            if scope["type"] == "http":
                await send({"type": "http.response.start", "status": 404, "headers": []})
                await send({"type": "http.response.body", "body": b""})
            return

        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": [*headers, (b"referrer-policy", b"no-referrer")]}
            await send(message)

        await self.app(scope, receive, told)
