"""Teachers with the student's own weights: what a run file says of them, and what the trainer publishes."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.rank_jobs import Job, make_learner, save_models
from tutelage.v1.rollout_pb2 import SampleOrder
from tutelage_client.errors import TutelageError
from typer.testing import CliRunner

from launcher.cli import app
from launcher.doctor_checks import demands
from launcher.model_facts import ModelFacts
from launcher.self_teachers import teacher_settings
from launcher.up import child_specs
from services.models.channel import Channel
from services.models.load import load_causal_lm
from services.teacher.settings import TeacherSettings
from student_trainer.channels import Channels
from student_trainer.checkpoint import CheckpointStore
from student_trainer.config import RunConfig, parse_run_config
from student_trainer.config_errors import RunFileError
from student_trainer.learner import Learner
from student_trainer.policy_store import PolicyStore, content_stamp
from student_trainer.resume import restore
from student_trainer.sampler.policy import StudentPolicy
from student_trainer.sections import LoraSettings

GUIDE = Path(__file__).parents[2] / "docs" / "moving-teachers.md"
OWN = {"before": "initial", "now": "live", "average": "ema", "old": "checkpoint:models/old"}


def make_config(weights: dict[str, str], **sections: Any) -> RunConfig:
    objective = {
        "support": "student_topk",
        "k": 8,
        "estimator": "pathwise",
        "target": "losses",
        "views": {name: {"weights": each} for name, each in weights.items()},
    }
    if len(weights) == 1:
        del objective["target"]
    document = {
        "run": {"name": "r", "directory": "runs/r"},
        "queue": {"url": "redis://queue"},
        "student": {"model": "models/student"},
        "data": {"task": "addition"},
        "objective": objective | sections.pop("objective", {}),
        "training": {"steps": 9},
    }
    for name, section in sections.items():
        document[name] = document.get(name, {}) | section
    return parse_run_config(document)


def option(arguments: tuple[str, ...], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


def test_up_starts_a_teacher_for_every_weights_that_need_no_section() -> None:
    config = make_config(OWN, self_teacher={"replicas": 2, "device": "cpu"}, student={"dtype": "bfloat16"})
    specs = [spec for spec in child_specs(config, Path("run.toml"), "redis://q") if spec.role == "teacher"]
    served = {
        spec.name: (option(spec.arguments, "--follow"), option(spec.arguments, "--model")) for spec in specs
    }
    (checkpoint,) = {name[:-2] for name in served if name.startswith("checkpoint-")}
    assert served == {
        f"{name}-{replica}": where
        for replica in range(2)
        for name, where in {
            "r.initial": ("runs/r/initial", None),
            "r.live": ("runs/r/policy", None),
            "r.ema": ("runs/r/ema", None),
            checkpoint: (None, "models/old"),
        }.items()
    }
    assert {option(spec.arguments, "--dtype") for spec in specs} == {"bfloat16"}
    assert {option(spec.arguments, "--name") for spec in specs} == {
        "r.initial",
        "r.live",
        "r.ema",
        checkpoint,
    }


def test_in_process_nobody_else_is_started_and_the_same_is_served() -> None:
    config = make_config(OWN, self_teacher={"in_process": True}, run={"deterministic": True})
    specs = child_specs(config, Path("run.toml"), "redis://q")
    assert [spec.role for spec in specs] == ["trainer", "sampler"]
    served = {settings.name: settings for settings in teacher_settings(config)}
    assert served["r.ema"].follow == Path("runs/r/ema")
    assert {settings.model for settings in served.values()} == {None, "models/old"}
    assert all(settings.deterministic and settings.threads == 1 for settings in served.values())


def test_the_doctor_counts_their_memory() -> None:
    config = make_config({"before": "initial"}, self_teacher={"replicas": 2, "device": "cpu"})
    facts = ModelFacts(
        name="s", architecture="A", parameters=1000, vocab_size=32, tokenizer_size=32, max_tokens=64,
        fingerprint="f",
    )  # fmt: skip
    wanted = [demand.process for demand in demands(config, facts, {"r.initial": facts})]
    assert wanted == ["r.initial-0", "r.initial-1", "trainer", "sampler-0"]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"weights": {"t": "teacher:t"}, "teachers": {"t": {"model": "m"}}, "self_teacher": {"replicas": 2}},
         "[self_teacher]: is set, but no view has weights that need"),
        ({"teachers": {"r.ema": {"model": "m"}}}, "[teachers.r.ema]: has the name of the teacher with"),
        ({"self_teacher": {"engine": "vllm"}, "run": {"deterministic": True}}, "[self_teacher] engine"),
        ({"self_teacher": {"engine": "vllm", "in_process": True}}, "has a process of its own"),
        ({"self_teacher": {"in_process": True, "dtype": "bfloat16"}}, "got true with [self_teacher] dtype"),
        ({"self_teacher": {"in_process": True}, "student": {"dtype": "bfloat16"}}, "with [student] dtype"),
        ({"objective": {"max_lag": 0}, "run": {"deterministic": True}}, "objective.max_lag: got 0"),
        ({"weights": {"b": "initial"}, "objective": {"ema_rate": 0.1}}, "objective.ema_rate: set to 0.1"),
        ({"weights": {"b": "initial"}, "objective": {"max_lag": 1}}, "objective.max_lag: set to 1"),
        ({"objective": {"ema_rate": 0.0}}, "ema_rate: got 0.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(sections: dict[str, Any], expected: str) -> None:
    sections = dict(sections)
    with pytest.raises(RunFileError) as caught:
        make_config(sections.pop("weights", {"average": "ema"}), **sections)
    assert any(expected in problem for problem in caught.value.problems), caught.value.problems


def test_somebody_elses_replica_of_own_weights_needs_but_its_address() -> None:
    config = make_config({"average": "ema"}, teachers={"r.ema": {"address": "10.0.0.7:50051"}})
    assert config.implied_teachers() == {}
    assert [s.role for s in child_specs(config, Path("x"), "redis://q")] == ["trainer", "sampler"]


def test_what_the_guide_says_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    toml, command = re.findall(r"```(?:toml)?\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    document = tomllib.loads(toml)
    config = parse_run_config(
        {"student": {"model": "s"}, "data": {"task": "addition"}, "training": {"steps": 1}, **document}
    )
    assert config.plan().ema_rate == 0.05
    assert [spec.name for spec in child_specs(config, Path("x"), "redis://q")][:2] == [
        "run.ema-0",
        "run.ema-1",
    ]
    started: list[TeacherSettings] = []
    monkeypatch.setattr("services.teacher.process.main", started.append)
    ran = CliRunner().invoke(app, shlex.split(command)[1:])
    assert ran.exit_code == 0, ran.output
    assert (started[0].follow, started[0].name, started[0].model) == (Path("RUN_DIR/ema"), "RUN.ema", None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root


JOB = Job("own", ema=True, groups=1)


def make_run(models: Path, directory: Path, job: Job, weights: dict[str, str]) -> tuple[RunConfig, Learner]:
    learner = make_learner(job, models)
    config = make_config(weights, run={"directory": str(directory)})
    learner.plan = config.plan()
    return config, learner


@pytest.mark.parametrize("job", [JOB, replace(JOB, lora=LoraSettings(rank=2))], ids=["full", "adapters"])
def test_initial_weights_are_published_once_also_by_a_trainer_that_resumes(
    job: Job, models: Path, tmp_path: Path
) -> None:
    config, learner = make_run(models, tmp_path / "run", job, {"before": "initial", "average": "ema"})
    checkpoints = CheckpointStore(tmp_path / "run" / "checkpoints")
    ledger = restore(config, checkpoints, learner)
    before = load_file(tmp_path / "run/initial/v00000000/model.safetensors")
    plain = load_causal_lm(models / job.model).model.state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in before.items())
    with torch.no_grad():
        for _, parameter in learner.student.trained():
            parameter.add_(0.1)
    ledger.step = 1
    checkpoints.save(learner.state_tensors(), ledger)
    first = Channel(tmp_path / "run/initial").get(0)
    _, resumed = make_run(models, tmp_path / "run", job, {"before": "initial", "average": "ema"})
    restore(config, checkpoints, resumed)
    assert Channel(tmp_path / "run/initial").get(0) == first
    for path in sorted((tmp_path / "run/initial").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    _, resumed = make_run(models, tmp_path / "run", job, {"before": "initial", "average": "ema"})
    ledger = restore(config, checkpoints, resumed)
    assert ledger.step == 1
    again = load_file(tmp_path / "run/initial/v00000000/model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.items())


@pytest.mark.parametrize(
    ("job", "weights", "counts"),
    [
        (replace(JOB, lora=LoraSettings(rank=2)), {"average": "ema"}, True),
        (JOB, {"before": "initial", "average": "ema"}, True),
        (JOB, {"average": "ema"}, False),
    ],
    ids=["adapters", "initial", "every weight is in the checkpoint"],
)
def test_a_run_does_not_go_on_from_another_model_under_the_same_name(
    job: Job, weights: dict[str, str], counts: bool, models: Path, tmp_path: Path
) -> None:
    """Adapters would go on upon another base, and the initial weights would be another model's."""
    shutil.copytree(models, tmp_path / "models")
    checkpoints = CheckpointStore(tmp_path / "run" / "checkpoints")
    config, learner = make_run(tmp_path / "models", tmp_path / "run", job, weights)
    restore(config, checkpoints, learner)
    file = tmp_path / "models" / job.model / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    _, learner = make_run(tmp_path / "models", tmp_path / "run", job, weights)
    with pytest.raises(TutelageError, match=r"student\.model \(content\)") if counts else nullcontext():
        restore(config, checkpoints, learner)


def test_a_trainer_that_died_before_its_first_step_was_saved_counts_as_one_before(
    models: Path, tmp_path: Path
) -> None:
    """What it published has left scores on their way, which its successor refuses and goes on."""
    lineages = []
    for _ in range(2):
        config, learner = make_run(models, tmp_path / "run", JOB, {"average": "ema"})
        lineages.append(restore(config, CheckpointStore(tmp_path / "run" / "checkpoints"), learner).lineage)
    assert [stretch.start for stretch in lineages[1]] == [0, 0]
    assert lineages[1][:1] == lineages[0]


def test_a_run_that_begins_anew_has_nothing_of_the_one_before_it(models: Path, tmp_path: Path) -> None:
    """Its checkpoints are gone and its student is another; the channels still hold the old one's weights."""
    wanted = {"before": "initial", "average": "ema", "now": "live"}
    for start in range(2):
        config, learner = make_run(models, tmp_path / "run", JOB, wanted)
        with torch.no_grad():
            for _, parameter in learner.student.trained():
                parameter.add_(0.1 * start)
        for _, average in learner.ema.averages.items() if learner.ema else ():
            average.add_(0.1 * start)
        checkpoints = CheckpointStore(tmp_path / f"checkpoints-{start}")
        Channels(config, learner, restore(config, checkpoints, learner)).begin()
    expected = learner.student.weights()
    for channel in ("initial", "ema", "policy"):
        found = load_file(tmp_path / "run" / channel / "v00000000/model.safetensors")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items()), channel


def test_channels_write_down_what_may_still_be_scored_with(models: Path, tmp_path: Path) -> None:
    config, learner = make_run(models, tmp_path / "run", JOB, {"average": "ema"})
    ledger = restore(config, CheckpointStore(tmp_path / "run" / "checkpoints"), learner)
    channels = Channels(config, learner, ledger)
    channels.begin()
    for step in (1, 2, 3):
        ledger.step = step
        channels.publish()
    ema = PolicyStore(tmp_path / "run" / "ema")
    for channel, store in (("ema", ema), ("live", channels.live)):
        assert store.versions() == [0, 1, 2, 3]
        stamps = {version: store.get(version).stamp for version in (2, 3)}  # type: ignore[union-attr]
        assert ledger.publications[channel] == stamps  # max_staleness is 1
    channels.prune(2, pinned=[0])
    assert (channels.live.versions(), ema.versions()) == ([0, 2, 3], [2, 3])
    assert not (tmp_path / "run" / "initial").exists()
    ledger.step = 2  # as a checkpoint has it
    ledger.publications = {"ema": {1: "one"}, "live": {1: "one"}}
    channels.begin()
    assert channels.live.versions() == [0, 2]
    assert ledger.publications["ema"] == {1: "one", 2: stamps_of(ema)[2]}


def stamps_of(store: PolicyStore) -> dict[int, str]:
    return {version: found.stamp for version in store.versions() if (found := store.get(version))}


def test_content_stamps_tell_weights_apart_and_nothing_else(tmp_path: Path) -> None:
    def write(text: str, path: Path) -> None:
        (path / "config.json").write_text("{}")
        (path / "model.safetensors").write_text(text)

    store = PolicyStore(tmp_path / "policy", content_stamp)
    stamps = [
        store.publish(version, lambda p, t=text: write(t, p)).stamp for version, text in enumerate("aab")
    ]
    assert stamps[0] == stamps[1] != stamps[2]
    again = PolicyStore(tmp_path / "again", content_stamp).publish(7, lambda p: write("b", p))
    assert again.stamp == stamps[2]


def test_a_sampler_takes_the_number_of_a_version_that_changed_nothing(tmp_path: Path) -> None:
    """A refused step publishes the same weights again, and a deterministic run stamps them alike."""
    store = PolicyStore(tmp_path / "policy", lambda path: "always the same")
    first = store.publish(0, lambda path: None)
    policy = StudentPolicy(store, first, [lambda path: None])
    store.publish(1, lambda path: None)
    assert policy.ready(SampleOrder(id="o", run="r", policy_version=1, exact=True))
    assert policy.version == 1
