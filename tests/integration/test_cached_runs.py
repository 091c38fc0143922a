"""Runs that replay a score file: from sampling to training, with and without a live teacher."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.teachers import TeacherProcess
from support.training_run import (
    HEARTBEAT,
    Processes,
    TrainingRun,
    finish,
    start_server,
    wait_until,
    write_model,
)
from tutelage_client.codec import unpack_ids
from tutelage_client.types import Signal
from typer.testing import CliRunner

from launcher.cli import app
from launcher.doctor import examine
from launcher.sample import sample_file
from launcher.score import ScoreOptions, score_file
from launcher.up import child_specs
from services.score_file import read_header
from services.teacher.settings import TeacherSettings
from student_trainer.config import load_run_config
from student_trainer.policy_store import PolicyVersion
from student_trainer.sampler.build import build_sampler

ROOT = Path(__file__).parents[2]
GROUPS = 20  # two and a half steps: the third begins the next epoch
STEPS = 4
LIGHTNING = 'preset = "lightning"\n'


@dataclass(frozen=True)
class Bench:
    """Models, a queue, responses of the student and what the teacher says about them."""

    root: Path
    url: str
    processes: Processes
    scores: Path

    def run(self, name: str, *, cached: bool, **changes: str) -> TrainingRun:
        """A run on the fixed responses, in a part of the queue of its own."""
        run = TrainingRun(
            self.root,
            self.url,
            self.root,
            name=name,
            objective=LIGHTNING,
            training=f"steps = {STEPS}\ncheckpoint_every = 2",
        )
        edits = {
            "[queue]\n": f'[queue]\nnamespace = "{name}"\n',
            "samples_per_prompt = 2\n": f'samples_per_prompt = 1\nsampler = "file:{self.scores}"\n',
            **changes,
        }
        if cached:
            edits[f'model = "{self.root / "teacher"}"'] = f'scores = "{self.scores}"'
        text = run.file.read_text()
        for old, new in edits.items():
            assert old in text, old
            text = text.replace(old, new)
        run.file.write_text(text)
        run.config = load_run_config(run.file)
        return run


def replica(bench: Bench, name: str, **settings: Any) -> TeacherProcess:
    """A deterministic teacher for the run of that name."""
    common = {"name": "big", "deterministic": True} if "model" in settings else {"name": "big"}
    return TeacherProcess(
        bench.root / f"{name}-teacher",
        queue_url=bench.url,
        namespace=name,
        heartbeat_seconds=HEARTBEAT,
        **common,
        **settings,
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("cached")
    write_model(root / "student", seed=1)
    write_model(root / "teacher", seed=2)
    server = start_server(root / "queue")
    with Processes() as processes:
        bench = Bench(root, server.url, processes, root / "scores.parquet")
        _write_scores(bench)
        yield bench
    server.stop()


def _write_scores(bench: Bench) -> None:
    """As a user would: sample the student of a run, then score what it said."""
    source = TrainingRun(bench.root, bench.url, bench.root, name="source", training=f"steps = {STEPS}")
    text = source.file.read_text().replace("samples_per_prompt = 2", "samples_per_prompt = 1")
    source.file.write_text(text)
    rollouts = bench.root / "rollouts.jsonl"
    assert sample_file(source.file, groups=GROUPS, output=rollouts) == 0
    served = {
        "engine": "transformers",
        "model": str(bench.root / "teacher"),
        "device": "cpu",
        "dtype": "float32",
    }
    teacher = TeacherProcess(bench.root / "scorer", name="big", deterministic=True, **served)
    try:
        options = ScoreOptions(
            teacher=teacher.wait_ready(100).grpc,
            model=None,
            engine="transformers",
            tokenizer=None,
            output=bench.scores,
            signal=Signal(),
            batch_tokens=1,  # one response in each request, as the run asks
            token=None,
        )
        assert score_file(rollouts, options) == 0
    finally:
        teacher.kill()


def train(bench: Bench, run: TrainingRun, teacher: TeacherProcess) -> None:
    try:
        bench.processes.sampler(run)
        finish(bench.processes.trainer(run), run)
    finally:
        teacher.kill()


def records(run: TrainingRun) -> list[dict[str, Any]]:
    """Every step's figures but its times."""
    times = ("seconds", "time", "_per_second")
    return [
        {key: value for key, value in record.items() if not any(word in key for word in times)}
        for record in run.metrics()
        if "step" in record
    ]


def test_a_run_from_a_file_trains_bit_for_bit_as_with_the_live_teacher(bench: Bench) -> None:
    live, cached = bench.run("live", cached=False), bench.run("cached", cached=True)
    model = {
        "engine": "transformers",
        "model": str(bench.root / "teacher"),
        "device": "cpu",
        "dtype": "float32",
    }
    train(bench, live, replica(bench, "live", **model))
    train(bench, cached, replica(bench, "cached", engine="file", scores=str(bench.scores)))
    assert records(live) == records(cached)
    ours, theirs = cached.weights(), live.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ledgers = [run.ledger() for run in (live, cached)]
    assert ledgers[0]["pins"] == ledgers[1]["pins"]
    assert [sum(ledger["drop_counts"].values()) for ledger in ledgers] == [0, 0]
    before = bench.run("before", cached=True).config.student.model
    from safetensors.torch import load_file

    start = load_file(Path(before) / "model.safetensors")
    assert any(not torch.equal(start[name], ours[name]) for name in start if name in ours), (
        "nothing was trained"
    )
    assert "which model wrote what the student was trained on" in cached.log("trainer")


def test_a_response_that_the_file_lacks_is_counted_and_named(bench: Bench) -> None:
    """The student samples by itself, so that nearly nothing it says is in the file."""
    run = bench.run("lacks", cached=True, **{f'sampler = "file:{bench.scores}"\n': ""})
    teacher = replica(bench, "lacks", engine="file", scores=str(bench.scores))
    try:
        bench.processes.sampler(run)
        bench.processes.trainer(run)
        wait_until(lambda: "does not hold this response" in run.log("trainer"), what="a refusal in the log")
    finally:
        teacher.kill()
    assert "no_score" in run.log("trainer")


FITS = {
    "tokenizer": ({}, "other", "was written with tokenizer"),
    "temperature": (
        {"max_new_tokens = 6": "max_new_tokens = 6\ntemperature = 0.7"},
        None,
        "was scored at 1.0",
    ),
    "signal": ({LIGHTNING: 'preset = "gkd"\nk = 4\n'}, None, r"top_k: got 4, .* has 0"),
}


@pytest.mark.parametrize("name", FITS)
def test_a_file_that_does_not_fit_the_plan_is_refused_by_trainer_and_doctor(name: str, bench: Bench) -> None:
    changes, student, complaint = FITS[name]
    if student is not None:
        changes = {f'model = "{bench.root / "student"}"': f'model = "{_other_student(bench)}"'}
    run = bench.run(f"misfit-{name}", cached=True, **changes)
    found = [f.message for f in examine(run.config, download=False, token=None) if f.level == "fail"]
    assert any(_matches(complaint, message) for message in found), found
    process = bench.processes.trainer(run)
    process.join(60)
    assert process.exitcode not in (0, None)
    assert _matches(complaint, run.log("trainer")), run.log("trainer")


def _matches(pattern: str, text: str) -> bool:
    import re

    return re.search(pattern, text) is not None


def _other_student(bench: Bench) -> Path:
    """The same model with two letters of its tokenizer exchanged."""
    directory = bench.root / "other"
    if not directory.exists():
        from student_trainer.tasks.addition import CHARACTERS
        from student_trainer.tasks.characters import character_tokenizer

        write_model(directory, seed=1)
        character_tokenizer(CHARACTERS[1] + CHARACTERS[0] + CHARACTERS[2:]).save_pretrained(directory)
    return directory


def test_the_doctor_says_whose_words_the_student_was_trained_on(bench: Bench) -> None:
    revision = read_header(bench.scores).identity.revision
    teacher = bench.root / "teacher"
    for said, expected in (
        (None, "it is not known which model wrote"),
        ("Qwen/Qwen3-8B", "but Qwen/Qwen3-8B wrote"),
        (str(teacher), None),
        (str(teacher.parent / "." / "teacher"), None),
        (revision, None),
    ):
        changes = {} if said is None else {'task = "addition"': f'task = "addition"\nwritten_by = "{said}"'}
        run_file = bench.root / "doctor.toml"
        source = bench.root / "doctor-source.toml"
        if not source.exists():
            source.write_text(bench.run("doctored", cached=True).file.read_text())
        text = source.read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        run_file.write_text(text)
        findings = list(examine(load_run_config(run_file), download=False, token=None))
        warnings = [f.message for f in findings if f.level == "warn" and f.subject == "score file"]
        assert [expected in warning for warning in warnings] == ([] if expected is None else [True])
        assert any("20 responses, scored by" in finding.message for finding in findings)


def commands(guide: str) -> list[list[str]]:
    """The commands of the guide about Lightning OPD, without the program's name."""
    text = guide.split("## Lightning OPD")[1].split("```sh\n")[1].partition("```")[0]
    return [line.split()[1:] for line in text.splitlines()]


def test_the_guides_commands_make_what_its_recipe_trains_on(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "quickstart").symlink_to(bench.root)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    sample, score, up = commands((ROOT / "docs" / "cached-scores.md").read_text())
    assert up[1:] == ["recipes/lightning.toml"]
    sample[sample.index("--groups") + 1] = "12"
    for command in (sample, score):
        ran = CliRunner().invoke(app, command)
        assert ran.exit_code == 0, ran.output
    rows = [json.loads(line) for line in Path("artifacts/lightning/rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["example"] for row in rows}) == 12
    config = load_run_config(Path(up[1]))
    findings = [(f.level, f.subject) for f in examine(config, download=False, token=None)]
    assert ("ok", "sampling.sampler") in findings
    assert ("warn", "score file") in findings, "nobody said who wrote what the student was trained on"
    assert "fail" not in [level for level, _ in findings], findings
    started: list[TeacherSettings] = []
    monkeypatch.setattr("services.teacher.process.main", started.append)
    replica = child_specs(config, Path(up[1]), "unix:///queue")[0]
    assert CliRunner().invoke(app, list(replica.arguments)).exit_code == 0
    assert [(one.engine, one.model, one.scores) for one in started] == [
        ("file", None, config.teachers["teacher"].scores)
    ]


def test_what_sample_writes_is_what_the_run_itself_would_sample(bench: Bench) -> None:
    """The first groups of the run that the responses come from, whose batches are of another size."""
    rows = [json.loads(line) for line in (bench.root / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == GROUPS
    _, sampler = build_sampler(
        load_run_config(bench.root / "source.toml"), PolicyVersion(0, bench.root / "student", "")
    )
    for index, sampled in zip((3, 4), sampler.sample([3, 4], 0), strict=True):
        (rollout,) = sampled.group.rollouts
        assert unpack_ids(rollout.response_ids, "").tolist() == rows[index]["response_ids"]
        assert unpack_ids(sampled.group.prompt_ids, "").tolist() == rows[index]["context_ids"]
        assert sampler.prompts.training_index(index) == rows[index]["example"]
