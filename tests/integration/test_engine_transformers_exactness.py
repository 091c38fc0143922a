"""Scores of the transformers engine against Hugging Face float32, one sequence at a time."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_requests import Reference, assert_scores, random_request, run_engine, shuffled
from support.tiny_models import NOT_PACKABLE, PACKABLE, VOCAB, save_tiny_model, tiny_model
from tutelage_client.types import Score, ScoreRequest, Sequence, Signal

from services.teacher.engines.transformers import TransformersEngine

ARCHITECTURES = [
    "qwen3",
    "llama",
    "gemma2",
    "gemma3",
    "mistral",
    "gpt2",
    "qwen3_moe",
    "mixtral",
    *NOT_PACKABLE,
]
EVERYTHING = Signal(sampled=True, top_k=5, candidates=True, entropy=True)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[TransformersEngine]:
    """A Mistral with a window of 4 tokens."""
    async with run_engine(save_tiny_model(tmp_path / "model", "mistral")) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(tiny_model("mistral"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_every_signal_equals_plain_float32(architecture: str, tmp_path: Path) -> None:
    reference = Reference(tiny_model(architecture))
    request = random_request(0, signal=EVERYTHING)
    async with run_engine(save_tiny_model(tmp_path / "model", architecture)) as engine:
        score = await engine.score(request)
    assert_scores(score, request, reference, tolerance=1e-4)


@pytest.mark.parametrize("architecture", [name for name in PACKABLE if name in ARCHITECTURES])
async def test_bfloat16_stays_near_float32_of_the_same_weights(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, spread=0.1).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    reference = Reference(model.float())
    request = random_request(0, sequences=60)
    async with run_engine(tmp_path / "model", dtype="bfloat16") as engine:
        score = await engine.score(request)
        assert (engine.identity.dtype, engine.identity.head_dtype) == ("bfloat16", "float32")
    errors = np.concatenate([
        np.abs(answer.sampled - reference.sampled(request, sequence))
        for answer, sequence in zip(score.sequences, request.sequences, strict=True)
    ])  # fmt: skip
    print(architecture, "mean", errors.mean(), "p99", np.quantile(errors, 0.99))
    assert errors.mean() <= 5e-3
    assert np.quantile(errors, 0.99) <= 5e-2


@pytest.mark.parametrize("temperature", [0.25, 0.7, 1.0, 3.0])
async def test_temperature_is_exact(
    engine: TransformersEngine, reference: Reference, temperature: float
) -> None:
    signal = Signal(top_k=7, candidates=True, entropy=True, temperature=temperature)
    request = random_request(1, signal=signal)
    assert_scores(await engine.score(request), request, reference, tolerance=1e-4)


async def test_requests_of_different_signals_share_a_batch(
    engine: TransformersEngine, reference: Reference
) -> None:
    import asyncio

    signals = [
        Signal(),
        Signal(sampled=False, top_k=3),
        Signal(top_k=3, temperature=0.5),
        Signal(candidates=True, entropy=True),
        Signal(sampled=False, entropy=True),
    ]
    requests = [random_request(i, signal=signal) for i, signal in enumerate(signals * 4)]
    before = engine.counters.batches
    scores = await asyncio.gather(*(engine.score(request) for request in requests))
    assert engine.counters.batches - before < len(requests) / 2
    for score, request in zip(scores, requests, strict=True):
        assert_scores(score, request, reference, tolerance=1e-4)


async def test_order_and_neighbours_do_not_matter(engine: TransformersEngine) -> None:
    import asyncio

    request = random_request(2, signal=EVERYTHING)
    alone = await engine.score(request)
    other = shuffled(request, 3)
    mixed = (
        await asyncio.gather(engine.score(random_request(9)), engine.score(other), engine.score(request))
    )[1]
    by_id = {answer.id: answer for answer in mixed.sequences}
    assert [answer.id for answer in mixed.sequences] == [sequence.id for sequence in other.sequences]
    for answer in alone.sequences:
        assert answer.sampled is not None
        np.testing.assert_allclose(by_id[answer.id].sampled, answer.sampled, atol=1e-4)
        np.testing.assert_allclose(by_id[answer.id].entropy, answer.entropy, atol=1e-4)


def test_any_request_is_aligned(tmp_path: Path, reference: Reference) -> None:
    """Hypothesis: ragged, shared, one-token contexts and responses, budgets that cut requests."""
    import asyncio

    directory = save_tiny_model(tmp_path / "model", "mistral")
    with asyncio.Runner() as runner:
        holder = run_engine(directory, max_batch_tokens=12)
        engine = runner.run(holder.__aenter__())

        @settings(max_examples=80, deadline=None)
        @given(
            shape=st.lists(
                st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)),
                min_size=1,
                max_size=4,
            ),
            seed=st.integers(0, 2**32 - 1),
        )
        def check(shape: list[tuple[int, list[int]]], seed: int) -> None:
            request = random_request(seed, shape=shape)
            assert_scores(runner.run(engine.score(request)), request, reference, tolerance=1e-4)

        check()
        runner.run(holder.__aexit__(None, None, None))


async def test_long_requests_are_cut_to_the_budget_and_usage_says_so(
    tmp_path: Path, reference: Reference
) -> None:
    request = random_request(4, shape=[(20, [5] * 12)])
    async with run_engine(save_tiny_model(tmp_path / "model", "mistral"), max_batch_tokens=40) as engine:
        score = await engine.score(request)
        assert engine.counters.batches == 3  # 20 + 5·4 rows fit 40 tokens
    assert_scores(score, request, reference, tolerance=1e-4)
    assert score.usage.positions == 60
    assert score.usage.tokens_computed == 3 * 20 + 12 * 4
    assert score.usage.tokens_computed + score.usage.tokens_reused == 12 * 24


async def test_equal_contexts_of_different_requests_are_computed_once(
    engine: TransformersEngine, reference: Reference
) -> None:
    import asyncio

    first = random_request(5, shape=[(20, [5])])
    contexts = first.contexts
    requests = [
        ScoreRequest(contexts, (Sequence("0", 0, np.arange(i, i + 6, dtype=np.int32)),)) for i in range(8)
    ]
    blocker = asyncio.ensure_future(engine.score(random_request(6, sequences=60)))
    scores: list[Score] = await asyncio.gather(*(engine.score(request) for request in requests))
    await blocker
    assert sum(score.usage.tokens_computed for score in scores) == 20 + 8 * 5
    for score, request in zip(scores, requests, strict=True):
        assert_scores(score, request, reference, tolerance=1e-4)


async def test_deterministic_scores_do_not_depend_on_neighbours(tmp_path: Path) -> None:
    import asyncio

    directory = save_tiny_model(tmp_path / "model", "qwen3_moe")
    request = random_request(7, sequences=20, signal=EVERYTHING)
    async with run_engine(directory, deterministic=True, max_batch_tokens=64) as engine:
        alone = await engine.score(request)
        scores = await asyncio.gather(
            *(engine.score(random_request(i)) for i in range(10)), engine.score(request)
        )
    for ours, theirs in zip(alone.sequences, scores[-1].sequences, strict=True):
        for name in ("sampled", "top_ids", "top_logprobs", "candidate_logprobs", "entropy", "valid"):
            a: Any = getattr(ours, name)
            b: Any = getattr(theirs, name)
            assert a.tobytes() == b.tobytes(), name


def test_reference_vocabulary_is_the_models() -> None:
    assert tiny_model("mistral").lm_head.weight.shape[0] == VOCAB
