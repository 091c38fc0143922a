"""The fake engine gives a real distribution that no misaligned caller can match by accident."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tutelage_client import Score, SequenceScore, Signal, TutelageError, codec

from services.teacher.engines.fake import FakeEngine, FakeSettings

VOCAB = 50
EVERYTHING = Signal(True, 5, True, True)
lists_of_ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


def score(
    context: list[int], response: list[int], signal: Signal = EVERYTHING, **options: Any
) -> SequenceScore:
    engine = FakeEngine(FakeSettings(vocab_size=VOCAB, **options))
    ids = [np.tile(np.arange(-1, VOCAB, dtype=np.int32), (len(response), 1))]
    request = codec.build_request([context], [response], candidate_ids=ids, signal=signal)
    return asyncio.run(engine.score(request)).sequences[0]


@settings(max_examples=40, deadline=None)
@given(lists_of_ids, lists_of_ids, st.sampled_from([0.25, 1.0, 3.0]))
def test_all_signals_describe_one_normalised_distribution(
    context: list[int], response: list[int], temperature: float
) -> None:
    got = score(context, response, Signal(True, 5, True, True, temperature))
    assert got.candidate_logprobs is not None
    assert np.isnan(got.candidate_logprobs[:, 0]).all()  # the pad
    full = got.candidate_logprobs[:, 1:].astype(np.float64)  # [R, V]
    np.testing.assert_allclose(np.exp(full).sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(got.sampled, got.candidate_logprobs[:, 1:][range(len(response)), response])
    np.testing.assert_array_equal(got.top_ids, np.argsort(-full, axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(got.top_logprobs, -np.sort(-full, axis=1)[:, :5])
    np.testing.assert_allclose(got.entropy, -(np.exp(full) * full).sum(axis=1), atol=1e-4)


def test_temperature_scales_the_logits_exactly() -> None:
    at_one = score([1, 2], [3, 4]).candidate_logprobs[:, 1:].astype(np.float64)  # type: ignore[index]
    at_two = score([1, 2], [3, 4], Signal(True, 5, True, True, 2.0)).candidate_logprobs[:, 1:]  # type: ignore[index]
    scaled = at_one / 2
    np.testing.assert_allclose(at_two, scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True)), atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(lists_of_ids, lists_of_ids, st.integers(1, 11))
def test_a_position_depends_only_on_what_precedes_it(
    context: list[int], response: list[int], split: int
) -> None:
    split = min(split, len(response) - 1)
    whole = score(context, response)
    if split:
        rest = score(context + response[:split], response[split:])
        np.testing.assert_array_equal(whole.sampled[split:], rest.sampled)  # type: ignore[index]
        np.testing.assert_array_equal(whole.top_ids[split:], rest.top_ids)  # type: ignore[index]


def test_a_shift_by_one_changes_nearly_every_score() -> None:
    rng = np.random.default_rng(0)
    context, response = rng.integers(0, VOCAB, 8).tolist(), rng.integers(0, VOCAB, 200).tolist()
    right = score(context, response)
    for wrong in (
        score(context[1:], response),
        score([*context, 7], response),
        score(context[::-1], response),
    ):
        assert (wrong.sampled == right.sampled).mean() < 0.1
        assert (wrong.top_ids == right.top_ids).all(axis=1).mean() < 0.1  # type: ignore[union-attr]


def test_equal_seeds_agree_and_other_seeds_and_weights_do_not(tmp_path) -> None:  # type: ignore[no-untyped-def]
    one, same, other = (score([1], list(range(20)), seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.sampled, same.sampled)
    assert (one.sampled != other.sampled).mean() > 0.9

    async def after_new_weights() -> Score:
        engine = FakeEngine(FakeSettings(vocab_size=VOCAB))
        await engine.load_weights(tmp_path, 1)
        return await engine.score(codec.build_request([[1]], [list(range(20))]))

    renewed = asyncio.run(after_new_weights())
    assert renewed.identity.weights_version == 1
    assert (renewed.sequences[0].sampled != one.sampled).mean() > 0.9


async def test_an_answer_under_way_while_weights_change_is_by_those_it_names(tmp_path: Path) -> None:
    response = np.arange(20_000, dtype=np.int32) % VOCAB
    request = codec.build_request([[1]], [response, response])  # computed in two goes, with a pause between
    scores = {}
    for number, stamp in ((3, "a"), (3, "b")):
        engine = FakeEngine(FakeSettings(vocab_size=VOCAB))
        await engine.load_weights(tmp_path, number, stamp)
        running = asyncio.create_task(engine.score(request))
        await asyncio.sleep(0)
        await engine.load_weights(tmp_path, 9, "later")
        scores[stamp] = await running
        assert (scores[stamp].identity.weights_version, scores[stamp].identity.weights_id) == (number, stamp)
        first, second = scores[stamp].sequences
        np.testing.assert_array_equal(first.sampled, second.sampled)
    assert (scores["a"].sequences[0].sampled != scores["b"].sequences[0].sampled).mean() > 0.9


async def test_rate_is_kept_and_a_cancelled_request_gives_its_time_back() -> None:
    engine = FakeEngine(FakeSettings(vocab_size=VOCAB, tokens_per_second=1000))
    request = codec.build_request([[1] * 10], [[2] * 40])
    began = time.perf_counter()
    tasks = [asyncio.create_task(engine.score(request)) for _ in range(6)]
    await asyncio.sleep(0.01)
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert 0.2 <= time.perf_counter() - began <= 0.5  # five times 50 ms


async def test_faults_are_injected_as_told() -> None:
    request = codec.build_request([[1]], [[2, 3]])
    for options, text in (
        ({"failure_rate": 1.0}, "INTERNAL"),
        ({"disconnect_rate": 1.0}, "UNAVAILABLE"),
        ({"poison_token": 3}, "a response has token 3"),
    ):
        with pytest.raises(TutelageError, match=text):
            await FakeEngine(FakeSettings(vocab_size=VOCAB, **options)).score(request)
    half = FakeEngine(FakeSettings(vocab_size=VOCAB, failure_rate=0.5))
    answers = await asyncio.gather(*[half.score(request) for _ in range(200)], return_exceptions=True)
    assert 60 <= sum(isinstance(answer, TutelageError) for answer in answers) <= 140


def test_speed_is_enough_to_load_the_wire() -> None:
    engine = FakeEngine(FakeSettings(vocab_size=32_000))
    request = codec.build_request([[1]], [np.arange(2048) % 100], signal=Signal(top_k=64))

    async def fastest() -> float:
        times = []
        for _ in range(20):
            began = time.perf_counter()
            await engine.score(request)
            times.append(time.perf_counter() - began)
        return min(times)

    assert 2048 / asyncio.run(fastest()) >= 1_000_000  # several million on an idle machine
