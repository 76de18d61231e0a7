"""Errors as OpenAI's interface tells them: our message, no traceback."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from foveate.core import FoveateError

_log = logging.getLogger("foveate.serve")
FAILED = "the server failed at this request; its log says why"
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(status: int, message: str) -> dict[str, Any]:
    """The JSON of an error answer with this HTTP status."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def tell_errors(app: FastAPI) -> None:
    """Let an application answer every error in that form."""

    @app.exception_handler(FoveateError)
    async def refused(_request: Request, error: FoveateError) -> JSONResponse:
        return JSONResponse(error_body(400, str(error)), 400)

    @app.exception_handler(RequestValidationError)
    async def misformed(_request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(error_body(400, "the body of a request is one JSON object"), 400)

    @app.exception_handler(HTTPException)
    async def other(_request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(_request: Request, error: Exception) -> JSONResponse:
        _log.error("an answer failed", exc_info=error)
        return JSONResponse(error_body(500, FAILED), 500)
