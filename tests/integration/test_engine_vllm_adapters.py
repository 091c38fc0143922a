"""A base and its LoRA adapters as teachers on one vLLM engine, against Hugging Face float32 and PEFT."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from support.adapters import CODE, MATH, save_adapter
from support.engine_requests import assert_scores, shuffled
from support.queue_data import make_group, make_request
from support.sequence_bank import Bank
from support.teachers import http_client, serve
from support.tiny_models import SERVABLE, random_ids, save_tiny_model, tiny_model
from support.vllm_engines import run_vllm
from tutelage.v1.teacher_pb2 import ScoreResponse
from tutelage_client import AsyncTeacherClient, codec
from tutelage_client.errors import TutelageError
from tutelage_client.types import ScoreRequest, Sequence, Signal

from services.models.adapters import read_adapter
from services.models.fingerprint import directory_revision
from services.queue import Queue, ScoredGroup
from services.queue.embedded import EmbeddedServer
from services.teacher.engines.vllm.engine import VllmEngine
from services.teacher.jobs import job_request
from services.teacher.puller import Puller

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.asyncio(loop_scope="module")

TOLERANCE = 1e-4
BASE, NAMES = "base", ("base", "math", "code")


@dataclass(frozen=True)
class Shared:
    """The engine that all tests ask, and what each of its teachers must answer."""

    engine: VllmEngine
    banks: dict[str, Bank]
    directories: dict[str, Path]

    def requests(self, seed: int, count: int) -> list[ScoreRequest]:
        """The same questions to every teacher, one teacher after the other within each question."""
        alike = [self.banks[name].requests(seed, count) for name in NAMES]
        return [
            replace(request, teacher=name)
            for same in zip(*alike, strict=True)
            for name, request in zip(NAMES, same, strict=True)
        ]

    async def check(self, requests: list[ScoreRequest]) -> None:
        scores = await asyncio.gather(*(self.engine.score(request) for request in requests))
        for request, score in zip(requests, scores, strict=True):
            assert score.identity.name == request.teacher
            assert_scores(score, request, self.banks[request.teacher], TOLERANCE)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shared]:
    root = tmp_path_factory.mktemp("adapters")
    directories = {BASE: save_tiny_model(root / BASE, shape=SERVABLE)}
    models = {BASE: tiny_model(shape=SERVABLE)}
    for name, recipe in (("math", MATH), ("code", CODE)):
        directories[name], models[name] = save_adapter(root / name, recipe)
    banks = {name: Bank(models[name], count=8, longest=160) for name in NAMES}
    adapters = {name: directories[name] for name in NAMES if name != BASE}
    async with run_vllm(directories[BASE], engine={"name": BASE, "adapters": adapters}) as engine:
        yield Shared(engine, banks, directories)


async def test_three_teachers_in_the_same_batches_equal_their_merged_models(shared: Shared) -> None:
    """All signals and temperatures; every adapter's slot is taken, and the base is among them."""
    requests = shared.requests(1, 10)
    await shared.check(requests)
    order = np.random.default_rng(0).permutation(len(requests))
    await shared.check([shuffled(requests[i], int(i)) for i in order])
    assert shared.engine.counters.rescored == 0
    merged = [shared.banks[name].sampled(requests[0], requests[0].sequences[0]) for name in NAMES]
    assert min(np.abs(merged[0] - merged[1]).max(), np.abs(merged[1] - merged[2]).max()) > 0.1


async def test_a_cached_prefix_belongs_to_one_teacher(shared: Shared) -> None:
    """The same long context: each teacher computes it once for itself, and then finds its own."""
    random = np.random.default_rng(5)
    context, response = random_ids(random, 160), random_ids(random, 8)
    request = ScoreRequest((context,), (Sequence("0", 0, response),), Signal())
    reused = {}
    for name in NAMES + NAMES:
        score = await shared.engine.score(replace(request, teacher=name))
        reused.setdefault(name, []).append(score.usage.tokens_reused)
    assert list(reused.values()) == [[0, 128]] * 3


async def test_every_teacher_has_an_identity_of_its_own(shared: Shared) -> None:
    identities = {identity.name: identity for identity in shared.engine.identities}
    assert tuple(identities) == NAMES
    base = identities[BASE]
    assert base.revision == directory_revision(shared.directories[BASE])
    for name in ("math", "code"):
        adapter = read_adapter(name, shared.directories[name])
        assert identities[name].revision == adapter.revision(base.revision)
        assert identities[name].model == f"{base.model}+{shared.directories[name]}"
        same = replace(identities[name], name=base.name, model=base.model, revision=base.revision)
        assert same == base
    assert len({identity.revision for identity in identities.values()}) == 3


async def test_each_is_asked_through_both_doors_and_by_its_own_stream(shared: Shared, tmp_path: Path) -> None:
    """One group, a view for each teacher: what three streams bring is what direct callers get."""
    group = make_group("r", 0)
    views = {name: make_request(name, view=f"view-{name}") for name in NAMES}
    for view in views.values():
        view.signal.sampled = True
    with EmbeddedServer(tmp_path / "queue", dies_with_parent=True) as server:
        async with serve(shared.engine) as doors, Queue(server.url) as queue:
            pullers = [Puller(doors.core, queue, teacher=n, consumer="here", concurrency=2) for n in NAMES]
            pulling = [asyncio.create_task(puller.run()) for puller in pullers]
            await queue.submit_group(group, list(views.values()))
            stored = await scored(queue)
            for name in NAMES:
                assert await queue.alive(f"teacher:{name}"), "a replica must say that it lives, as each"
                answer = codec.score_from_proto(stored.scores[f"view-{name}"])
                request = job_request(group, views[name])
                async with AsyncTeacherClient(doors.grpc) as client, http_client(doors.http) as http:
                    direct = await client.score_request(codec.request_from_proto(request))
                    headers = {"content-type": "application/x-protobuf"}
                    reply = await http.post("/v1/score", content=request.SerializeToString(), headers=headers)
                by_http = codec.score_from_proto(ScoreResponse.FromString(reply.content))
                assert answer.identity == direct.identity == by_http.identity
                assert answer.identity.name == name
                for one, *others in zip(answer.sequences, direct.sequences, by_http.sequences, strict=True):
                    for other in others:
                        np.testing.assert_allclose(one.sampled, other.sampled, atol=TOLERANCE)
            for puller in pullers:
                puller.stop()
            await asyncio.gather(*pulling)


async def scored(queue: Queue) -> ScoredGroup:
    reader = queue.scored("r")
    async with asyncio.timeout(20):
        while not (found := await reader.read(1, 200)):
            pass
    return found[0]


async def test_weights_under_adapters_stay(shared: Shared) -> None:
    with pytest.raises(TutelageError, match="FAILED_PRECONDITION: weights: got others for a model with ad"):
        await shared.engine.load_weights(shared.directories[BASE], 1)
    await shared.check(shared.requests(9, 2))
