"""The happy path of a group through a real server, and the refusals along it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from support.queue_data import VIEW_TOKENS, make_group, make_request, make_scores
from tutelage.v1.rollout_pb2 import SampleOrder

from services.queue import LeaseSettings, Queue, Submitted
from services.queue.embedded import EmbeddedServer

FAST = LeaseSettings(heartbeat=0.4)


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedServer(tmp_path_factory.mktemp("queue")) as server:
        yield server.url


@pytest.fixture
async def queue(server_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Queue]:
    async with Queue(server_url, f"test:{request.node.name}", max_queued_tokens=100, lease=FAST) as handle:
        yield handle


async def test_group_travels_from_order_to_acknowledgement(queue: Queue) -> None:
    order = SampleOrder(id="run-s0-0", run="run", num_groups=1)
    assert await queue.place_order(order)
    assert not await queue.place_order(order)

    async with queue.orders("run", "sampler") as sampler:
        [claimed] = await sampler.claim(4, 1000)
        assert claimed.order == order
        group, requests = make_group("run", 0), [make_request("big"), make_request("small", "reference")]
        assert await queue.submit_group(group, requests, order=claimed) is Submitted.QUEUED
        assert await queue.submit_group(group, requests, order=claimed) is Submitted.EXISTS
        assert await sampler.finish(claimed)
        assert not await sampler.finish(claimed)

    stats = await queue.teacher_stats("big")
    assert (stats.queued_tokens, stats.jobs.waiting, stats.jobs.in_flight) == (VIEW_TOKENS, 1, 0)

    reader = queue.scored("run")
    for teacher, view in (("big", "teacher"), ("small", "reference")):
        assert await reader.read(1, 0) == []
        async with queue.jobs(teacher, "replica") as replica:
            [claim] = await replica.claim(4, 1000)
            assert (claim.view, claim.deliveries, claim.traceparent) == (view, 1, group.traceparent)
            assert await replica.load(claim) == (group, make_request(teacher, view))
            assert await replica.commit(claim, make_scores(teacher))
            assert replica.held == 0

    [scored] = await reader.read(4, 1000)
    assert (scored.group, scored.status) == (group, "scored")
    assert {view: answer.request_id for view, answer in scored.scores.items()} == {
        "teacher": "big",
        "reference": "small",
    }
    await reader.acknowledge([scored])
    assert await queue.scored("run").read(1, 0) == []
    stats = await queue.teacher_stats("big")
    assert (stats.queued_tokens, stats.scored, stats.jobs.in_flight, stats.jobs.consumers) == (0, 1, 0, 0)
