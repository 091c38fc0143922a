"""Tags and factors of examples: read from the fields that the run file names, or refused with the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tutelage_client.errors import TutelageError

from student_trainer.objective.compile import compile_plan
from student_trainer.objective.settings import ObjectiveSettings
from student_trainer.sampler.data import load_prompts
from student_trainer.sampler.labels import ExampleLabels
from student_trainer.sampler.settings import DataSettings
from student_trainer.tasks import Example

ROUTE = {"a": {"route": {"x": "maths", "7": "prose"}}}
WEIGHTED = {"a": {"weights": "teacher:maths", "weight_field": "trust"}, "b": {"weights": "teacher:prose"}}


class Labels:
    """Labels over a file of one row."""

    def __init__(self, directory: Path, row: dict[str, Any], views: dict[str, Any], tag: str | None) -> None:
        self.path = directory / "rows.jsonl"
        self.path.write_text(json.dumps({"prompt": "p", **row}))
        prompts = load_prompts(DataSettings(path=self.path, holdout=0.0), seed=0)
        several = {"target": "losses"} if len(views) > 1 else {}
        settings = ObjectiveSettings.model_validate({"views": views, **several})
        plan = compile_plan(settings, student_temperature=1.0, teachers=["maths", "prose"])
        self.example: Example = prompts.example(0)
        self.read = ExampleLabels(plan, prompts, tag)

    def refusal(self, what: str) -> str:
        with pytest.raises(TutelageError) as caught:
            getattr(self.read, what)(0, self.example)
        assert caught.value.code == "INVALID_ARGUMENT"
        return caught.value.message


@pytest.mark.parametrize(("value", "tag", "teacher"), [("x", "x", "maths"), (7, "7", "prose")])
def test_tag_chooses_the_teacher_of_a_routed_view(tmp_path: Path, value: Any, tag: str, teacher: str) -> None:
    labels = Labels(tmp_path, {"kind": value}, ROUTE, "kind")
    assert labels.read.tag(0, labels.example) == tag
    assert labels.read.teacher("a", 0, tag) == teacher


def test_tag_that_is_not_needed_may_lack(tmp_path: Path) -> None:
    labels = Labels(tmp_path, {}, WEIGHTED, "kind")
    assert labels.read.tag(0, labels.example) == ""
    assert labels.read.teacher("b", 0, "") == "prose"


def test_tag_that_lacks_is_refused_with_row_and_fields(tmp_path: Path) -> None:
    labels = Labels(tmp_path, {"knid": "x"}, ROUTE, "kind")
    assert labels.refusal("tag") == (
        f"data.tag_field: row 0 of {labels.path} has no field 'kind'; its fields are ['knid', 'prompt']"
    )


@pytest.mark.parametrize("value", [0, 0.5, 3])
def test_factors_are_read_for_the_views_that_have_one(tmp_path: Path, value: float) -> None:
    labels = Labels(tmp_path, {"trust": value}, WEIGHTED, None)
    assert labels.read.weights(0, labels.example) == {"a": value}


@pytest.mark.parametrize("value", ["0.5", True, -1, float("nan"), float("inf")])
def test_factor_that_is_none_is_refused(tmp_path: Path, value: Any) -> None:
    labels = Labels(tmp_path, {"trust": value}, WEIGHTED, None)
    assert labels.refusal("weights").startswith(
        f"objective.views.a.weight_field: row 0 of {labels.path} has trust = {value!r}, allowed: "
    )


def test_factor_that_lacks_is_refused(tmp_path: Path) -> None:
    labels = Labels(tmp_path, {"trust": None}, WEIGHTED, None)
    assert "row 0" in labels.refusal("weights")
