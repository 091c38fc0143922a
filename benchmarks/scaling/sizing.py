"""How many replicas a run file needs: its tokens per second over those of one replica, measured or given.

python -m benchmarks.scaling.sizing RUN.toml --step-seconds 30 --context 200 --rate 7000
python -m benchmarks.scaling.sizing RUN.toml --step-seconds 30 --context 200 --measure HOST:PORT
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tutelage_client import AsyncTeacherClient, ScoreRequest, Signal, codec

from student_trainer.config import load_run_config

WAIT_SECONDS = 30.0  # of work in front of each replica: what hpa.yaml's waiting tokens mean
BUSY = 0.7  # share of its time that a replica should work on average
WARM_SECONDS = 1.0
HELD = 8  # jobs that a replica holds at once, queue_concurrency


@dataclass(frozen=True, slots=True)
class Need:
    """What a run asks of one teacher. Tokens as the queue counts them: a group's context once per view."""

    teacher: str
    prompts: int
    samples: int
    views: int
    signal: Signal
    context: int
    response: int
    candidates: int  # ids per position that the sampler adds, when the signal wants them

    @property
    def job_tokens(self) -> int:
        return self.context + self.samples * self.response

    @property
    def step_tokens(self) -> int:
        return self.prompts * self.views * self.job_tokens

    def replicas(self, step_seconds: float, rate: float) -> int:
        return math.ceil(self.step_tokens / step_seconds / rate / BUSY)


def needs(run_file: Path, *, context: int, response: int | None) -> list[Need]:
    """One entry per teacher of the run file; `response` is max_new_tokens when nobody knows better."""
    config = load_run_config(run_file)
    plan = config.plan()
    found: dict[str, list[Signal]] = {}
    for teacher, signal in plan.view_requests.values():
        found.setdefault(teacher, []).append(signal)
    return [
        Need(
            teacher=teacher, prompts=config.training.prompts_per_step,
            samples=config.sampling.samples_per_prompt, views=len(signals), signal=signals[0],
            context=context, response=response or config.sampling.max_new_tokens,
            candidates=plan.student_candidates,
        )
        for teacher, signals in found.items()
    ]  # fmt: skip


async def measured_rate(need: Need, address: str, seconds: float, token: str | None) -> float:
    """Tokens per second of the replica at `address`, kept busy with groups as the run would send them."""
    rng = np.random.default_rng(0)
    async with AsyncTeacherClient(address, token=token) as client:
        vocabulary = (await client.get_teacher()).identity.vocab_size
        scored = 0

        async def keep_asking(end: float) -> None:
            nonlocal scored
            while time.perf_counter() < end:
                request = make_request(need, rng, vocabulary)
                (await client.score_request(request)).raise_for_errors()
                scored += codec.request_tokens(request)

        await keep_asking(time.perf_counter() + WARM_SECONDS)
        scored, began = 0, time.perf_counter()
        await asyncio.gather(*(keep_asking(began + seconds) for _ in range(HELD)))
        return scored / (time.perf_counter() - began)


def make_request(need: Need, rng: np.random.Generator, vocabulary: int) -> ScoreRequest:
    """A group of the run's shape, of tokens that nothing has cached."""
    context, *responses = (
        rng.integers(0, vocabulary, size, dtype=np.int64).astype(np.int32)
        for size in (need.context, *[need.response] * need.samples)
    )
    candidates = None
    if need.signal.candidates:
        drawn = rng.integers(0, vocabulary, (need.response, need.candidates), dtype=np.int64)
        candidates = [drawn.astype(np.int32)] * need.samples
    return codec.build_request([context], responses, candidate_ids=candidates, signal=need.signal)


def print_need(need: Need, step_seconds: float, rate: float | None) -> None:
    per_second = need.step_tokens / step_seconds
    views = f" × {need.views} views" if need.views > 1 else ""
    print(
        f"{need.teacher}: {need.prompts} prompts{views} × ({need.context} + {need.samples} × {need.response})"
        f" = {need.step_tokens:,} tokens a step, {per_second:,.0f} a second for a step of {step_seconds:g} s"
    )
    if rate is None:
        return
    replicas = need.replicas(step_seconds, rate)
    waiting, held = WAIT_SECONDS * rate, min(HELD * need.job_tokens, WAIT_SECONDS * rate)
    print(
        f"  a replica scores {rate:,.0f} tokens/s: {replicas} replicas, busy {100 * BUSY:.0f}% of the time\n"
        f"  averageValue: waiting tokens {waiting:,.0f} ({WAIT_SECONDS:.0f} s of work), tokens in flight "
        f"{held:,.0f} ({HELD} jobs of {need.job_tokens:,}, or as much)\n"
        f"  [queue] max_queued_tokens: at least {replicas * (waiting + held):,.0f}, or no autoscaler sees it"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.scaling.sizing", description=__doc__)
    parser.add_argument("run_file", type=Path, metavar="RUN.toml")
    parser.add_argument("--step-seconds", type=float, required=True, help="what a step may take")
    parser.add_argument("--context", type=int, required=True, help="tokens of a prompt, on average")
    parser.add_argument("--response", type=int, help="tokens of a response, on average")
    parser.add_argument("--rate", type=float, help="tokens per second of one replica")
    parser.add_argument("--measure", metavar="HOST:PORT", help="measure it: gRPC address of a replica")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure")
    options = parser.parse_args(arguments)
    for need in needs(options.run_file, context=options.context, response=options.response):
        rate = options.rate
        if options.measure:
            token = os.environ.get("TUTELAGE_TOKEN")
            rate = asyncio.run(measured_rate(need, options.measure, options.seconds, token))
        print_need(need, options.step_seconds, rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
