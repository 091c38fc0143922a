"""The recipes are run files that can be run, and their views see what their comments say."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.text_tokenizer import text_tokenizer

from launcher.preview import Preview, preview
from student_trainer.config import load_run_config, parse_run_config

RECIPES = Path(__file__).parents[2] / "recipes"
FIELDS = {
    "self-distillation": {"question": "What is 1 + 1?", "answer": "One and one. #### 2"},
    "preference": {"question": "What is 1 + 1?", "answer": "One and one. #### 2"},
    "feedback-sdpo": {"question": "What is 1 + 1?", "answer": "One and one. #### 2"},
    "two-teachers": {"question": "What is 1 + 1?", "domain": "math"},
    "context-distillation": {"prompt": "I have a cold."},
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipe_is_a_run_file_of_its_own_name(path: Path) -> None:
    config = load_run_config(path)
    assert config.run.name == path.stem
    assert config.plan().sampling_temperature == config.sampling.temperature


def shown(name: str, directory: Path, *responses: str) -> Preview:
    """The recipe's first example, with a tokenizer and data of its form in place of those it downloads."""
    document: dict[str, Any] = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    data = directory / "data.jsonl"
    data.write_text((json.dumps(FIELDS[name]) + "\n") * 100)  # of which some are held out
    document["data"] = {
        key: value for key, value in document["data"].items() if key not in ("dataset", "subset")
    } | {"path": str(data)}
    return preview(parse_run_config(document), text_tokenizer(chat=True), 0, responses)


def test_the_solution_is_for_the_view_alone(tmp_path: Path) -> None:
    seen = shown("self-distillation", tmp_path, "It is 2.")
    (view,) = seen.views
    assert (view.teacher, view.weights) == ("self-distillation.initial", "the student before training")
    assert "One and one." in view.seen[0].context.prompt.text
    assert "One and one." not in seen.prompt.text


def test_the_preferred_are_sampled_under_what_the_view_sees_word_for_word(tmp_path: Path) -> None:
    seen = shown("preference", tmp_path, "It is 2.")
    (view,) = seen.views
    assert (view.weights, seen.guided) == ("the student as it is trained", 2)
    assert seen.guide is not None
    assert seen.guide.ids.tolist() == view.seen[0].context.prompt.ids.tolist()
    assert "One and one." in seen.guide.text
    assert "One and one." not in seen.prompt.text


def test_a_failed_response_sees_its_siblings_success_and_a_lonely_one_the_feedback(tmp_path: Path) -> None:
    wrong, right = "It is 3.", "It is 2."
    (view,) = shown("feedback-sdpo", tmp_path, wrong, right).views
    contexts = {seen.response: seen.context for seen in view.seen}
    assert right in contexts[0].prompt.text
    assert contexts[1].template is None, "nobody else was right and there is nothing to object to"
    (view,) = shown("feedback-sdpo", tmp_path, wrong, wrong).views
    assert all("The last number, 3, is wrong." in seen.context.prompt.text for seen in view.seen)


def test_the_domain_chooses_the_teacher(tmp_path: Path) -> None:
    seen = shown("two-teachers", tmp_path, "It is 2.")
    assert (seen.tag, seen.views[0].teacher) == ("math", "math")


def test_the_system_prompt_is_for_the_view_alone(tmp_path: Path) -> None:
    seen = shown("context-distillation", tmp_path, "Rest.")
    assert "<|im_start|>system\nYou advise patients." in seen.views[0].seen[0].context.prompt.text
    assert "advise" not in seen.prompt.text
