"""The trainer as a process, with a real sampler, a real teacher replica and a real Valkey."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.training_bench import Bench, training_bench
from support.training_run import PATHWISE, TrainingRun, finish, kill, wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

GRPO = 'preset = "grpo"\n'


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with training_bench(tmp_path_factory.mktemp("process")) as made:
        yield made


def get(address: str, path: str) -> bytes:
    with urllib.request.urlopen(address + path, timeout=10) as answer:
        body: bytes = answer.read()
        return body


def test_adapters_are_trained_stopped_resumed_and_exported(bench: Bench) -> None:
    """A run in arrival order: SIGTERM in the middle ends it with 0, the same command ends it well."""
    steps, staleness = 12, 2
    run = bench.run(
        "lora",
        deterministic=False,
        student_extra="lora = { rank = 4, dropout = 0.1 }",
        training=f"steps = {steps}\nmax_staleness = {staleness}\ncheckpoint_every = 50\nsample_every = 3\n"
        "evaluate_every = 6\nevaluation_prompts = 8",
    )
    bench.processes.sampler(run)
    trainer = bench.processes.trainer(run)
    wait_until(lambda: len(run.steps()) >= 4)
    _check_status_port(bench.progress(run)["metrics_address"])
    assert trainer.pid is not None
    os.kill(trainer.pid, signal.SIGTERM)
    finish(trainer, run)
    stopped_at = run.steps()[-1]
    assert bench.progress(run)["status"] == "stopped"
    assert run.ledger()["step"] == stopped_at < steps

    finish(bench.processes.trainer(run), run)
    progress = bench.progress(run)
    assert (progress["status"], progress["step"], progress["steps"]) == ("finished", steps, steps)
    assert 0.0 <= progress["accuracy_greedy"] <= 1.0
    assert run.steps() == list(range(1, steps + 1))
    records = [record for record in run.metrics() if "step" in record]
    assert max(record["staleness_max"] for record in records) <= staleness
    assert sum(record["kl"] for record in records[-3:]) < sum(record["kl"] for record in records[:3])
    evaluated = [r["evaluation"]["policy_version"] for r in run.metrics() if "evaluation" in r]
    assert sorted(evaluated) == [0, 6, 12]
    _check_export(run, bench.root / "student")
    _check_samples(run)


def _check_status_port(address: str) -> None:
    assert get(address, "/health") == b"ok\n"
    assert json.loads(get(address, "/status"))["step"] >= 1
    assert b"tutelage_trainer_loss" in get(address, "/metrics")
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(address, "/nothing")
    assert caught.value.code == 404


def _check_export(run: TrainingRun, before: Path) -> None:
    exported = AutoModelForCausalLM.from_pretrained(run.directory / "student")
    original = AutoModelForCausalLM.from_pretrained(before)
    changed = [
        name
        for (name, new), old in zip(exported.named_parameters(), original.parameters(), strict=True)
        if not torch.equal(new, old)
    ]
    assert changed
    assert all("proj" in name for name in changed)
    assert AutoTokenizer.from_pretrained(run.directory / "student").decode([6]) != ""
    assert (run.directory / "adapter" / "adapter_model.safetensors").is_file()
    saved = max((run.directory / "checkpoints").glob("step-*")) / "model.safetensors.index.json"
    weights = [name for name in json.loads(saved.read_text())["weight_map"] if name.startswith("model.")]
    assert weights
    assert all("lora_" in name for name in weights)


def _check_samples(run: TrainingRun) -> None:
    files = sorted((run.directory / "samples").glob("step-*.jsonl.gz"))
    assert [file.name for file in files] == [f"step-{step:08d}.jsonl.gz" for step in (1, 3, 6, 9, 12)]
    for line in gzip.decompress(files[-1].read_bytes()).splitlines():
        record = json.loads(line)
        length = len(record["token_ids"])
        assert length == len(record["token_texts"]) == len(record["teacher_top"])
        assert length == len(record["student_logprobs"]) == len(record["teacher_logprobs"])
        assert all(logprob < 0.0 for logprob in record["student_logprobs"] + record["teacher_logprobs"])
        assert all(len(position) == 5 for position in record["teacher_top"])
        assert all(top == sorted(top, key=lambda entry: -entry[1]) for top in record["teacher_top"])
        assert record["reward"] in (0.0, 1.0)


def test_reward_alone_trains_without_any_teacher(bench: Bench) -> None:
    run = bench.run("reward", objective=GRPO, deterministic=False, training="steps = 4")
    bench.processes.sampler(run)
    finish(bench.processes.trainer(run), run)
    assert run.steps() == [1, 2, 3, 4]
    records = [record for record in run.metrics() if "step" in record]
    assert all("reward_mean" in record and "kl" not in record for record in records)
    assert (run.directory / "student" / "config.json").is_file()


def test_steps_with_nothing_to_train_on_are_counted_and_do_not_end_the_run(bench: Bench) -> None:
    objective = GRPO + "tokens = { skip_first_n = 50 }\n"
    run = bench.run("closed", objective=objective, training="steps = 4\nmax_refused_steps = 2")
    bench.processes.sampler(run)
    finish(bench.processes.trainer(run), run)
    assert [record["refused_steps"] for record in run.metrics()] == [1, 2, 3, 4]


def test_objective_with_a_temperature_of_its_own_is_not_taken_for_misalignment(bench: Bench) -> None:
    """Log-probabilities at 1 and at 0.05 differ by more than rounding, and nothing is wrong."""
    run = bench.run("cold", objective=PATHWISE + "temperature = 0.05\n", training="steps = 1")
    bench.processes.sampler(run)
    finish(bench.processes.trainer(run), run)
    assert run.steps() == [1]
    assert "objective.temperature = 0.05 is not sampling.temperature = 1.0" in run.log("trainer")


def test_full_queue_brings_the_checkpoint_forward(bench: Bench) -> None:
    """The queue's memory is freed by checkpoints alone, however far apart they are asked for."""
    training = "steps = 3\ncheckpoint_every = 50\nkeep_checkpoints = 9\nmax_unacknowledged_bytes = 1"
    run = bench.run("memory", objective=GRPO, training=training)
    bench.processes.sampler(run)
    finish(bench.processes.trainer(run), run)
    saved = sorted(path.name for path in (run.directory / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in range(4)]


def test_finished_run_is_finished_again_at_once(bench: Bench) -> None:
    run = bench.run("twice", objective=GRPO, training="steps = 1")
    sampler = bench.processes.sampler(run)
    finish(bench.processes.trainer(run), run)
    kill(sampler)
    weights = run.weights()
    started = time.monotonic()
    finish(bench.processes.trainer(run), run)
    assert time.monotonic() - started < 20
    assert all(torch.equal(tensor, run.weights()[name]) for name, tensor in weights.items())
    assert run.steps() == [1]


def test_queue_that_holds_another_run_of_the_same_name_is_refused(bench: Bench) -> None:
    first = bench.run("same", objective=GRPO, training="steps = 1")
    bench.processes.sampler(first)
    finish(bench.processes.trainer(first), first)
    first.directory.rename(bench.root / "elsewhere")
    trainer = bench.processes.trainer(first)
    trainer.join(60)
    assert trainer.exitcode == 1
    assert "the queue holds another run called 'same'" in first.log("trainer")


def test_dead_sampler_is_named_within_thirty_seconds_and_its_return_ends_the_wait(bench: Bench) -> None:
    run = bench.run("absent", objective=GRPO, training="steps = 25\nmax_staleness = 0")
    sampler = bench.processes.sampler(run)
    trainer = bench.processes.trainer(run)
    wait_until(lambda: len(run.steps()) >= 1)
    kill(sampler)
    wait_until(lambda: "no sampler" in bench.progress(run)["status"], seconds=30)
    assert trainer.is_alive()
    bench.processes.sampler(run, "sampler-1")
    finish(trainer, run)
    assert bench.progress(run)["status"] == "finished"
