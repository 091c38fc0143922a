"""Views end to end: contexts of their own, routed teachers and guided sampling, on a real queue.

Every score is compared with a plain float32 forward of transformers over the context that the test itself
writes out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.text_tokenizer import text_tokenizer
from support.training_run import Processes, start_server
from support.view_run import SEEDS, ViewRuns, reference_logprobs, write_model
from transformers import AutoModelForCausalLM
from tutelage.v1.rollout_pb2 import Group
from tutelage_client.codec import unpack_ids
from tutelage_client.errors import TutelageError

from services.queue import ScoredGroup
from services.teacher.jobs import job_request
from student_trainer.config import RunConfig
from student_trainer.sampler.groups import SampledGroup
from student_trainer.verify import Expectations, verify_group

VIEWS = """
target = "losses"
tokens = { marked_only = true }

[objective.views.expert]
route = { a = "maths", p = "prose" }
weight_field = "trust"

[objective.views.hinted]
weights = "teacher:self"
context = { user = "{prompt} ({solution}) not {other_prompt}", system = "As {kind}." }

[objective.views.taught]
weights = "teacher:self"
context = [{ user = "{prompt} so {success}" }, { user = "{prompt} no: {feedback}" }]
missing = "same"

[objective.views.plain]
weights = "teacher:self"
"""
GROUPS = 8


@dataclass(frozen=True)
class Bench:
    runs: ViewRuns
    processes: Processes
    models: dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """The groups of one run as they were sampled and as the teachers scored them."""

    config: RunConfig
    sampled: list[SampledGroup]
    scored: list[ScoredGroup]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("views")
    for name, seed in SEEDS.items():
        write_model(root / name, seed)
    runs = ViewRuns(root, (server := start_server(root / "queue")).url)
    runs.write_rows("rows.jsonl", {})
    with Processes() as processes:
        for name in ("maths", "prose", "self"):
            processes.teacher(server.url, root / name, root / f"{name}.log", name=name)
        models = {name: AutoModelForCausalLM.from_pretrained(root / name).eval() for name in SEEDS}
        yield Bench(runs, processes, models)
    server.stop()


@pytest.fixture(scope="module")
def scored(bench: Bench) -> Scored:
    """Groups some of whose responses are right: rows 0 and 3 are answered as the student answers them."""
    before = bench.runs.sample(bench.runs.config("before", VIEWS), range(4))
    answers = {i: before[i].group.rollouts[i % 3].text for i in (0, 3)}
    bench.runs.write_rows("answered.jsonl", answers)
    config = bench.runs.config("scored", VIEWS, rows="answered.jsonl")
    sampled = bench.runs.sample(config, range(GROUPS))
    return Scored(config, sampled, bench.runs.score(config, sampled))


def chat(user: str, system: str | None = None) -> str:
    """ChatML, written out."""
    told = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{told}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


TOKENIZER = text_tokenizer(chat=True)


def ids_of(text: str) -> Any:
    return np.array(TOKENIZER(text)["input_ids"], dtype=np.int32)


def expected_contexts(group: Group, place: int) -> dict[str, set[str]]:
    """What each view may see before one response, written without the code under test."""
    i, rollout = group.index, group.rollouts[place]
    step = range(i - i % 4, i - i % 4 + 4)
    siblings = {r.text.strip() for n, r in enumerate(group.rollouts) if n != place and r.reward == 1.0}
    taught = {chat(f"{i}? so {text}") for text in siblings if text}
    if not taught and rollout.reward == 0.0:
        said = (
            f"The answer {rollout.text.strip()!r} is wrong."
            if rollout.text.strip()
            else "There is no answer."
        )
        taught = {chat(f"{i}? no: {said}")}
    return {
        "expert": {chat(f"{i}?")},
        "hinted": {chat(f"{i}? (sol {i}) not {j}?", f"As {'ap'[i % 2]}.") for j in step if j != i},
        "taught": taught or {chat(f"{i}?")},
        "plain": {chat(f"{i}?")},
    }


def test_every_view_scores_the_same_tokens_under_its_own_context(bench: Bench, scored: Scored) -> None:
    """Position t of every view is log q(response[t]) after that view's own context, to float32 rounding."""
    seen = {"success": 0, "feedback": 0, "same": 0}
    for sampled, answer in zip(scored.sampled, scored.scored, strict=True):
        group = answer.group
        teachers = {"expert": ("maths", "prose")[group.index % 2]}
        for request in sampled.requests:
            answers = answer.scores[request.view]
            assert answers.identity.name == teachers.get(request.view, "self")
            for place, rollout in enumerate(group.rollouts):
                context = unpack_ids(
                    request.contexts[place if len(request.contexts) > 1 else 0].ids, "context"
                )
                text = TOKENIZER.decode(context)
                assert text in expected_contexts(group, place)[request.view]
                response = unpack_ids(rollout.response_ids, "response")
                expected = reference_logprobs(bench.models[answers.identity.name], ids_of(text), response)
                got = np.frombuffer(answers.sequences[place].sampled, dtype="<f4")
                np.testing.assert_allclose(
                    got, expected, atol=1e-4, rtol=0, err_msg=f"{group.id} {request.view}"
                )
                own = request.view in rollout.privileged_views
                assert own == (text != chat(f"{group.index}?"))
                if request.view == "taught":
                    seen["same" if not own else "success" if " so " in text else "feedback"] += 1
    assert min(seen.values()) > 0, f"every way a context is chosen was met: {seen}"


def test_privileged_context_moves_the_scores_of_the_same_weights(bench: Bench, scored: Scored) -> None:
    """And every response is scored under its own context: a sibling's would have given other numbers."""
    moved = []
    for sampled, answer in zip(scored.sampled, scored.scored, strict=True):
        (request,) = (request for request in sampled.requests if request.view == "taught")
        for place, rollout in enumerate(answer.group.rollouts):
            plain, taught = (
                np.frombuffer(answer.scores[view].sequences[place].sampled, dtype="<f4")
                for view in ("plain", "taught")
            )
            if "taught" not in rollout.privileged_views:
                np.testing.assert_array_equal(plain, taught)
                continue
            moved.append(np.abs(plain - taught).max())
            if len(request.contexts) > 1:
                sibling = (place + 1) % len(request.contexts)
                if request.contexts[sibling].ids != request.contexts[place].ids:
                    other = unpack_ids(request.contexts[sibling].ids, "context")
                    response = unpack_ids(rollout.response_ids, "response")
                    assert (
                        np.abs(reference_logprobs(bench.models["self"], other, response) - taught).max()
                        > 1e-3
                    )
    assert min(moved) > 1e-3


def test_response_ids_are_the_same_in_every_view_and_jobs_share_what_they_can(scored: Scored) -> None:
    for sampled in scored.sampled:
        shapes = {}
        for request in sampled.requests:
            job = job_request(sampled.group, request)
            responses = [sequence.response_ids for sequence in job.sequences]
            assert responses == [rollout.response_ids for rollout in sampled.group.rollouts]
            shapes[request.view] = len(job.contexts)
        assert shapes["taught"] in (1, 3)
        assert {shapes[view] for view in ("expert", "hinted", "plain")} == {1}


def test_what_was_scored_passes_the_trainers_checks_with_its_marks(scored: Scored) -> None:
    plan = scored.config.plan()
    expected = Expectations(
        scored.config.run.name,
        plan,
        1.0,
        112,
        scored.scored[0].scores["plain"].identity.tokenizer_fingerprint,
    )
    pins: dict[str, Any] = {}
    for answer in scored.scored:
        group = verify_group(answer, expected, pins)
        assert group.view_weights == {"expert": 0.5 + answer.group.index}
        for rollout, sent in zip(group.rollouts, answer.group.rollouts, strict=True):
            assert rollout.marked == (set(sent.privileged_views) == {"hinted", "taught"})
    assert set(pins) == {"maths", "prose", "self"}


def test_redelivered_order_asks_the_same(bench: Bench, scored: Scored) -> None:
    again = bench.runs.sample(scored.config, range(3, GROUPS))
    for before, after in zip(scored.sampled[3:], again, strict=True):
        assert before.requests == after.requests
        for one, other in zip(before.group.rollouts, after.group.rollouts, strict=True):
            assert one.response_ids == other.response_ids
            assert one.privileged_views == other.privileged_views


def test_tag_that_no_route_names_is_refused_when_it_is_sampled(bench: Bench) -> None:
    config = bench.runs.config("untold", '[objective.views.expert]\nroute = { a = "maths" }')
    with pytest.raises(
        TutelageError, match=r"expert\.route: row 1 of .* has kind = 'p', allowed: a"
    ) as caught:
        bench.runs.sample(config, range(2))
    assert caught.value.code == "INVALID_ARGUMENT"


GUIDED = 'context = { user = "{solution} {prompt}", system = "Guess." }'
TOP = """
support = "student_topk"
k = 4
estimator = "pathwise"
correction = { kind = "importance", cap = 2.0 }
[objective.views.expert]
weights = "teacher:maths"
"""
IMPORTANCE = """
correction = { kind = "importance", cap = 2.0 }
[objective.views.expert]
weights = "teacher:maths"
"""


PAIRS = """
preference = { scale = 0.5 }
normalisation = "sequence_mean"
[objective.views.expert]
weights = "teacher:self"
context = { user = "{solution} {prompt}", system = "Guess." }
"""


def test_guided_student_samples_under_its_context_and_is_scored_under_its_prompt(bench: Bench) -> None:
    config = bench.runs.config("guided", TOP, sampling=GUIDED)
    for sampled in bench.runs.sample(config, range(4)):
        group, i = sampled.group, sampled.group.index
        assert group.sampled_by == "student@context"
        prompt = unpack_ids(group.prompt_ids, "prompt")
        np.testing.assert_array_equal(prompt, ids_of(chat(f"{i}?")))
        assert [context.ids for context in sampled.requests[0].contexts] == [group.prompt_ids]
        for rollout in group.rollouts:
            response = unpack_ids(rollout.response_ids, "response")
            behaviour = np.frombuffer(rollout.behaviour_logprobs, dtype="<f4")
            guide = ids_of(chat(f"sol {i} {i}?", "Guess."))
            np.testing.assert_allclose(
                behaviour, reference_logprobs(bench.models["student"], guide, response), atol=1e-4
            )
            both = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
            with torch.inference_mode():
                logits = bench.models["student"](both[None]).logits[0, len(prompt) - 1 : -1]
            candidates = unpack_ids(rollout.candidate_ids, "candidates", 4)
            np.testing.assert_array_equal(candidates, logits.topk(4).indices.numpy())


@pytest.mark.parametrize(
    ("name", "objective", "sampling"),
    [
        ("routed", VIEWS.replace("marked_only = true", ""), ""),
        ("guided-run", IMPORTANCE, GUIDED),
        ("pairs-run", PAIRS, GUIDED + "\nguided_samples = 1"),
    ],
    ids=["routed", "guided", "pairs"],
)
def test_run_with_views_trains_to_its_end(bench: Bench, name: str, objective: str, sampling: str) -> None:
    """Real processes: sampler, teachers, trainer. Nothing is dropped, and every teacher stays who it was."""
    config = bench.runs.config(name, objective, sampling=sampling)
    run = FinishedRun(bench, name, config)
    run.train()
    ledger = run.ledger()
    assert (ledger["step"], ledger["drop_counts"], ledger["missing_views"]) == (3, {}, {})
    assert set(ledger["pins"]) == set(config.plan().scoring_teachers)
    assert len(run.metrics()) == 3
    for record in run.metrics():
        assert np.isfinite(record["loss"])
        assert record["positions"] > 12
        assert record.get("pairs") == (4 * 2 if name == "pairs-run" else None)
    trained = load_file(config.run.directory / "student" / "model.safetensors")
    before = load_file(bench.runs.root / "student" / "model.safetensors")
    assert any(not torch.equal(trained[key], before[key]) for key in before)


HINTED = """
target = "losses"
missing_view = "{missing_view}"
[objective.views.expert]
weights = "teacher:maths"
[objective.views.hinted]
weights = "teacher:self"
context = {{ user = "{{prompt}} {{solution}}" }}
"""


def test_context_too_long_for_the_teacher_costs_its_view_alone_where_that_is_wanted(bench: Bench) -> None:
    bench.runs.write_rows("long.jsonl", {}, long={1, 6, 7})
    config = bench.runs.config("partial", HINTED.format(missing_view="renormalise"), rows="long.jsonl")
    run = FinishedRun(bench, "partial", config)
    run.train()
    ledger = run.ledger()
    assert (ledger["drop_counts"], ledger["missing_views"]) == ({}, {"hinted": 3})
    for record, partial in zip(run.metrics(), (1, 2, 0), strict=True):
        assert (record["responses_left_out"], record["groups"]) == (0, 4)
        assert (record["renormalised"] > 0) == (partial > 0)
    assert run.metrics()[-1]["groups_without_hinted"] == 3
    assert "view 'hinted': INVALID_ARGUMENT" in (run.logs / "trainer.log").read_text()


def test_context_too_long_for_the_teacher_is_named_where_it_ends_a_run(bench: Bench) -> None:
    bench.runs.write_rows("long.jsonl", {}, long={1})
    config = bench.runs.config("whole", HINTED.format(missing_view="drop"), rows="long.jsonl")
    run = FinishedRun(bench, "whole", config)
    assert run.train(ends_well=False) != 0
    log = (run.logs / "trainer.log").read_text()
    assert "group whole-1 cannot be trained (no_score): no rollout was scored: view 'hinted': " in log


@dataclass(frozen=True)
class FinishedRun:
    """One run of the bench's teachers, from nothing to its end."""

    bench: Bench
    name: str
    config: RunConfig

    @property
    def logs(self) -> Path:
        return self.bench.runs.root / f"{self.name}-logs"

    @property
    def file(self) -> Path:
        return self.bench.runs.root / f"{self.name}.toml"

    def train(self, *, ends_well: bool = True) -> int:
        self.logs.mkdir()
        sampler = self.bench.processes.sampler(self)  # type: ignore[arg-type]
        trainer = self.bench.processes.trainer(self)  # type: ignore[arg-type]
        trainer.join(90)
        sampler.terminate()
        assert trainer.exitcode is not None
        assert (trainer.exitcode == 0) == ends_well, (self.logs / "trainer.log").read_text()[-3000:]
        return trainer.exitcode

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.config.run.directory / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def ledger(self) -> dict[str, Any]:
        newest = max((self.config.run.directory / "checkpoints").glob("step-*"))
        found: dict[str, Any] = json.loads((newest / "ledger.json").read_text())
        return found
