"""The synchronous client; safe to share between threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
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
    Metadata,
    Tls,
    as_tutelage_error,
    call_metadata,
    channel_options,
    closed,
)
from tutelage_client.errors import TutelageError
from tutelage_client.retry import Attempts, RetryPolicy
from tutelage_client.stream import OpenStream
from tutelage_client.trace import trace_metadata


class TeacherClient:
    """Asks one teacher, behind one or several addresses, for scores.

    Args:
        addresses: "host:port", or several of replicas that serve the same teacher. The replicas of a name
            are asked in turn; of several addresses the one with the fewest tokens outstanding.
        token: bearer token, when the service asks for one.
        tls: encrypts the connection; None for plain text.
        retry: see RetryPolicy.
        max_message_bytes: largest request and answer on this side.

    Every method raises TutelageError, and only that, for a refusal or a failure.
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
        self._channels: list[grpc.Channel] = []
        endpoints = []
        for address in as_addresses(addresses):
            if tls is None:
                channel = grpc.insecure_channel(address, options)
            else:
                channel = grpc.secure_channel(address, tls.credentials(), options)
            self._channels.append(channel)
            endpoints.append(Endpoint(address, TeacherServiceStub(channel)))  # type: ignore[no-untyped-call]
        self._balancer = Balancer(endpoints)
        self._closed = threading.Event()

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every call, those that wait for another try included, with CANCELLED."""
        self._closed.set()
        for channel in self._channels:
            channel.close()

    def get_teacher(self, teacher: str = "", timeout: float | None = 30.0) -> t.Teacher:
        """Who scores here, and within which limits."""
        answer = self._call("GetTeacher", codec.teacher_request(teacher), 0, timeout)
        return codec.teacher_from_proto(answer)

    def score(
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
        """Score every token of every response under its context.

        Args:
            contexts: token ids; one for all responses, one per response, or see `context_index`.
            responses: token ids, each of at least one token.
            context_texts: for each context the question without a template, or None; a judge and a writer
                are shown it in place of the ids' text.
            context_index: for each response, which context it belongs to.
            sampled: log-probability of each response token.
            top_k: the K most probable tokens at each position and their log-probabilities.
            candidate_ids: for each response an array [R, C] of ids to score, PAD_ID for none.
            anchors: for each response [F] where its audited chunks begin; with `continuations`.
            continuations: of a writer, sampled at every anchor; with sampled=False, as it answers no more.
            chunk_tokens: of the response, in an audited chunk; with `continuations`.
            entropy: of the teacher's distribution at each position, in nats.
            temperature: of the teacher's distribution, for everything above.
            encoding: "float16" halves the log-probabilities on the wire.
            pins: what the teacher must be; otherwise FAILED_PRECONDITION.
            timeout: seconds for everything, retries included.
            traceparent: W3C, of the caller's span; by default the current one of OpenTelemetry, if the
                caller uses it.

        A sequence that cannot be scored carries its error; `Score.raise_for_errors` raises it.
        """
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
        return self.score_request(request, timeout, traceparent)

    def score_request(
        self,
        request: t.ScoreRequest,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
        traceparent: str | None = None,
    ) -> t.Score:
        """Score a request as it is."""
        message = codec.request_to_proto(request)
        tokens = codec.request_tokens(request)
        return codec.score_from_proto(self._call("Score", message, tokens, timeout, traceparent))

    def score_stream(
        self,
        requests: Iterable[t.ScoreRequest],
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
        traceparent: str | None = None,
    ) -> Iterator[t.StreamAnswer]:
        """Answers as they finish, in any order, matched by `request_id`.

        The whole stream goes to one address and is not retried: when it breaks, TutelageError is
        raised and the requests that were not answered may be sent again.
        """
        stream = OpenStream(self._balancer)
        error = None
        try:
            method = stream.endpoint.connection.ScoreStream
            metadata = (*self._metadata, *trace_metadata(traceparent))
            call = self._begin(method, _messages(requests, stream), timeout, metadata)
            try:
                for message in call:
                    yield stream.answered(message)
            finally:
                call.cancel()
            stream.raise_for_requests()
        except grpc.RpcError as raised:
            stream.raise_for_requests()
            error = self._error(raised)
            raise error from raised
        finally:
            stream.close(error)

    def _call(
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
                answer = self._begin(call, message, attempts.remaining(), metadata)
            except grpc.RpcError as raised:
                error = self._error(raised)
                self._balancer.observe(endpoint, error)
            else:
                self._balancer.observe(endpoint)
                return answer
            finally:
                self._balancer.give_back(endpoint, tokens)
            self._closed.wait(attempts.pause_after(error, self._balancer.rest_seconds()))

    def _begin(self, method: Any, message: object, timeout: float | None, metadata: Metadata) -> Any:
        if self._closed.is_set():
            raise closed()
        try:
            return method(message, timeout=timeout, metadata=metadata)
        except ValueError as error:  # what gRPC raises when the channel was closed just now
            if not self._closed.is_set():
                raise
            raise closed() from error

    def _error(self, raised: grpc.RpcError) -> TutelageError:
        return closed() if self._closed.is_set() else as_tutelage_error(raised)


def _messages(
    requests: Iterable[t.ScoreRequest], stream: OpenStream[TeacherServiceStub]
) -> Iterator[pb.ScoreRequest]:
    try:
        for request in requests:
            yield stream.sending(request)
    except Exception as error:  # noqa: BLE001 - gRPC would make UNKNOWN of it; raised by the reader
        stream.requests_failed(error)
