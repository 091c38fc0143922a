"""What the trainer and a second sampler add to a group's trace when things do not go as planned."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from support.traces import one
from support.training_groups import RUN, make_expectations, make_group, make_plan
from support.training_run import wait_until
from tutelage.v1.rollout_pb2 import SampleOrder

from benchmarks.tracing.collector import Collector as TraceCollector
from services import tracing
from services.queue import OrderClaim, Queue, Submitted, sampler_role
from student_trainer.collect import Collector
from student_trainer.config import RunConfig, parse_run_config
from student_trainer.ledger import Ledger
from student_trainer.lineage import continued
from student_trainer.pacing import Pacer
from student_trainer.sampler.groups import SampledGroup, traceparent
from student_trainer.sampler.spans import RolloutTimes, record_rollout
from student_trainer.spans import record_trained
from student_trainer.waiting import Watch

pytest_plugins = ["support.collecting", "support.queue_server"]

PLAN = make_plan(preset="grpo")  # no teacher: a group goes straight to the trainer
LINEAGE = continued((), 0)


@pytest.fixture
def traces(collector: TraceCollector) -> Iterator[TraceCollector]:
    """This process traces."""
    tracing.start("tutelage-trainer", "test")
    yield collector
    tracing.stop()


def make_config(prompts_per_step: int) -> RunConfig:
    return parse_run_config(
        {
            "run": {"name": RUN},
            "student": {"model": "unused"},
            "data": {"task": "addition"},
            "sampling": {"samples_per_prompt": 2},
            "objective": {"preset": "grpo"},
            "training": {"steps": 1, "prompts_per_step": prompts_per_step},
        }
    )


def make_collector(queue: Queue, ledger: Ledger, prompts_per_step: int) -> Collector:
    config = make_config(prompts_per_step)
    return Collector(
        config=config,
        reader=queue.scored(RUN),
        pacer=Pacer(queue, config, ledger),
        watch=Watch(queue, RUN, [sampler_role(RUN)]),
        ledger=ledger,
        expected=make_expectations(PLAN),
        stop=asyncio.Event(),
    )


async def submit(queue: Queue, index: int, temperature: float | None = None) -> str:
    """Put a group into the queue; its traceparent."""
    group = make_group(index, PLAN, rewards=(1.0, 0.0))
    group.traceparent = traceparent(group.id, LINEAGE)
    if temperature is not None:
        group.temperature = temperature
    assert await queue.submit_group(group, []) is Submitted.QUEUED
    return group.traceparent


async def nothing(_status: str) -> None: ...


async def test_dropped_trained_and_redelivered_groups_can_be_told_apart(
    traces: TraceCollector, queue: Queue
) -> None:
    dropped, trained = await submit(queue, 0, temperature=0.123), await submit(queue, 1)
    ledger = Ledger(settings={})
    groups = await make_collector(queue, ledger, 1).collect(nothing)
    assert groups is not None
    with tracing.span("step", parent=""):
        record_trained(groups, time.time_ns(), step=1, refused=None)
    ledger.applied.add(1)
    # A trainer that starts again is given what was never acknowledged.
    again = await submit(queue, 2)
    groups = await make_collector(queue, ledger, 1).collect(nothing)
    assert groups is not None
    with tracing.span("step", parent="") as step:
        record_trained(groups, time.time_ns(), step=2, refused="the gradient norm is nan")
        step.event("refused")
    tracing.stop()

    found = traces.traces()
    first, second = [span for span in found[dropped[3:35]] if span.name == "collect.wait"]
    assert first.parent == dropped[36:52]
    assert first.error.startswith("shape: temperature: sampled at 0.123")
    assert (first.attributes["tutelage.outcome"], first.attributes["tutelage.drop_reason"]) == (
        "dropped",
        "shape",
    )
    assert "dropped" in first.events
    assert (second.attributes["tutelage.outcome"], second.error) == ("duplicate", "")
    assert not [span for span in found[dropped[3:35]] if span.name == "train"]

    waits = [span for span in found[trained[3:35]] if span.name == "collect.wait"]
    assert [span.attributes["tutelage.outcome"] for span in waits] == ["collected", "duplicate"]
    assert one(found[trained[3:35]], "train").error == ""

    refused = one(found[again[3:35]], "train")
    assert refused.error == "step_refused: the gradient norm is nan"
    assert refused.attributes["tutelage.step_refused"] is True
    assert refused.links == (traces.named("step")[1].trace,)


def test_a_redelivered_order_makes_the_same_root_again(traces: TraceCollector) -> None:
    group = make_group(3, PLAN)
    group.traceparent = traceparent(group.id, LINEAGE)
    sampled = SampledGroup(group, ())
    order = SampleOrder(id=f"{RUN}-s0-0", run=RUN, num_groups=1)
    now = time.time_ns()
    for deliveries, answer in ((1, Submitted.QUEUED), (2, Submitted.EXISTS)):
        claim = OrderClaim(entry="1-0", consumer="s", deliveries=deliveries, run=RUN, order=order)
        times = RolloutTimes(began=now, sampled=now + 1_000, submitted=now + 2_000)
        record_rollout(sampled, claim, times, answer)
        now += 10_000
    wait_until(lambda: len(traces.spans) >= 6, 10)
    one_root, other = traces.named("rollout")
    assert (
        (one_root.trace, one_root.id)
        == (other.trace, other.id)
        == (group.traceparent[3:35], group.traceparent[36:52])
    )
    assert [root.attributes["tutelage.outcome"] for root in (one_root, other)] == ["queued", "exists"]
    assert [root.events for root in (one_root, other)] == [(), ("redelivery",)]
    assert {span.parent for span in traces.spans if span.name != "rollout"} == {one_root.id}
