"""The application and its server."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from foveate.core import FoveateError
from foveate.inference.loading import Loaded
from foveate.serve.local.limits import Limits

KEPT = ("/v1/chat/completions", "/v1/responses", "/v1/models", "/health", "/openapi.json")
"""What of transformers' application is served; the rest loads models, takes sound, or draws pages from elsewhere."""


def application(
    loaded: Loaded,
    spec: str = "none",
    *,
    limits: Limits | None = None,
    key: str | None = None,
    clip: str | None = None,
) -> Any:
    """An ASGI application that answers questions about pictures over OpenAI's two interfaces.

    Args:
        spec: what pictures of a request are pruned by that does not say; "none" for nothing.
        key: that clients must send; None asks for none.
        clip: folder or hub id of the CLIP whose vision tower the encoder is.

    Raises:
        FoveateError: `foveate[serve]` is not installed, or the spec cannot run on the model.
    """
    check_installed()
    from fastapi import Response
    from transformers.cli.serving.server import build_server

    from foveate.serve.local.errors import tell_errors
    from foveate.serve.local.gate import Gate
    from foveate.serve.local.generation import Manager, State
    from foveate.serve.local.handlers import Chat, Desk, OneModel, Responses
    from foveate.serve.local.metrics import Metrics
    from foveate.serve.local.schema import with_bodies

    limits = limits or Limits()
    metrics = Metrics()
    desk, models = Desk(loaded, spec, limits, metrics, clip), OneModel(loaded)
    state = State(Manager(desk.fitted, clip))
    handlers = {
        "model_manager": models,
        "chat_handler": Chat(desk, models, state),
        "response_handler": Responses(desk, models, state),
        "generation_state": state,
    }
    # Further handlers come with versions of transformers; their routes are taken out.
    unused = {
        name for name in inspect.signature(build_server).parameters if name.endswith("_handler")
    } - handlers.keys()
    app = build_server(**handlers, **dict.fromkeys(unused))
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in KEPT]
    tell_errors(app)

    figures = lambda: Response(metrics.text(), media_type="text/plain; version=0.0.4")  # noqa: E731
    app.add_api_route("/metrics", figures, response_model=None)
    app.openapi_schema = with_bodies(app.openapi(), limits)
    return Gate(app, limits, metrics, frozenset((*KEPT, "/metrics")), key)


def serve(app: Any, host: str, port: int, seconds: float) -> None:
    """Serve until SIGTERM or SIGINT; requests that run by then are answered first.

    Args:
        seconds: that they may take.
    """
    import uvicorn

    logging.getLogger("transformers").setLevel(logging.ERROR)  # it tells every request
    uvicorn.run(app, host=host, port=port, log_level="info", timeout_graceful_shutdown=int(seconds) + 1)


def check_installed() -> None:
    """Refuse to serve without the packages of `foveate[serve]`.

    Raises:
        FoveateError: naming those that are not there.
    """
    from importlib.util import find_spec

    lacking = [name for name in ("fastapi", "uvicorn", "openai", "prometheus_client") if find_spec(name) is None]
    if lacking:
        raise FoveateError(f"serving needs {', '.join(lacking)}; install foveate[serve]")
