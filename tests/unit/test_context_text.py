"""A context's text on its way to a teacher that reads words: both encodings, the core and the queue."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.queue_data import make_group
from support.teachers import ids
from tutelage.v1 import teacher_pb2 as pb
from tutelage.v1.rollout_pb2 import ViewRequest
from tutelage_client import codec
from tutelage_client.errors import TutelageError
from tutelage_client.types import Limits, ScoreRequest, Sequence, SequenceError, Signal

from services.api import json_codec
from services.api.core import _without
from services.teacher.jobs import job_request

TEXT = "What is 2+2?\nÅ 字 \x00 \U0001f600"

texts = st.lists(st.none() | st.text(max_size=4), min_size=1, max_size=4)


def asked(*texts: str | None) -> ScoreRequest:
    """A context for each text, and one sequence of each."""
    return codec.build_request([[i + 1] for i in range(len(texts))], [[9]] * len(texts), context_texts=texts)


@given(texts)
def test_a_text_comes_back_as_it_was_sent_and_none_takes_no_byte(texts: list[str | None]) -> None:
    request = asked(*texts)
    data = codec.request_to_proto(request).SerializeToString()
    back = codec.request_from_proto(pb.ScoreRequest.FromString(data))
    assert [back.text_of(sequence) for sequence in back.sequences] == texts
    assert back.context_texts == request.context_texts
    ids_alone = pb.ScoreRequest.FromString(data)
    for context in ids_alone.contexts:
        context.ClearField("text")
    plain = codec.request_to_proto(asked(*[None] * len(texts))).SerializeToString()
    assert ids_alone.SerializeToString() == plain
    assert (data == plain) == all(text is None for text in texts)
    document = {
        "contexts": [
            {"ids": [1]} if text is None else {"ids": [1], "text": text} for text in texts
        ],
        "sequences": [{"id": str(i), "context": i, "response_ids": [9]} for i in range(len(texts))],
    }  # fmt: skip
    parsed = codec.request_from_proto(json_codec.parse_request(json.dumps(document).encode(), Limits()))
    assert [parsed.text_of(sequence) for sequence in parsed.sequences] == texts


def test_what_was_written_before_there_were_texts_is_read_as_ever() -> None:
    """Field 1 alone, as older callers and jobs have it."""
    old = bytes([0x0A, 4, 1, 0, 0, 0])
    assert pb.Context(ids=codec.pack_ids([1])).SerializeToString() == old
    message = pb.ScoreRequest(contexts=[pb.Context.FromString(old)])
    assert codec.request_from_proto(message).context_texts == ()


@pytest.mark.parametrize("bad", [7, "\ud800", ["What?"]])
def test_what_is_no_text_is_refused_before_it_is_sent(bad: Any) -> None:
    with pytest.raises(TutelageError, match=r"INVALID_ARGUMENT: contexts\[1\].text: got .*no value of this"):
        codec.request_to_proto(asked("a", bad))


@pytest.mark.parametrize("bad", ["7", '"\\ud800"', '["What?"]', '{"a": 1}'])
def test_the_door_for_json_refuses_what_is_no_text(bad: str) -> None:
    body = f'{{"contexts": [{{"ids": [1], "text": {bad}}}]}}'
    with pytest.raises(TutelageError, match="INVALID_ARGUMENT: body: not a ScoreRequest"):
        json_codec.parse_request(body.encode(), Limits())


def test_there_are_as_many_texts_as_contexts_or_none() -> None:
    with pytest.raises(TutelageError, match=r"context_texts: got 1 texts for 2 contexts"):
        codec.build_request([[1], [2]], [[3], [4]], context_texts=["a"])
    with pytest.raises(TutelageError, match=r"context_texts: got 1 texts for 2 contexts"):
        codec.request_to_proto(replace(asked(None, None), context_texts=("a",)))


@given(st.data(), st.integers(1, 4).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1)))))
def test_a_sequence_keeps_its_context_and_text_when_others_are_left_out(
    data: st.DataObject, drawn: tuple[int, list[int]]
) -> None:
    count, places = drawn
    request = ScoreRequest(
        tuple(ids(i) for i in range(count)),
        tuple(Sequence(str(i), place, ids(1)) for i, place in enumerate(places)),
        context_texts=data.draw(st.just(()) | st.just(tuple(f"text {i}" for i in range(count)))),
    )
    bad = data.draw(st.sets(st.integers(0, max(0, len(places) - 1))))
    left = _without(request, {i: SequenceError("INVALID_ARGUMENT", "") for i in bad if i < len(places)})
    assert [sequence.id for sequence in left.sequences] == [
        str(i) for i in range(len(places)) if i not in bad
    ]
    for sequence in left.sequences:
        before = request.sequences[int(sequence.id)]
        np.testing.assert_array_equal(left.contexts[sequence.context], request.contexts[before.context])
        assert left.text_of(sequence) == request.text_of(before)
    assert len(left.contexts) == len({sequence.context for sequence in left.sequences})


def test_a_job_carries_the_texts_of_its_contexts() -> None:
    group = make_group("r", 0)
    signal = codec.signal_to_proto(Signal(sampled=False, judgement=True))
    own = [pb.Context(ids=codec.pack_ids([1]), text=TEXT), pb.Context(ids=codec.pack_ids([1]))]
    for contexts, expected in (
        (own, [TEXT, None]),
        (own[:1], [TEXT, TEXT]),
        (own[1:], [None, None]),
    ):
        stored = ViewRequest(view="judge", teacher="judge", signal=signal, contexts=contexts)
        view = ViewRequest.FromString(stored.SerializeToString())
        request = codec.request_from_proto(job_request(group, view))
        assert [request.text_of(sequence) for sequence in request.sequences] == expected
