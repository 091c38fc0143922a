"""`tutelage doctor` on views: what a sampler would meet in the first examples is said before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.text_tokenizer import text_tokenizer

from launcher.doctor_views import check_views
from launcher.model_facts import ModelFacts
from student_trainer.config import parse_run_config

FACTS = ModelFacts("m", "Qwen3ForCausalLM", 1000, 112, 64, 104, "f")
ROW = {"prompt": "2+2?", "answer": "4", "solution": "two twos", "kind": "a", "trust": 1.0}


def findings(
    directory: Path,
    view: dict[str, Any],
    *,
    rows: Sequence[dict[str, Any]] = (ROW, ROW),
    student: ModelFacts | None = FACTS,
    objective: dict[str, Any] | None = None,
    **sampling: Any,
) -> list[tuple[str, str, str]]:
    text_tokenizer(chat=True).save_pretrained(directory)
    (directory / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = parse_run_config(
        {
            "teachers": {"big": {"model": "m"}},
            "student": {"model": str(directory)},
            "data": {
                "path": directory / "rows.jsonl",
                "answer_field": "answer",
                "tag_field": "kind",
                "holdout": 0.0,
                "shuffle": False,
            },
            "sampling": {"samples_per_prompt": 2, "max_new_tokens": 8, **sampling},
            "objective": {"views": {"v": view}, **(objective or {})},
            "training": {"steps": 1},
        }
    )
    return [(f.level, f.subject, f.message) for f in check_views(config, student, {"big": FACTS})]


def test_run_without_views_of_its_own_has_nothing_to_look_at(tmp_path: Path) -> None:
    assert findings(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("view", "level", "message"),
    [
        ({"context": {"user": "{solution}"}}, "ok", "of 2 examples 2 have a context"),
        (
            {"context": {"user": "{success}"}, "missing": "same"},
            "ok",
            "of 2 examples 0 have a context, 2 wait for their responses",
        ),
        ({"context": {"user": "{hint}"}}, "fail", "got field 'hint', which none of the first 2 examples has"),
        (
            {"context": {"user": "x" * 60 + "{solution}"}},
            "warn",
            "m takes 64; responses under it would be left",
        ),
        ({"route": {"a": "big"}}, "ok", "first 2 examples have their teachers"),
        ({"route": {"b": "big"}}, "fail", "row 0 of"),
        ({"weight_field": "kind"}, "fail", "has kind = 'a', allowed: a finite number"),
    ],
)
def test_what_a_sampler_would_meet_is_said(
    tmp_path: Path, view: dict[str, Any], level: str, message: str
) -> None:
    found = findings(tmp_path, view)
    assert any(got == level and message in said for got, _, said in found), found


@pytest.mark.parametrize(("missing", "level"), [("error", "fail"), ("same", "ok")])
def test_examples_that_lack_a_field_are_counted(tmp_path: Path, missing: str, level: str) -> None:
    view = {"context": {"user": "{solution}"}, "missing": missing}
    ((got, subject, message),) = findings(tmp_path, view, rows=(ROW, {**ROW, "solution": None}))
    assert (got, subject) == (level, "view v")
    assert message.startswith("of 2 examples 1 have a context, 1 ")


def test_guiding_context_is_looked_at_too(tmp_path: Path) -> None:
    lacking = {**ROW, "solution": None}
    ((level, _, message),) = findings(
        tmp_path,
        {"weights": "live"},
        rows=(ROW, lacking),
        objective={"correction": {"kind": "importance"}},
        context={"user": "{solution}"},
    )
    assert level == "fail"
    assert "sampling.context: row 1 of" in message


@pytest.mark.parametrize(("sampled_under", "warned"), [("{prompt} {solution}", False), ("{solution}", True)])
def test_preference_whose_view_is_not_what_sampled_warns(
    tmp_path: Path, sampled_under: str, warned: bool
) -> None:
    found = findings(
        tmp_path,
        {"weights": "live", "context": {"user": "{prompt} {solution}"}},
        objective={"preference": {}, "normalisation": "sequence_mean"},
        context={"user": sampled_under},
        guided_samples=1,
    )
    said = [message for level, subject, message in found if (level, subject) == ("warn", "view v")]
    assert [message.startswith("its context is not the text of [sampling] context") for message in said] == [
        True
    ] * warned


def test_without_the_students_tokenizer_nothing_is_claimed(tmp_path: Path) -> None:
    ((level, _, message),) = findings(tmp_path, {"context": {"user": "{solution}"}}, student=None)
    assert level == "unknown"
    assert "tokenizer" in message
