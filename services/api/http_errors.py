"""Every refusal over HTTP: a status, and a body in the shape that OpenAI's clients parse."""

from __future__ import annotations

import math
import re
from typing import Any

from fastapi.responses import JSONResponse
from tutelage_client.errors import TutelageError

STATUS = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "NOT_FOUND": 404,
    "FAILED_PRECONDITION": 412,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}
# Messages begin with the field they are about: "signal.top_k: got 999, …".
_FIELD = re.compile(r"([a-z_-]+(?:\[\d+\])?(?:\.[a-z_]+(?:\[\d+\])?)*): ")


def error_body(status: int, message: str, code: str) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = message.encode("utf-8", "backslashreplace").decode()  # it may quote what is not Unicode
    field = _FIELD.match(message)
    return {"error": {"message": message, "type": kind, "code": code, "param": field and field.group(1)}}


def error_response(error: TutelageError) -> JSONResponse:
    status = STATUS[error.code]
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))  # whole seconds, by RFC 9110
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(status, error.message, error.code), status, headers)
