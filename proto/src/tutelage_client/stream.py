"""One ScoreStream call as the client sees it: its share of an address's load, and why its requests ended."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

from tutelage.v1 import teacher_pb2 as pb

from tutelage_client import codec
from tutelage_client import types as t
from tutelage_client.balance import Balancer
from tutelage_client.errors import TutelageError

T = TypeVar("T")


class OpenStream(Generic[T]):
    """A stream counts as one token, and with the tokens of every request that waits for its answer.

    Requests may be sent from another thread than answers are read.
    """

    def __init__(self, balancer: Balancer[T]) -> None:
        self._balancer = balancer
        self._lock = threading.Lock()
        self._waiting: dict[str, list[int]] = {}
        self._closed = False
        self._failure: TutelageError | None = None
        self.endpoint = balancer.take(0)

    def sending(self, request: t.ScoreRequest) -> pb.ScoreRequest:
        """The message of a request, which is outstanding from now on."""
        message = codec.request_to_proto(request)
        tokens = codec.request_tokens(request)
        with self._lock:
            if not self._closed:
                self._waiting.setdefault(request.request_id, []).append(tokens)
                self._balancer.add_load(self.endpoint, tokens)
        return message

    def answered(self, message: pb.ScoreResponse) -> t.StreamAnswer:
        """The answer in a message, which is outstanding no more."""
        with self._lock:
            waiting = self._waiting.get(message.request_id)
            if waiting:
                self._balancer.add_load(self.endpoint, -waiting.pop())
        self._balancer.observe(self.endpoint)
        return codec.stream_answer_from_proto(message)

    def requests_failed(self, cause: Exception) -> None:
        """The caller's requests ended with `cause`; nothing more is sent, what was sent is still answered."""
        if isinstance(cause, TutelageError):
            self._failure = cause
            return
        self._failure = TutelageError("INVALID_ARGUMENT", f"requests: raised {type(cause).__name__}: {cause}")
        self._failure.__cause__ = cause

    def raise_for_requests(self) -> None:
        """Raise TutelageError, with its cause, when the caller's requests ended with an exception."""
        if self._failure is not None:
            raise self._failure

    def close(self, error: TutelageError | None) -> None:
        """The stream is over, with `error` when it broke."""
        with self._lock:
            self._closed = True
            rest = sum(map(sum, self._waiting.values()))
            self._waiting.clear()
            self._balancer.add_load(self.endpoint, -rest)
        self._balancer.give_back(self.endpoint, 0)
        if error is not None:
            self._balancer.observe(self.endpoint, error)
