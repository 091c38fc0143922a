"""`tutelage quickstart`: what it says about the gap, and (long) the whole of it from nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.quickstart import ENOUGH, MAIN, RECIPES, share_closed
from launcher.quickstart_measure import Measured
from student_trainer.config import load_run_config


def measured(greedy: float, sampled: float) -> Measured:
    return Measured(greedy, 0.01, sampled, 0.01, 0.1)


def test_the_share_of_the_gap_is_that_between_student_and_teacher() -> None:
    rows = {
        "teacher": measured(1.0, 0.9),
        "student before": measured(0.2, 0.1),
        "student after": measured(0.8, 0.5),
    }
    assert share_closed(rows, "greedy") == pytest.approx(0.75)
    assert share_closed(rows, "sampled") == pytest.approx(0.5)
    assert pytest.approx(0.75) == ENOUGH


def test_the_vllm_recipe_is_the_quickstart_with_another_engine() -> None:
    ours, other = (load_run_config(RECIPES / MAIN[engine]) for engine in ("transformers", "vllm"))
    theirs = ours.teachers["teacher"].model_copy(
        update={"engine": "vllm", "vllm": other.teachers["teacher"].vllm}
    )
    run = ours.run.model_copy(
        update=other.run.model_dump(include={"name", "directory", "deterministic", "threads"})
    )
    assert other == ours.model_copy(update={"run": run, "teachers": {"teacher": theirs}})
    assert other.threads == ours.threads == 1


@pytest.mark.parametrize(
    ("engine", "expected"), [("vlm", "must be transformers or vllm"), ("vllm", "make setup")]
)
def test_an_engine_that_is_not_here_is_refused_before_anything_is_written(
    engine: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launcher.quickstart.find_spec", lambda name: None)
    ran = CliRunner().invoke(app, ["quickstart", "--engine", engine])
    assert ran.exit_code == 2
    assert expected in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_student_learns_from_a_teacher_service_and_the_report_shows_it(tmp_path: Path) -> None:
    def quickstart(*options: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-m", "launcher", "quickstart", *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=900,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    first = quickstart()
    run = tmp_path / "runs" / "quickstart"
    outcome = json.loads((run / "outcome.json").read_text())
    rows = {row["name"]: row for row in outcome["rows"]}
    assert rows["student before"]["greedy"] < 0.5
    assert rows["student after"]["greedy"] > 0.9
    assert rows["student after"]["kl"] < rows["student before"]["kl"] / 5
    assert "training the teacher" in first
    page = (run / "report.html").read_text()
    assert f"{100 * rows['student after']['greedy']:.1f}%" in page
    assert (run / "report" / "accuracy.png").stat().st_size > 5000
    weights = (run / "student" / "model.safetensors").read_bytes()
    second = quickstart()
    assert "training the teacher" not in second
    assert (run / "student" / "model.safetensors").read_bytes() == weights
    if find_spec("vllm") is not None:
        quickstart("--engine", "vllm")
        third = json.loads((tmp_path / "runs" / "quickstart-vllm" / "outcome.json").read_text())
        assert {row["name"]: row for row in third["rows"]}["student after"]["greedy"] > 0.9
