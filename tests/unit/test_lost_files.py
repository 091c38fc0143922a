"""What a run file names and is not there is said at once, by the place where it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tutelage_client.errors import TutelageError

from launcher.lost_files import check_files
from services.models.load import load_causal_lm, load_tokenizer
from services.models.place import is_lost
from student_trainer.config import RunConfig, parse_run_config


def run(**sections: Any) -> RunConfig:
    document = {
        "student": {"model": "Qwen/Qwen3-0.6B"},
        "data": {"task": "addition"},
        "teachers": {"big": {"model": "Qwen/Qwen3-8B"}},
        "objective": {"preset": "thinking-machines"},
        "training": {"steps": 1},
    }
    return parse_run_config(document | sections)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_ids_of_the_hub_and_what_is_there_pass(here: Path) -> None:
    (here / "models/made/here").mkdir(parents=True)
    (here / "lines.jsonl").write_text("")
    teachers = {"big": {"model": "./models/made/here", "adapter": "models"}}
    check_files(run(student={"model": "gpt2"}, teachers=teachers, data={"path": "lines.jsonl"}))


def test_a_teacher_that_runs_elsewhere_has_its_files_there() -> None:
    check_files(run(teachers={"big": {"model": "/models/big", "address": "10.0.0.5:50051"}}))


def test_everything_that_is_lost_is_named_where_it_was_named() -> None:
    config = run(
        student={"model": "artifacts/quickstart/student"},
        data={"path": "data/questions.jsonl"},
        teachers={
            "big": {"model": "./big"},
            "math": {"model": "Qwen/Qwen3-8B", "adapter": "adapters/math"},
            "kept": {"scores": "scores.parquet"},
        },
        objective={"preset": "thinking-machines", "views": {"teacher": {"weights": "teacher:big"}}},
    )
    with pytest.raises(TutelageError) as caught:
        check_files(config)
    assert caught.value.message.split("\n  ") == [
        "[student] model: artifacts/quickstart/student: there is no such directory; `tutelage quickstart` "
        "makes it",
        "[teachers.big] model: ./big: there is no such directory",
        "[teachers.math] adapter: adapters/math: there is no such directory",
        "teachers.kept.scores: scores.parquet: there is no such file; `tutelage score` writes it",
        "[data] path: data/questions.jsonl: there is no such file",
    ]


@pytest.mark.parametrize("path", ["a/b/c", "./student", "~/student", "/models/student"])
def test_a_path_that_is_not_there_is_no_badly_spelled_id(path: str) -> None:
    assert is_lost(path)
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(TutelageError, match=f"could not load '{path}': there is no such directory"):
            load(path, revision=None)


def test_a_name_that_may_be_an_id_was_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TutelageError, match="'models/student', which is no directory here, from the hub: "):
        load_causal_lm("models/student")
