"""The HTTP routes over a ScoringCore: the contract as protobuf or JSON, probes, metrics, OpenAPI."""

from __future__ import annotations

import asyncio
import math
from typing import Annotated, Literal

from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from tutelage.v1 import teacher_pb2 as pb
from tutelage_client import codec
from tutelage_client.errors import TutelageError, invalid, shown
from tutelage_client.types import Score, ScoreRequest, SequenceError

from services.access import TokenCheck
from services.api.core import ScoringCore
from services.api.http_errors import error_body, error_response
from services.api.http_gates import Gates
from services.api.json_codec import parse_request, score_document
from services.api.openapi import error_responses, score_operation
from services.api.settings import ServiceSettings
from services.api.spans import HttpSpans
from services.api.validate import check_counts

PROTOBUF = "application/x-protobuf"

ArrayForm = Annotated[
    Literal["base64", "list"], Query(description="how a JSON answer writes arrays; lists have null for NaN")
]
Timeout = Annotated[str | None, Header(alias="Request-Timeout", description="seconds until the deadline")]


def build_app(core: ScoringCore, settings: ServiceSettings, tokens: TokenCheck) -> FastAPI:
    """The application of the HTTP port."""
    app = FastAPI(
        title="Tutelage teacher", description="Scores of a teacher model, by token id.", version="1"
    )
    _add_error_shapes(app)
    _add_score_routes(app, core)
    _add_probes(app, core)
    if settings.metrics_port is None:
        _add_metrics(app, core)
    app.add_middleware(HttpSpans)
    app.add_middleware(Gates, tokens=tokens, max_bytes=settings.max_message_bytes)
    return app


def build_metrics_app(core: ScoringCore, settings: ServiceSettings, tokens: TokenCheck) -> FastAPI:
    """The application of the metrics port."""
    app = FastAPI(title="Tutelage teacher metrics", openapi_url=None)
    _add_error_shapes(app)
    _add_metrics(app, core)
    app.add_middleware(Gates, tokens=tokens, max_bytes=settings.max_message_bytes)
    return app


def _add_score_routes(app: FastAPI, core: ScoringCore) -> None:
    @app.post("/v1/score", responses=error_responses(), openapi_extra=score_operation())
    async def score(request: Request, arrays: ArrayForm = "base64", seconds: Timeout = None) -> Response:
        """Score a batch; the answer comes in the request's own media type."""
        binary = _media_type(request) == PROTOBUF
        body = await _body(request)
        if binary:
            message = _parse_protobuf(body)
            check_counts(len(message.sequences), len(message.contexts), core.limits)
        else:
            message = await asyncio.to_thread(parse_request, body, core.limits)
        malformed: dict[int, SequenceError] = {}
        decoded = codec.request_from_proto(message, malformed)
        answer = await _score_while_connected(core, request, decoded, malformed, _seconds(seconds))
        encoding = decoded.signal.encoding
        if binary:
            return Response(codec.score_to_bytes(answer, encoding), media_type=PROTOBUF)
        # Making JSON of a large answer takes seconds, in which other requests are not to wait.
        return await asyncio.to_thread(lambda: JSONResponse(score_document(answer, encoding, arrays)))

    @app.get("/v1/teacher", responses=error_responses())
    async def teacher(request: Request, teacher: str = "") -> Response:
        """Who scores here, and within which limits."""
        message = codec.teacher_to_proto(core.teacher(teacher))
        if PROTOBUF in request.headers.get("accept", ""):
            return Response(message.SerializeToString(), media_type=PROTOBUF)
        document = json_format.MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return JSONResponse(document)

    @app.get("/v1/models", responses=error_responses())
    async def models() -> JSONResponse:
        """The teachers as OpenAI's clients list models."""
        served = [core.teacher(identity.name) for identity in core.identities]
        models = [
            {
                "id": teacher.identity.name,
                "object": "model",
                "created": 0,
                "owned_by": "tutelage",
                "root": teacher.identity.model,
                "max_model_len": teacher.limits.max_sequence_tokens,
            }
            for teacher in served
        ]
        return JSONResponse({"object": "list", "data": models})


def _add_probes(app: FastAPI, core: ScoringCore) -> None:
    def probe(well: bool) -> JSONResponse:
        return JSONResponse({"status": core.state}, 200 if well else 503)

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 from when the model is loaded until the process ends, also while draining."""
        return probe(core.state != "loading")

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """200 while requests are accepted."""
        return probe(core.state == "ready")


def _add_metrics(app: FastAPI, core: ScoringCore) -> None:
    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(core.metrics.exposition(), media_type="text/plain; version=0.0.4")


def _add_error_shapes(app: FastAPI) -> None:
    @app.exception_handler(TutelageError)
    async def refused(_request: Request, error: TutelageError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def not_served(_request: Request, error: HTTPException) -> JSONResponse:
        code = "NOT_FOUND" if error.status_code == 404 else "INVALID_ARGUMENT"
        body = error_body(error.status_code, str(error.detail), code)
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def wrong_parameter(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return error_response(invalid(f"{first['loc'][-1]}: {first['msg']}"))


async def _body(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect as error:
        raise TutelageError("CANCELLED", "connection: closed by the caller") from error


async def _score_while_connected(
    core: ScoringCore,
    request: Request,
    decoded: ScoreRequest,
    malformed: dict[int, SequenceError],
    seconds: float | None,
) -> Score:
    """Score, and withdraw the work from the engine as soon as the caller hangs up."""
    scoring = asyncio.create_task(
        core.score(decoded, transport="http", remaining_seconds=seconds, malformed=malformed)
    )
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({scoring, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not scoring.done():
            raise TutelageError("CANCELLED", "connection: closed by the caller")
        return scoring.result()
    finally:
        gone.cancel()
        scoring.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _media_type(request: Request) -> str:
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type not in (PROTOBUF, "application/json"):
        raise invalid(f"content-type: got {shown(media_type)}, allowed are application/json and {PROTOBUF}")
    return media_type


def _parse_protobuf(body: bytes) -> pb.ScoreRequest:
    try:
        return pb.ScoreRequest.FromString(body)
    except DecodeError as error:
        raise invalid(f"body: got {len(body)} bytes that are not a ScoreRequest") from error


def _seconds(header: str | None) -> float | None:
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise invalid(f"request-timeout: got {shown(header)}, must be a number of seconds of at least 0")
    return seconds
