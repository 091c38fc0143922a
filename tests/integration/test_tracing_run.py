"""A whole run, traced: one tree per trained group, one trace per step, and nothing else changes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.traces import children, one, traced
from support.training_run import write_model
from support.up_run import STEPS, UpRun

from benchmarks.tracing.collector import Collector, Span
from benchmarks.tracing.tree import render

pytestmark = pytest.mark.timeout(400)

MILLISECOND = 1_000_000
PROMPTS = 8  # of a step
STEP_PARTS = ["collect", "forward_backward", "optimizer", "publish"]


@dataclass(frozen=True)
class Traced:
    """A finished run with everything it sent."""

    run: UpRun
    collector: Collector

    def groups(self) -> dict[str, list[Span]]:
        """Spans of each group's trace, by the group's id."""
        found = {}
        for spans in self.collector.traces().values():
            roots = [span for span in spans if span.name == "rollout"]
            if roots:
                found[roots[0].attributes["tutelage.group"]] = spans
        return found

    def lines(self, process: str) -> list[dict[str, Any]]:
        """The log of a process, whose every line has to be JSON."""
        return [json.loads(line) for line in (self.run.directory / "logs" / f"{process}.log").open()]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_model(root / "student", seed=1)
    write_model(root / "teacher", seed=2)
    return root


def run_to_the_end(root: Path, models: Path, name: str, **variables: str) -> UpRun:
    run = UpRun.write(root, models, name)
    with pytest.MonkeyPatch.context() as environment:
        for variable, value in variables.items():
            environment.setenv(variable, value)
        run.start()
    try:
        assert run.finish() == 0, run.output()
    finally:
        run.end()
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Traced]:
    root = tmp_path_factory.mktemp("traced")
    with Collector() as collector:
        variables = {**traced(collector.endpoint), "TUTELAGE_LOG_FORMAT": "json"}
        yield Traced(run_to_the_end(root, models, "traced", **variables), collector)


def test_every_trained_group_is_one_tree_from_its_rollout_to_its_training(finished: Traced) -> None:
    groups = finished.groups()
    assert groups.keys() == {f"up-{index}" for index in range(STEPS * PROMPTS)}
    for spans in groups.values():
        root = one(spans, "rollout")
        assert root.parent == ""
        ids = {span.id for span in spans}
        assert all(span.parent in ids for span in spans if span is not root), render(spans)
        names = sorted(span.name for span in children(root, spans))
        assert names == ["collect.wait", "queue.wait", "sample", "score", "submit", "train"], render(spans)
        assert [span.name for span in children(one(spans, "score"), spans)] == ["engine"]
        services = {span.name: span.service for span in spans}
        assert services["rollout"] == "tutelage-sampler"
        assert services["score"] == services["queue.wait"] == "tutelage-teacher"
        assert services["train"] == services["collect.wait"] == "tutelage-trainer"


def test_a_group_is_sampled_queued_scored_collected_and_trained_in_this_order(finished: Traced) -> None:
    for spans in finished.groups().values():
        rollout, wait, score = (one(spans, name) for name in ("rollout", "queue.wait", "score"))
        collected, train = one(spans, "collect.wait"), one(spans, "train")
        assert all(span.began <= span.ended for span in spans)
        # The queue tells its times in whole milliseconds, rounded down.
        assert rollout.began <= one(spans, "sample").ended <= wait.began + MILLISECOND
        assert wait.ended <= score.began <= one(spans, "engine").began
        assert one(spans, "engine").ended <= score.ended
        assert one(spans, "engine").ended <= collected.began + MILLISECOND
        assert collected.ended <= train.began


def test_spans_say_what_the_work_was(finished: Traced) -> None:
    for group, spans in finished.groups().items():
        score, rollout, train = one(spans, "score"), one(spans, "rollout"), one(spans, "train")
        assert score.kind == "consumer"
        told = {name.removeprefix("tutelage."): value for name, value in score.attributes.items()}
        assert (told["run"], told["group"], told["delivery"]) == ("up", group, 1)
        assert told["positions"] == rollout.attributes["tutelage.tokens"] > 0
        assert told["tokens_computed"] >= told["positions"]
        assert told["weights_version"] == 0
        assert told["outcome"] == "committed"
        assert score.attributes["messaging.destination.name"] == "tutelage:jobs:big"
        version = train.attributes["tutelage.step"] - 1 - train.attributes["tutelage.staleness"]
        assert rollout.attributes["tutelage.policy_version"] == version


def test_each_step_is_a_trace_that_its_groups_link_to(finished: Traced) -> None:
    steps = finished.collector.named("step")
    assert [step.attributes["tutelage.step"] for step in steps] == list(range(1, STEPS + 1))
    assert {step.parent for step in steps} == {""}
    assert len({step.trace for step in steps}) == STEPS
    by_trace = {step.trace: step.attributes["tutelage.step"] for step in steps}
    traces = finished.collector.traces()
    for step in steps:
        parts = [span.name for span in children(step, traces[step.trace])]
        saved = step.attributes["tutelage.step"] % 5 == 0
        assert parts == [*STEP_PARTS[:3], *(["checkpoint"] if saved else []), *STEP_PARTS[3:]]
    for spans in finished.groups().values():
        train = one(spans, "train")
        assert [by_trace[link] for link in train.links] == [train.attributes["tutelage.step"]]


def test_every_line_of_every_log_is_json_and_says_what_it_is_about(finished: Traced) -> None:
    for process in ("trainer", "sampler-0", "big-0", "big-1"):
        lines = finished.lines(process)
        assert lines
        assert all(line.keys() >= {"ts", "level", "event"} for line in lines)
    by_trace = {step.trace: step.attributes["tutelage.step"] for step in finished.collector.named("step")}
    stepped = [line for line in finished.lines("trainer") if line["event"] == "step"]
    assert [f"{by_trace[line['trace_id']]}/{STEPS}" for line in stepped] == [line["step"] for line in stepped]
    orders = [line for line in finished.lines("sampler-0") if line["event"] == "order sampled"]
    rollouts = finished.collector.named("rollout")
    assert (
        {line["order"] for line in orders}
        == {span.attributes["tutelage.order"] for span in rollouts}
        != set()
    )


def test_a_trace_is_printed_as_a_tree(finished: Traced) -> None:
    printed = render(finished.groups()["up-8"]).splitlines()
    assert printed[0].startswith("trace ")
    assert " rollout  " in printed[2]
    assert "group=up-8" in printed[2]
    (engine,) = [line for line in printed if "engine" in line]
    score = printed[printed.index(engine) - 1]
    assert score.index("score") < engine.index("engine"), "a child is indented"
    (train,) = [line for line in printed if "─ train" in line]
    assert "→ trace" in train


def test_a_command_that_trains_nothing_has_no_trace_to_print() -> None:
    command = [sys.executable, "-m", "benchmarks.tracing", "--", "true"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stdout.startswith("0 traces, and no group")


def test_a_collector_that_is_away_costs_one_warning_per_process_and_changes_no_weight(
    finished: Traced, models: Path, tmp_path: Path
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as closed:
        away = f"http://127.0.0.1:{closed.getsockname()[1]}"
    untraced = run_to_the_end(tmp_path, models, "up", **traced(away))
    weights, others = untraced.weights(), finished.run.weights()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    for log in ("trainer", "sampler-0"):
        text = (untraced.directory / "logs" / f"{log}.log").read_text()
        assert text.count("traces_not_sent") == 1, text
        assert "Traceback" not in text
