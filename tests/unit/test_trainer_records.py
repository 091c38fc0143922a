"""What a run leaves for people: metrics file, status port, trackers; and what a resumption refuses."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.training_groups import (
    IDENTITY,
    RUN,
    make_expectations,
    make_group,
    make_scores,
    scored,
)
from support.training_run import write_model
from tutelage_client.errors import TutelageError

from services.exit_status import EXIT_BAD_INPUT, exit_status
from student_trainer import trackers, train
from student_trainer.channels import channels_of
from student_trainer.checkpoint import CheckpointStore, find_damage
from student_trainer.config import RunConfig, parse_run_config
from student_trainer.learner import Learner
from student_trainer.ledger import Ledger
from student_trainer.metrics import MetricsFile, SamplingRates, open_trackers, step_record
from student_trainer.objective.compile import compile_plan
from student_trainer.objective.settings import ObjectiveSettings
from student_trainer.ranks import Ranks
from student_trainer.resume import restore
from student_trainer.samples import discard_samples_above
from student_trainer.sections import MetricsSettings
from student_trainer.status import StatusServer
from student_trainer.step_result import StepResult
from student_trainer.student import load_student
from student_trainer.verify import verify_group

DISTILL = {"support": "student_topk", "k": 4, "tail": "bucket", "estimator": "pathwise"}


def make_config(directory: Path, **changes: object) -> RunConfig:
    student = {"model": str(directory / "student"), "device": "cpu"} | dict(changes.pop("student", {}))  # type: ignore[call-overload]
    return parse_run_config(
        {
            "run": {"directory": str(directory / "run"), **changes.pop("run", {})},  # type: ignore[dict-item]
            "student": student,
            "teachers": {"big": {"model": "unused"}} | dict(changes.pop("teachers", {})),  # type: ignore[call-overload]
            "data": {"task": "addition"},
            "sampling": changes.pop("sampling", {}),
            "objective": changes.pop("objective", {}),
            "training": {"steps": 9, **changes},
        }
    )


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_tells_how_far_the_weights_that_scored_were_behind() -> None:
    """Step 7 trained version 6. Weights that do not move have no lag, nor has another model."""
    views = {name: {"weights": name} for name in ("live", "ema", "initial")} | {
        "big": {"weights": "teacher:big"}
    }
    plan = compile_plan(
        ObjectiveSettings.model_validate({"views": views, "target": "losses"}),
        student_temperature=1.0,
        teachers=["big"],
        run=RUN,
    )
    channels = channels_of(plan, RUN)
    assert sorted(channels.values()) == ["ema", "initial", "live"]
    result = StepResult(0.5, 1.0, 1e-3, {"positions": 8.0}, (), (), None)

    def record(*scored_by: dict[str, int]) -> dict[str, float]:
        groups = []
        for index, versions in enumerate(scored_by):
            group = make_group(index, plan)
            scores = {
                view: make_scores(
                    group,
                    plan,
                    view,
                    replace(IDENTITY, name=plan.requests[view][0], weights_version=versions.get(view, 0)),
                )
                for view in plan.view_requests
            }
            expected = replace(make_expectations(plan), channels=channels)
            groups.append(verify_group(scored(group, scores), expected, {}))
        return step_record(groups, result, Ledger(settings={}, step=7), {"train": 1.0}, channels)

    found = record({"live": 6, "ema": 5}, {"live": 3, "ema": 6, "big": 1})
    assert (found["weights_lag_mean"], found["weights_lag_max"]) == (1.0, 3)
    fixed = compile_plan(
        ObjectiveSettings.model_validate({"views": {"v": {"weights": "initial"}}}),
        student_temperature=1.0,
        teachers=["big"],
        run=RUN,
    )
    plan, channels = fixed, channels_of(fixed, RUN)
    assert not [name for name in record({}) if name.startswith("weights_lag")]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, step=0, pending_evaluations=[])
    for step in range(1, 8):
        first.write({"step": step, "loss": float(step)})
    for version in (0, 4, 6):
        first.write({"evaluation": {"policy_version": version}})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 8, "los')
    again = MetricsFile(path, step=5, pending_evaluations=[4])
    again.write({"step": 6, "loss": -6.0})
    again.close()
    found = lines(path)
    assert [record["step"] for record in found if "step" in record] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["loss"] == -6.0
    assert [record for record in found if "evaluation" in record] == [{"evaluation": {"policy_version": 0}}]


def test_figures_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", step=0, pending_evaluations=[])
    file.write({"step": 1, "loss": float("nan"), "gradient_norm": float("inf"), "kl": 0.5})
    file.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "gradient_norm": None, "kl": 0.5}]


def test_sampling_rate_is_that_of_all_samplers_since_the_last_look() -> None:
    rates = SamplingRates()
    assert rates.rates({"sampler:a": {"tokens": 100, "sample_seconds": 1.0}, "step": 3}) == {}
    progress = {
        "sampler:a": {"tokens": 300, "sample_seconds": 2.0},
        "sampler:b": {"tokens": 100, "sample_seconds": 1.0},
    }
    assert rates.rates(progress) == {"sampled_tokens_per_second": 150.0}
    assert rates.rates(progress) == {}


def test_samples_of_lost_steps_are_deleted(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        (tmp_path / f"step-{step:08d}.jsonl.gz").write_bytes(b"")
    discard_samples_above(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000002.jsonl.gz",
        "step-00000004.jsonl.gz",
    ]


def test_status_port_answers_on_loopback_only() -> None:
    with StatusServer(MetricsSettings(), "run") as server:
        assert server.address.startswith("http://127.0.0.1:")
        server.update({"loss": 0.5, "status": "training", "step": 3})
        server.update({"step": 4})
        status = json.loads(urllib.request.urlopen(server.address + "/status").read())
        assert status == {"loss": 0.5, "status": "training", "step": 4}
        metrics = urllib.request.urlopen(server.address + "/metrics").read().decode()
    assert "tutelage_trainer_step 4.0" in metrics
    assert "status" not in metrics


def test_a_loss_that_is_not_finite_is_null_in_the_status_and_nan_among_the_metrics() -> None:
    with StatusServer(MetricsSettings(), "run") as server:
        server.update({"loss": float("nan"), "step": 3})
        for path, wanted in (
            ("status", '{"loss": null, "step": 3}'),
            ("metrics", "tutelage_trainer_loss NaN"),
        ):
            with urllib.request.urlopen(f"{server.address}/{path}", timeout=10) as answer:
                assert wanted in answer.read().decode()


def test_dropped_groups_are_told_apart_by_their_reason() -> None:
    with StatusServer(MetricsSettings(), "run") as server:
        server.update({"groups_dropped": {"stale": 2, "failed": 0}})
        server.update({"groups_dropped": {"stale": 3, "failed": 0}})
        metrics = urllib.request.urlopen(server.address + "/metrics").read().decode()
        status = json.loads(urllib.request.urlopen(server.address + "/status").read())
    assert 'tutelage_trainer_groups_dropped{reason="stale"} 3.0' in metrics
    assert 'tutelage_trainer_groups_dropped{reason="failed"} 0.0' in metrics
    assert status["groups_dropped"] == {"stale": 3, "failed": 0}


def test_tracker_that_is_not_installed_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(trackers.importlib, "import_module", missing)
    with pytest.raises(TutelageError, match="'wandb' is not installed; run pip install wandb"):
        open_trackers(make_config(tmp_path, trackers=["wandb"]), 0)


def test_tensorboard_gets_every_finite_figure(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(tmp_path, trackers=["tensorboard"])
    (tracker,) = open_trackers(config, 0)
    tracker.log(1, {"loss": 0.5, "gradient_norm": float("nan")})
    tracker.log(2, {"loss": 0.25})
    tracker.close()
    events = EventAccumulator(str(config.run.directory / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert "gradient_norm" not in events.Tags()["scalars"]


# Resumption.


def make_learner(config: RunConfig) -> Learner:
    plan = compile_plan(
        config.objective, student_temperature=config.sampling.temperature, teachers=sorted(config.teachers)
    )
    student = load_student(config.student.model_copy(update={"revision": None}))  # a local one has none
    return Learner(student, plan, config.training)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resume")
    write_model(directory / "student", seed=1)
    return directory


def test_first_start_leaves_a_checkpoint_to_come_back_to(root: Path, tmp_path: Path) -> None:
    config = make_config(root, evaluate_every=3)
    store = CheckpointStore(tmp_path)
    ledger = restore(config, store, make_learner(config))
    assert store.steps() == [0]
    assert ledger.pending_evaluations == [0]
    again = restore(config, store, make_learner(config))
    assert again.run_id == ledger.run_id
    assert again.lineage != ledger.lineage
    assert [stretch.start for stretch in again.lineage] == [0, 0]  # one before it


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"run": {"name": "other"}}, "run.name"),
        ({"run": {"seed": 7}}, "run.seed"),
        ({"run": {"deterministic": True}}, "run.deterministic"),
        ({"prompts_per_step": 5}, "training.prompts_per_step"),
        ({"student": {"lora": {"rank": 2}}}, "student.lora"),
        ({"student": {"dtype": "bfloat16"}}, "student.dtype"),
        ({"student": {"revision": "main"}}, "student.revision"),
        ({"sampling": {"temperature": 0.5}}, "sampling.temperature"),
        ({"objective": {**DISTILL, "temperature": 0.5}}, "objective.temperature"),
        ({"objective": {**DISTILL, "k": 5}}, "objective.k"),
        ({"objective": {**DISTILL, "support": "teacher_topk"}}, "objective.views"),
        ({"objective": {**DISTILL, "tokens": {"teacher_entropy_above": 0.1}}}, "objective.views"),
    ],
)
def test_run_continues_only_as_it_began(
    root: Path, tmp_path: Path, changes: dict[str, object], name: str
) -> None:
    config = make_config(root, objective=DISTILL)
    store = CheckpointStore(tmp_path)
    restore(config, store, make_learner(config))
    changed = make_config(root, **{"objective": DISTILL, **changes})
    with pytest.raises(TutelageError, match=f"holds a run with {name} = "):
        restore(changed, store, make_learner(changed))


def test_run_that_an_earlier_version_began_goes_on(root: Path, tmp_path: Path) -> None:
    """What came later (audits, guided samples, signals of writers) is not in its ledger."""
    context = {"context": {"user": "{prompt} {answer}"}, "samples_per_prompt": 3}
    for number, changes in enumerate(({}, {"sampling": context})):
        config = make_config(root, objective=DISTILL, **changes)
        store = CheckpointStore(tmp_path / str(number))
        learner = make_learner(config)
        ledger = restore(config, store, learner)
        (view,) = ledger.settings["objective.views"].values()
        assert set(view) == {
            "teacher", "sampled", "top_k", "candidates", "entropy", "temperature", "encoding", "judgement",
            "hidden_layers", "context", "missing", "route", "weight_field",
        }  # fmt: skip
        of_tokens = [f"objective.tokens.{name}" for name in ("skip_first_n", "keep_first_n", "skip_ids")]
        for later in ("objective.audit", "sampling.guided_samples", *of_tokens):
            assert ledger.settings.pop(later) is None
        ledger.step += 1
        store.save(learner.state_tensors(), ledger)
        assert restore(config, store, make_learner(config)).step == 1


@pytest.mark.parametrize(("name", "value"), [("skip_first_n", 2), ("keep_first_n", 9), ("skip_ids", [7, 5])])
def test_run_with_an_audit_keeps_the_tokens_that_may_be_audited(
    root: Path, tmp_path: Path, name: str, value: object
) -> None:
    """What is queued was audited where they were; without an audit the trainer alone selects by them."""
    selected = {"tokens": {name: value}}
    writer = {"teachers": {"writer": {"model": "unused", "writer": {}}}}
    audited = {**DISTILL, "mix": "route", "audit": {"teacher": "writer", "chunk_tokens": 4}}
    for row, teachers in ((DISTILL, {}), (audited, writer)):
        whole = make_config(root, objective=row, **teachers)
        some = make_config(root, objective={**row, **selected}, **teachers)
        for number, (first, second) in enumerate(((whole, some), (some, whole))):
            store = CheckpointStore(tmp_path / str(len(teachers)) / str(number))
            restore(first, store, make_learner(first))
            restore(first, store, make_learner(first))
            if row is DISTILL:
                restore(second, store, make_learner(second))
                continue
            with pytest.raises(TutelageError, match=rf"holds a run with objective\.tokens\.{name} = "):
                restore(second, store, make_learner(second))


def test_deterministic_run_keeps_its_staleness(root: Path, tmp_path: Path) -> None:
    """Its queued groups are of exactly the versions that the old bound asked for."""
    config = make_config(root, run={"deterministic": True})
    store = CheckpointStore(tmp_path)
    restore(config, store, make_learner(config))
    changed = make_config(root, run={"deterministic": True}, max_staleness=3)
    with pytest.raises(TutelageError, match=r"holds a run with training\.max_staleness = 1"):
        restore(changed, store, make_learner(changed))


def test_steps_and_learning_rate_may_change_on_resumption(root: Path, tmp_path: Path) -> None:
    config = make_config(root)
    store = CheckpointStore(tmp_path)
    restore(config, store, make_learner(config))
    changed = make_config(root, steps=99, learning_rate=0.5, checkpoint_every=1, max_staleness=3)
    assert restore(changed, store, make_learner(changed)).step == 0


def test_run_whose_every_checkpoint_is_damaged_does_not_start_over(root: Path, tmp_path: Path) -> None:
    config = make_config(root)
    store = CheckpointStore(tmp_path)
    restore(config, store, make_learner(config))
    (tmp_path / "step-00000000" / "ledger.json").write_text("{}")
    with pytest.raises(TutelageError, match="none of the 1 checkpoints"):
        restore(config, store, make_learner(config))


def test_damaged_checkpoint_is_not_kept_in_place_of_a_whole_one(root: Path, tmp_path: Path) -> None:
    config = make_config(root)
    store, learner = CheckpointStore(tmp_path), make_learner(config)
    ledger = restore(config, store, learner)
    for step in (50, 100):
        ledger.step = step
        store.save(learner.state_tensors(), ledger)
    (tmp_path / "step-00000100" / "manifest.json").unlink()
    resumed = restore(config, store, learner)
    assert resumed.step == 50
    resumed.step = 60
    store.save(learner.state_tensors(), resumed)
    store.prune(1)
    assert store.steps() == [60]
    assert find_damage(tmp_path / "step-00000060") is None
    assert (tmp_path / "damaged-step-00000100" / "ledger.json").is_file()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_objective_that_depends_on_the_number_of_ranks_is_refused_by_each(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def join(device: str, timeout: float) -> Iterator[Ranks]:
        yield Ranks(rank, 2)

    monkeypatch.setattr(train, "join", join)
    config = make_config(tmp_path, objective=DISTILL | {"tokens": {"top_fraction": 0.5}})
    with pytest.raises(TutelageError, match=r"tokens\.top_fraction: got 0\.5 with 2 ranks") as refused:
        train.main(config)
    assert exit_status(refused.value) == EXIT_BAD_INPUT
