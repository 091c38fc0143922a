"""What may be asked of a writer: every refusal names its field, and a bad sequence fails alone."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from tutelage.v1 import teacher_pb2 as pb
from tutelage.v1.rollout_pb2 import Group, Rollout, ViewRequest
from tutelage_client import codec
from tutelage_client.errors import TutelageError
from tutelage_client.types import Identity, Limits, Score, ScoreRequest, SequenceScore, Signal

from services.api import json_codec
from services.api.validate import check_request, check_sequences
from services.teacher.jobs import job_request

IDENTITY = Identity("w", "model", "rev", 0, "ab", 100, "writer", "1", "float32", "float32")
WRITES = Limits(max_top_k=0, max_candidates=0, entropy=False, temperature=False, max_continuations=4)
ASKED = Signal(sampled=False, continuations=4, chunk_tokens=3)
RESPONSE = list(range(10))


def request(anchors: object, signal: Signal = ASKED) -> ScoreRequest:
    built = codec.build_request([[1]], [RESPONSE, RESPONSE], anchors=[[0], [0]], signal=signal)
    other = replace(built.sequences[1], anchors=None if anchors is None else np.array(anchors, np.int32))
    return replace(built, sequences=(built.sequences[0], other))


@pytest.mark.parametrize("anchors", [[], [0], [7], [0, 3, 6], [1, 4, 7], [0, 7]])
def test_chunks_that_lie_side_by_side_inside_the_response_are_audited(anchors: list[int]) -> None:
    check_request(request(anchors), IDENTITY, WRITES)
    assert check_sequences(request(anchors), IDENTITY, WRITES) == {}


@pytest.mark.parametrize(
    ("anchors", "reason"),
    [
        (None, "got none, signal.continuations asks for an array [F]"),
        ([[0]], "got shape [1, 1], must be [F]"),
        ([-1], "got -1 to -1, allowed are 0 to 7"),
        ([8], "got 8 to 8, allowed are 0 to 7"),
        ([0, 8], "got 0 to 8, allowed are 0 to 7"),
        ([0, 2], "got [0, 2], must be ascending and at least 3 apart"),
        ([4, 1], "got [4, 1], must be ascending and at least 3 apart"),
        ([1, 1], "got [1, 1], must be ascending and at least 3 apart"),
    ],
)
def test_any_other_anchors_fail_their_sequence_alone(anchors: object, reason: str) -> None:
    problems = check_sequences(request(anchors), IDENTITY, WRITES)
    assert {at: (error.code, error.message) for at, error in problems.items()} == {
        1: ("INVALID_ARGUMENT", f"sequences[1].anchors: {reason}")
    }


def test_what_is_read_and_may_be_written_counts_as_a_requests_tokens_do() -> None:
    """Room and deadlines are estimated by it, and each chunk costs a reading of all before it."""
    asked = request([0, 3, 6])
    cost = 2 * len(RESPONSE) + (1 + 3) * (1 + 4 * 3) + 3 + 6
    assert codec.request_tokens(asked) == cost
    check_request(asked, IDENTITY, replace(WRITES, max_request_tokens=cost))
    with pytest.raises(TutelageError, match=f"request tokens: got {cost}, allowed are {cost - 1}"):
        check_request(asked, IDENTITY, replace(WRITES, max_request_tokens=cost - 1))
    assert codec.request_tokens(replace(asked, signal=Signal())) == 1 + 2 * len(RESPONSE)
    for wrong in (replace(ASKED, chunk_tokens=2**31 - 1), replace(ASKED, chunk_tokens=-9)):
        least = 2 * len(RESPONSE) + (1 + 3) + 3 + 6
        assert least <= codec.request_tokens(request([0, 3, 6], wrong)) <= least + 4 * 4 * len(RESPONSE)
    for far in ([-(2**31), 2**31 - 1], [[2**31 - 1] * 2]):  # they are refused after it
        assert codec.request_tokens(request(far)) <= 2 * len(RESPONSE) + 3 * (1 + len(RESPONSE) + 4 * 3)


def test_a_context_counts_as_often_as_it_is_read_and_with_its_text() -> None:
    """A small request would cost a replica its memory, or hours, if what all chunks share counted once."""
    judged = Signal(sampled=False, judgement=True)
    before, written = (3 + 6) + (1 + 4 + 7), 7 * 4 * 3
    for signal, times, own in ((Signal(), 1, 30), (judged, 3, 30), (ASKED, 7, 30 + before + written)):
        asked = codec.build_request(
            [range(50)], [RESPONSE] * 3, anchors=[[0], [0, 3, 6], [1, 4, 7]], signal=signal
        )
        assert codec.request_tokens(asked) == own + times * 50
        for text, tokens in (("", 0), ("\u00e9" * 100, 50), ("\u00e9" * 100 + "!", 51)):
            with_text = replace(asked, context_texts=(text,))
            assert codec.request_tokens(with_text) == own + times * (50 if signal == Signal() else tokens)
    nowhere = [replace(one, context=at) for one, at in zip(asked.sequences, (-1, 1, 9), strict=True)]
    assert codec.request_tokens(replace(asked, sequences=tuple(nowhere))) == own, "it is refused after it"


def test_a_small_request_that_reads_much_is_refused_before_any_of_it_is_read() -> None:
    shape = {"context_texts": ["a" * 40_000], "anchors": [list(range(0, 9, 3))] * 40}
    asked = codec.build_request([[1]], [RESPONSE] * 40, signal=ASKED, **shape)  # type: ignore[arg-type]
    cost = 40 * (10 + 3 * (10_000 + 4 * 3) + 3 + 6)
    with pytest.raises(
        TutelageError, match=f"request tokens: got {cost}, allowed are {Limits().max_request_tokens}"
    ):
        check_request(asked, IDENTITY, WRITES)


def test_a_response_shorter_than_a_chunk_has_no_anchor() -> None:
    short = replace(ASKED, chunk_tokens=11)
    problems = check_sequences(request([], short), IDENTITY, WRITES)
    assert list(problems) == [0]
    assert problems[0].message.endswith("allowed are none, the response is shorter than 11 tokens")


TEACHES = Limits()
JUDGES = replace(WRITES, max_continuations=0, judge=True)


@pytest.mark.parametrize(
    ("limits", "signal", "reason"),
    [
        (WRITES, Signal(), "signal: this teacher is a writer, ask for continuations and for nothing else"),
        (WRITES, replace(ASKED, sampled=True), "signal: this teacher is a writer"),
        (WRITES, replace(ASKED, entropy=True), "signal: this teacher is a writer"),
        (WRITES, replace(ASKED, hidden_layers=(1,)), "signal: this teacher is a writer"),
        (WRITES, replace(ASKED, judgement=True), "signal.judgement: got true, this teacher is no judge"),
        (WRITES, replace(ASKED, continuations=5), "signal.continuations: got 5, allowed are 1 to 4"),
        (WRITES, replace(ASKED, continuations=-1), "signal.continuations: got -1, allowed are 1 to 4"),
        (WRITES, replace(ASKED, chunk_tokens=0), "signal.chunk_tokens: got 0, must be at least 1"),
        (WRITES, replace(ASKED, chunk_tokens=-1), "signal.chunk_tokens: got -1, must be at least 1"),
        (WRITES, replace(ASKED, continuations=0), "signal.chunk_tokens: got 3 without continuations"),
        (WRITES, replace(ASKED, temperature=0.5), "signal.temperature: got 0.5, must be 1"),
        (TEACHES, ASKED, "signal.continuations: got 4, this teacher writes nothing"),
        (TEACHES, replace(ASKED, sampled=True), "signal.continuations: got 4, this teacher writes nothing"),
        (TEACHES, Signal(chunk_tokens=3), "signal.chunk_tokens: got 3 without continuations, must be 0"),
        (JUDGES, ASKED, "signal: this teacher is a judge, ask for judgement and for nothing else"),
        (JUDGES, replace(ASKED, judgement=True), "signal: this teacher is a judge"),
    ],
)
def test_what_a_writer_and_others_do_not_answer_is_refused(
    limits: Limits, signal: Signal, reason: str
) -> None:
    with pytest.raises(TutelageError) as refused:
        check_request(request([0], signal), IDENTITY, limits)
    assert refused.value.code == "INVALID_ARGUMENT"
    assert refused.value.message.startswith(reason)


def test_the_door_for_json_takes_and_gives_lists() -> None:
    sequence = {"id": "a", "response_ids": RESPONSE, "anchors": [0, 3]}
    signal = {"continuations": 4, "chunk_tokens": 3}
    document = {"contexts": [{"ids": [1]}], "sequences": [sequence, sequence | {"anchors": []}]}
    parsed = json_codec.parse_request(json.dumps(document | {"signal": signal}).encode(), WRITES)
    asked = codec.request_from_proto(parsed)
    assert asked.signal == ASKED
    assert [np.asarray(one.anchors).tolist() for one in asked.sequences] == [[0, 3], []]
    agreed = SequenceScore("a", agreement=np.array([0.25, 1.0], np.float32))
    score = Score((agreed, SequenceScore("b", agreement=np.empty(0, np.float32))), IDENTITY)
    assert json_codec.score_document(score, "float16", "list")["sequences"] == [
        {"id": "a", "agreement": [0.25, 1.0]},
        {"id": "b", "agreement": []},
    ]
    packed = json_codec.score_document(score, "float16", "base64")["sequences"]
    assert [one.get("num_chunks", 0) for one in packed] == [2, 0]
    assert all("agreement" in one for one in packed)


def test_a_job_carries_the_anchors_of_its_rollouts_where_they_are_asked_for() -> None:
    rollouts = [
        Rollout(response_ids=codec.pack_ids(RESPONSE), anchors=codec.pack_ids([0, 3])),
        Rollout(response_ids=codec.pack_ids(RESPONSE), anchors=b""),
        Rollout(response_ids=codec.pack_ids(RESPONSE)),
    ]
    group = Group(id="g", rollouts=rollouts)
    view = ViewRequest(contexts=[pb.Context(ids=codec.pack_ids([1]))], signal=codec.signal_to_proto(ASKED))
    found = [one.anchors for one in codec.request_from_proto(job_request(group, view)).sequences]
    assert [None if ids is None else ids.tolist() for ids in found] == [[0, 3], [], None]
    view.signal.CopyFrom(codec.signal_to_proto(Signal()))
    assert not any(one.HasField("anchors") for one in job_request(group, view).sequences)
