"""The rollout process on a real Valkey: orders become groups, once, whatever dies in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training_run import Processes, kill
from transformers import AutoModelForCausalLM, Qwen3Config
from tutelage.v1.rollout_pb2 import Group, SampleOrder, ViewRequest
from tutelage_client.codec import unpack_ids

from services.models.fingerprint import tokenizer_fingerprint
from services.queue import LeaseSettings, Queue, sampler_role
from services.queue.embedded import EmbeddedServer
from student_trainer.config import RunConfig, load_run_config
from student_trainer.lineage import Stretch
from student_trainer.policy_store import PolicyStore
from student_trainer.sampler import process
from student_trainer.sampler.build import build_sampler
from student_trainer.sampler.metrics import Counters
from student_trainer.sampler.process import OrderService
from student_trainer.sampler.verify import plain_logprobs
from student_trainer.tasks.addition import CHARACTERS
from student_trainer.tasks.characters import MODEL_ROWS, character_tokenizer

HEARTBEAT = 0.4
PATIENCE = 60.0

RUN_FILE = """
[run]
name = "{name}"
directory = "{directory}"
seed = 11
deterministic = true

[queue]
url = "{url}"
heartbeat_seconds = {heartbeat}
max_queued_tokens = {max_queued_tokens}

[teachers.big]
model = "{teacher}"

[student]
model = "unused"

[data]
task = "addition"

[sampling]
samples_per_prompt = 2
max_new_tokens = 6
batch_size = 6
{sampling}

[objective]
divergence = "kl_student_teacher"
support = "student_topk"
k = 4
tail = "bucket"
estimator = "pathwise"

[training]
steps = 1
evaluation_prompts = 9
"""


def make_model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=MODEL_ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def write_model(directory: Path, seed: int) -> None:
    make_model(seed).save_pretrained(directory)
    character_tokenizer(CHARACTERS).save_pretrained(directory)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes of a deterministic run do: sums in another order differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedServer(tmp_path_factory.mktemp("queue")) as server:
        yield server.url


class Run:
    """A run file with a policy store, a queue handle, and what a trainer and a teacher would do."""

    def __init__(self, path: Path, queue: Queue) -> None:
        self.queue = queue
        self.config: RunConfig = load_run_config(path)
        self.name = self.config.run.name
        self.store = PolicyStore(self.config.run.directory / "policy")
        self.file = path
        self.logs = path.parent

    def publish(self, version: int) -> None:
        lineage = (Stretch("first", 0),)
        self.store.publish(version, lambda directory: write_model(directory, seed=version), lineage=lineage)

    async def order(self, number: int = 0, groups: int = 5, **fields: Any) -> SampleOrder:
        order = SampleOrder(
            id=f"{self.name}-s{number}-0", run=self.name, first_group=5 * number, num_groups=groups, **fields
        )
        assert await self.queue.place_order(order)
        return order

    async def open_orders(self) -> int:
        orders = (await self.queue.run_stats(self.name)).orders
        return orders.waiting + orders.in_flight

    async def score(self, until: Callable[[], Awaitable[bool]]) -> dict[str, tuple[bytes, ViewRequest]]:
        """Take every job like a teacher, until the condition holds: group id → what was in the queue."""
        seen = {}
        async with self.queue.jobs("big", "teacher") as worker:
            end = time.monotonic() + PATIENCE
            while True:
                for claim in await worker.claim(4, 50):
                    loaded = await worker.load(claim)
                    assert loaded is not None
                    assert claim.group not in seen, "a group was queued twice"
                    seen[claim.group] = (loaded[0].SerializeToString(deterministic=True), loaded[1])
                    await worker.commit(claim, b"")
                if await until() and (await self.queue.teacher_stats("big")).queued_tokens == 0:
                    return seen
                assert time.monotonic() < end, f"only {sorted(seen)} arrived"

    async def scored(self) -> dict[str, tuple[bytes, ViewRequest]]:
        async def no_order_is_open() -> bool:
            return await self.open_orders() == 0

        return await self.score(no_order_is_open)

    def expected(self, version: int, indices: range) -> dict[str, bytes]:
        """The groups by a sampler of our own, batch by batch as the process does."""
        published = self.store.get(version)
        assert published is not None
        _, sampler = build_sampler(self.config, published)
        groups = [
            sampled.group
            for start in range(indices.start, indices.stop, 3)
            for sampled in sampler.sample(
                range(start, min(start + 3, indices.stop)), version, published.lineage
            )
        ]
        return {group.id: group.SerializeToString(deterministic=True) for group in groups}

    @asynccontextmanager
    async def sampler(self) -> AsyncIterator[OrderService]:
        """The service of a sampler in this process, stopped at the end."""
        stop, first = asyncio.Event(), self.store.latest()
        assert first is not None
        policy, sampler = build_sampler(self.config, first)
        async with self.queue.orders(self.name, "sampler") as worker:
            service = OrderService(
                config=self.config,
                name="sampler",
                queue=self.queue,
                worker=worker,
                policy=policy,
                sampler=sampler,
                counters=Counters(),
                stop=stop,
            )
            task = asyncio.create_task(service.serve())
            yield service
            stop.set()
            await task


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not await condition():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what}"
        await asyncio.sleep(0.02)


@pytest.fixture
def processes() -> Iterator[Processes]:
    with Processes() as started:
        yield started


@pytest.fixture
async def make_run(tmp_path: Path, url: str) -> AsyncIterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(*, max_queued_tokens: int = 100_000, sampling: str = "") -> Run:
        name = f"r{time.monotonic_ns()}"
        path = tmp_path / f"{name}.toml"
        text = RUN_FILE.format(
            name=name,
            directory=tmp_path / name,
            url=url,
            heartbeat=HEARTBEAT,
            max_queued_tokens=max_queued_tokens,
            teacher=tmp_path / "teacher",
            sampling=sampling,
        )
        path.write_text(text.replace("[queue]", f'[queue]\nnamespace = "{name}"'))
        queue = Queue(
            url, name, max_queued_tokens=max_queued_tokens, lease=LeaseSettings(heartbeat=HEARTBEAT)
        )
        runs.append(Run(path, queue))
        return runs[-1]

    yield make
    for run in runs:
        await run.queue.close()


async def test_an_order_becomes_groups_with_everything_the_objective_needs(
    make_run: Callable[..., Run],
) -> None:
    run = make_run()
    run.publish(0)
    async with run.sampler():
        await run.order(groups=5, policy_version=0)
        seen = await run.scored()
    assert sorted(seen) == [f"{run.name}-{index}" for index in range(5)]
    model, tokenizer = make_model(0), character_tokenizer(CHARACTERS)
    for data, request in seen.values():
        group = Group.FromString(data)
        prompt = unpack_ids(group.prompt_ids, "prompt")
        assert tokenizer.decode(prompt) == group.prompt_text
        assert (group.policy_version, group.temperature, group.sampled_by) == (0, 1.0, "student")
        assert len(group.rollouts) == 2
        for rollout in group.rollouts:
            ids = unpack_ids(rollout.response_ids, "response")
            logprobs = np.frombuffer(rollout.behaviour_logprobs, dtype="<f4")
            np.testing.assert_allclose(logprobs, plain_logprobs(model, prompt, ids), atol=1e-4)
            candidates = unpack_ids(rollout.candidate_ids, "candidates", rollout.num_candidates)
            assert candidates.shape == (len(ids), 4)
            assert rollout.text == tokenizer.decode(ids, skip_special_tokens=True)
            assert rollout.HasField("reward")
        assert (request.view, request.teacher) == ("teacher", "big")
        assert request.signal.candidates
        assert request.signal.top_k == 0
        assert request.pins.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
        assert [context.ids for context in request.contexts] == [group.prompt_ids]
    assert {k: v for k, (v, _) in seen.items()} == run.expected(0, range(5))


async def test_an_exact_order_waits_for_its_version_and_others_take_the_newest(
    make_run: Callable[..., Run],
) -> None:
    run = make_run()
    run.publish(0)
    async with run.sampler():
        await run.order(0, policy_version=1, exact=True)
        await asyncio.sleep(0.5)
        assert await run.open_orders() == 1
        run.publish(1)
        exact = await run.scored()
        run.publish(2)
        await run.order(1, policy_version=0)
        newest = await run.scored()
        await run.order(2, policy_version=3)
        await asyncio.sleep(0.5)
        assert await run.open_orders() == 1, "an older policy is not good enough"
        run.publish(3)
        awaited = await run.scored()
    assert {k: v for k, (v, _) in exact.items()} == run.expected(1, range(5))
    assert {k: v for k, (v, _) in newest.items()} == run.expected(2, range(5, 10))
    assert {k: v for k, (v, _) in awaited.items()} == run.expected(3, range(10, 15))


async def test_weights_are_read_again_when_a_version_is_published_anew(make_run: Callable[..., Run]) -> None:
    run = make_run()
    run.publish(0)
    run.publish(1)
    async with run.sampler():
        run.store.discard_above(0)
        lineage = (Stretch("first", 0), Stretch("resumed", 0))
        run.store.publish(1, lambda directory: write_model(directory, seed=99), lineage=lineage)
        await run.order(0, policy_version=1, exact=True)
        seen = await run.scored()
    assert {k: v for k, (v, _) in seen.items()} == run.expected(1, range(5))


async def test_an_order_for_a_deleted_version_is_given_up_with_its_reason(
    make_run: Callable[..., Run],
) -> None:
    run = make_run()
    for version in (0, 1):
        run.publish(version)
    run.store.prune(oldest=1)
    async with run.sampler():
        await run.order(0, policy_version=0, exact=True)
        await run.scored()
        await run.order(1, policy_version=1)
        assert len(await run.scored()) == 5, "healthy orders go on"
    [dead] = await run.queue.dead_orders(run.name)
    assert "policy version 0 has been deleted" in dead.error


async def test_evaluation_answers_held_out_prompts_greedily_and_sampled(make_run: Callable[..., Run]) -> None:
    run = make_run()
    run.publish(3)
    async with run.sampler():
        await run.order(0, groups=0, policy_version=3, exact=True, evaluation=True)
        await run.scored()
    progress = await run.queue.read_progress(run.name)
    result = progress["eval:3"]
    assert (result["version"], result["prompts"]) == (3, 9)
    for kind in ("greedy", "sampled"):
        accuracy = result[kind]["accuracy"]
        assert result[kind]["standard_error"] == pytest.approx((accuracy * (1 - accuracy) / 9) ** 0.5)
        assert 1 <= result[kind]["mean_tokens"] <= 6
    assert progress["sampler:sampler"]["evaluations"] == 1


async def test_another_sampler_takes_its_share_and_the_student_names_the_candidates(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    write_model(tmp_path / "teacher", seed=50)
    run = make_run(sampling='sampler = "teacher:big"\nstudent_fraction = 0.4')
    run.publish(0)
    async with run.sampler():
        await run.order(0, groups=30, policy_version=0)
        seen = await run.scored()
    models = {"student": make_model(0), "teacher:big": make_model(50)}
    groups = [Group.FromString(data) for data, _ in seen.values()]
    assert 4 <= sum(group.sampled_by == "student" for group in groups) <= 20
    for group in groups:
        prompt = unpack_ids(group.prompt_ids, "prompt")
        for rollout in group.rollouts:
            ids = unpack_ids(rollout.response_ids, "response")
            logprobs = np.frombuffer(rollout.behaviour_logprobs, dtype="<f4")
            expected = plain_logprobs(models[group.sampled_by], prompt, ids)
            np.testing.assert_allclose(logprobs, expected, atol=1e-4)
            with torch.inference_mode():
                both = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))
                logits = models["student"](both[None]).logits[0, len(prompt) - 1 : -1]
            candidates = unpack_ids(rollout.candidate_ids, "candidates", 4)
            np.testing.assert_array_equal(candidates, logits.topk(4).indices.numpy())


async def test_kill_9_in_the_middle_of_an_order_and_a_drain_lose_and_change_nothing(
    make_run: Callable[..., Run], processes: Processes
) -> None:
    run = make_run(max_queued_tokens=60)
    run.publish(0)
    await run.order(groups=5, policy_version=0, exact=True)

    async def queue_is_full() -> bool:
        return (await run.queue.teacher_stats("big")).queued_tokens > 20

    first = processes.sampler(run, "first")
    await until(queue_is_full, "the first groups")
    await asyncio.sleep(3 * HEARTBEAT)
    stats = await run.queue.teacher_stats("big")
    assert stats.queued_tokens <= 60, "back-pressure: no more than the limit is queued"
    assert await run.open_orders() == 1, "the order is not finished while its groups wait"
    assert "first" in await run.queue.alive(sampler_role(run.config.run.name))
    kill(first)

    second = processes.sampler(run, "second")
    claimed = time.monotonic()
    seen = await run.scored()
    assert time.monotonic() - claimed < PATIENCE
    assert {k: v for k, (v, _) in seen.items()} == run.expected(0, range(5))

    # The second one is now stuck in a full queue with another order, and told to go.
    await run.order(1, groups=5, policy_version=0, exact=True)
    await until(queue_is_full, "the next groups")
    second.terminate()
    await asyncio.to_thread(second.join, 20)
    assert second.exitcode == 0
    async with run.queue.orders(run.name, "observer") as worker:
        [claim] = await worker.claim(1, 5000)
        assert claim.deliveries == 1, "a drained order is handed back without counting the delivery"
        await worker.release(claim)
    async with run.sampler():
        rest = await run.scored()
    assert {k: v for k, (v, _) in rest.items()} == run.expected(0, range(5, 10))


async def test_a_sampler_waits_for_the_first_policy_and_stops_when_told(make_run: Callable[..., Run]) -> None:
    run = make_run()
    stop = asyncio.Event()
    waiting = asyncio.create_task(process._first_policy(run.store, stop))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    run.publish(0)
    found = await asyncio.wait_for(waiting, 5)
    assert found is not None
    assert found.version == 0
    stop.set()
    assert await process._first_policy(PolicyStore(run.store.directory / "none"), stop) is None
