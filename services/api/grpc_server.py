"""The gRPC door: TeacherService, health and reflection over a ScoringCore.

Messages are handled as bytes and parsed here, so that a malformed one is answered with
INVALID_ARGUMENT; gRPC's own deserialisation would answer INTERNAL.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tutelage.v1 import teacher_pb2 as pb
from tutelage_client import codec
from tutelage_client.errors import TutelageError, invalid
from tutelage_client.types import SequenceError

from services import tracing
from services.access import TokenCheck
from services.api.core import ScoringCore, Transport
from services.api.settings import ServiceSettings
from services.api.spans import rpc_span
from services.api.validate import check_counts

SERVICE = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
_HEALTH_PREFIX = "/grpc.health.v1.Health/"
_STREAM_WINDOW = 64
_MAX_DETAILS = 1000  # characters; details travel as metadata, which gRPC bounds at 8 KiB
# Callers watch a silent call by pings. gRPC's own bound is one in five minutes, beyond which it hangs up.
MIN_PING_INTERVAL_MS = 10_000

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)


class GrpcServer:
    """One listening gRPC server; `start` returns once it is bound."""

    def __init__(self, core: ScoringCore, settings: ServiceSettings) -> None:
        self._settings = settings
        self._health = health.aio.HealthServicer()
        self._calls = _OpenCalls()
        tokens = TokenCheck(settings.read_tokens())
        self._server = grpc.aio.server(
            interceptors=[_Authorize(tokens)] if tokens.required else None,
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
                # Callers keep a connection for good: without an end of it none would find a new replica.
                ("grpc.max_connection_age_ms", round(1000 * settings.max_connection_age_seconds)),
                ("grpc.so_reuseport", 0),  # a taken port is an error, not a silent split of the traffic
            ],
        )
        self._server.add_generic_rpc_handlers((_handlers(_Servicer(core, self._calls)),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.address = ""

    async def start(self) -> None:
        """Bind and answer; health says NOT_SERVING until `set_serving`. Raises OSError when taken."""
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        wanted = f"{host}:{self._settings.grpc_port}"
        try:
            port = self._bind(wanted)
        except RuntimeError as error:
            raise OSError(f"gRPC cannot listen on {wanted}: {error}") from error
        self.address = f"{host}:{port}"
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()

    async def set_serving(self) -> None:
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def begin_drain(self) -> None:
        """Health says NOT_SERVING from now on; running calls go on."""
        await self._health.enter_graceful_shutdown()

    async def settle(self, quiet_seconds: float, at_most_seconds: float) -> None:
        """Return once no call has been open for a while, so that every answer is on its way.

        Callers that keep coming are refused and do not hold this up for longer than `at_most_seconds`.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + at_most_seconds
        while clock() < end and self._calls.quiet_for() < quiet_seconds:  # noqa: ASYNC110 - quiet is no event
            await asyncio.sleep(quiet_seconds / 10)

    async def stop(self) -> None:
        """End every call and close; for a process that lives on afterwards.

        gRPC for asyncio (seen with 1.78) can crash here while callers keep coming: a process that is
        about to end should end without it.
        """
        await self._server.stop(None)

    def _bind(self, address: str) -> int:
        tls = self._settings.tls
        if tls is None:
            return self._server.add_insecure_port(address)
        authority = None if tls.client_authority is None else tls.client_authority.read_bytes()
        credentials = grpc.ssl_server_credentials(
            [(tls.key.read_bytes(), tls.certificate.read_bytes())],
            root_certificates=authority,
            require_client_auth=authority is not None,
        )
        return self._server.add_secure_port(address, credentials)

    async def _set_health(self, status: Any) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)


class _OpenCalls:
    """Calls whose answer gRPC has not yet sent."""

    def __init__(self) -> None:
        self._open = 0
        self._last_end = -math.inf

    def add(self, context: Context) -> None:
        self._open += 1
        context.add_done_callback(lambda _context: self._ended())  # type: ignore[arg-type]

    def quiet_for(self) -> float:
        """Seconds since the last call ended; 0 while there is one."""
        return 0.0 if self._open else time.monotonic() - self._last_end

    def _ended(self) -> None:
        self._open -= 1
        self._last_end = time.monotonic()


class _Servicer:
    """Bytes in, bytes out."""

    def __init__(self, core: ScoringCore, calls: _OpenCalls) -> None:
        self._core = core
        self._calls = calls

    async def get_teacher(self, data: bytes, context: Context) -> bytes:
        self._calls.add(context)
        try:
            with rpc_span(f"{SERVICE}/GetTeacher", context.invocation_metadata()):
                request = _parse(pb.GetTeacherRequest, data)
                return codec.teacher_to_proto(self._core.teacher(request.teacher)).SerializeToString()
        except TutelageError as error:
            await _abort(context, error)

    async def score(self, data: bytes, context: Context) -> bytes:
        self._calls.add(context)
        try:
            with rpc_span(f"{SERVICE}/Score", context.invocation_metadata()):
                message = _parse(pb.ScoreRequest, data)
                return await self._answer(message, context.time_remaining(), "grpc")
        except TutelageError as error:
            await _abort(context, error)

    async def score_stream(self, _messages: object, context: Context) -> None:
        """Answer as answers finish; when the service is full, read no further instead of refusing."""
        self._calls.add(context)
        try:
            with rpc_span(f"{SERVICE}/ScoreStream", context.invocation_metadata()):
                await self._answer_all(_Stream(context))
        except TutelageError as error:
            await _abort(context, error)

    async def _answer_all(self, stream: _Stream) -> None:
        draining = asyncio.create_task(self._core.draining.wait())
        try:
            async with asyncio.TaskGroup() as answering:
                while (data := await stream.next_unless(draining)) is not None:
                    answering.create_task(self._answer_on_stream(data, stream))
        finally:
            draining.cancel()
        if self._core.draining.is_set():
            raise TutelageError("UNAVAILABLE", "teacher: the service is draining")

    async def _answer(self, message: pb.ScoreRequest, remaining: float | None, transport: Transport) -> bytes:
        check_counts(len(message.sequences), len(message.contexts), self._core.limits)
        malformed: dict[int, SequenceError] = {}
        request = codec.request_from_proto(message, malformed)
        score = await self._core.score(
            request, transport=transport, remaining_seconds=remaining, malformed=malformed
        )
        return codec.score_to_bytes(score, request.signal.encoding)

    async def _answer_on_stream(self, data: bytes, stream: _Stream) -> None:
        request_id = ""
        try:
            with tracing.span("score") as span:
                message = _parse(pb.ScoreRequest, data)
                request_id = message.request_id
                span.set({"tutelage.request": request_id})
                answer = await self._answer(message, stream.time_remaining(), "stream")
        except TutelageError as error:
            refusal = pb.SequenceError(code=error.code, message=error.message)
            answer = pb.ScoreResponse(request_id=request_id, error=refusal).SerializeToString()
        await stream.write(answer)


class _Stream:
    """The messages of one ScoreStream call; at most a window of them is unanswered at a time."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._window = asyncio.Semaphore(_STREAM_WINDOW)
        self._writing = asyncio.Lock()  # gRPC takes one message of a stream at a time
        self.time_remaining = context.time_remaining

    async def next_unless(self, stop: asyncio.Task[Any]) -> bytes | None:
        """The next message; None when the caller has no more, or `stop` is done first."""
        await self._window.acquire()
        reading = asyncio.create_task(self._context.read())
        try:
            await asyncio.wait({reading, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not reading.done():
                reading.cancel()
        if not reading.done():
            return None
        message = reading.result()
        return None if message is grpc.aio.EOF else message

    async def write(self, message: bytes) -> None:
        async with self._writing:
            await self._context.write(message)
        self._window.release()


class _Authorize(grpc.aio.ServerInterceptor):
    """Refuses every call without an accepted token, except health checks."""

    def __init__(self, tokens: TokenCheck) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_HEALTH_PREFIX):
            return handler
        metadata = dict(handler_call_details.invocation_metadata)
        if self._tokens.allows(metadata.get("authorization")):
            return handler
        # Whatever the shape of the call: a handler of single messages would first read the whole message.
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(_messages: object, context: Context) -> NoReturn:
    await _abort(context, TutelageError("UNAUTHENTICATED", "authorization: got no accepted bearer token"))


def _handlers(servicer: _Servicer) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "GetTeacher": grpc.unary_unary_rpc_method_handler(servicer.get_teacher),
            "Score": grpc.unary_unary_rpc_method_handler(servicer.score),
            "ScoreStream": grpc.stream_stream_rpc_method_handler(servicer.score_stream),
        },
    )


def _parse(kind: type[M], data: bytes) -> M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise invalid(f"message: got {len(data)} bytes that are not a {kind.DESCRIPTOR.name}") from error


async def _abort(context: Context, error: TutelageError) -> NoReturn:
    metadata = () if error.retry_after is None else (("retry-after", f"{error.retry_after:.3f}"),)
    await context.abort(grpc.StatusCode[error.code], error.message[:_MAX_DETAILS], metadata)
    raise AssertionError("abort always raises")
