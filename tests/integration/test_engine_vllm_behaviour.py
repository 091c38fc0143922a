"""What the vLLM engine does when callers come and go, steps fail and weights change or are broken."""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import structlog
import torch
from safetensors.torch import load_file, save_file
from support.engine_requests import Reference, assert_scores
from support.sequence_bank import BLOCK, Bank
from support.teachers import serve
from support.tiny_models import SERVABLE, VOCAB, Shape, random_ids, save_tiny_model, tiny_model
from support.vllm_engines import LONGEST, run_vllm
from tutelage_client import AsyncTeacherClient
from tutelage_client.errors import TutelageError
from tutelage_client.types import PAD_ID, Score, ScoreRequest, Sequence, Signal

from services.models.fingerprint import directory_revision
from services.models.vllm_adapter import Residue, StepEngine
from services.teacher.engines.vllm.engine import VllmEngine
from services.teacher.engines.vllm.pooled import Pooled

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.asyncio(loop_scope="module")

TOLERANCE = 1e-4
NOTHING = Residue(requests=0, worker_requests=0, blocks=0)
EVERYTHING = Signal(sampled=True, top_k=5, candidates=True, entropy=True)
BLOCKS = 160  # few enough that freed blocks are soon used again


@dataclass(frozen=True)
class Shared:
    """The engine that all tests ask; directory and bank number n are of tiny_model(seed=n)."""

    engine: VllmEngine
    directories: list[Path]
    banks: list[Bank]

    @property
    def step_engine(self) -> StepEngine:
        assert self.engine._engine is not None
        return self.engine._engine

    async def fresh(self, number: int = 0) -> None:
        """Weights of directory `number`, as version `number`, and no cached prefix."""
        await self.engine.load_weights(self.directories[number], number)

    async def check(self, seed: int, number: int = 0, count: int = 4) -> None:
        """The engine answers as the model `number` would."""
        requests = self.banks[number].requests(seed, count)
        scores = await asyncio.gather(*(self.engine.score(request) for request in requests))
        for request, score in zip(requests, scores, strict=True):
            assert score.identity.weights_version == number
            assert_scores(score, request, self.banks[number], TOLERANCE)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shared]:
    root = tmp_path_factory.mktemp("models")
    directories = [save_tiny_model(root / str(seed), seed=seed, shape=SERVABLE) for seed in range(2)]
    banks = [Bank(tiny_model(seed=seed, shape=SERVABLE), count=16) for seed in range(2)]
    async with run_vllm(directories[0], engine_args={"num_gpu_blocks_override": BLOCKS}) as engine:
        yield Shared(engine, directories, banks)


@pytest_asyncio.fixture(loop_scope="module")
async def shared(served: Shared) -> AsyncIterator[Shared]:
    """Weights 0 and an empty cache before the test; nothing left behind after it."""
    await served.fresh()
    yield served
    assert await served.engine.residue() == NOTHING


class Gate:
    """Stands before every step, and notes how many sequences vLLM had at each."""

    def __init__(self, step_engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._engine = step_engine
        self._step = step_engine.step
        self._free = threading.Semaphore(0)
        self._always = False
        self.sequences: list[int] = []
        monkeypatch.setattr(step_engine, "step", self)

    def __call__(self) -> list[Any]:
        self.sequences.append(len(self._engine._core.scheduler.requests))
        if not self._always:
            assert self._free.acquire(timeout=10)
        return self._step()

    def open(self) -> None:
        self._always = True
        self._free.release()

    async def after(self, steps: int) -> None:
        """Let `steps` more steps happen, and the next one begin."""
        wanted = len(self.sequences) + steps
        for _ in range(steps):
            self._free.release()
        await until(lambda: len(self.sequences) > wanted - 1 if steps else bool(self.sequences))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in another thread
            await asyncio.sleep(0.001)


def group(seed: int, context: int, responses: list[int], signal: Signal | None = None) -> ScoreRequest:
    """Random responses of these lengths to one random context."""
    random = np.random.default_rng(seed)
    prompt = random_ids(random, context)
    members = tuple(Sequence(str(i), 0, random_ids(random, length)) for i, length in enumerate(responses))
    return ScoreRequest((prompt,), members, signal or Signal(), request_id=str(seed))


@pytest.mark.parametrize("context", [1, BLOCK, BLOCK + 1, 3 * BLOCK + 1])
async def test_a_group_computes_its_context_once(shared: Shared, context: int) -> None:
    """All whole blocks before the context's last token, whose hidden state is the first scored one."""
    blocks = (context - 1) // BLOCK * BLOCK
    first, second = group(context, context, [16] * 8), group(context, context, [16] * 8)
    second = replace(second, sequences=group(99, 1, [10] * 8).sequences)
    cold, warm = await shared.engine.score(first), await shared.engine.score(second)
    assert cold.usage.positions == 8 * 16
    assert cold.usage.tokens_reused == 7 * blocks
    assert cold.usage.tokens_computed == blocks + 8 * (context - blocks + 15)
    assert warm.usage.tokens_reused == 8 * blocks
    assert warm.usage.tokens_computed == 8 * (context - blocks + 9)


async def test_groups_that_arrive_together_share_too(shared: Shared) -> None:
    requests = [
        replace(group(7, 2 * BLOCK + 1, [1]), sequences=group(seed, 1, [12]).sequences) for seed in range(6)
    ]
    scores = await asyncio.gather(*(shared.engine.score(request) for request in requests))
    assert sum(score.usage.tokens_reused for score in scores) == 5 * 2 * BLOCK


async def test_withdrawn_requests_leave_vllm_before_the_next_step(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, before = Gate(shared.step_engine, monkeypatch), shared.engine.counters.withdrawn
    requests = [group(seed, 40, [200, 150]) for seed in range(4)]
    tasks = [asyncio.create_task(shared.engine.score(request)) for request in requests]
    await until(lambda: bool(gate.sequences))
    await gate.after(3)
    steps = len(gate.sequences)
    for task in tasks[:3]:
        task.cancel()
    late = asyncio.create_task(shared.engine.score(group(9, 5, [5])))
    await asyncio.sleep(0)
    late.cancel()
    await asyncio.sleep(0.01)
    gate.open()
    score = await tasks[3]
    assert gate.sequences[0] == 8
    assert max(gate.sequences[steps:]) == 2, "only the sequences of the last request are left"
    assert shared.engine.counters.withdrawn - before == 4
    assert_scores(score, requests[3], Reference(tiny_model(shape=SERVABLE)), TOLERANCE)


async def test_a_deadline_withdraws_what_it_cuts(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(shared.step_engine, monkeypatch)
    async with serve(shared.engine) as doors, AsyncTeacherClient(doors.grpc) as client:
        with pytest.raises(TutelageError, match="DEADLINE_EXCEEDED"):
            await client.score_request(group(0, 40, [200]), timeout=0.3)
        gate.open()
        assert await shared.engine.residue() == NOTHING


async def test_every_answer_is_by_the_weights_it_names(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under way finishes with the old weights, what comes later waits for the new ones."""
    gate = Gate(shared.step_engine, monkeypatch)
    old = shared.banks[0].requests(1, 6)
    before = [asyncio.create_task(shared.engine.score(request)) for request in old]
    await until(lambda: bool(gate.sequences))
    loading = asyncio.create_task(shared.fresh(1))
    await asyncio.sleep(0.01)
    new = shared.banks[1].requests(2, 6)
    after = [asyncio.create_task(shared.engine.score(request)) for request in new]
    await gate.after(2)
    assert not loading.done()
    gate.open()
    await loading
    for number, (requests, tasks) in enumerate([(old, before), (new, after)]):
        for request, score in zip(requests, await asyncio.gather(*tasks), strict=True):
            assert score.identity.weights_version == number
            assert score.identity.revision == directory_revision(shared.directories[number])
            assert_scores(score, request, shared.banks[number], TOLERANCE)
    assert shared.engine.identity.weights_version == 1


async def test_new_weights_forget_the_prefixes_of_the_old(shared: Shared) -> None:
    request = group(3, 4 * BLOCK, [20])
    assert (await shared.engine.score(request)).usage.tokens_reused == 0
    assert (await shared.engine.score(request)).usage.tokens_reused == 3 * BLOCK
    await shared.fresh(1)
    score = await shared.engine.score(request)
    assert score.usage.tokens_reused == 0
    assert_scores(score, request, Reference(tiny_model(seed=1, shape=SERVABLE)), TOLERANCE)


def without_a_tensor(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path / "model.safetensors")


def without_its_head(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def with_another_scale(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))


def with_another_shape(path: Path) -> None:
    wide = Shape(**{**vars(SERVABLE), "intermediate": 96})
    save_tiny_model(path, shape=wide)


def another_architecture(path: Path) -> None:
    save_tiny_model(path, "gpt2", shape=SERVABLE)


def truncated(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def empty(path: Path) -> None:
    (path / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_a_tensor, r"model\.layers\.1\.mlp\.up_proj"),
        (without_its_head, r"lm_head\.weight"),
        (with_another_shape, "intermediate_size = 96, here it is"),
        (with_another_scale, "rms_norm_eps = 0.5, here it is"),
        (another_architecture, r"config\.json of"),
        (truncated, "no whole safetensors file"),
        (empty, "no safetensors file"),
    ],
)
async def test_weights_that_do_not_fit_are_refused_and_the_old_ones_score(
    shared: Shared, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "spoilt"
    shutil.copytree(shared.directories[1], path)
    spoil(path)
    before = shared.engine.identity
    with pytest.raises(TutelageError, match=message):
        await shared.engine.load_weights(path, 1)
    assert shared.engine.identity == before
    await shared.check(4)


async def test_weights_that_break_off_half_way_are_never_scored_with(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

    whole, calls = Qwen3ForCausalLM.load_weights, []

    def half(model: Any, weights: Any) -> Any:
        tensors = list(weights)
        calls.append(len(tensors))
        if len(calls) > 1:
            return whole(model, iter(tensors))
        whole(model, iter(tensors[: len(tensors) // 2]))
        raise OSError("the second half is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Qwen3ForCausalLM, "load_weights", half)
        with pytest.raises(TutelageError, match="the second half is gone"):
            await shared.fresh(1)
    assert shared.engine.identity.weights_version == 0
    await shared.check(5)


async def test_a_step_that_fails_once_is_not_seen_by_innocents(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, failures = shared.step_engine.step, []

    def fragile() -> list[Any]:
        outputs = step()
        if len(shared.step_engine._core.scheduler.requests) > 4 and not failures:
            failures.append(1)
            raise RuntimeError("kernel launch failed")
        return outputs

    monkeypatch.setattr(shared.step_engine, "step", fragile)
    await shared.check(6, count=6)
    assert failures


async def test_a_request_that_breaks_every_step_fails_alone(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, scheduler = shared.step_engine.step, shared.step_engine._core.scheduler
    bad = group(8, 10, [77])

    def fragile() -> list[Any]:
        if any(request.num_prompt_tokens == 10 + 76 for request in scheduler.requests.values()):
            raise RuntimeError("kernel launch failed")
        return step()

    monkeypatch.setattr(shared.step_engine, "step", fragile)
    others = [request for request in shared.banks[0].requests(9, 8) if not is_like(request, 86)]
    tasks = [asyncio.create_task(shared.engine.score(request)) for request in [*others, bad]]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    refused = answers.pop()
    assert isinstance(refused, TutelageError)
    assert refused.code == "INTERNAL"
    for request, score in zip(others, answers, strict=True):
        assert isinstance(score, Score), score
        assert_scores(score, request, shared.banks[0], TOLERANCE)
    with pytest.raises(TutelageError, match="INTERNAL"):
        await shared.engine.score(bad)
    await shared.check(10)


def is_like(request: ScoreRequest, prompt: int) -> bool:
    return any(
        len(request.contexts[sequence.context]) + len(sequence.response_ids) - 1 == prompt
        for sequence in request.sequences
    )


async def test_a_request_that_vllm_does_not_take_fails_alone(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = shared.step_engine.add

    def picky(request_id: str, prompt_ids: list[int], params: Any, adapter: str | None) -> None:
        if len(prompt_ids) == 10 + 76:
            raise ValueError("not this one")
        add(request_id, prompt_ids, params, adapter)

    monkeypatch.setattr(shared.step_engine, "add", picky)
    others = shared.check(11, count=3)
    refused = shared.engine.score(group(8, 10, [5, 77, 5]))
    answers = await asyncio.gather(others, refused, return_exceptions=True)
    assert answers[0] is None, answers[0]
    assert isinstance(answers[1], TutelageError)
    assert "not this one" in answers[1].message


async def test_rows_that_the_cache_swallowed_are_computed_again(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the cap on prefix hits, as after a change inside vLLM: slower, never wrong."""
    manager = shared.step_engine._core.scheduler.kv_cache_manager
    request = group(12, 2 * BLOCK, [3 * BLOCK, 10], Signal(top_k=3, entropy=True))
    reference = Reference(tiny_model(shape=SERVABLE))
    assert_scores(await shared.engine.score(request), request, reference, TOLERANCE)
    monkeypatch.delattr(manager, "get_computed_blocks")
    before = shared.engine.counters.rescored
    with structlog.testing.capture_logs() as logs:
        score = await shared.engine.score(request)
    assert_scores(score, request, reference, TOLERANCE)
    assert shared.engine.counters.rescored - before >= 1
    assert "rows_missing" in [entry["event"] for entry in logs]
    await shared.check(13, count=20)


def poisoned(shared: Shared, path: Path, name: str, row: int, value: float) -> Path:
    shutil.copytree(shared.directories[0], path)
    state = load_file(path / "model.safetensors")
    state[name][row] = value
    save_file(state, path / "model.safetensors")
    return path


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
async def test_a_broken_embedding_masks_only_what_depends_on_it(
    shared: Shared, tmp_path: Path, value: float
) -> None:
    path = poisoned(shared, tmp_path / "broken", "model.embed_tokens.weight", VOCAB - 1, value)
    random = np.random.default_rng(0)
    context = random.integers(0, VOCAB - 1, size=2 * BLOCK + 1).astype(np.int32)
    responses = [random.integers(0, VOCAB - 1, size=60).astype(np.int32) for _ in range(12)]
    for ids in responses[::2]:
        ids[20] = VOCAB - 1  # read from row 21 on
    members = tuple(
        Sequence(str(i), 0, ids, np.full((60, 2), 9, dtype=np.int32)) for i, ids in enumerate(responses)
    )
    request = ScoreRequest((context,), members, EVERYTHING)
    await shared.engine.load_weights(path, 0)
    async with serve(shared.engine) as doors, AsyncTeacherClient(doors.grpc) as client:
        score = (await client.score_request(request)).raise_for_errors()
        counted = doors.core.metrics.invalid_positions._value.get()
    reference = Reference(tiny_model(shape=SERVABLE))
    invalid = 0
    for number, (answer, sequence) in enumerate(zip(score.sequences, members, strict=True)):
        assert answer.valid is not None
        assert answer.sampled is not None
        assert answer.top_ids is not None
        valid = answer.valid
        if number % 2:
            assert valid.all(), "its neighbours are broken, it is not"
        assert not valid[21:].any() or number % 2
        invalid += int((~valid).sum())
        sampled = reference.sampled(request, sequence)
        np.testing.assert_allclose(answer.sampled[valid], sampled[valid], atol=TOLERANCE)
        for array in (answer.sampled, answer.top_logprobs, answer.candidate_logprobs, answer.entropy):
            assert array is not None
            assert np.isnan(array[~valid]).all()
            assert np.isfinite(array[valid]).all()
        assert (answer.top_ids[~valid] == PAD_ID).all()
    assert counted == invalid
    await shared.fresh()
    await shared.check(14, count=60)  # in blocks that still hold what was not finite


async def test_one_bad_row_of_the_head_masks_every_position(shared: Shared, tmp_path: Path) -> None:
    await shared.engine.load_weights(poisoned(shared, tmp_path / "m", "lm_head.weight", 7, torch.nan), 0)
    score = await shared.engine.score(group(15, 40, [30, 1], Signal(top_k=3, entropy=True)))
    assert not np.concatenate([answer.valid for answer in score.sequences]).any()  # type: ignore[misc]


async def test_sizes_at_the_models_limit_pass_and_one_over_never_reaches_vllm(shared: Shared) -> None:
    whole, over = group(16, LONGEST - 1, [1]), group(16, LONGEST - 1, [2])
    long = group(17, 1, [LONGEST - 1], Signal(top_k=VOCAB))
    refused = [over, group(17, 1, [LONGEST]), replace(whole, signal=Signal(top_k=VOCAB + 1))]
    reference = Reference(tiny_model(shape=SERVABLE))
    assert shared.engine.limits.max_sequence_tokens == LONGEST
    assert shared.engine.limits.max_top_k == VOCAB
    async with serve(shared.engine) as doors, AsyncTeacherClient(doors.grpc) as client:
        for request in (whole, long):
            score = (await client.score_request(request)).raise_for_errors()
            assert_scores(score, request, reference, TOLERANCE)
        before = shared.engine.counters.steps
        for request in refused:
            times = []
            for _ in range(5):
                began = time.perf_counter()
                with pytest.raises(TutelageError, match="INVALID_ARGUMENT"):
                    (await client.score_request(request)).raise_for_errors()
                times.append(time.perf_counter() - began)
            assert min(times) <= 0.010
        assert shared.engine.counters.steps == before


async def test_rows_missing_twice_fail_their_request_and_nothing_else(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Pooled, "answer", lambda *_: None)
        with pytest.raises(TutelageError, match="fewer rows"):
            await asyncio.wait_for(shared.engine.score(group(5, BLOCK, [5, 5, 5])), 30)
    request = group(6, BLOCK, [5, 5])
    assert len((await shared.engine.score(request)).sequences) == 2
    assert await shared.engine.residue() == NOTHING
