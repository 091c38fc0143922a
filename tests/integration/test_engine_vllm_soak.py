"""Random requests, many at once, through gRPC to a vLLM teacher: right or refused, and nothing stays."""

import asyncio
import gc
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from support.engine_requests import assert_scores
from support.sequence_bank import SIGNALS, Bank
from support.teachers import serve
from support.tiny_models import SERVABLE, VOCAB, save_tiny_model, tiny_model
from support.vllm_engines import LONGEST, run_vllm
from tutelage_client import AsyncTeacherClient, RetryPolicy
from tutelage_client.errors import TutelageError
from tutelage_client.types import ScoreRequest, Sequence, Signal

from services.models.vllm_adapter import Residue
from services.teacher.engines.vllm.engine import VllmEngine

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.asyncio(loop_scope="module")

TOLERANCE = 1e-4
AT_ONCE = 24
DEADLINE, SHORT_DEADLINE = 60.0, 0.1
# What a caller may be told, by what it did; everything else must be scored.
ALLOWED = {
    "sound": {"RESOURCE_EXHAUSTED"},
    "cancelled": {"RESOURCE_EXHAUSTED", "CANCELLED"},
    "hurried": {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"},
    "too long": {"INVALID_ARGUMENT"},
    "too many": {"INVALID_ARGUMENT"},
}
KINDS = ["sound"] * 12 + ["cancelled"] * 4 + ["hurried"] * 2 + ["too long", "too many"]


@dataclass(frozen=True)
class Teacher:
    engine: VllmEngine
    bank: Bank


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def teacher(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Teacher]:
    """Few blocks, so that prefixes are evicted all the time."""
    directory = save_tiny_model(tmp_path_factory.mktemp("soak") / "model", "qwen3", shape=SERVABLE)
    bank = Bank(tiny_model("qwen3", shape=SERVABLE), count=48, longest=LONGEST)
    blocks = {"num_gpu_blocks_override": 96}
    async with run_vllm(directory, max_num_batched_tokens=200, engine_args=blocks) as engine:
        yield Teacher(engine, bank)


class Caller:
    """One of the concurrent callers; checks every answer it gets."""

    def __init__(self, client: AsyncTeacherClient, bank: Bank, seed: int) -> None:
        self._client = client
        self._bank = bank
        self._random = np.random.default_rng(seed)
        self.outcomes: Counter[tuple[str, str]] = Counter()

    async def ask(self, number: int) -> None:
        kind = str(self._random.choice(KINDS))
        request = self._bank.request(self._random, SIGNALS[self._random.integers(len(SIGNALS))])
        request = replace(request, request_id=str(number))
        if kind == "too long":
            request = _one(self._random, LONGEST + 1, Signal())
        elif kind == "too many":
            request = _one(self._random, 20, Signal(top_k=VOCAB + 1))
        code, text = "scored", ""
        try:
            await self._send(kind, request)
        except TutelageError as error:
            code, text = error.code, str(error)
        except asyncio.CancelledError:
            code = "CANCELLED"
        assert code == "scored" or code in ALLOWED[kind], f"{kind}: {text}"
        self.outcomes[kind, code] += 1

    async def _send(self, kind: str, request: ScoreRequest) -> None:
        deadline = SHORT_DEADLINE if kind == "hurried" else DEADLINE
        call = asyncio.create_task(self._client.score_request(request, timeout=deadline))
        if kind == "cancelled":
            await asyncio.wait({call}, timeout=float(self._random.exponential(0.1)))
            call.cancel()
        score = (await call).raise_for_errors()
        assert score.request_id == request.request_id
        assert_scores(score, request, self._bank, TOLERANCE)


def _one(random: np.random.Generator, tokens: int, signal: Signal) -> ScoreRequest:
    ids = random.integers(0, VOCAB, size=tokens).astype(np.int32)
    return ScoreRequest((ids[:5],), (Sequence("0", 0, ids[5:]),), signal)


async def soak(teacher: Teacher, count: int, seed: int) -> Counter[tuple[str, str]]:
    """`count` requests from AT_ONCE callers; what became of them."""
    outcomes: Counter[tuple[str, str]] = Counter()
    numbers = iter(range(count))
    async with (
        serve(teacher.engine, max_queued_tokens=12_000) as doors,
        AsyncTeacherClient(doors.grpc, retry=RetryPolicy(attempts=1)) as client,
        asyncio.TaskGroup() as callers,
    ):

        async def work(number: int) -> None:
            caller = Caller(client, teacher.bank, seed + number)
            for request in numbers:
                await caller.ask(request)
            outcomes.update(caller.outcomes)

        for number in range(AT_ONCE):
            callers.create_task(work(number))
    assert sum(outcomes.values()) == count
    return outcomes


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def check(teacher: Teacher, warm: int, count: int, growth: int) -> None:
    await soak(teacher, warm, seed=10_000)
    before, began = resident(), time.perf_counter()
    outcomes = await soak(teacher, count, seed=0)
    seconds, grown = time.perf_counter() - began, resident() - before
    counters = teacher.engine.counters
    print(f"{count} requests in {seconds:.0f} s, memory grew by {grown / 1e6:.1f} MB, {counters}")
    for (kind, code), number in sorted(outcomes.items()):
        print(f"  {kind}: {code} {number}")
    assert outcomes["sound", "scored"] > 0.5 * count
    assert outcomes["cancelled", "CANCELLED"] > 0
    assert {code for kind, code in outcomes if kind.startswith("too")} == {"INVALID_ARGUMENT"}
    assert await teacher.engine.residue() == Residue(requests=0, worker_requests=0, blocks=0)
    assert not teacher.engine._line._jobs
    assert not teacher.engine._line._units
    assert counters.withdrawn > 0
    assert counters.failed_steps == 0
    assert counters.rescored == 0
    assert grown <= growth


async def test_random_requests_are_answered_right_and_leave_nothing(teacher: Teacher) -> None:
    await check(teacher, warm=100, count=400, growth=30_000_000)


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_ten_thousand_random_requests_leave_nothing(teacher: Teacher) -> None:
    await check(teacher, warm=1000, count=10_000, growth=30_000_000)
