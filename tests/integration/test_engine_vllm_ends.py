"""vLLM engines that are short of memory, score in vLLM's own way, break, or are closed."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.engine_requests import assert_scores, random_request
from support.sequence_bank import Bank
from support.teachers import TeacherProcess, serve
from support.tiny_models import SERVABLE, VOCAB, save_tiny_model, tiny_model
from support.vllm_engines import LONGEST, SMALL, run_vllm, small_engine
from tutelage_client import AsyncTeacherClient, RetryPolicy
from tutelage_client.errors import TutelageError
from tutelage_client.types import Signal

from services.exit_status import EXIT_FAILED
from services.models.vllm_settings import VllmSettings

pytest.importorskip("vllm", reason="vLLM is not installed")

TOLERANCE = 1e-4


async def test_preempted_sequences_are_scored_right_and_closing_fails_the_rest(tmp_path: Path) -> None:
    """Twelve blocks for sequences of up to eight: vLLM takes some of them back in the middle."""
    directory = save_tiny_model(tmp_path / "model", shape=SERVABLE)
    bank = Bank(tiny_model(shape=SERVABLE))
    scarce = {
        "num_gpu_blocks_override": 13,
        "scheduler_reserve_full_isl": False,  # let sequences begin that will not fit
        "long_prefill_token_threshold": 10,  # so that several are half done at once
    }
    async with run_vllm(directory, engine_args=scarce) as engine:
        assert engine._engine is not None
        scheduler = engine._engine._core.scheduler
        preempt, preempted = scheduler._preempt_request, []

        def counting(request: Any, *arguments: Any, **options: Any) -> None:
            preempted.append(request.num_computed_tokens)
            preempt(request, *arguments, **options)

        scheduler._preempt_request = counting
        requests = bank.requests(1, 40)
        scores = await asyncio.gather(*(engine.score(request) for request in requests))
        for request, score in zip(requests, scores, strict=True):
            assert_scores(score, request, bank, TOLERANCE)
        assert sum(tokens > 0 for tokens in preempted) > 3
        assert (await engine.residue()).blocks == 0
        tasks = [asyncio.create_task(engine.score(request)) for request in requests]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait_for(engine.close(), 10)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, TutelageError)]
        assert len(failed) + sum(not isinstance(answer, BaseException) for answer in answers) == 40
        assert failed
        assert {error.code for error in failed} == {"UNAVAILABLE"}
        await asyncio.wait_for(engine.ended(), 1)
        with pytest.raises(TutelageError, match="UNAVAILABLE"):
            await engine.score(requests[0])


async def test_the_stock_way_scores_what_it_says_it_can(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "model", shape=SERVABLE)
    bank = Bank(tiny_model(shape=SERVABLE), count=8, longest=LONGEST - 1)
    async with run_vllm(directory, implementation="stock") as engine:
        assert engine.identity.engine == "vllm-stock"
        limits = engine.limits
        assert (limits.entropy, limits.temperature, limits.max_candidates) == (False, False, 0)
        assert limits.max_sequence_tokens == LONGEST - 1
        signals = [Signal(), Signal(top_k=1), Signal(sampled=False, top_k=7), Signal(top_k=VOCAB)]
        requests = bank.requests(1, 12, signals)
        for _ in range(2):
            scores = await asyncio.gather(*(engine.score(request) for request in requests))
            for request, score in zip(requests, scores, strict=True):
                assert_scores(score, request, bank, TOLERANCE)
        before = engine.counters.steps
        async with serve(engine) as doors, AsyncTeacherClient(doors.grpc) as client:
            for signal, name in (
                (Signal(entropy=True), "entropy"),
                (Signal(temperature=0.5), "temperature"),
                (Signal(candidates=True), "candidate"),
            ):
                with pytest.raises(TutelageError, match=f"INVALID_ARGUMENT.*{name}"):
                    (await client.score_request(random_request(0, signal=signal))).raise_for_errors()
        assert engine.counters.steps == before
        residue = await engine.residue()
        assert (residue.requests, residue.blocks) == (0, 0)


BROKEN_REPLICA = """
import sys
from services.models.vllm_adapter import StepEngine
from services.teacher.process import main
from services.teacher.settings import TeacherSettings

whole, steps = StepEngine.step, []

def broken(engine):
    steps.append(1)
    if len(steps) > 3:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return whole(engine)

StepEngine.step = broken
sys.exit(main(TeacherSettings.model_validate_json(sys.argv[1])))
"""


async def test_a_replica_whose_steps_always_fail_exits_1(tmp_path: Path) -> None:
    """So that whoever started it starts it anew; its callers are told to ask another."""
    save_tiny_model(tmp_path / "model", shape=SERVABLE)
    options = {"engine": "vllm", "model": str(tmp_path / "model"), "vllm": VllmSettings(**SMALL)}
    teacher = TeacherProcess(tmp_path, program=BROKEN_REPLICA, **options)
    try:
        await asyncio.to_thread(teacher.wait_ready, 60)
        async with AsyncTeacherClient(teacher.grpc, retry=RetryPolicy(attempts=1)) as client:
            calls = [client.score_request(random_request(seed), timeout=10) for seed in range(4)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        assert errors
        assert {getattr(error, "code", error) for error in errors} <= {"INTERNAL", "UNAVAILABLE"}
        assert await asyncio.to_thread(teacher.process.wait, 20) == EXIT_FAILED
    finally:
        teacher.kill()


def pruned(served: Path, other: Path) -> None:
    shutil.rmtree(served)


def replaced(served: Path, other: Path) -> None:
    shutil.rmtree(served)
    shutil.copytree(other, served)


@pytest.mark.parametrize("lose", [pruned, replaced])
async def test_an_engine_that_cannot_have_its_weights_back_ends_and_answers_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: Callable[[Path, Path], None]
) -> None:
    """New weights break off in the middle; meanwhile those that were served have left their place."""
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

    start, served, new, other = (
        save_tiny_model(tmp_path / str(seed), seed=seed, shape=SERVABLE) for seed in range(4)
    )
    whole = Qwen3ForCausalLM.load_weights

    def half(model: Any, weights: Any) -> Any:
        monkeypatch.setattr(Qwen3ForCausalLM, "load_weights", whole)
        tensors = list(weights)
        whole(model, iter(tensors[: len(tensors) // 2]))
        lose(served, other)
        raise OSError("the second half is gone")

    async with run_vllm(start) as engine:
        await engine.load_weights(served, 1)
        monkeypatch.setattr(Qwen3ForCausalLM, "load_weights", half)
        loading = asyncio.create_task(engine.load_weights(new, 2))
        await asyncio.sleep(0)
        late = asyncio.create_task(engine.score(random_request(0, shape=[(3, [2])])))  # of one step
        lost = f"INTERNAL: .* the second half is gone; {served}, which was served, cannot be loaded again"
        with pytest.raises(TutelageError, match=lost):
            await asyncio.wait_for(loading, 30)
        with pytest.raises(TutelageError, match="UNAVAILABLE: engine: closed"):
            await asyncio.wait_for(late, 30)
        await asyncio.wait_for(engine.ended(), 10)


async def test_a_model_that_vllm_cannot_serve_fails_the_start(tmp_path: Path) -> None:
    engine = small_engine(tmp_path / "nothing")
    with pytest.raises(TutelageError, match="nothing"):
        await engine.start()
    await engine.close()
