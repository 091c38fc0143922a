"""`tutelage doctor` reads the data as samplers do, and compares the run's numbers with the models'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tutelage_client.types import Limits

from launcher.doctor_checks import Finding, check_lengths, check_objective
from launcher.doctor_data import check_data, check_prompts
from launcher.doctor_scores import check_scores
from launcher.model_facts import ModelFacts
from student_trainer.config import RunConfig, parse_run_config
from student_trainer.tasks.characters import character_tokenizer

SMALL = ModelFacts("small", "Tiny", 1000, vocab_size=32, max_tokens=128, tokenizer_size=32, fingerprint="f")


def run(**sections: Any) -> RunConfig:
    document = {
        "student": {"model": "student"},
        "data": {"task": "addition"},
        "teachers": {"big": {"model": "big"}},
        "objective": {"preset": "thinking-machines"},
        "training": {"steps": 1},
    }
    return parse_run_config(document | sections)


def fails(findings: Any) -> list[str]:
    return [finding.message for finding in findings if finding.level == "fail"]


def look(path: Path, **settings: Any) -> Finding:
    return check_data(run(data={"path": str(path), "holdout": 0.0, **settings}))


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    rows = [{"prompt": f"{number}+1=", "answer": str(number + 1)} for number in range(70)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_data_that_samplers_can_read_are_counted(lines: Path) -> None:
    assert look(lines, answer_field="answer") == Finding("ok", "data", f"{lines}: 70 prompts, 0 are held out")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"answer_field": "anwser"}, "has no field 'anwser'; its fields are ['answer', 'prompt']"),
        ({"prompt_field": "question"}, "line 1 has no field 'question'; its fields are ['answer', 'prompt']"),
    ],
)
def test_a_field_that_the_data_lack_would_fail(lines: Path, settings: dict[str, str], expected: str) -> None:
    found = look(lines, **settings)
    assert (found.level, found.message.endswith(expected)) == ("fail", True), found


def test_a_line_far_down_that_is_not_json_would_fail(lines: Path) -> None:
    lines.write_text(lines.read_text() + "{prompt: 1}\n")
    found = look(lines)
    assert found.level == "fail"
    assert "line 71: not JSON" in found.message


def test_a_file_that_is_no_parquet_file_would_fail(tmp_path: Path) -> None:
    (tmp_path / "lines.parquet").write_text('{"prompt": "1+1="}\n')
    found = look(tmp_path / "lines.parquet")
    assert (found.level, "is no Parquet file" in found.message) == ("fail", True), found


def test_more_ids_than_the_student_has_would_fail() -> None:
    config = run(objective={"support": "student_topk", "estimator": "pathwise", "k": 33})
    limits = {"big": Limits()}
    assert fails(check_objective(config, limits, SMALL)) == ["objective.k: got 33, the student has 32 tokens"]
    config = run(objective={"support": "student_topk", "estimator": "pathwise", "k": 32})
    assert fails(check_objective(config, limits, SMALL)) == []


def test_a_teacher_that_nothing_asks_is_named() -> None:
    """As when the run file's view has another name than the preset's, and takes its place."""
    own = run(objective={"preset": "thinking-machines", "views": {"techer": {"weights": "ema"}}})
    findings = check_objective(own, {"big": Limits(), "run.ema": Limits()}, SMALL)
    assert [finding.subject for finding in findings if finding.level == "warn"] == ["teacher big"]
    writes = run(
        teachers={"big": {"model": "big"}, "other": {"model": "other"}},
        sampling={"sampler": "teacher:other"},
        objective={"preset": "thinking-machines", "views": {"teacher": {"weights": "teacher:big"}}},
    )
    findings = check_objective(writes, {"big": Limits(), "other": Limits()}, SMALL)
    assert [finding.subject for finding in findings if finding.level == "warn"] == []


def test_every_teacher_of_a_route_is_named() -> None:
    config = run(
        teachers={"a": {"model": "a"}, "b": {"model": "b"}},
        data={"path": "x.jsonl", "tag_field": "domain"},
        objective={"preset": "thinking-machines", "views": {"teacher": {"route": {"x": "a", "y": "b"}}}},
    )
    assert "teacher asks a or b for sampled" in next(iter(check_objective(config, {}))).message


def test_a_judge_s_reply_has_to_fit_before_any_question() -> None:
    judging = {"preset": "grpo", "judge": "big"}

    def of(tokens: int) -> RunConfig:
        judge = {"model": "big", "judge": {"max_new_tokens": tokens}}
        return run(teachers={"big": judge}, objective=judging, sampling=SAMPLING)

    assert fails(check_lengths(of(127), "teacher big", SMALL)) == []
    (found,) = fails(check_lengths(of(128), "teacher big", SMALL))
    assert "takes 128 tokens; its reply alone may have judge.max_new_tokens = 128" in found
    served = [finding.message for finding in check_objective(of(8), {"big": Limits(judge=True)}, SMALL)]
    assert "serves the objective (judges)" in served


SAMPLING = {"samples_per_prompt": 2, "max_new_tokens": 8}


def test_a_teacher_that_answers_from_a_file_wants_its_responses_replayed() -> None:
    def warned(**sampling: Any) -> list[str]:
        kept = run(teachers={"big": {"scores": "scores.parquet"}}, sampling=sampling)
        return [f.message for f in check_scores(kept, SMALL) if f.subject == "teacher big"]

    (message,) = warned()
    assert message.endswith(
        """sampler = 'student' writes new responses; "file:scores.parquet" replays the file's"""
    )
    assert warned(sampler="file:scores.parquet") == []


def test_prompts_that_the_student_cannot_read_or_hold_are_counted(tmp_path: Path) -> None:
    character_tokenizer("0123456789+=").save_pretrained(tmp_path / "student")
    path = tmp_path / "lines.jsonl"

    def warned(*prompts: str, **sampling: Any) -> list[str]:
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        config = run(
            student={"model": str(tmp_path / "student")},
            data={"path": str(path), "holdout": 0.0},
            sampling=sampling,
        )
        findings = list(check_prompts(config, SMALL))
        assert all(finding.level == "warn" for finding in findings)
        return [finding.message for finding in findings]

    assert warned("1+1=", "2+2=", max_new_tokens=124) == []
    (unread,) = warned("1+1=", "two + 2", max_new_tokens=8)
    assert unread.startswith("1 of the first 2 prompts have text that the tokenizer does not know, '<unk>'")
    (long,) = warned("1+1=", "12+1=", max_new_tokens=124)
    assert long.startswith("one of the first 2 has 5 tokens, with [sampling] max_new_tokens 129; the student")


def test_a_chat_template_that_the_student_lacks_would_fail(tmp_path: Path) -> None:
    character_tokenizer("0123456789+=").save_pretrained(tmp_path)
    config = run(student={"model": str(tmp_path)}, data={"task": "addition", "chat_template": "always"})
    (found,) = check_prompts(config, SMALL)
    assert (found.level, "chat template" in found.message) == ("fail", True), found
