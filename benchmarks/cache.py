"""Answers from the score cache against live scoring: positions per second of one service on the CPU.

A small Qwen3 (random weights, 16k vocabulary) behind the same core, cache and encoder as a replica's, in
this process. Live: a request that nobody asked before, on one thread and by processor time, so that a busy
machine does not flatter the cache. Hit: the same request again, from a directory and from a Valkey, by the
clock on the wall. Both are encoded to the bytes that would leave the service.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tutelage_client import ScoreRequest, Signal, codec

from benchmarks.results import record
from services.api.core import ScoringCore
from services.api.metrics import Metrics
from services.logs import log_to_stderr
from services.queue.embedded import EmbeddedServer
from services.teacher.build import build_cached
from services.teacher.settings import TeacherSettings

VOCAB, CONTEXT, POSITIONS, SEQUENCES = 16_384, 128, 512, 4
SIGNALS = {"sampled": Signal(), "top_64": Signal(top_k=64)}


def write_model(directory: Path) -> Path:
    """A Qwen3 of 7M parameters: far less work for each token than any teacher's."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def requests(signal: Signal) -> Iterator[ScoreRequest]:
    """Requests that have never been made."""
    rng = np.random.default_rng(0)
    while True:
        context, *responses = [
            rng.integers(0, VOCAB, size) for size in (CONTEXT, *(POSITIONS for _ in range(SEQUENCES)))
        ]
        yield codec.build_request([context], responses, signal=signal)


@asynccontextmanager
async def service(model: Path, location: str) -> AsyncIterator[ScoringCore]:
    """The core of a replica with a cache."""
    settings = TeacherSettings.model_validate(
        {
            "model": str(model),
            "dtype": "float32",
            "device": "cpu",
            "threads": 1,
            "cache": {"location": location},
        }
    )
    metrics = Metrics()
    engine = build_cached(settings, metrics)
    await engine.start()
    core = ScoringCore(engine, max_queued_tokens=2**40, max_message_bytes=2**31 - 1, metrics=metrics)
    core.open()
    try:
        yield core
    finally:
        await engine.close()


async def rate(core: ScoringCore, request: ScoreRequest, clock: Callable[[], float]) -> float:
    """Positions per second of one request, answer encoded."""
    began = clock()
    score = await core.score(request, transport="grpc")
    codec.score_to_bytes(score)
    return SEQUENCES * POSITIONS / (clock() - began)


async def compare(rounds: int) -> None:
    """Measure, print and record every figure."""
    with tempfile.TemporaryDirectory() as name, EmbeddedServer(Path(name) / "queue") as server:
        model = write_model(Path(name) / "model")
        for store, location in (("directory", f"{name}/cache"), ("valkey", server.url)):
            async with service(model, location) as core:
                for kind, signal in SIGNALS.items():
                    fresh = requests(signal)
                    await rate(core, next(fresh), time.process_time)
                    live, hit = [], []
                    for _ in range(rounds):
                        asked = next(fresh)
                        live.append(await rate(core, asked, time.process_time))
                        hit.append(await rate(core, asked, time.perf_counter))
                    show(f"cache.{store}_{kind}", live, hit)


def show(name: str, live: list[float], hit: list[float]) -> None:
    a, b = statistics.median(hit), statistics.median(live)
    runs = [{"ours": one, "peer": other} for one, other in zip(hit, live, strict=True)]
    record(name, a / b, unit="ratio", ours=a, peer=b, peer_name="live scoring", runs=runs)
    print(f"{name:26} {a / b:6.1f}  (hit {a:,.0f}, live {b:,.0f} positions/s)")


def main() -> int:
    log_to_stderr(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    asyncio.run(compare(parser.parse_args().rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
