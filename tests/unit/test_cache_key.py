"""The key of a cached score: equal for the same question to the same engine, and for nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.teachers import ids
from tutelage_client.types import Identity, ScoreRequest, Sequence, Signal

from services.teacher.build import build_cached
from services.teacher.cache.key import sequence_keys, teacher_digest

IDENTITY = Identity(
    name="big", model="m", revision="r", weights_version=3, weights_id="w", tokenizer_fingerprint="t",
    vocab_size=100, engine="fake", engine_version="1", dtype="float32", head_dtype="float32",
)  # fmt: skip
CHANGE_THE_KEY = {
    "identity": {field for field in Identity.__slots__ if field != "name"},
    "signal": set(Signal.__slots__),
    "sequence": {"response_ids", "candidate_ids", "anchors"},
    "request": {"contexts", "sequences", "signal", "context_texts"},
}
CHANGE_NOTHING = {
    "identity": {"name"},
    "signal": set(),
    "sequence": {"id", "context"},
    "request": {"teacher", "pins", "request_id"},
}


def key(
    context: Any = (1, 2),
    response: Any = (3, 4),
    candidates: Any = None,
    *,
    signal: Signal | None = None,
    identity: Identity = IDENTITY,
    variant: dict[str, Any] | None = None,
) -> bytes:
    found = None if candidates is None else np.array(candidates, dtype=np.int32)
    request = ScoreRequest(
        (ids(*context),), (Sequence("a", 0, ids(*response), found),), signal or Signal(candidates=True)
    )
    return sequence_keys(teacher_digest(identity, variant or {}), request)[0]


def other(value: Any) -> Any:
    """A value of the same type that is not `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, 1)
    return value + ("!" if isinstance(value, str) else 1)


def test_every_field_of_the_contract_is_in_the_key_or_known_to_change_nothing() -> None:
    for name, kind in (
        ("identity", Identity), ("signal", Signal), ("sequence", Sequence), ("request", ScoreRequest)
    ):  # fmt: skip
        assert CHANGE_THE_KEY[name] | CHANGE_NOTHING[name] == set(kind.__slots__), kind


def test_another_identity_signal_or_setting_has_another_key() -> None:
    signal = Signal(top_k=4, entropy=True)
    keys = [key(), key(signal=signal), key(variant={"device": "cpu"}), key(variant={"device": "cuda"})]
    for field in CHANGE_THE_KEY["identity"]:
        keys.append(key(identity=replace(IDENTITY, **{field: other(getattr(IDENTITY, field))})))
    for field in CHANGE_THE_KEY["signal"] - {"encoding"}:
        keys.append(key(signal=replace(signal, **{field: other(getattr(signal, field))})))
    keys.append(key(signal=replace(signal, encoding="float16")))
    assert len(set(keys)) == len(keys)


def test_names_change_nothing() -> None:
    request = ScoreRequest(
        (ids(9), ids(1, 2)), (Sequence("x", 1, ids(3, 4)),), Signal(), "name", request_id="r"
    )
    named = teacher_digest(replace(IDENTITY, name="another"), {})
    assert sequence_keys(named, request) == [key(signal=Signal())]


def test_other_anchors_have_another_key() -> None:
    def of(anchors: list[int]) -> bytes:
        sequence = Sequence("a", 0, ids(3, 4, 5), anchors=ids(*anchors))
        signal = Signal(sampled=False, continuations=2, chunk_tokens=1)
        (found,) = sequence_keys(teacher_digest(IDENTITY, {}), ScoreRequest((ids(1),), (sequence,), signal))
        return found

    assert len({of([]), of([0]), of([1]), of([0, 1])}) == 4


def test_a_contexts_text_is_part_of_a_question_to_those_who_read_words_and_of_no_other() -> None:
    def of(signal: Signal, *texts: str | None) -> bytes:
        sequence = Sequence("a", 0, ids(3, 4, 5), anchors=ids(0))
        request = ScoreRequest((ids(1),), (sequence,), signal, context_texts=texts)
        (found,) = sequence_keys(teacher_digest(IDENTITY, {}), request)
        return found

    for signal, different in (
        (Signal(sampled=False, judgement=True), 3),
        (Signal(sampled=False, continuations=2, chunk_tokens=1), 3),
        (Signal(top_k=2), 1),
    ):
        assert of(signal) == of(signal, None)
        assert len({of(signal), of(signal, ""), of(signal, "a")}) == different


def test_candidates_that_are_not_asked_for_change_nothing() -> None:
    assert key(candidates=[[1], [2]], signal=Signal()) == key(signal=Signal())
    assert key(signal=Signal(temperature=1)) == key(signal=Signal(temperature=1.0))


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6)
questions = st.tuples(tokens, tokens, st.none() | st.tuples(st.integers(1, 3), tokens))


def shaped(question: tuple[list[int], list[int], tuple[int, list[int]] | None]) -> Any:
    context, response, candidates = question
    if candidates is None:
        return context, response, None
    columns, values = candidates
    cells = np.resize(values, len(response) * columns)
    return context, response, cells.reshape(len(response), columns).tolist()


@given(questions, questions)
def test_two_questions_have_one_key_only_when_they_are_equal(first: Any, second: Any) -> None:
    """Few tokens, so that the same ids are often cut at another place between context and response."""
    one, two = shaped(first), shaped(second)
    assert (key(*one) == key(*two)) == (one == two)


@given(tokens.filter(lambda values: len(values) > 1), st.data())
def test_a_boundary_that_moves_is_another_question(values: list[int], data: st.DataObject) -> None:
    cuts = data.draw(
        st.lists(st.integers(1, len(values) - 1), min_size=2, max_size=2, unique=True)
        if len(values) > 2
        else st.just([1, 1])
    )
    keys = [key(values[:cut], values[cut:]) for cut in cuts]
    assert (keys[0] == keys[1]) == (cuts[0] == cuts[1])


@given(st.text(max_size=4), st.text(max_size=4), st.text(max_size=4), st.text(max_size=4))
def test_text_does_not_run_from_one_field_into_the_next(a: str, b: str, c: str, d: str) -> None:
    first = teacher_digest(replace(IDENTITY, model=a, revision=b), {})
    second = teacher_digest(replace(IDENTITY, model=c, revision=d), {})
    assert (first == second) == ((a, b) == (c, d))


def test_settings_of_an_engine_that_no_identity_holds_are_in_the_key() -> None:
    from services.api.metrics import Metrics
    from services.teacher.cache.engine import CachedEngine
    from services.teacher.settings import TeacherSettings

    def digest(**fake: Any) -> bytes:
        settings = TeacherSettings.model_validate(
            {"engine": "fake", "fake": fake, "cache": {"location": "nowhere"}, "consumer": "c"}
        )
        engine = build_cached(settings, Metrics())
        assert isinstance(engine, CachedEngine)
        return teacher_digest(engine.identity, engine.variant)

    assert digest(seed=1) != digest(seed=2)
    assert digest(seed=1) == digest(seed=1)
    assert digest(seed=1, latency_seconds=1.0) == digest(seed=1)
