"""The rollout process: a stateless worker that turns orders into sampled groups in the queue."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import closing
from dataclasses import asdict

import structlog
import torch
from tutelage_client.errors import TutelageError

from services import tracing
from services.logs import about, log_to_stderr
from services.models.generate import GenerationInterruptedError
from services.queue import OrderClaim, OrderWorker, Queue, Submitted, sampler_role
from student_trainer.config import RunConfig
from student_trainer.policy_store import PolicyStore, PolicyVersion
from student_trainer.run_queue import run_queue
from student_trainer.sampler.build import build_sampler
from student_trainer.sampler.evaluation import evaluate
from student_trainer.sampler.groups import GroupSampler, SampledGroup
from student_trainer.sampler.metrics import Counters, FullQueue, metrics_port
from student_trainer.sampler.policy import StudentPolicy
from student_trainer.sampler.spans import RolloutTimes, record_rollout

CLAIM_MS = 500
POLL_SECONDS = 0.02
FULL_SECONDS = 0.05
SUBMITTED_AT_ONCE = 16
ROLE = "sampler"

log = structlog.get_logger(__name__)


def main(config: RunConfig, name: str) -> int:
    """Serve orders until SIGTERM or SIGINT; 0 when drained.

    Raises:
        TutelageError: the run cannot be sampled as configured.
    """
    log_to_stderr()
    tracing.start("tutelage-sampler", name)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(config.run.deterministic)
    try:
        asyncio.run(_serve(config, name))
    finally:
        tracing.stop()
    return 0


async def _serve(config: RunConfig, name: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    counters = Counters()
    async with run_queue(config) as queue:
        with (
            queue.presence(sampler_role(config.run.name), name),
            metrics_port(config.metrics, counters, config.run.name),
        ):
            built = await _build(config, stop)
            if built is None:
                return
            policy, sampler = built
            with closing(sampler):
                async with queue.orders(config.run.name, name) as worker:
                    service = OrderService(
                        config=config,
                        name=name,
                        queue=queue,
                        worker=worker,
                        policy=policy,
                        sampler=sampler,
                        counters=counters,
                        stop=stop,
                    )
                    await service.serve()
    log.info("sampler drained", name=name)


async def _build(config: RunConfig, stop: asyncio.Event) -> tuple[StudentPolicy, GroupSampler] | None:
    """A sampler of the newest published version; None when stopped before there is one."""
    store = PolicyStore(config.run.directory / "policy")
    while (first := await _first_policy(store, stop)) is not None:
        try:
            return await asyncio.to_thread(build_sampler, config, first)
        except Exception:
            # A resuming trainer may have deleted the version while it was read, which every library
            # puts in errors of its own. Anything else is an error.
            if store.get(first.version) == first:
                raise
            log.info("policy version replaced while loading", version=first.version)
    return None


async def _first_policy(store: PolicyStore, stop: asyncio.Event) -> PolicyVersion | None:
    """The newest published version, waited for; None when stopped first."""
    reported = time.monotonic()
    while not stop.is_set():
        if (found := store.latest()) is not None:
            return found
        if time.monotonic() - reported > 10.0:
            reported = time.monotonic()
            log.info("waiting for the trainer's first policy version", directory=str(store.directory))
        await asyncio.sleep(POLL_SECONDS)
    return None


class OrderService:
    """Works on one order at a time, so that a batch is a function of its order alone."""

    def __init__(
        self,
        *,
        config: RunConfig,
        name: str,
        queue: Queue,
        worker: OrderWorker,
        policy: StudentPolicy,
        sampler: GroupSampler,
        counters: Counters,
        stop: asyncio.Event,
    ) -> None:
        self._config = config
        self._name = name
        self._queue = queue
        self._worker = worker
        self._policy = policy
        self._sampler = sampler
        self._stop = stop
        self._counters = counters
        self._full = FullQueue(counters)
        counters.policy_version = policy.version

    async def serve(self) -> None:
        """Claim and work until stopped; an unfinished order goes back to the queue at once."""
        interrupter = asyncio.create_task(self._interrupt_when_stopped())
        try:
            while not self._stop.is_set():
                for claim in await self._claim():
                    with about(order=claim.order.id, delivery=claim.deliveries):
                        await self._attempt(claim)
        finally:
            interrupter.cancel()

    async def _claim(self) -> list[OrderClaim]:
        started = time.perf_counter()
        claims = await self._worker.claim(1, CLAIM_MS)
        self._counters.order_wait_seconds += time.perf_counter() - started
        return claims

    async def _interrupt_when_stopped(self) -> None:
        await self._stop.wait()
        self._sampler.interrupt()

    async def _attempt(self, claim: OrderClaim) -> None:
        """One delivery, ended in one way: finished, handed back, failed or given up."""
        try:
            done = await self._work(claim)
        except GenerationInterruptedError:
            done = False
        except TutelageError as error:
            log.error("order failed", error=str(error))
            if error.code == "INTERNAL":
                await self._worker.fail(claim, str(error))
            else:
                await self._worker.bury(claim, str(error))
            return
        except Exception as error:
            await self._worker.fail(claim, f"{type(error).__name__}: {error}")
            raise
        if done:
            await self._worker.finish(claim)
            self._counters.orders += 1
            await self._publish()
        elif self._worker.holds(claim):
            log.info("order handed back")
            await self._worker.release(claim)

    async def _work(self, claim: OrderClaim) -> bool:
        """True when the order is complete, False when stopped or when its lease was lost."""
        order = claim.order
        if not await self._wait_for_policy(claim):
            return False
        if order.evaluation:
            await self._evaluate()
            return True
        size = max(1, self._config.sampling.batch_size // self._config.sampling.samples_per_prompt)
        end = order.first_group + order.num_groups
        for start in range(order.first_group, end, size):
            if self._stop.is_set() or not self._worker.holds(claim):
                return False
            began = time.time_ns()
            groups = await self._sample(range(start, min(start + size, end)))
            times = began, time.time_ns()
            for at in range(0, len(groups), SUBMITTED_AT_ONCE):
                some = groups[at : at + SUBMITTED_AT_ONCE]
                if not all(await asyncio.gather(*(self._submit(group, claim, times) for group in some))):
                    return False
        log.info("order sampled", groups=order.num_groups, policy_version=self._policy.version)
        return True

    async def _wait_for_policy(self, claim: OrderClaim) -> bool:
        started = time.perf_counter()
        while not self._stop.is_set() and self._worker.holds(claim):
            if await asyncio.to_thread(self._policy.ready, claim.order):
                self._counters.policy_wait_seconds += time.perf_counter() - started
                self._counters.policy_version = self._policy.version
                return True
            await asyncio.sleep(POLL_SECONDS)
        return False

    async def _sample(self, indices: range) -> list[SampledGroup]:
        started = time.perf_counter()
        policy = self._policy
        groups = await asyncio.to_thread(self._sampler.sample, indices, policy.version, policy.lineage)
        self._counters.sample_seconds += time.perf_counter() - started
        return groups

    async def _submit(self, sampled: SampledGroup, claim: OrderClaim, times: tuple[int, int]) -> bool:
        """Into the queue, traced; `times` are unix nanoseconds when sampling began and ended."""
        with about(sampled.group.traceparent, group=sampled.group.id):
            answer = await self._enqueue(sampled, claim)
            if answer in (Submitted.QUEUED, Submitted.EXISTS):
                record_rollout(sampled, claim, RolloutTimes(*times, submitted=time.time_ns()), answer)
                return True
            if answer is Submitted.LOST:
                log.warning("order lost to another sampler")
            return False

    async def _enqueue(self, sampled: SampledGroup, claim: OrderClaim) -> Submitted:
        """Into the queue, waiting while the teachers have enough to do; FULL when stopped meanwhile."""
        while True:
            answer = await self._queue.submit_group(sampled.group, sampled.requests, order=claim)
            if answer is not Submitted.FULL or self._stop.is_set():
                break
            with self._full:
                await asyncio.sleep(FULL_SECONDS)
        self._counters.count(answer, sampled.num_tokens)
        return answer

    async def _evaluate(self) -> None:
        version = self._policy.version
        prompts = self._config.training.evaluation_prompts
        result = await asyncio.to_thread(evaluate, self._sampler, prompts=prompts, policy_version=version)
        await self._queue.publish_progress(self._config.run.name, {f"eval:{version}": result})
        self._counters.evaluations += 1

    async def _publish(self) -> None:
        await self._queue.publish_progress(
            self._config.run.name, {f"{ROLE}:{self._name}": asdict(self._counters)}
        )
