"""Spans of a real replica: direct calls join the caller's trace, jobs their group's."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from support.queue_data import make_group, make_request
from support.teachers import TeacherProcess, teacher_process
from support.traces import SOON, children, one, traced
from support.training_run import wait_until
from tutelage.v1.rollout_pb2 import Group, ViewRequest
from tutelage_client import AsyncTeacherClient, RetryPolicy, TeacherClient, TutelageError, codec

from benchmarks.tracing.collector import Collector, Span
from services import tracing
from services.queue import LeaseSettings, Queue, ScoredGroup
from services.queue.embedded import EmbeddedServer
from services.teacher.engines.fake import FakeEngine, FakeSettings
from student_trainer.lineage import continued
from student_trainer.sampler.groups import traceparent

pytest_plugins = ["support.collecting"]

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
REQUEST = codec.build_request([[1, 2, 3]], [[4, 5, 6]] * 4)
SERVICE = "tutelage.v1.TeacherService"
ONCE = RetryPolicy(attempts=1)


@pytest.fixture
def teacher(collector: Collector, tmp_path: Path) -> Iterator[TeacherProcess]:
    with teacher_process(tmp_path / "teacher", consumer="replica-a") as process:
        yield process


def arrived(collector: Collector, name: str, count: int = 1) -> list[Span]:
    wait_until(lambda: len(collector.named(name)) >= count, 15, f"{count} spans {name}")
    return collector.named(name)


def test_a_grpc_call_joins_the_callers_trace_and_says_what_the_engine_did(
    collector: Collector, teacher: TeacherProcess
) -> None:
    with TeacherClient(teacher.grpc) as client:
        client.score_request(REQUEST, traceparent=PARENT)
    (call,) = arrived(collector, f"{SERVICE}/Score")
    assert (call.trace, call.parent, call.kind) == (TRACE, SPAN, "server")
    assert (call.service, call.instance) == ("tutelage-teacher", "replica-a")
    assert call.attributes["rpc.system.name"] == "grpc"
    assert call.attributes["rpc.response.status_code"] == "OK"
    (engine,) = children(call, collector.spans)
    assert engine.name == "engine"
    assert call.began <= engine.began <= engine.ended <= call.ended
    assert engine.attributes["tutelage.sequences"] == 4
    assert engine.attributes["tutelage.positions"] == 12
    assert engine.attributes["tutelage.tokens_computed"] == 15


def test_what_a_caller_did_wrong_is_told_and_is_no_error_of_the_server(
    collector: Collector, teacher: TeacherProcess
) -> None:
    with TeacherClient(teacher.grpc, retry=ONCE) as client:
        for request in (replace(REQUEST, teacher="other"), replace(REQUEST, sequences=())):
            with pytest.raises(TutelageError):
                client.score_request(request)
    calls = arrived(collector, f"{SERVICE}/Score", 2)
    codes = ["NOT_FOUND", "INVALID_ARGUMENT"]
    assert [call.attributes["rpc.response.status_code"] for call in calls] == codes
    assert [call.attributes["error.type"] for call in calls] == codes
    assert [call.error for call in calls] == ["", ""]


def test_a_stream_has_one_span_per_request_below_that_of_the_call(
    collector: Collector, teacher: TeacherProcess
) -> None:
    requests = [
        codec.build_request([[1]], [[2, 3]], request_id="fine"),
        codec.build_request([[1]], [[2, 3]], request_id="refused", teacher="somebody-else"),
    ]
    with TeacherClient(teacher.grpc) as client:
        assert len(list(client.score_stream(requests, traceparent=PARENT))) == 2
    (call,) = arrived(collector, f"{SERVICE}/ScoreStream")
    assert (call.trace, call.parent) == (TRACE, SPAN)
    scores = {span.attributes["tutelage.request"]: span for span in children(call, collector.spans)}
    assert scores.keys() == {"fine", "refused"}
    assert [span.name for span in children(scores["fine"], collector.spans)] == ["engine"]
    assert scores["refused"].error.startswith("NOT_FOUND: teacher: got 'somebody-else'")


def test_http_calls_join_the_callers_trace_with_its_state(
    collector: Collector, teacher: TeacherProcess
) -> None:
    body = {
        "contexts": [{"ids": [1, 2]}],
        "sequences": [{"id": "0", "response_ids": [3]}],
        "signal": {"sampled": True},
    }
    headers = {"traceparent": PARENT, "tracestate": "vendor=1"}
    with httpx.Client(base_url=teacher.http, headers=headers) as client:
        assert client.get("/v1/teacher").status_code == 200
        assert client.post("/v1/score", json={**body, "teacher": "other"}).status_code == 404
        assert client.post("/v1/score", json=body).status_code == 200
        assert client.get("/v1/made-up").status_code == 404
        assert client.get("/ready").status_code == 200
    arrived(collector, "GET /v1/teacher")
    refused, scored = arrived(collector, "POST /v1/score", 2)
    assert {span.trace for span in collector.spans} == {TRACE}
    assert (scored.parent, scored.kind, scored.state) == (SPAN, "server", "vendor=1")
    assert scored.attributes["http.request.method"] == "POST"
    assert scored.attributes["http.route"] == "/v1/score"
    assert [span.attributes["http.response.status_code"] for span in (refused, scored)] == [404, 200]
    assert [span.name for span in children(scored, collector.spans)] == ["engine"]
    assert not refused.error, "what a caller did wrong is no error of the server"
    # A path that somebody made up is no name of a span, and a probe is no work.
    assert {span.name for span in collector.spans if span.kind == "server"} == {
        "GET /v1/teacher",
        "POST /v1/score",
        "GET",
    }


def test_what_is_no_traceparent_begins_a_trace_of_its_own(
    collector: Collector, teacher: TeacherProcess
) -> None:
    with httpx.Client(base_url=teacher.http) as client:
        client.get("/v1/teacher")
        client.get("/v1/teacher", headers={"traceparent": "00-nonsense"})
    spans = arrived(collector, "GET /v1/teacher", 2)
    assert [span.parent for span in spans] == ["", ""]
    assert len({span.trace for span in spans}) == 2


async def test_the_clients_take_the_callers_current_span(
    collector: Collector, teacher: TeacherProcess
) -> None:
    tracing.start("caller", "test")
    try:
        with TeacherClient(teacher.grpc) as client, tracing.span("outer", parent=""):
            client.score_request(REQUEST)
        async with AsyncTeacherClient(teacher.grpc) as client:
            with tracing.span("outer", parent=""):
                await client.score_request(REQUEST)
            with tracing.span("outer", parent=""):
                assert [answer async for answer in client.score_stream([REQUEST])]
    finally:
        await asyncio.to_thread(tracing.stop)
    calls = [*arrived(collector, f"{SERVICE}/Score", 2), *arrived(collector, f"{SERVICE}/ScoreStream")]
    outer = arrived(collector, "outer", 3)
    assert [(call.trace, call.parent) for call in calls] == [(span.trace, span.id) for span in outer]
    assert {span.service for span in outer} == {"caller"}


def test_a_caller_that_samples_nothing_leaves_no_span(collector: Collector, teacher: TeacherProcess) -> None:
    with TeacherClient(teacher.grpc) as client:
        client.score_request(REQUEST, traceparent=f"00-{TRACE}-{SPAN}-00")
        client.score_request(REQUEST, traceparent=PARENT)
    assert len(arrived(collector, f"{SERVICE}/Score")) == 1
    assert len(collector.named("engine")) == 1


def view() -> ViewRequest:
    asked = make_request("fake")
    asked.signal.sampled = True
    return asked


def attached(group: Group, collector: Collector, name: str) -> list[Span]:
    """The group's spans of a name; each must hang below the root that its traceparent names."""
    trace, root, _ = tracing.ids(group.traceparent) or ("", "", "")
    found = collector.named(name, lambda span: span.trace == trace)
    assert {span.parent for span in found} <= {root}
    return found


async def scored(queue: Queue, count: int) -> dict[str, ScoredGroup]:
    reader, found = queue.scored("r"), {}
    async with asyncio.timeout(30):
        while len(found) < count:
            found.update({group.group.id: group for group in await reader.read(16, 200)})
    return found


async def test_a_killed_replica_and_the_one_after_it_are_both_in_the_trace(
    collector: Collector, tmp_path: Path
) -> None:
    with EmbeddedServer(tmp_path / "queue") as server:
        async with Queue(server.url, lease=LeaseSettings(heartbeat=0.5)) as queue:
            group = make_group("r", 7)
            settings = {"queue_url": server.url, "heartbeat_seconds": 0.5}
            slow = {**settings, "fake": {"latency_seconds": 60.0}}
            with teacher_process(tmp_path / "a", consumer="replica-a", **slow) as first:
                await queue.submit_group(group, [view()])
                await asyncio.to_thread(arrived, collector, "queue.wait")
                first.kill()
            with teacher_process(tmp_path / "b", consumer="replica-b", **settings) as second:
                await scored(queue, 1)
                assert await asyncio.to_thread(second.terminate) == 0
    waits, (score,) = attached(group, collector, "queue.wait"), attached(group, collector, "score")
    assert [(w.instance, w.attributes["tutelage.delivery"], w.events) for w in waits] == [
        ("replica-a", 1, ()),
        ("replica-b", 2, ("redelivery",)),
    ]
    assert (score.instance, score.attributes["tutelage.delivery"], score.error) == ("replica-b", 2, "")
    assert "redelivery" in score.events
    assert waits[1].ended <= score.ended
    assert score.attributes["messaging.message.id"] == waits[0].attributes["messaging.message.id"]
    assert score.attributes["tutelage.positions"] == 12
    assert score.attributes["tutelage.outcome"] == "committed"


async def test_a_failure_says_its_code_and_the_last_one_that_it_is_a_dead_letter(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same goes for the replica's log: JSON lines with the ids of the span they were written in."""
    monkeypatch.setenv("TUTELAGE_LOG_FORMAT", "json")
    with EmbeddedServer(tmp_path / "queue") as server:
        async with Queue(server.url, lease=LeaseSettings(heartbeat=0.5)) as queue:
            poison, hopeless = make_group("r", 1), make_group("r", 2)
            wrong = view()
            wrong.signal.top_k = 10_000
            await queue.submit_group(poison, [view()])
            await queue.submit_group(hopeless, [wrong])
            settings = {"queue_url": server.url, "heartbeat_seconds": 0.5, "fake": {"failure_rate": 1.0}}
            with teacher_process(tmp_path / "t", **settings) as replica:
                assert {group.status for group in (await scored(queue, 2)).values()} == {"failed"}
                assert await asyncio.to_thread(replica.terminate) == 0
    deliveries = attached(poison, collector, "score")
    assert [span.attributes["tutelage.delivery"] for span in deliveries] == [1, 2, 3]
    assert [span.error for span in deliveries] == ["INTERNAL: injected failure"] * 3
    assert ["dead_letter" in span.events for span in deliveries] == [False, False, True]
    (refused,) = attached(hopeless, collector, "score")
    assert refused.attributes["error.type"] == "INVALID_ARGUMENT"
    assert "dead_letter" in refused.events
    logged = [json.loads(line) for line in replica.log.read_text().splitlines()]
    failures = [line for line in logged if line["event"] == "job_failed"]
    told = {(line["group"], line["delivery"], line["trace_id"], line["span_id"]) for line in failures}
    spans = [(s.attributes["tutelage.group"], s) for s in [*deliveries, refused]]
    assert told == {
        (group, span.attributes["tutelage.delivery"], span.trace, span.id) for group, span in spans
    }
    assert {line["view"] for line in failures} == {"teacher"}
    assert {line["job"] for line in failures} == {
        span.attributes["messaging.message.id"] for _, span in spans
    }


async def test_what_is_handed_back_is_seen_twice_and_is_no_redelivery(
    collector: Collector, tmp_path: Path
) -> None:
    with EmbeddedServer(tmp_path / "queue") as server:
        async with Queue(server.url, lease=LeaseSettings(heartbeat=0.5)) as queue:
            group = make_group("r", 3)
            settings = {"queue_url": server.url, "heartbeat_seconds": 0.5, "grace_seconds": 0.2}
            with teacher_process(tmp_path / "a", fake={"latency_seconds": 60.0}, **settings) as first:
                await queue.submit_group(group, [view()])
                await asyncio.to_thread(arrived, collector, "queue.wait")
                assert await asyncio.to_thread(first.terminate) == 1
            with teacher_process(tmp_path / "b", **settings) as second:
                await scored(queue, 1)
                assert await asyncio.to_thread(second.terminate) == 0
    given_back, committed = attached(group, collector, "score")
    assert "handed_back" in given_back.events
    assert [span.attributes["tutelage.delivery"] for span in (given_back, committed)] == [1, 1]


def test_a_collector_that_is_away_costs_a_warning_and_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        away = f"http://127.0.0.1:{taken.getsockname()[1]}"  # takes connections and answers nothing
        for name, value in traced(away).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "512")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "5")
        expected = asyncio.run(FakeEngine(FakeSettings()).score(REQUEST)).sequences
        with teacher_process(tmp_path / "t") as teacher:
            with TeacherClient(teacher.grpc, retry=ONCE) as client:
                slowest = 0.0
                for _ in range(600):
                    began = time.perf_counter()
                    answer = client.score_request(REQUEST, timeout=10)
                    slowest = max(slowest, time.perf_counter() - began)
                    for one_, other in zip(answer.sequences, expected, strict=True):
                        np.testing.assert_array_equal(one_.sampled, other.sampled)
            wait_until(lambda: "traces_not_sent" in teacher.log.read_text(), 30)
            assert teacher.terminate() == 0
    assert slowest < 4.0, "a call waited for the collector"
    log = teacher.log.read_text()
    assert log.count("traces_not_sent") == 1
    assert "Traceback" not in log


def test_a_collector_that_comes_back_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Collector() as first:
        endpoint = first.endpoint
    for name, value in traced(endpoint).items():
        monkeypatch.setenv(name, value)
    with teacher_process(tmp_path / "t") as teacher, TeacherClient(teacher.grpc) as client:
        client.score_request(REQUEST)
        wait_until(lambda: "traces_not_sent" in teacher.log.read_text(), 15)
        for _ in range(40):  # several exports that fail
            client.score_request(REQUEST)
            time.sleep(0.1)
        with Collector(int(endpoint.rpartition(":")[2])) as again:
            deadline = time.monotonic() + 20
            while not again.spans and time.monotonic() < deadline:
                client.score_request(REQUEST)
                time.sleep(0.1)
            assert again.spans
            wait_until(lambda: "traces_sent_again" in teacher.log.read_text(), 10)
    assert teacher.log.read_text().count("traces_not_sent") == 1


def test_what_was_not_sent_yet_is_sent_when_the_replica_drains(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    with teacher_process(tmp_path / "t") as teacher, TeacherClient(teacher.grpc) as client:
        client.score_request(REQUEST)
        assert not collector.spans
        assert teacher.terminate() == 0
    assert {span.name for span in collector.spans} == {f"{SERVICE}/Score", "engine"}


def test_a_root_is_sampled_by_its_id_and_what_is_below_it_with_it(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a redelivered order makes the same decision, and no tree loses some of its branches."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    lineage = continued((), 0)
    tracing.start("sampler", "test")
    try:
        roots = [traceparent(f"run-{index}", lineage) for index in range(200)]
        assert roots == [traceparent(f"run-{index}", lineage) for index in range(200)]
        for root in roots:
            tracing.record("rollout", 1_000, 2_000, itself=root)
            tracing.record("score", 1_500, 1_800, parent=root)
    finally:
        tracing.stop()
    sampled = {root[3:35] for root in roots if root.endswith("-01")}
    assert 60 < len(sampled) < 140
    for name in ("rollout", "score"):
        assert {span.trace for span in arrived(collector, name, len(sampled))} == sampled
    assert {root[36:52] for root in roots} >= {span.id for span in collector.named("rollout")}


def test_runs_of_one_name_do_not_share_traces() -> None:
    one_run, other_run = continued((), 0), continued((), 0)
    assert traceparent("run-0", one_run) == traceparent("run-0", continued(one_run, 5))
    assert traceparent("run-0", one_run) != traceparent("run-0", other_run)
    assert traceparent("run-0", one_run) != traceparent("run-1", one_run)
    assert traceparent("run-0", one_run).endswith("-00"), "this process does not trace"


def test_a_token_comes_before_a_trace(collector: Collector, tmp_path: Path) -> None:
    """Who may not call may not write into somebody's trace either."""
    (tmp_path / "tokens").write_text("secret\n")
    with teacher_process(tmp_path / "t", service={"token_file": tmp_path / "tokens"}) as teacher:
        with (
            TeacherClient(teacher.grpc, retry=ONCE) as stranger,
            pytest.raises(TutelageError, match="UNAUTHENTICATED"),
        ):
            stranger.score_request(REQUEST, traceparent=PARENT)
        assert httpx.get(f"{teacher.http}/v1/teacher", headers={"traceparent": PARENT}).status_code == 401
        with TeacherClient(teacher.grpc, token="secret") as client:
            client.score_request(REQUEST)
        arrived(collector, f"{SERVICE}/Score")
        time.sleep(5 * int(SOON["OTEL_BSP_SCHEDULE_DELAY"]) / 1e3)
    assert TRACE not in collector.traces()
    assert one(collector.spans, "engine").trace == one(collector.spans, f"{SERVICE}/Score").trace
