"""A vLLM replica that follows a channel: which weights answer, and that bad ones change nothing."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file
from support.engine_requests import Reference, assert_scores
from support.sequence_bank import BLOCK, Bank
from support.teachers import TeacherProcess
from support.tiny_models import SERVABLE, random_ids, save_tiny_model, tiny_model
from support.vllm_engines import SMALL, run_vllm
from tutelage_client import AsyncTeacherClient, RetryPolicy
from tutelage_client.errors import TutelageError
from tutelage_client.types import Identity, Pins, Score, ScoreRequest, Sequence, Signal

from services.models.channel import PolicyVersion
from services.models.vllm_settings import VllmSettings
from student_trainer.policy_store import PolicyStore

pytest.importorskip("vllm", reason="vLLM is not installed")

TOLERANCE = 1e-4
NAME = "run.ema"


def named(identity: Identity) -> tuple[int, str]:
    return identity.weights_version, identity.weights_id


@dataclass
class Run:
    """A channel, its replica, and the weights that are published: number n is tiny_model(seed=n)."""

    store: PolicyStore
    teacher: TeacherProcess
    models: list[Path]
    banks: list[Bank]  # all of the same sequences
    numbers: dict[str, int] = field(default_factory=dict)  # of the weights, by stamp

    def publish(self, number: int, spoil: Callable[[Path], None] = lambda _: None) -> PolicyVersion:
        """The next version."""

        def write(path: Path) -> None:
            shutil.copytree(self.models[number], path, dirs_exist_ok=True)
            spoil(path)

        published = self.store.publish((self.store.versions() or [-1])[-1] + 1, write)
        self.numbers[published.stamp] = number
        return published

    def assert_by_those_it_names(self, score: Score, request: ScoreRequest) -> None:
        assert_scores(score, request, self.banks[self.numbers[score.identity.weights_id]], TOLERANCE)


@dataclass(frozen=True)
class Caller:
    run: Run
    client: AsyncTeacherClient

    async def serve(self, number: int) -> PolicyVersion:
        """Publish, and wait until the replica has loaded it."""
        published = self.run.publish(number)
        async with asyncio.timeout(30):
            while named(await self.identity()) != (published.version, published.stamp):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return published

    async def identity(self) -> Identity:
        return (await self.client.get_teacher()).identity

    async def score(self, request: ScoreRequest) -> Score:
        return (await self.client.score_request(request)).raise_for_errors()

    async def check(self, seed: int, published: PolicyVersion, count: int = 6) -> None:
        """Whatever is asked, `published` answers."""
        requests = self.run.banks[0].requests(seed, count)
        for request, score in zip(requests, await asyncio.gather(*map(self.score, requests)), strict=True):
            assert named(score.identity) == (published.version, published.stamp)
            self.run.assert_by_those_it_names(score, request)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    root = tmp_path_factory.mktemp("following")
    models = [save_tiny_model(root / str(seed), seed=seed, shape=SERVABLE) for seed in range(3)]
    banks = [Bank(tiny_model(seed=seed, shape=SERVABLE), count=16) for seed in range(3)]
    store = PolicyStore(root / "ema")
    options = {"engine": "vllm", "name": NAME, "follow": store.directory, "vllm": VllmSettings(**SMALL)}
    teacher = TeacherProcess(root / "replica", **options)
    made = Run(store, teacher, models, banks)
    made.publish(0)
    try:
        teacher.wait_ready(120)
        yield made
        assert teacher.terminate() == 0
    finally:
        teacher.kill()


@pytest_asyncio.fixture
async def caller(run: Run) -> AsyncIterator[Caller]:
    async with AsyncTeacherClient(run.teacher.grpc, retry=RetryPolicy(attempts=1)) as client:
        yield Caller(run, client)


def long_context(seed: int) -> ScoreRequest:
    random = np.random.default_rng(seed)
    members = (Sequence("0", 0, random_ids(random, 20)),)
    return ScoreRequest((random_ids(random, 4 * BLOCK),), members, Signal(top_k=5, entropy=True))


async def test_a_context_cached_under_old_weights_is_scored_as_a_fresh_engine_scores_it(
    caller: Caller,
) -> None:
    request = long_context(1)
    old = await caller.serve(0)
    first, again = await caller.score(request), await caller.score(request)
    assert [score.usage.tokens_reused for score in (first, again)] == [0, 3 * BLOCK]
    new = await caller.serve(1)
    after = await caller.score(request)
    assert after.usage.tokens_reused == 0
    for score, published, seed in ((first, old, 0), (again, old, 0), (after, new, 1)):
        assert named(score.identity) == (published.version, published.stamp)
        assert score.identity.model == str(caller.run.store.directory)
        assert_scores(score, request, Reference(tiny_model(seed=seed, shape=SERVABLE)), TOLERANCE)
    async with run_vllm(new.path) as fresh:
        expected = await fresh.score(request)
    assert after.identity.revision == expected.identity.revision
    for one, other in zip(after.sequences, expected.sequences, strict=True):
        np.testing.assert_array_equal(one.top_ids, other.top_ids)
        for what in ("sampled", "top_logprobs", "entropy"):
            np.testing.assert_allclose(getattr(one, what), getattr(other, what), atol=TOLERANCE, rtol=0)


async def test_publications_amid_requests_are_all_loaded_and_every_answer_is_by_the_one_it_names(
    caller: Caller,
) -> None:
    requests = caller.run.banks[0].requests(2, 24)
    answers: list[tuple[ScoreRequest, Score]] = []
    over = asyncio.Event()

    async def ask(part: list[ScoreRequest]) -> None:
        while not over.is_set():
            answers.extend([(request, await caller.score(request)) for request in part])

    async with asyncio.TaskGroup() as asking:
        for start in range(4):
            asking.create_task(ask(requests[start::4]))
        published = [await caller.serve(number) for number in (1, 2, 0)]
        over.set()
    assert {each.stamp for each in published} <= {score.identity.weights_id for _, score in answers}
    for request, score in answers:
        caller.run.assert_by_those_it_names(score, request)


async def test_a_pin_of_other_weights_is_refused(caller: Caller) -> None:
    old, new = await caller.serve(0), await caller.serve(1)
    for version in (old.version, new.version + 1):
        pinned = replace(long_context(3), pins=Pins(weights_version=version))
        with pytest.raises(TutelageError, match=f"FAILED_PRECONDITION: pins.weights_version: got {version}"):
            await caller.score(pinned)
    await caller.check(3, new)


def narrower(path: Path) -> None:
    """A tensor of another shape, under the same configuration."""
    state = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    state[name] = state[name][:-8].clone()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def torn(path: Path) -> None:
    """As a copy between machines leaves it that broke off."""
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [narrower, torn, without_weights])
async def test_a_publication_that_does_not_fit_leaves_the_old_weights_serving(
    caller: Caller, spoil: Callable[[Path], None]
) -> None:
    old = await caller.serve(2)
    cached = long_context(4)
    await caller.score(cached)
    bad = caller.run.publish(1, spoil)
    async with asyncio.timeout(30):
        while str(bad.path) not in caller.run.teacher.log.read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert "weights_not_loaded" in caller.run.teacher.log.read_text()
    await caller.check(5, old)
    score = await caller.score(cached)
    assert score.usage.tokens_reused == 3 * BLOCK, "nothing has changed, so nothing is forgotten"
    assert_scores(score, cached, Reference(tiny_model(seed=2, shape=SERVABLE)), TOLERANCE)
    await caller.check(6, await caller.serve(1))


async def test_a_publication_that_is_still_being_written_is_not_seen(caller: Caller) -> None:
    old = await caller.serve(0)
    store = caller.run.store
    version = old.version + 1
    temporary = store.path(version).with_name(f".{store.path(version).name}.x.tmp")
    shutil.copytree(caller.run.models[1], temporary)
    shutil.copytree(caller.run.models[1], store.path(version))  # copied here by others; its stamp comes last
    await asyncio.sleep(1.0)
    await caller.check(7, old)
    shutil.rmtree(temporary)
    shutil.rmtree(store.path(version))
    await caller.check(8, await caller.serve(1))
