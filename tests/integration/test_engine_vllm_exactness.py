"""Scores of the vLLM engine against Hugging Face float32: prefill in pieces, prefix cache on."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from support.engine_requests import Reference, assert_scores, shuffled
from support.sequence_bank import BLOCK, SIGNALS, Bank
from support.tiny_models import SERVABLE, random_ids, save_tiny_model, tiny_model
from support.vllm_engines import run_vllm
from tutelage_client.types import Score, ScoreRequest, Sequence, Signal

from services.teacher.engines.vllm.engine import VllmEngine

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.asyncio(loop_scope="module")

TOLERANCE = 1e-4
EVERYTHING = Signal(sampled=True, top_k=5, candidates=True, entropy=True)


@dataclass(frozen=True)
class Shared:
    """The engine that most tests ask, and what its answers must be."""

    engine: VllmEngine
    bank: Bank
    directory: Path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shared]:
    directory = save_tiny_model(tmp_path_factory.mktemp("shared") / "model", "qwen3", shape=SERVABLE)
    bank = Bank(tiny_model("qwen3", shape=SERVABLE))
    async with run_vllm(directory) as engine:
        yield Shared(engine, bank, directory)


async def score_all(engine: VllmEngine, requests: list[ScoreRequest]) -> list[Score]:
    return list(await asyncio.gather(*(engine.score(request) for request in requests)))


def sequences_of(requests: list[ScoreRequest]) -> int:
    return sum(len(request.sequences) for request in requests)


async def test_mixed_requests_equal_plain_float32_cold_and_warm(shared: Shared) -> None:
    """All signals, temperatures and K up to the vocabulary in one batch, prefixes shared all over."""
    requests = shared.bank.requests(1, count=80)
    assert {request.signal for request in requests} == set(SIGNALS)
    cold = await score_all(shared.engine, requests)
    again = [shuffled(request, seed) for seed, request in enumerate(requests)]
    order = np.random.default_rng(0).permutation(len(again))
    warm = await score_all(shared.engine, [again[i] for i in order])
    for request, score in zip(requests, cold, strict=True):
        assert_scores(score, request, shared.bank, TOLERANCE)
    for number, score in zip(order, warm, strict=True):
        assert_scores(score, again[number], shared.bank, TOLERANCE)
    reused = [sum(score.usage.tokens_reused for score in scores) for scores in (cold, warm)]
    assert 0 < reused[0] < reused[1]
    assert shared.engine.counters.rescored == 0


async def test_equal_and_almost_equal_responses_lose_no_rows(shared: Shared) -> None:
    """What vLLM's prefix cache, left to itself, would answer without hidden states."""
    random = np.random.default_rng(2)
    reference = Reference(tiny_model("qwen3", shape=SERVABLE))
    for size in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK):
        context, response = random_ids(random, size), random_ids(random, 3 * BLOCK)
        responses = [response, response, response[:BLOCK], response[: 2 * BLOCK], response[: BLOCK + 1]]
        responses += [np.append(response[:cut], random_ids(random, 5)) for cut in (1, 31, 32, 63, 64)]
        members = [Sequence(str(i), 0, ids.astype(np.int32)) for i, ids in enumerate(responses)]
        request = ScoreRequest((context,), tuple(members), Signal(top_k=3))
        for _ in range(2):
            assert_scores(await shared.engine.score(request), request, reference, TOLERANCE)
    assert shared.engine.counters.rescored == 0


@pytest.mark.parametrize("temperature", [0.25, 0.7, 1.0, 3.0])
async def test_temperature_is_exact(shared: Shared, temperature: float) -> None:
    signal = Signal(top_k=7, candidates=True, entropy=True, temperature=temperature)
    requests = shared.bank.requests(3, 3, [signal])
    for request, score in zip(requests, await score_all(shared.engine, requests), strict=True):
        assert_scores(score, request, shared.bank, TOLERANCE)


async def test_order_neighbours_and_cache_do_not_matter(shared: Shared) -> None:
    """Cold and alone, then among others and shuffled: the same within the tolerance."""
    engine = shared.engine
    await engine.load_weights(shared.directory, 0)  # forgets every prefix
    (request,) = shared.bank.requests(4, 1, [EVERYTHING])
    alone = await engine.score(request)
    other = shuffled(request, 3)
    mixed = (await score_all(engine, [*shared.bank.requests(5, 8), other]))[-1]
    by_id = {answer.id: answer for answer in mixed.sequences}
    assert [answer.id for answer in mixed.sequences] == [sequence.id for sequence in other.sequences]
    for answer in alone.sequences:
        for name in ("sampled", "top_logprobs", "entropy", "candidate_logprobs"):
            np.testing.assert_allclose(getattr(by_id[answer.id], name), getattr(answer, name), atol=TOLERANCE)


async def check_alignment(shared: Shared, wanted: int) -> None:
    """Ask until `wanted` sequences were compared, in waves of concurrent requests."""
    done, seed, worst, began = 0, 1000, 0.0, time.perf_counter()
    while done < wanted:
        seed += 1
        requests = shared.bank.requests(seed, min(60, wanted // 4))
        for request, score in zip(requests, await score_all(shared.engine, requests), strict=True):
            assert_scores(score, request, shared.bank, TOLERANCE)
            for answer, sequence in zip(score.sequences, request.sequences, strict=True):
                if answer.sampled is not None:
                    error = np.abs(answer.sampled - shared.bank.sampled(request, sequence)).max()
                    worst = max(worst, float(error))
        done += sequences_of(requests)
    assert shared.engine.counters.rescored == 0
    print(
        f"{done} sequences, 0 mismatches, largest error {worst:.1e} nats, {time.perf_counter() - began:.0f} s"
    )


async def test_any_request_is_aligned(shared: Shared) -> None:
    await check_alignment(shared, 300)


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_ten_thousand_sequences_are_aligned(shared: Shared) -> None:
    await check_alignment(shared, 10_000)
