"""Whatever bytes arrive, the answer is a score or a client error: no 5xx, no uncaught exception.

Run in process over the real application and servicer, so that thousands of cases take seconds.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.teachers import LIMITS, VOCAB, RecordingScorer
from tutelage.v1 import rollout_pb2
from tutelage.v1 import teacher_pb2 as pb
from tutelage_client import TutelageError, codec

from services.access import TokenCheck
from services.api.core import ScoringCore, Transport
from services.api.http_app import build_app
from services.api.settings import ServiceSettings
from services.teacher.jobs import job_request

CASES = 250
CLIENT_ERRORS = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}

short = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
thorough = settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))


def check_refusal(error: TutelageError) -> None:
    assert error.code in CLIENT_ERRORS, error


LENGTHS = [pytest.param(short, id="short"), pytest.param(thorough, id="long", marks=pytest.mark.long)]


class Service:
    """The application over a fake engine, called without a socket, on one loop for all cases."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.scored = 0
        service = ServiceSettings(max_message_bytes=LIMITS.max_message_bytes)
        self.core = ScoringCore(RecordingScorer(), max_queued_tokens=10_000, max_message_bytes=1 << 16)
        self.core.open()
        app = build_app(self.core, service, TokenCheck(()))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://teacher", verify=False)

    def post(self, content: bytes, headers: dict[str, str], **params: str) -> httpx.Response:
        call = self.http.post("/v1/score", content=content, headers=headers, params=params)
        return self.loop.run_until_complete(call)

    def check_http(self, content: bytes, headers: dict[str, str], **params: str) -> None:
        reply = self.post(content, headers, **params)
        assert reply.status_code < 500, (reply.status_code, reply.text)
        if reply.status_code != 200:
            assert set(reply.json()["error"]) == {"message", "type", "code", "param"}
        elif "json" in reply.headers["content-type"]:
            json.loads(reply.text, parse_constant=pytest.fail)

    def check_message(self, message: pb.ScoreRequest, transport: Transport) -> None:
        """The way of a request after its bytes are parsed."""
        malformed: dict[int, Any] = {}
        try:
            request = codec.request_from_proto(message, malformed)
            scoring = self.core.score(request, transport=transport, malformed=malformed)
            score = self.loop.run_until_complete(scoring)
        except TutelageError as error:
            check_refusal(error)
            return
        self.scored += 1
        answer = codec.score_from_proto(pb.ScoreResponse.FromString(codec.score_to_bytes(score)))
        assert [sequence.id for sequence in answer.sequences] == [s.id for s in message.sequences]
        for sequence, asked in zip(answer.sequences, request.sequences, strict=True):
            assert sequence.error is not None or sequence.num_positions == len(asked.response_ids)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    running = Service()
    yield running
    running.loop.run_until_complete(running.http.aclose())
    running.loop.close()


int32s = st.integers(-(2**31), 2**31 - 1)
good_ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6).map(codec.pack_ids)
likely_ids = st.lists(st.integers(-2, VOCAB + 1), max_size=6).map(codec.pack_ids)
id_bytes = good_ids | likely_ids | st.binary(max_size=20)
contexts = st.builds(pb.Context, ids=good_ids | id_bytes, text=st.none() | st.text(max_size=3))
sequences = st.builds(
    pb.Sequence,
    id=st.uuids().map(str) | st.text(max_size=3),
    context=st.just(0) | st.integers(-1, 3) | int32s,
    response_ids=good_ids | id_bytes,
    candidate_ids=good_ids | id_bytes,
    num_candidates=st.just(1) | st.integers(-1, 4) | int32s,
    anchors=st.none() | id_bytes,
)
signals = st.builds(
    pb.Signal,
    sampled=st.booleans(),
    top_k=st.integers(0, 16) | st.integers(-1, 20) | int32s,
    candidates=st.sampled_from([False, False, True]),
    entropy=st.booleans(),
    temperature=st.just(1.0) | st.floats(0.5, 2) | st.floats(),
    encoding=st.integers(0, 2) | st.integers(0, 2) | st.integers(0, 3),
    judgement=st.sampled_from([False] * 15 + [True]),
    hidden_layers=st.sampled_from([()] * 15 + [(0,), (2, 1)]),
    continuations=st.sampled_from([0] * 15 + [1, -1]),
    chunk_tokens=st.sampled_from([0] * 15 + [1, -1]),
)
pins = st.builds(
    pb.Pins,
    tokenizer_fingerprint=st.none() | st.text(max_size=3),
    revision=st.none() | st.just("0"),
    weights_version=st.none() | st.integers(-1, 1),
    min_weights_version=st.none() | st.integers(-1, 1),
)
anything_asked = st.builds(
    pb.ScoreRequest,
    request_id=st.text(max_size=3),
    teacher=st.sampled_from(["", "", "fake", "other"]),
    pins=st.none() | st.none() | pins,
    contexts=st.lists(contexts, min_size=1, max_size=3) | st.lists(contexts, max_size=1),
    sequences=st.lists(sequences, min_size=1, max_size=4) | st.lists(sequences, max_size=1),
    signal=signals,
)
well_asked = st.builds(
    pb.ScoreRequest,
    contexts=st.lists(st.builds(pb.Context, ids=good_ids), min_size=1, max_size=1),
    sequences=st.lists(
        st.builds(pb.Sequence, id=st.uuids().map(str), response_ids=good_ids), min_size=1, max_size=4
    ),
    signal=st.builds(pb.Signal, sampled=st.just(True), top_k=st.integers(0, 4), entropy=st.booleans()),
)
messages = anything_asked | well_asked


@st.composite
def mutated_bytes(draw: st.DrawFn) -> bytes:
    """The bytes of a message with some of them changed, removed or put in."""
    data = bytearray(draw(messages).SerializeToString())
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


words = st.sampled_from(
    [
        "contexts",
        "sequences",
        "signal",
        "pins",
        "ids",
        "response_ids",
        "candidate_ids",
        "num_candidates",
        "anchors",
        "id",
    ]
) | st.text(max_size=3)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
id_lists = st.lists(st.integers(-2, VOCAB + 1) | leaves, max_size=4)
likely_documents = st.fixed_dictionaries(
    {},
    optional={
        "contexts": st.lists(st.dictionaries(words | st.just("ids"), id_lists | leaves), max_size=2)
        | anything,
        "sequences": st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "id": leaves,
                    "context": leaves,
                    "response_ids": id_lists | leaves,
                    "responseIds": id_lists,
                    "candidate_ids": st.lists(id_lists, max_size=3) | anything,
                    "num_candidates": leaves,
                    "anchors": id_lists | leaves,
                },
            ),
            max_size=2,
        )
        | anything,
        "signal": st.dictionaries(
            st.sampled_from(["sampled", "top_k", "candidates", "entropy", "temperature", "encoding"]), leaves
        )
        | anything,
        "teacher": leaves,
        "pins": anything,
    },
)
JSON, PROTOBUF = {"content-type": "application/json"}, {"content-type": "application/x-protobuf"}


def as_json(document: object) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


def in_both_lengths(
    strategy: st.SearchStrategy[Any],
) -> Callable[[Callable[[Service, Any], None]], Callable[..., None]]:
    """A property as one test of some hundred cases, and as a long one of ten thousand."""

    def decorate(check: Callable[[Service, Any], None]) -> Callable[..., None]:
        def wrapper(service: Service, length: settings) -> None:
            length(given(strategy)(lambda case: check(service, case)))()

        wrapper.__name__, wrapper.__doc__ = check.__name__, check.__doc__
        return pytest.mark.parametrize("length", LENGTHS)(wrapper)

    return decorate


@pytest.mark.parametrize("length", LENGTHS)
def test_any_message_is_scored_or_refused(service: Service, length: settings) -> None:
    scored = service.scored
    length(given(messages)(lambda message: service.check_message(message, "grpc")))()
    assert service.scored - scored > CASES // 10, "a test that never gets past the door tests only the door"


@in_both_lengths(mutated_bytes() | st.binary(max_size=64))
def test_any_protobuf_body_is_scored_or_refused(service: Service, data: bytes) -> None:
    service.check_http(data, PROTOBUF)


@in_both_lengths(likely_documents | anything)
def test_any_json_body_is_scored_or_refused(service: Service, document: object) -> None:
    service.check_http(as_json(document), JSON, arrays="list")
    service.check_http(as_json(document), JSON)


@in_both_lengths(st.binary(max_size=200))
def test_any_bytes_called_json_are_scored_or_refused(service: Service, data: bytes) -> None:
    service.check_http(data, JSON)


@in_both_lengths(st.tuples(st.text(max_size=10), st.text(max_size=10), st.text(max_size=10)))
def test_any_parameter_and_header_is_answered(service: Service, texts: tuple[str, str, str]) -> None:
    arrays, timeout, media_type = (text.encode("ascii", "ignore").decode() for text in texts)
    clean = "".join(filter(str.isprintable, timeout))
    headers = {"content-type": "".join(filter(str.isprintable, media_type)), "request-timeout": clean}
    service.check_http(b"{}", headers, arrays=arrays)


groups = st.builds(
    rollout_pb2.Group,
    id=st.text(max_size=3),
    rollouts=st.lists(
        st.builds(
            rollout_pb2.Rollout,
            response_ids=id_bytes,
            candidate_ids=id_bytes,
            num_candidates=st.integers(-1, 4) | int32s,
        ),
        max_size=3,
    ),
)
views = st.builds(
    rollout_pb2.ViewRequest,
    view=st.text(max_size=3),
    teacher=st.sampled_from(["", "fake"]),
    contexts=st.lists(contexts, max_size=3),
    signal=signals,
)


@in_both_lengths(st.tuples(groups, views))
def test_any_queued_job_is_scored_or_refused(service: Service, job: Any) -> None:
    try:
        message = job_request(*job)
    except TutelageError as error:
        check_refusal(error)
        return
    service.check_message(message, "queue")
