"""What the transformers engine does when weights are broken or change, and callers come and go."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from support.engine_requests import Reference, assert_scores, random_request, run_engine
from support.tiny_models import VOCAB, save_tiny_model, tiny_model
from tutelage_client.errors import TutelageError
from tutelage_client.types import PAD_ID, Limits, ScoreRequest, Sequence, Signal

from services.models.fingerprint import directory_revision
from services.teacher.engines.batching import Unit
from services.teacher.engines.forward import BatchScores, PackedScorer
from services.teacher.engines.transformers import TransformersEngine

EVERYTHING = Signal(sampled=True, top_k=5, candidates=True, entropy=True)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[TransformersEngine]:
    async with run_engine(save_tiny_model(tmp_path / "model")) as engine:
        yield engine


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Callable[[], "Gate"]:
    def install() -> Gate:
        held = Gate(PackedScorer.score)
        monkeypatch.setattr(PackedScorer, "score", held)
        return held

    return install


class Gate:
    """Stands in the way of every forward pass, and notes what goes through."""

    def __init__(self, score: Callable[[PackedScorer, list[Unit]], BatchScores]) -> None:
        self._score = score
        self._open = threading.Event()
        self.entered = threading.Event()
        self.seen: list[str] = []

    def __get__(self, scorer: PackedScorer, owner: type) -> Callable[[list[Unit]], BatchScores]:
        return lambda batch: self(scorer, batch)

    def __call__(self, scorer: PackedScorer, batch: list[Unit]) -> BatchScores:
        self.seen += [unit.job.request.request_id for unit in batch]
        self.entered.set()
        assert self._open.wait(10)
        return self._score(scorer, batch)

    def open(self) -> None:
        self._open.set()

    async def until_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 10)


def named(name: str, seed: int = 0, **settings: Any) -> ScoreRequest:
    request = random_request(seed, **settings)
    return ScoreRequest(request.contexts, request.sequences, request.signal, request_id=name)


def break_weights(engine: TransformersEngine, change: Callable[[Any], None]) -> None:
    assert engine._scorer is not None
    with torch.no_grad():
        change(engine._scorer.loaded.model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
async def test_a_broken_embedding_masks_only_what_depends_on_it(
    engine: TransformersEngine, value: float
) -> None:
    def poison(model: Any) -> None:
        model.get_input_embeddings().weight[60] = value

    clean_ids = np.array([3, 4, 5, 6], dtype=np.int32)
    poisoned_ids = np.array([3, 60, 5, 6], dtype=np.int32)
    context = np.array([7, 8], dtype=np.int32)
    candidates = np.full((4, 2), 9, dtype=np.int32)
    sequences = tuple(
        Sequence(name, 0, ids, candidates) for name, ids in (("clean", clean_ids), ("poisoned", poisoned_ids))
    )
    request = ScoreRequest((context,), sequences, EVERYTHING)
    before = await engine.score(request)
    break_weights(engine, poison)
    after = await engine.score(request)
    clean, poisoned = after.sequences
    np.testing.assert_allclose(clean.sampled, before.sequences[0].sampled, atol=1e-4)
    assert clean.valid is not None
    assert clean.valid.all()
    assert poisoned.valid is not None
    assert not poisoned.valid[2:].any()
    for array in (poisoned.sampled, poisoned.top_logprobs, poisoned.candidate_logprobs, poisoned.entropy):
        assert array is not None
        assert np.isnan(array[~poisoned.valid]).all()
        assert np.isfinite(array[poisoned.valid]).all()
    assert poisoned.top_ids is not None
    assert (poisoned.top_ids[~poisoned.valid] == PAD_ID).all()
    assert engine.counters.invalid_positions == int((~poisoned.valid).sum())


async def test_one_bad_row_of_the_head_masks_every_position(engine: TransformersEngine) -> None:
    break_weights(engine, lambda model: model.lm_head.weight[7].fill_(torch.nan))
    request = random_request(0, signal=EVERYTHING)
    score = await engine.score(request)
    assert not np.concatenate([answer.valid for answer in score.sequences]).any()
    assert engine.counters.invalid_positions == score.usage.positions


async def test_a_request_withdrawn_before_it_began_is_never_computed(
    engine: TransformersEngine, gate: Callable[[], Gate]
) -> None:
    held = gate()
    first = asyncio.ensure_future(engine.score(named("first")))
    await held.until_entered()
    second = asyncio.ensure_future(engine.score(named("second")))
    third = asyncio.ensure_future(engine.score(named("third")))
    await asyncio.sleep(0.01)
    second.cancel()
    held.open()
    await asyncio.gather(first, third)
    assert second.cancelled()
    assert sorted(set(held.seen)) == ["first", "third"]
    assert engine.dropped_requests == 1


async def test_a_withdrawn_request_stops_between_its_forward_passes(
    tmp_path: Path, gate: Callable[[], Gate]
) -> None:
    async with run_engine(save_tiny_model(tmp_path / "model"), max_batch_tokens=16) as engine:
        held = gate()
        long = asyncio.ensure_future(engine.score(named("long", shape=[(4, [9] * 30)])))
        await held.until_entered()
        long.cancel()
        await asyncio.sleep(0.01)
        held.open()
        await engine.score(named("next", shape=[(4, [4])]))
        assert held.seen == ["long", "next"]
        assert engine.dropped_requests == 1


async def test_a_failing_request_fails_alone(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = PackedScorer.score

    def fragile(scorer: PackedScorer, batch: list[Unit]) -> BatchScores:
        if any(unit.job.request.request_id == "bad" for unit in batch):
            raise RuntimeError("kernel launch failed")
        time.sleep(0.05)  # the others gather in the line
        return honest(scorer, batch)

    monkeypatch.setattr(PackedScorer, "score", fragile)
    names = ["a", "b", "bad", "c"]
    with structlog.testing.capture_logs() as logs:
        answers = await asyncio.gather(*(engine.score(named(n)) for n in names), return_exceptions=True)
    assert [entry["event"] for entry in logs] == ["batch_failed"]
    for name, answer in zip(names, answers, strict=True):
        if name == "bad":
            assert isinstance(answer, TutelageError)
            assert answer.code == "INTERNAL"
        else:
            assert not isinstance(answer, BaseException)
            assert answer.request_id == name
    assert (await engine.score(named("after"))).request_id == "after"


async def test_the_engine_outlives_a_fault_of_its_own(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*_: Any) -> None:
        raise ZeroDivisionError("a bug after the forward pass")

    with monkeypatch.context() as patched, structlog.testing.capture_logs():
        patched.setattr(TransformersEngine, "_record", faulty)
        with pytest.raises(TutelageError, match=r"INTERNAL.*ZeroDivisionError"):
            await engine.score(named("unlucky"))
    assert (await engine.score(named("after"))).request_id == "after"


async def test_scoring_does_not_block_the_event_loop(
    engine: TransformersEngine, gate: Callable[[], Gate]
) -> None:
    held = gate()
    pending = asyncio.ensure_future(engine.score(named("slow")))
    await held.until_entered()
    beats = 0
    for _ in range(10):
        await asyncio.sleep(0.01)
        beats += 1
    assert beats == 10
    assert not pending.done()
    held.open()
    score = await pending
    assert score.usage.compute_ms >= 80


async def test_every_answer_is_by_the_weights_it_names(tmp_path: Path) -> None:
    directories = [save_tiny_model(tmp_path / str(seed), seed=seed) for seed in range(3)]
    references = [Reference(tiny_model(seed=seed)) for seed in range(3)]
    async with run_engine(directories[0], max_batch_tokens=48) as engine:
        requests = [random_request(seed) for seed in range(45)]
        tasks = []
        for number, request in enumerate(requests):
            tasks.append(asyncio.ensure_future(engine.score(request)))
            if number in (15, 30):
                await tasks[number - 10]
                version = number // 15
                await engine.load_weights(directories[version], version)
        for request, score in zip(requests, await asyncio.gather(*tasks), strict=True):
            version = score.identity.weights_version
            assert score.identity.revision == directory_revision(directories[version])
            assert_scores(score, request, references[version], tolerance=1e-4)
        assert engine.identity.weights_version == 2


async def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    before = engine.identity
    with pytest.raises(TutelageError, match="another architecture"):
        await engine.load_weights(save_tiny_model(tmp_path / "other", "gpt2"), 1)
    assert engine.identity == before
    request = random_request(0)
    assert_scores(await engine.score(request), request, Reference(tiny_model()), tolerance=1e-4)


async def test_closing_answers_everyone(engine: TransformersEngine, gate: Callable[[], Gate]) -> None:
    held = gate()
    running = asyncio.ensure_future(engine.score(named("running")))
    await held.until_entered()
    waiting = asyncio.ensure_future(engine.score(named("waiting")))
    await asyncio.sleep(0.01)
    closing = asyncio.ensure_future(engine.close())
    with pytest.raises(TutelageError, match="UNAVAILABLE"):
        await waiting
    held.open()
    await closing
    assert (await running).request_id == "running"
    with pytest.raises(TutelageError, match="UNAVAILABLE"):
        await engine.score(named("late"))


async def test_identity_and_limits_are_the_models(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "model")
    engine = TransformersEngine(
        directory, name="maths", device="cpu", threads=1, limits=Limits(max_top_k=500)
    )
    with pytest.raises(TutelageError, match="UNAVAILABLE"):
        _ = engine.identity
    await engine.start()
    try:
        assert engine.identity.name == "maths"
        assert engine.identity.revision == directory_revision(directory)
        assert engine.identity.vocab_size == VOCAB
        assert (engine.identity.dtype, engine.identity.head_dtype) == ("float32", "float32")
        assert engine.limits.max_top_k == VOCAB
        assert engine.limits.max_sequence_tokens == 2048
    finally:
        await engine.close()


async def test_a_model_that_cannot_be_loaded_fails_the_start(tmp_path: Path) -> None:
    engine = TransformersEngine(tmp_path / "nothing", device="cpu", threads=1)
    with pytest.raises(TutelageError, match="model: could not load"):
        await engine.start()
    await engine.close()


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # the thread ends, as it should
async def test_a_log_that_cannot_be_written_keeps_nobody_waiting(tmp_path: Path) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> Any:
        raise OSError("stderr is gone")

    structlog.configure(processors=[broken])
    engine = TransformersEngine(save_tiny_model(tmp_path / "model"), device="cpu", threads=1)
    with pytest.raises(TutelageError, match="stderr is gone"):
        await asyncio.wait_for(engine.start(), timeout=30)
    with pytest.raises(TutelageError, match="closed"):
        await engine.score(random_request(0))
    await engine.close()


async def test_closing_does_not_wait_for_a_model_that_keeps_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, release = threading.Event(), threading.Event()

    def slow(*_args: Any, **_kwargs: Any) -> None:
        entered.set()
        release.wait(30)
        raise TutelageError("UNAVAILABLE", "model: too late")

    monkeypatch.setattr("services.teacher.engines.transformers.load_causal_lm", slow)
    engine = TransformersEngine(tmp_path / "model", device="cpu", threads=1)
    starting = asyncio.create_task(engine.start())
    try:
        assert await asyncio.to_thread(entered.wait, 10)
        starting.cancel()
        await asyncio.wait_for(engine.close(), timeout=5)
    finally:
        release.set()


async def test_closing_does_not_wait_for_a_forward_pass_that_takes_long(
    engine: TransformersEngine, gate: Callable[[], Gate]
) -> None:
    held = gate()
    scoring = asyncio.create_task(engine.score(random_request(0)))
    try:
        assert await asyncio.to_thread(held.entered.wait, 10)
        await asyncio.wait_for(engine.close(), timeout=5)
    finally:
        held.open()
    await scoring
