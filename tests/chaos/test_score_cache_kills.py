"""Two replicas on one cache directory, one of them killed again and again while it writes."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from support.teachers import RecordingScorer, TeacherProcess, http_client
from tutelage_client import AsyncTeacherClient, codec
from tutelage_client.errors import TutelageError
from tutelage_client.types import Limits, ScoreRequest, Signal

from services.teacher.cache.directory import BLOCK, LOOK_EVERY
from services.teacher.cache.entry import unpack

LIMIT = 120 * BLOCK
ROUNDS, REQUESTS = 2, 25
SIGNAL = Signal(top_k=16, entropy=True)


def replica(directory: Path, name: str) -> TeacherProcess:
    settings: dict[str, Any] = {
        "fake": {"vocab_size": 64},
        "cache": {"location": str(directory / "cache"), "max_bytes": LIMIT},
        "consumer": name,
    }
    return TeacherProcess(directory / name, **settings)


def question(number: int) -> ScoreRequest:
    """Four of a few hundred sequences; each takes a block or two of the disk."""
    rng = np.random.default_rng(number % 60)
    responses = [rng.integers(0, 64, int(rng.integers(10, 60))) for _ in range(4)]
    return codec.build_request([[1, 2, 3]], responses, signal=SIGNAL)


async def counted(teacher: TeacherProcess) -> dict[str, float]:
    """The cache's counters."""
    async with http_client(teacher.http) as client:
        text = (await client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        next(iter(sample.labels.values()), sample.name): sample.value
        for sample in samples
        if sample.name.startswith("tutelage_cache")
    }


async def check(
    client: AsyncTeacherClient, plain: RecordingScorer, number: int, seconds: float = 30.0
) -> None:
    """The client's answer is the engine's own."""
    asked = question(number)
    score, expected = await client.score_request(asked, timeout=seconds), await plain.score(asked)
    for got, right in zip(score.sequences, expected.sequences, strict=True):
        for field in ("sampled", "top_ids", "top_logprobs", "entropy", "valid"):
            np.testing.assert_array_equal(getattr(got, field), getattr(right, field))


async def test_no_answer_is_wrong_and_the_limit_holds_while_a_writer_is_killed(tmp_path: Path) -> None:
    plain, rng = RecordingScorer(vocab_size=64, limits=Limits()), random.Random(0)
    replicas = [replica(tmp_path, name) for name in ("stays", *(f"dies-{i}" for i in range(ROUNDS)))]
    try:
        stays, *dying = [teacher.wait_ready() for teacher in replicas]
        async with AsyncTeacherClient(stays.grpc) as staying:
            for dies in dying:
                async with AsyncTeacherClient(dies.grpc) as client:
                    for _ in range(REQUESTS):
                        await asyncio.gather(
                            *(check(one, plain, rng.randrange(1000)) for one in (staying, client, client))
                        )
                    cut = [
                        asyncio.create_task(check(client, plain, rng.randrange(1000), 1.0)) for _ in range(20)
                    ]
                    await asyncio.sleep(rng.uniform(0.002, 0.02))
                    dies.kill()
                    ended = await asyncio.gather(*cut, return_exceptions=True)
                    assert all(one is None or isinstance(one, TutelageError) for one in ended), ended
            for number in range(60):
                await check(staying, plain, number)
            figures = await counted(stays)
    finally:
        for teacher in replicas:
            teacher.kill()
    assert min(figures["hit"], figures["miss"]) > 20
    assert figures["corrupt"] == figures["store"] == 0
    held = 0
    for path in (tmp_path / "cache").glob("*/*.score"):
        unpack(bytes.fromhex(path.parent.name + path.stem), path.read_bytes())
        held += -(-path.stat().st_size // BLOCK) * BLOCK
    assert 0.5 * LIMIT < held <= LIMIT * (1 + 2 * LOOK_EVERY)
