"""Every bad input gets the documented answer through both doors, and changes nothing."""

from __future__ import annotations

import base64
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc
import pytest
import pytest_asyncio
from google.protobuf import json_format
from starlette.types import Message
from support.teachers import LIMITS, VOCAB, Doors, RecordingScorer, http_client, serve
from tutelage.v1 import teacher_pb2 as pb
from tutelage_client import codec

from services.access import TokenCheck
from services.api.http_app import build_app
from services.api.http_errors import STATUS
from services.api.settings import ServiceSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROTOBUF = {"content-type": "application/x-protobuf"}
JSON = {"content-type": "application/json"}
SCORE = "/tutelage.v1.TeacherService/Score"


@dataclass
class Answer:
    """What came back, whichever door it came through."""

    code: str
    message: str
    response: pb.ScoreResponse | None = None


@dataclass
class Service:
    scorer: RecordingScorer
    doors: Doors

    async def grpc_bytes(self, data: bytes) -> Answer:
        async with grpc.aio.insecure_channel(self.doors.grpc) as channel:
            try:
                body = await channel.unary_unary(SCORE)(data, timeout=10)
            except grpc.aio.AioRpcError as error:
                return Answer(error.code().name, error.details() or "")
        return Answer("OK", "", pb.ScoreResponse.FromString(body))

    async def http_bytes(self, data: bytes, headers: dict[str, str]) -> Answer:
        async with http_client(self.doors.http) as client:
            reply = await client.post("/v1/score", content=data, headers=headers)
        if reply.status_code != 200:
            error = reply.json()["error"]
            assert set(error) == {"message", "type", "code", "param"}
            assert STATUS[error["code"]] == reply.status_code
            return Answer(error["code"], error["message"])
        if headers is PROTOBUF:
            return Answer("OK", "", pb.ScoreResponse.FromString(reply.content))
        return Answer("OK", "", json_format.ParseDict(reply.json(), pb.ScoreResponse()))

    async def through(self, door: str, request: pb.ScoreRequest) -> Answer:
        if door == "grpc":
            return await self.grpc_bytes(request.SerializeToString())
        if door == "http-protobuf":
            return await self.http_bytes(request.SerializeToString(), PROTOBUF)
        return await self.http_bytes(json_format.MessageToJson(request).encode(), JSON)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Service]:
    scorer = RecordingScorer()
    async with serve(scorer) as doors:
        yield Service(scorer, doors)


@pytest.fixture
def service(shared: Service) -> Service:
    """The module's one service, with nothing recorded yet."""
    shared.scorer.reached.clear()
    return shared


def good() -> pb.ScoreRequest:
    return pb.ScoreRequest(
        contexts=[pb.Context(ids=codec.pack_ids([1, 2, 3]))],
        sequences=[
            pb.Sequence(id="a", response_ids=codec.pack_ids([4, 5])),
            pb.Sequence(id="b", response_ids=codec.pack_ids([6])),
        ],
        signal=pb.Signal(sampled=True, top_k=4),
    )


def edited(edit: Callable[[pb.ScoreRequest], None]) -> pb.ScoreRequest:
    request = good()
    edit(request)
    return request


def response(*values: int) -> Callable[[pb.ScoreRequest], None]:
    def edit(request: pb.ScoreRequest) -> None:
        request.sequences[0].response_ids = struct.pack(f"<{len(values)}i", *values)

    return edit


def context(*values: int) -> Callable[[pb.ScoreRequest], None]:
    def edit(request: pb.ScoreRequest) -> None:
        request.contexts.append(pb.Context(ids=struct.pack(f"<{len(values)}i", *values)))
        request.sequences[0].context = 1

    return edit


def candidates(data: bytes, columns: int) -> Callable[[pb.ScoreRequest], None]:
    def edit(request: pb.ScoreRequest) -> None:
        request.signal.candidates = True
        request.sequences[0].candidate_ids = data
        request.sequences[0].num_candidates = columns
        request.sequences[1].candidate_ids = codec.pack_ids([1, -1])
        request.sequences[1].num_candidates = 2

    return edit


# name: (edit of the good request, what the first sequence's error says); its neighbour is scored.
SEQUENCE_CASES = {
    "empty response": (response(), "sequences[0].response_ids: got shape [0]"),
    "response id too large": (response(4, VOCAB), f"got ids from 4 to {VOCAB}, allowed are 0 to {VOCAB - 1}"),
    "response id negative": (response(-1, 4), "sequences[0].response_ids: got ids from -1 to 4"),
    "too long": (response(*[1] * 62), "got 65 tokens of context and response, allowed are 64"),
    "empty context": (context(), "contexts[1].ids: got no token"),
    "context id too large": (context(VOCAB), "contexts[1].ids: got ids from 100 to 100"),
    "no such context": (
        lambda r: setattr(r.sequences[0], "context", 7),
        "sequences[0].context: got 7, allowed are 0 to 0",
    ),
    "negative context": (lambda r: setattr(r.sequences[0], "context", -1), "sequences[0].context: got -1"),
    "response of broken bytes": (
        lambda r: setattr(r.sequences[0], "response_ids", b"\x01\x00\x00"),
        "sequences[0].response_ids: got 3 bytes, must be a multiple of 4",
    ),
    "candidates missing": (candidates(b"", 0), "sequences[0].candidate_ids: got none"),
    "candidates of wrong rows": (
        candidates(codec.pack_ids([1, 2, 3]), 1),
        "got shape [3, 1], must be [2, C]",
    ),
    "candidates of broken width": (
        candidates(codec.pack_ids([1, 2, 3]), 2),
        "got 12 bytes, must be a multiple",
    ),
    "candidates without width": (candidates(codec.pack_ids([1, 2]), 0), "num_candidates: got 0"),
    "too many candidates": (candidates(codec.pack_ids([1] * 34), 17), "got shape [2, 17], must be [2, C]"),
    "candidate id out of range": (candidates(codec.pack_ids([1, -2]), 1), "got ids from -2 to 1"),
}


def many_sequences(request: pb.ScoreRequest) -> None:
    for index in range(LIMITS.max_sequences):
        request.sequences.append(pb.Sequence(id=str(index), response_ids=codec.pack_ids([1])))


def many_contexts(request: pb.ScoreRequest) -> None:
    request.contexts.extend([pb.Context(ids=b"123")] * LIMITS.max_sequences)


def many_tokens(request: pb.ScoreRequest) -> None:
    del request.sequences[:]
    for index in range(5):
        request.sequences.append(pb.Sequence(id=str(index), response_ids=codec.pack_ids([1] * 60)))


# name: (edit, code, what the message says); nothing of the request is scored.
REQUEST_CASES = {
    "top_k too large": (
        lambda r: setattr(r.signal, "top_k", 17),
        "INVALID_ARGUMENT",
        "signal.top_k: got 17, allowed are 0 to 16",
    ),
    "top_k negative": (lambda r: setattr(r.signal, "top_k", -1), "INVALID_ARGUMENT", "signal.top_k: got -1"),
    "nothing asked": (lambda r: r.ClearField("signal"), "INVALID_ARGUMENT", "signal: got nothing to answer"),
    "temperature negative": (
        lambda r: setattr(r.signal, "temperature", -1.0),
        "INVALID_ARGUMENT",
        "signal.temperature: got -1.0",
    ),
    "temperature not a number": (
        lambda r: setattr(r.signal, "temperature", float("nan")),
        "INVALID_ARGUMENT",
        "signal.temperature: got nan",
    ),
    "unknown encoding": (
        lambda r: setattr(r.signal, "encoding", 9),
        "INVALID_ARGUMENT",
        "signal.encoding: got 9",
    ),
    "no sequence": (lambda r: r.ClearField("sequences"), "INVALID_ARGUMENT", "sequences: got 0"),
    "too many sequences": (many_sequences, "INVALID_ARGUMENT", "sequences: got 10, allowed are 1 to 8"),
    "too many contexts": (many_contexts, "INVALID_ARGUMENT", "contexts: got 9, allowed are as many as"),
    "a name too long for metadata": (
        lambda r: setattr(r, "teacher", "é" * 5_000),
        "NOT_FOUND",
        "… (5002 characters), here is 'fake'",
    ),
    "too many tokens": (many_tokens, "INVALID_ARGUMENT", "request tokens: got 303, allowed are 256"),
    "the same id twice": (
        lambda r: setattr(r.sequences[1], "id", "a"),
        "INVALID_ARGUMENT",
        "sequences.id: got the same id twice",
    ),
    "context of broken bytes": (
        lambda r: setattr(r.contexts[0], "ids", b"123"),
        "INVALID_ARGUMENT",
        "contexts[0].ids: got 3 bytes",
    ),
    "unknown teacher": (
        lambda r: setattr(r, "teacher", "nobody"),
        "NOT_FOUND",
        "got 'nobody', here is 'fake'",
    ),
    "wrong tokenizer": (
        lambda r: setattr(r.pins, "tokenizer_fingerprint", "beef"),
        "FAILED_PRECONDITION",
        "; token ids would mean other text to it",
    ),
    "wrong revision": (
        lambda r: setattr(r.pins, "revision", "main"),
        "FAILED_PRECONDITION",
        "pins.revision: got 'main', this teacher has '0'",
    ),
    "wrong weights": (
        lambda r: setattr(r.pins, "weights_version", 3),
        "FAILED_PRECONDITION",
        "pins.weights_version: got 3, this teacher has 0",
    ),
}

DOORS = ["grpc", "http-protobuf", "http-json"]


@pytest.mark.parametrize("name", SEQUENCE_CASES)
async def test_bad_sequence_fails_alone_and_its_neighbour_is_scored(service: Service, name: str) -> None:
    edit, text = SEQUENCE_CASES[name]
    for door in DOORS:
        answer = await service.through(door, edited(edit))
        assert answer.code == "OK", answer.message
        assert answer.response is not None
        first, second = answer.response.sequences
        assert (first.id, first.error.code) == ("a", "INVALID_ARGUMENT")
        assert text in first.error.message
        assert not first.sampled
        assert not first.valid
        assert not second.HasField("error")
        assert second.num_positions == 1
        assert len(second.sampled) == 4
    assert all([s.id for s in request.sequences] == ["b"] for request in service.scorer.reached)


@pytest.mark.parametrize("name", REQUEST_CASES)
async def test_bad_request_is_refused_before_the_engine(service: Service, name: str) -> None:
    edit, code, text = REQUEST_CASES[name]
    for door in DOORS:
        answer = await service.through(door, edited(edit))
        assert answer.code == code, (door, answer)
        assert text in answer.message
    assert not service.scorer.reached


async def test_good_request_is_answered_alike_through_every_door(service: Service) -> None:
    answers = [await service.through(door, good()) for door in DOORS]
    responses = [answer.response for answer in answers]
    assert all(response is not None and len(response.sequences) == 2 for response in responses)
    for response in responses:
        assert response is not None
        response.ClearField("usage")
    assert responses[0] == responses[1] == responses[2]


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\xff", good().SerializeToString()[:-3]])
async def test_malformed_protobuf_is_an_invalid_argument(service: Service, data: bytes) -> None:
    for answer in (await service.grpc_bytes(data), await service.http_bytes(data, PROTOBUF)):
        assert answer.code == "INVALID_ARGUMENT"
        assert "not a ScoreRequest" in answer.message
    assert not service.scorer.reached


MALFORMED_JSON = {
    "not json": b"{",
    "empty": b"",
    "not utf-8": b'{"teacher": "\xff"}',
    "a list": b"[]",
    "null": b"null",
    "very deep": b"[" * 10_000,
    "unknown field": b'{"contekts": []}',
    "ids of floats": b'{"contexts": [{"ids": [1.5]}]}',
    "ids of booleans": b'{"contexts": [{"ids": [true, 2]}]}',
    "ids of text": b'{"contexts": [{"ids": ["1"]}]}',
    "huge id": b'{"contexts": [{"ids": [99999999999999999999999]}]}',
    "ragged candidates": b'{"sequences": [{"id": "a", "candidate_ids": [[1], [2, 3]]}]}',
    "flat candidates": b'{"sequences": [{"id": "a", "candidate_ids": [1, 2]}]}',
    "number as text": b'{"signal": {"top_k": "many"}}',
    "not base64": b'{"contexts": [{"ids": "\\u2603"}]}',
    "contexts as object": b'{"contexts": {"ids": [1]}}',
    "lone surrogate as a name": b'{"\\ud800": 1}',
    "lone surrogate as a nested name": b'{"sequences": [{"id": "a"}], "signal": {"\\ud800": 1}}',
    "lone surrogate as a list": b'{"sequences": "\\ud800"}',
    "lone surrogate as an enum": b'{"sequences": [{"id": "a"}], "signal": {"encoding": "\\ud800"}}',
    "endless number as an enum": b'{"sequences": [{"id": "a"}], "signal": {"encoding": 1e999}}',
    "lone surrogate as a number": b'{"sequences": [{"id": "a"}], "signal": {"temperature": "\\ud800"}}',
    "lone surrogate": b'{"teacher": "\\ud800"}',
}


@pytest.mark.parametrize("name", MALFORMED_JSON)
async def test_malformed_json_is_an_invalid_argument(service: Service, name: str) -> None:
    answer = await service.http_bytes(MALFORMED_JSON[name], JSON)
    assert answer.code == "INVALID_ARGUMENT"
    assert not service.scorer.reached


async def test_other_media_types_are_refused(service: Service) -> None:
    answer = await service.http_bytes(b"teacher=fake", {"content-type": "application/x-www-form-urlencoded"})
    assert answer.code == "INVALID_ARGUMENT"
    assert "allowed are application/json and application/x-protobuf" in answer.message


async def test_json_takes_lists_of_ids_and_gives_lists_back(service: Service) -> None:
    body = {
        "contexts": [{"ids": [1, 2, 3]}],
        "sequences": [{"id": "a", "response_ids": [4, 5], "candidate_ids": [[1, -1], [2, 3]]}],
        "signal": {"top_k": 2, "candidates": True, "entropy": True},
    }
    async with http_client(service.doors.http) as client:
        lists = (await client.post("/v1/score", params={"arrays": "list"}, json=body)).json()
        packed = (await client.post("/v1/score", json=body)).json()
    sequence = lists["sequences"][0]
    assert sequence["candidate_logprobs"][0][1] is None
    assert sequence["candidate_logprobs"][0][0] < 0
    top = struct.unpack("<4i", base64.b64decode(packed["sequences"][0]["top_ids"]))
    assert [i for row in sequence["top_ids"] for i in row] == list(top)
    assert "sampled" not in sequence


async def test_unknown_routes_and_methods_have_the_error_shape(service: Service) -> None:
    async with http_client(service.doors.http) as client:
        for reply, status in (
            (await client.get("/v1/nothing"), 404),
            (await client.get("/v1/score"), 405),
            (await client.get("/v1/teacher", params={"teacher": "nobody"}), 404),
            (await client.post("/v1/score", params={"arrays": "xml"}, json={}), 400),
        ):
            assert reply.status_code == status
            assert set(reply.json()["error"]) == {"message", "type", "code", "param"}


async def test_a_caller_that_hangs_up_while_sending_is_cancelled_and_no_failure(service: Service) -> None:
    app = build_app(service.doors.core, ServiceSettings(), TokenCheck(()))
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": [], "query_string": b""}
    await app(scope, receive, send)
    assert sent[0]["status"] == 499
