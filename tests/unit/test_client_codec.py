"""Requests and answers survive the wire exactly, and broken ones are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tutelage.v1 import teacher_pb2 as pb
from tutelage_client import (
    Identity,
    Pins,
    Score,
    ScoreRequest,
    Sequence,
    SequenceError,
    SequenceScore,
    Signal,
    TutelageError,
    Usage,
    codec,
)

IDENTITY = Identity("name", "model", "rev", 3, "ab", 100, "fake", "1", "float32", "float32")
int32s = st.integers(-(2**31), 2**31 - 1)


@st.composite
def requests(draw: st.DrawFn) -> ScoreRequest:
    def ids(rows: int | None = None) -> np.ndarray:
        size = rows if rows is not None else draw(st.integers(0, 5))
        return draw(hnp.arrays(np.int32, size, elements=int32s))

    sequences = []
    for index in range(draw(st.integers(0, 3))):
        response = ids()
        candidates = None
        if len(response) and draw(st.booleans()):
            width = draw(st.integers(1, 4))
            candidates = ids(len(response) * width).reshape(-1, width)
        anchors = draw(st.none() | st.just(0) | st.integers(0, 3))
        chunks = None if anchors is None else ids(anchors)
        sequences.append(Sequence(str(index), draw(st.integers(-1, 3)), response, candidates, chunks))
    return ScoreRequest(
        contexts=tuple(ids() for _ in range(draw(st.integers(0, 3)))),
        sequences=tuple(sequences),
        signal=Signal(
            draw(st.booleans()),
            draw(st.integers(0, 300)),
            draw(st.booleans()),
            draw(st.booleans()),
            draw(st.floats(0.01, 10)),
            draw(st.sampled_from(["float32", "float16"])),
            continuations=draw(int32s),
            chunk_tokens=draw(int32s),
        ),
        teacher=draw(st.text(max_size=5)),
        pins=Pins(
            draw(st.none() | st.just("f")), draw(st.none() | st.just("")), draw(st.none() | st.just(0))
        ),
        request_id=draw(st.text(max_size=5)),
    )


@settings(max_examples=60, deadline=None)
@given(requests())
def test_a_request_comes_back_as_it_was_sent(request: ScoreRequest) -> None:
    data = codec.request_to_proto(request).SerializeToString()
    back = codec.request_from_proto(pb.ScoreRequest.FromString(data))
    assert (back.signal, back.teacher, back.pins, back.request_id) == (
        request.signal,
        request.teacher,
        request.pins,
        request.request_id,
    )
    for sent, got in zip(request.contexts, back.contexts, strict=True):
        np.testing.assert_array_equal(sent, got)
    for one, other in zip(request.sequences, back.sequences, strict=True):
        assert (one.id, one.context) == (other.id, other.context)
        np.testing.assert_array_equal(one.response_ids, other.response_ids)
        assert (one.candidate_ids is None) == (other.candidate_ids is None)
        if one.candidate_ids is not None and other.candidate_ids is not None:
            np.testing.assert_array_equal(one.candidate_ids, other.candidate_ids)
        assert (one.anchors is None) == (other.anchors is None)
        if one.anchors is not None and other.anchors is not None:
            np.testing.assert_array_equal(one.anchors, other.anchors)


@pytest.mark.parametrize("encoding", ["float32", "float16"])
def test_a_score_comes_back_as_it_was_made(encoding: str) -> None:
    rng = np.random.default_rng(0)
    rows, top_k, columns = 7, 4, 3
    full = SequenceScore(
        id="a",
        sampled=-rng.random(rows, dtype=np.float32),
        top_ids=rng.integers(0, 100, (rows, top_k), dtype=np.int32),
        top_logprobs=-rng.random((rows, top_k), dtype=np.float32),
        candidate_logprobs=-rng.random((rows, columns), dtype=np.float32),
        entropy=rng.random(rows, dtype=np.float32),
        valid=np.array([True, False] * 3 + [True]),
        hidden=rng.random((rows, 2, 3)).astype(np.float16),
    )
    failed = SequenceScore("b", SequenceError("INVALID_ARGUMENT", "why"))
    judged = SequenceScore("c", judgement=0.0, verdict="Nothing is right.\nScore: 0")
    audited = [SequenceScore(i, agreement=rng.random(n, dtype=np.float32)) for i, n in (("d", 3), ("e", 0))]
    score = Score((full, failed, judged, *audited), IDENTITY, Usage(7, 9, 1, 0.5, 0.25), "r")
    data = codec.score_to_bytes(score, encoding)  # type: ignore[arg-type]
    assert pb.ScoreResponse.FromString(data) == codec.score_to_proto(score, encoding)  # type: ignore[arg-type]
    back = codec.score_from_proto(pb.ScoreResponse.FromString(data))
    assert (back.identity, back.usage, back.request_id) == (score.identity, score.usage, "r")
    assert back.sequences[1:3] == (failed, judged)
    for sent, came in zip(audited, back.sequences[3:], strict=True):
        assert came.agreement is not None, "no chunk is an empty array, and not no answer"
        assert (came.num_positions, came.agreement.dtype) == (0, np.float32)
        np.testing.assert_array_equal(came.agreement, sent.agreement)
    got = back.sequences[0]
    for field in ("sampled", "top_logprobs", "candidate_logprobs", "entropy"):
        expected = getattr(full, field).astype(encoding)
        assert getattr(got, field).dtype == expected.dtype
        np.testing.assert_array_equal(getattr(got, field), expected)
    np.testing.assert_array_equal(got.top_ids, full.top_ids)
    np.testing.assert_array_equal(got.valid, full.valid)
    np.testing.assert_array_equal(got.hidden, full.hidden)


@pytest.mark.parametrize("rows", [1, 31, 32, 127, 128, 5000, 70_000])
def test_hand_written_lengths_agree_with_protobuf_at_every_size(rows: int) -> None:
    arrays = SequenceScore("x" * 200, sampled=np.zeros(rows, np.float32), valid=np.ones(rows, bool))
    score = Score((arrays, SequenceScore("", SequenceError("INTERNAL", "y" * rows)), arrays), IDENTITY)
    assert pb.ScoreResponse.FromString(codec.score_to_bytes(score)) == codec.score_to_proto(score)


def test_an_answer_whose_array_lacks_a_row_is_refused() -> None:
    message = pb.SequenceScore(id="a", num_positions=2, sampled=b"\0" * 4, valid=b"\1\1")
    with pytest.raises(TutelageError, match=r"sampled: got 1 values for shape \[2\]"):
        codec.score_from_proto(pb.ScoreResponse(sequences=[message]))
    message = pb.SequenceScore(id="a", num_chunks=2, agreement=b"\0" * 4)
    with pytest.raises(TutelageError, match="agreement: got 4 bytes for 2 chunks"):
        codec.score_from_proto(pb.ScoreResponse(sequences=[message]))


@pytest.mark.parametrize(
    ("contexts", "responses", "text"),
    [
        ([[1.5]], [[1]], "must be integers"),
        ([[1]], [[2**40]], "outside int32"),
        ([[1], [2]], [[1], [2], [3]], "2 contexts"),
        ([["a"]], [[1]], "must be integers"),
        ([[[1, 2], [3, 4]]], [[1]], r"contexts\[0\]: got shape \[2, 2\]"),
        ([[1]], [np.ones((2, 2), np.int32)], r"responses\[0\]: got shape \[2, 2\]"),
        ([np.int32(1)], [[1]], r"contexts\[0\]: got "),
        ([[1]], [np.array(1, np.int32)], r"responses\[0\]: got shape \[\]"),
        ([[[1], [2, 3]]], [[1]], r"contexts\[0\]: got "),
    ],
)
def test_what_cannot_be_a_request_is_refused_before_it_is_sent(
    contexts: list[list[int]], responses: list[list[int]], text: str
) -> None:
    with pytest.raises(TutelageError, match=text):
        codec.build_request(contexts, responses)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan"), float("inf"), "hot"])
def test_a_temperature_that_is_none_is_refused_and_not_taken_for_one(temperature: float) -> None:
    with pytest.raises(TutelageError, match=r"INVALID_ARGUMENT: signal\.temperature: got"):
        codec.signal_to_proto(Signal(temperature=temperature))


ONES = np.ones(1, np.int32)
UNSAYABLE: dict[str, dict[str, object]] = {
    "signal.encoding": {"signal": Signal(encoding="bfloat16")},  # type: ignore[arg-type]
    "signal.top_k": {"signal": Signal(top_k=2**31)},
    "signal.sampled": {"signal": Signal(sampled="yes")},  # type: ignore[arg-type]
    "pins.revision": {"pins": Pins(revision="\ud800")},
    "pins.weights_version": {"pins": Pins(weights_version=2**63)},
    "teacher": {"teacher": "a\ud800"},
    "request_id": {"request_id": "\udfff"},
    "sequences[0].id": {"sequences": (Sequence("\ud800", 0, ONES),)},
    "sequences[0].context": {"sequences": (Sequence("a", 2**31, ONES),)},
    "sequences[0].response_ids": {"sequences": (Sequence("a", 0, ONES.reshape(1, 1)),)},
    "sequences[0].candidate_ids": {"sequences": (Sequence("a", 0, ONES, [[1]]),)},  # type: ignore[arg-type]
    "sequences[0].anchors": {"sequences": (Sequence("a", 0, ONES, anchors=ONES.reshape(1, 1)),)},
    "signal.continuations": {"signal": Signal(continuations=2**31)},
    "contexts[0]": {"contexts": (np.ones((2, 2), np.int32),)},
}


@pytest.mark.parametrize("field", UNSAYABLE)
def test_what_the_wire_cannot_say_is_refused_with_its_field(field: str) -> None:
    whole = ScoreRequest((ONES,), (Sequence("a", 0, ONES),))
    with pytest.raises(TutelageError) as refused:
        codec.request_to_proto(replace(whole, **UNSAYABLE[field]))  # type: ignore[arg-type]
    assert refused.value.code == "INVALID_ARGUMENT"
    assert refused.value.message.startswith(f"{field}: got ")


def test_a_long_value_is_not_repeated_in_full() -> None:
    with pytest.raises(TutelageError) as refused:
        codec.teacher_request("\ud800" * 100_000)
    assert len(refused.value.message) < 1000


def test_contexts_are_shared_paired_or_indexed() -> None:
    def index(**arguments: object) -> list[int]:
        request = codec.build_request(responses=[[1], [2]], **arguments)  # type: ignore[arg-type]
        return [sequence.context for sequence in request.sequences]

    assert index(contexts=[[5]]) == [0, 0]
    assert index(contexts=[[5], [6]]) == [0, 1]
    assert index(contexts=[[5], [6], [7]], context_index=[2, 2]) == [2, 2]


def test_anchors_are_given_for_every_response_or_for_none() -> None:
    request = codec.build_request([[5]], [[1], [2]], anchors=[[0], []])
    assert [np.asarray(sequence.anchors).tolist() for sequence in request.sequences] == [[0], []]
    assert [sequence.anchors for sequence in codec.build_request([[5]], [[1]]).sequences] == [None]
    with pytest.raises(TutelageError, match="anchors: got 1 arrays for 2 responses"):
        codec.build_request([[5]], [[1], [2]], anchors=[[0]])


def test_raise_for_errors_names_the_first_failed_sequence() -> None:
    failed = SequenceScore("b", SequenceError("INVALID_ARGUMENT", "sequences[1]: why"))
    score = Score((SequenceScore("a", valid=np.ones(1, bool)), failed), IDENTITY)
    with pytest.raises(TutelageError, match=r"INVALID_ARGUMENT: sequences\[1\]: why"):
        score.raise_for_errors()
