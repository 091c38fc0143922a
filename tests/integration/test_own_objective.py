"""A user's own objective, and gates and several updates, through the real queue, sampler and teacher."""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.training_run import Processes, TrainingRun, finish, start_server, wait_until, write_model

GUIDE = Path(__file__).parents[2] / "docs/add-an-objective.md"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    write_model(root / "student", seed=1)
    write_model(root / "teacher", seed=2)
    return root


@pytest.fixture(scope="module")
def bench(root: Path) -> Iterator[tuple[str, Processes]]:
    server = start_server(root / "queue")
    with Processes() as processes:
        processes.teacher(server.url, root / "teacher", root / "teacher.log")
        yield server.url, processes
    server.stop()


def example() -> dict[str, str]:
    """The files of the guide's whole example, and what stands in the run file."""
    _, whole = GUIDE.read_text().split("## A whole example\n")
    blocks = re.findall(r"(?:`([\w.]+)`|run file):\n\n```\w+\n(.*?)```", whole, flags=re.DOTALL)
    return {name or "run": text for name, text in blocks}


def test_the_guides_example_trains_and_is_part_of_its_run(root: Path, bench: tuple[str, Processes]) -> None:
    url, processes = bench
    files = example()
    assert sum(text.count("\n") for text in files.values()) < 40
    for name in ("own.toml", "own.py"):
        (root / name).write_text(files[name])
    objective = files["run"].removeprefix("[objective]\n")

    run = TrainingRun(root, url, root, name="guide", objective=objective, training="steps = 12")
    processes.sampler(run)
    finish(processes.trainer(run), run)
    records = [record for record in run.metrics() if "step" in record]
    assert run.steps() == list(range(1, 13))
    assert all(abs(record["advantage"]) <= 1 for record in records)
    assert all(0.5 < record["token_weight"] < 1 for record in records)
    assert sum(r["kl"] for r in records[-4:]) < sum(r["kl"] for r in records[:4])
    assert run.ledger()["settings"]["objective.custom"]["divergence"]["name"] == "own.py:le_cam"

    own = root / "own.py"
    own.write_text(own.read_text().replace("0.9", "0.8"))
    run.file.write_text(run.file.read_text().replace("steps = 12", "steps = 14"))
    fading = own.read_text()
    own.write_text(fading + "\nraise RuntimeError('no')\n")
    broken = processes.trainer(run)
    broken.join(60)
    assert broken.exitcode not in (0, None)
    assert "importing" in run.log("trainer")
    own.write_text(fading)
    refused = processes.trainer(run)
    refused.join(60)
    assert refused.exitcode not in (0, None)
    assert "a run with objective.custom = " in run.log("trainer")
    assert run.steps()[-1] == 12


def test_a_second_context_travels_from_the_sampler_to_the_auxiliary_loss(
    root: Path, bench: tuple[str, Processes]
) -> None:
    url, processes = bench
    run = TrainingRun(
        root,
        url,
        root,
        name="consistent",
        objective="""
distill_coefficient = 0.1
auxiliary = { kind = "consistency", coefficient = 3.0, context = { user = "{answer}{prompt}" } }
""",
        training="steps = 10",
    )
    processes.sampler(run)
    finish(processes.trainer(run), run)
    figures = [record["consistency"] for record in run.metrics() if "step" in record]
    assert len(figures) == 10
    assert figures[0] > 0.1
    assert sum(figures[-3:]) < 0.7 * sum(figures[:3])
    assert run.ledger()["settings"]["objective.auxiliary"]["context"]["user"] == "{answer}{prompt}"


def test_a_gate_and_several_updates_of_a_step_go_on_after_a_stop(
    root: Path, bench: tuple[str, Processes]
) -> None:
    url, processes = bench
    run = TrainingRun(
        root,
        url,
        root,
        name="gated",
        deterministic=False,
        objective='mix = "add"\ncorrection = { kind = "ppo" }\nweights = { rollout_cap = 5.0 }\n'
        'gate = { entropy_of = "teacher", warmup_steps = 3 }\ntokens = { reward_below = 0.5 }',
        training="steps = 8\nupdates_per_step = 2\ncheckpoint_every = 50",
    )
    processes.sampler(run)
    trainer = processes.trainer(run)
    wait_until(lambda: len(run.steps()) >= 2)
    assert trainer.pid is not None
    os.kill(trainer.pid, signal.SIGTERM)
    finish(trainer, run)
    stopped: dict[str, Any] = run.ledger()
    assert stopped["gate"]["warmed"] == min(stopped["step"], 3)
    finish(processes.trainer(run), run)
    records = [record for record in run.metrics() if "step" in record]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["gate_open"] for record in records[:3]] == [0, 0, 1]
    warm = [record["teacher_entropy"] for record in records[:3]]
    assert run.ledger()["gate"]["level"] == pytest.approx(sum(warm) / 3)
    for before, record in itertools.pairwise(records[2:]):
        entropy, level = record["teacher_entropy"], sum(warm) / 3
        held = before["gate_open"] and entropy >= 0.93 * level
        assert record["gate_open"] == float(held or entropy >= level)
