"""The asyncio client; one instance per event loop."""

# ruff: noqa: ASYNC109 - the timeout travels to the teacher as the deadline of the call

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.message import Message
from tutelage.v1 import teacher_pb2 as pb
from tutelage.v1.teacher_pb2_grpc import TeacherServiceStub

from tutelage_client import codec
from tutelage_client import types as t
from tutelage_client.balance import Balancer, Endpoint, as_addresses
from tutelage_client.connect import (
    DEFAULT_TIMEOUT_SECONDS,
    MAX_MESSAGE_BYTES,
    Tls,
    as_tutelage_error,
    call_metadata,
    channel_options,
    closed,
)
from tutelage_client.retry import Attempts, RetryPolicy
from tutelage_client.stream import OpenStream
from tutelage_client.trace import trace_metadata


class AsyncTeacherClient:
    """TeacherClient for asyncio, with the same arguments; cancelling a call cancels it on the teacher.

    Create and use it inside one running event loop.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        token: str | None = None,
        tls: Tls | None = None,
        *,
        retry: RetryPolicy | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._metadata = call_metadata(token)
        self._retry = retry or RetryPolicy()
        options = channel_options(max_message_bytes)
        self._channels: list[grpc.aio.Channel] = []
        endpoints = []
        for address in as_addresses(addresses):
            if tls is None:
                channel = grpc.aio.insecure_channel(address, options)
            else:
                channel = grpc.aio.secure_channel(address, tls.credentials(), options)
            self._channels.append(channel)
            endpoints.append(Endpoint(address, TeacherServiceStub(channel)))  # type: ignore[no-untyped-call]
        self._balancer = Balancer(endpoints)
        self._closed = asyncio.Event()

    async def __aenter__(self) -> AsyncTeacherClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """As TeacherClient.close."""
        self._closed.set()
        for channel in self._channels:
            await channel.close()

    async def get_teacher(self, teacher: str = "", timeout: float | None = 30.0) -> t.Teacher:
        """Who scores here, and within which limits."""
        answer = await self._call("GetTeacher", codec.teacher_request(teacher), 0, timeout)
        return codec.teacher_from_proto(answer)

    async def score(
        self,
        contexts: Iterable[t.TokenIds],
        responses: Iterable[t.TokenIds],
        *,
        context_texts: Iterable[str | None] | None = None,
        context_index: Iterable[int] | None = None,
        sampled: bool = True,
        top_k: int = 0,
        candidate_ids: Iterable[t.Int32Array] | None = None,
        anchors: Iterable[t.TokenIds] | None = None,
        continuations: int = 0,
        chunk_tokens: int = 0,
        entropy: bool = False,
        temperature: float = 1.0,
        encoding: t.EncodingName = "float32",
        teacher: str = "",
        pins: t.Pins | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
        traceparent: str | None = None,
    ) -> t.Score:
        """As TeacherClient.score."""
        request = codec.build_request(
            contexts,
            responses,
            context_texts=context_texts,
            context_index=context_index,
            candidate_ids=candidate_ids,
            anchors=anchors,
            signal=t.Signal(
                sampled,
                top_k,
                candidate_ids is not None,
                entropy,
                temperature,
                encoding,
                continuations=continuations,
                chunk_tokens=chunk_tokens,
            ),
            teacher=teacher,
            pins=pins,
        )
        return await self.score_request(request, timeout, traceparent)

    async def score_request(
        self,
        request: t.ScoreRequest,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
        traceparent: str | None = None,
    ) -> t.Score:
        """Score a request as it is."""
        message = codec.request_to_proto(request)
        tokens = codec.request_tokens(request)
        return codec.score_from_proto(await self._call("Score", message, tokens, timeout, traceparent))

    async def score_stream(
        self,
        requests: AsyncIterable[t.ScoreRequest] | Iterable[t.ScoreRequest],
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
        traceparent: str | None = None,
    ) -> AsyncIterator[t.StreamAnswer]:
        """As TeacherClient.score_stream."""
        stream = OpenStream(self._balancer)
        error = None
        try:
            method = stream.endpoint.connection.ScoreStream
            with self._closing_is_an_error():
                metadata = (*self._metadata, *trace_metadata(traceparent))
                call = method(_messages(requests, stream), timeout=timeout, metadata=metadata)
                try:
                    async for message in call:
                        yield stream.answered(message)
                finally:
                    call.cancel()
            stream.raise_for_requests()
        except grpc.RpcError as raised:
            stream.raise_for_requests()
            error = as_tutelage_error(raised)
            raise error from raised
        finally:
            stream.close(error)

    async def _call(
        self,
        method: str,
        message: Message,
        tokens: int,
        timeout: float | None,
        traceparent: str | None = None,
    ) -> Any:
        """One unary call, tried until it is answered, refused for good or out of time."""
        metadata = (*self._metadata, *trace_metadata(traceparent))
        attempts = Attempts(self._retry, timeout)
        while True:
            endpoint = self._balancer.take(tokens)
            try:
                call = getattr(endpoint.connection, method)
                with self._closing_is_an_error():
                    answer = await call(message, timeout=attempts.remaining(), metadata=metadata)
            except grpc.RpcError as raised:
                error = as_tutelage_error(raised)
                self._balancer.observe(endpoint, error)
            else:
                self._balancer.observe(endpoint)
                return answer
            finally:
                self._balancer.give_back(endpoint, tokens)
            await self._pause(attempts.pause_after(error, self._balancer.rest_seconds()))

    async def _pause(self, seconds: float) -> None:
        """Wait; not longer than until the client is closed."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), seconds)

    @contextlib.contextmanager
    def _closing_is_an_error(self) -> Iterator[None]:
        """A closed channel cancels its calls, which would look as if the caller's task had been cancelled."""
        if self._closed.is_set():
            raise closed()
        try:
            yield
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if not self._closed.is_set() or (task is not None and task.cancelling()):
                raise
            raise closed() from error


async def _messages(
    requests: AsyncIterable[t.ScoreRequest] | Iterable[t.ScoreRequest], stream: OpenStream[TeacherServiceStub]
) -> AsyncIterator[pb.ScoreRequest]:
    try:
        if isinstance(requests, AsyncIterable):
            async for request in requests:
                yield stream.sending(request)
        else:
            for request in requests:
                yield stream.sending(request)
    except Exception as error:  # noqa: BLE001 - gRPC would answer a bare cancellation; raised by the reader
        stream.requests_failed(error)
