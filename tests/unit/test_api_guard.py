"""The guard lets no number out that is not one, and no array that is not the one asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tutelage_client import PAD_ID, Sequence, SequenceScore, Signal, TutelageError

from services.api.guard import guard

SEQUENCE = Sequence("a", 0, np.array([1, 2, 3], np.int32), np.array([[1], [PAD_ID], [2]], np.int32))
SIGNAL = Signal(True, 2, True, True)
WHOLE = np.empty(0, np.int32)  # the anchors of a response that is not audited


def answer() -> SequenceScore:
    return SequenceScore(
        id="a",
        sampled=np.array([-1, -2, -3], np.float32),
        top_ids=np.arange(6, dtype=np.int32).reshape(3, 2),
        top_logprobs=-np.ones((3, 2), np.float32),
        candidate_logprobs=np.array([[-1], [np.nan], [-2]], np.float32),
        entropy=np.ones(3, np.float32),
        valid=np.ones(3, bool),
    )


def test_a_good_answer_passes_untouched() -> None:
    given = answer()
    assert guard(given, SEQUENCE, SIGNAL) == (given, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["sampled", "top_logprobs", "candidate_logprobs", "entropy"])
def test_one_bad_number_masks_its_whole_position(field: str, bad: float) -> None:
    given = answer()
    getattr(given, field)[2] = bad
    got, invalid = guard(given, SEQUENCE, SIGNAL)
    assert invalid == 1
    assert got.valid is not None
    np.testing.assert_array_equal(got.valid, [True, True, False])
    for name in ("sampled", "top_logprobs", "candidate_logprobs", "entropy"):
        assert np.isnan(getattr(got, name)[2]).all()
        np.testing.assert_array_equal(getattr(got, name)[:2], getattr(answer(), name)[:2])
    assert got.top_ids is not None
    assert got.top_ids.tolist() == [[0, 1], [2, 3], [PAD_ID, PAD_ID]]


def test_what_the_engine_calls_invalid_carries_no_numbers() -> None:
    given = replace(answer(), valid=np.array([False, True, True]))
    got, invalid = guard(given, SEQUENCE, SIGNAL)
    assert invalid == 1
    assert got.sampled is not None
    assert np.isnan(got.sampled[0])


def test_a_value_too_large_for_float16_is_masked_rather_than_sent_as_infinity() -> None:
    given = answer()
    given.sampled[1] = -70_000.0  # type: ignore[index]
    assert guard(given, SEQUENCE, SIGNAL)[1] == 0
    got, invalid = guard(given, SEQUENCE, replace(SIGNAL, encoding="float16"))
    assert invalid == 1
    assert got.valid is not None
    assert not got.valid[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"sampled": np.zeros(2, np.float32)},
        {"sampled": None},
        {"top_ids": np.zeros((3, 3), np.int32)},
        {"top_logprobs": np.zeros((2, 2), np.float32)},
        {"candidate_logprobs": np.zeros((3, 2), np.float32)},
        {"entropy": None},
        {"valid": np.ones(4, bool)},
        {"id": "b"},
    ],
)
def test_an_answer_of_another_shape_is_an_engine_error(wrong: dict[str, object]) -> None:
    with pytest.raises(TutelageError, match="INTERNAL: engine answered"):
        guard(replace(answer(), **wrong), SEQUENCE, SIGNAL)  # type: ignore[arg-type]


def test_hidden_states_are_shaped_as_asked_and_masked_where_they_are_not_finite() -> None:
    signal = Signal(hidden_layers=(1, 3))
    states = np.full((3, 2, 4), 0.5, np.float16)
    given = SequenceScore("a", sampled=-np.ones(3, np.float32), valid=np.ones(3, bool), hidden=states)
    assert guard(given, SEQUENCE, signal) == (given, 0)
    broken = states.copy()
    broken[1, 1, 3] = np.nan
    got, invalid = guard(replace(given, hidden=broken), SEQUENCE, signal)
    assert invalid == 1
    assert got.hidden is not None
    assert got.valid is not None
    assert np.isnan(got.hidden[1]).all()
    assert got.valid.tolist() == [True, False, True]
    for wrong in (None, states[:2], states[:, :1], states[:, :, 0]):
        with pytest.raises(TutelageError, match="INTERNAL: engine answered hidden with shape"):
            guard(replace(given, hidden=wrong), SEQUENCE, signal)
    with pytest.raises(TutelageError, match="INTERNAL: engine answered hidden with shape"):
        guard(given, SEQUENCE, Signal())


JUDGE = Signal(sampled=False, judgement=True)


def test_a_judgement_from_0_to_1_passes() -> None:
    judged = SequenceScore("a", judgement=1.0, verdict="Score: 9")
    assert guard(judged, SEQUENCE, JUDGE) == (judged, 0)


@pytest.mark.parametrize(
    ("signal", "wrong"),
    [
        (JUDGE, SequenceScore("a")),
        (JUDGE, SequenceScore("a", judgement=float("nan"))),
        (JUDGE, SequenceScore("a", judgement=1.5)),
        (JUDGE, SequenceScore("b", judgement=0.5)),
        (JUDGE, replace(answer(), judgement=0.5)),
        (SIGNAL, replace(answer(), judgement=0.5)),
    ],
)
def test_any_other_judgement_is_an_engine_error(signal: Signal, wrong: SequenceScore) -> None:
    with pytest.raises(TutelageError, match="INTERNAL: engine answered"):
        guard(wrong, SEQUENCE, signal)


WRITER = Signal(sampled=False, continuations=4, chunk_tokens=1)
AUDITED = replace(SEQUENCE, anchors=np.array([0, 2], np.int32))


def agreeing(*values: float) -> SequenceScore:
    return SequenceScore("a", agreement=np.array(values, np.float32))


def test_an_agreement_from_0_to_1_for_every_anchor_passes() -> None:
    for sequence, given in ((AUDITED, agreeing(0, 1)), (replace(AUDITED, anchors=WHOLE), agreeing())):
        assert guard(given, sequence, WRITER) == (given, 0)


@pytest.mark.parametrize(
    ("signal", "wrong"),
    [
        (WRITER, SequenceScore("a")),
        (WRITER, agreeing(0.5)),
        (WRITER, agreeing(0.5, 0.5, 0.5)),
        (WRITER, replace(agreeing(), agreement=np.full((2, 1), 0.5, np.float32))),
        (WRITER, agreeing(0.5, float("nan"))),
        (WRITER, agreeing(0.5, 1.001)),
        (WRITER, agreeing(-0.001, 0.5)),
        (WRITER, replace(agreeing(0.5, 0.5), id="b")),
        (WRITER, replace(agreeing(0.5, 0.5), judgement=0.5)),
        (WRITER, replace(answer(), agreement=np.full(2, 0.5, np.float32))),
        (SIGNAL, replace(answer(), agreement=np.full(2, 0.5, np.float32))),
    ],
)
def test_any_other_agreement_is_an_engine_error(signal: Signal, wrong: SequenceScore) -> None:
    with pytest.raises(TutelageError, match="INTERNAL: engine answered"):
        guard(wrong, AUDITED, signal)


def test_an_answer_with_what_was_not_asked_is_an_engine_error() -> None:
    with pytest.raises(TutelageError, match="INTERNAL: engine answered entropy"):
        guard(answer(), SEQUENCE, replace(SIGNAL, entropy=False))
