"""Prompts: group index → example, held-out prompts, files, chat templates, checkers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from tutelage_client.errors import TutelageError

from student_trainer.sampler.checkers import boxed, exact, numeric
from student_trainer.sampler.data import PromptSource, load_prompts
from student_trainer.sampler.prompts import PromptEncoder
from student_trainer.sampler.settings import DataSettings, SamplingSettings
from student_trainer.tasks.addition import CHARACTERS
from student_trainer.tasks.characters import character_tokenizer

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1), "level": i % 3} for i in range(200)]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }},{% endfor %}"
    "{% if add_generation_prompt %}{{ mark or '=' }}{% endif %}"
)


def write_jsonl(path: Path, rows: list[Any] = ROWS) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def open_source(kind: str, directory: Path, **settings: Any) -> PromptSource:
    options: dict[str, Any] = {"answer_field": "answer", **settings}
    if kind == "jsonl":
        options["path"] = write_jsonl(directory / "rows.jsonl")
    elif kind == "parquet":
        options["path"] = write_parquet(directory / "rows.parquet")
    else:
        (directory / "set").mkdir()
        write_parquet(directory / "set" / "train.parquet")
        options["dataset"] = str(directory / "set")
    return load_prompts(DataSettings(**options), seed=7)


def test_an_epoch_is_a_permutation_and_the_next_is_another() -> None:
    source = load_prompts(DataSettings(task="addition"), seed=1)
    size = len(source.training)
    first = [source.training_index(i) for i in range(size)]
    assert sorted(first) == source.training.tolist()
    second = [source.training_index(size + i) for i in range(100)]
    assert second != first[:100]
    assert [source.training_index(i) for i in range(100)] == first[:100], "an earlier epoch stays as it was"


def test_an_example_depends_on_seed_and_group_index_only() -> None:
    one, same, other = (load_prompts(DataSettings(task="addition"), seed=seed) for seed in (3, 3, 4))
    for index in (0, 1, 17, 10**7):
        assert one.example(index) == same.example(index)
    assert [one.training_index(i) for i in range(50)] != [other.training_index(i) for i in range(50)]


def test_held_out_prompts_never_occur_in_training_and_do_not_depend_on_the_seed() -> None:
    one, other = (load_prompts(DataSettings(task="addition"), seed=seed) for seed in (3, 4))
    evaluation = one.held_out(500)
    assert evaluation == other.held_out(500)
    assert len({example.prompt for example in evaluation}) == 500
    assert not set(one.evaluation.tolist()) & set(one.training.tolist())
    trained = {one.task.example(int(index)).prompt for index in one.training[:: len(one.training) // 5000]}
    assert not trained & {example.prompt for example in evaluation}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_files_and_data_sets_give_every_row_once_per_epoch(kind: str, tmp_path: Path) -> None:
    source = open_source(kind, tmp_path, holdout=0.2)
    training = {source.example(i).prompt for i in range(len(source.training))}
    held_out = {example.prompt for example in source.held_out(1000)}
    assert training | held_out == {row["prompt"] for row in ROWS}
    assert not training & held_out
    assert 20 <= len(held_out) <= 60
    example = source.example(0)
    assert source.reward(example, f" {example.answer}\n") == 1.0
    assert source.reward(example, "no") == 0.0
    assert example.fields["level"] in (0, 1, 2)


def test_repeated_prompts_fall_on_one_side(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"p{i % 40}"} for i in range(400)])
    source = load_prompts(DataSettings(path=path, holdout=0.3), seed=0)
    training = {source.example(i).prompt for i in range(len(source.training))}
    assert training.isdisjoint(example.prompt for example in source.held_out(400))


def test_without_shuffle_the_file_order_stands_and_without_answers_there_is_no_reward(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl")
    source = load_prompts(DataSettings(path=path, shuffle=False, holdout=0.0), seed=0)
    assert [source.example(i).prompt for i in range(5)] == [row["prompt"] for row in ROWS[:5]]
    assert source.reward(source.example(0), "1") is None
    with pytest.raises(TutelageError, match="holds no prompt out"):
        source.held_out(5)


def test_long_prompts_are_left_out_when_asked(tmp_path: Path) -> None:
    settings = DataSettings(path=write_jsonl(tmp_path / "rows.jsonl"), max_prompt_tokens=5, holdout=0.1)
    encoder = PromptEncoder(character_tokenizer(CHARACTERS), settings)
    source = load_prompts(
        settings, seed=0, prompt_tokens=lambda examples: [len(p.ids) for p in encoder.encode(examples)]
    )
    prompts = [source.example(i).prompt for i in range(len(source.training))]
    assert 80 < len(prompts) < 100
    assert all(len(prompt) <= 5 for prompt in prompts)


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ('{"prompt": "a"}\nnot json\n', {}, "line 2: not JSON"),
        ('{"prompt": "a"}\n[1]\n', {}, "line 2: got .* must be an object"),
        (
            '{"prompt": "a"}\n\n{"text": "b"}\n',
            {},
            r"line 3 has no field 'prompt'; its fields are \['text'\]",
        ),
        ('{"prompt": "a"}\n', {"answer_field": "gold"}, "data.answer_field: row 0 .* no field 'gold'"),
        ('{"prompt": 3}\n', {}, "prompt of type int"),
        ("", {}, "is empty"),
    ],
)
def test_bad_files_name_the_place_and_the_field(
    content: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(TutelageError, match=message):
        load_prompts(DataSettings(path=path, holdout=0.0, **settings), seed=0).example(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of task, path, dataset"),
        ({"task": "addition", "path": "a.jsonl"}, "exactly one of task, path, dataset"),
        ({"path": "a.csv"}, "must end in .jsonl or .parquet"),
        ({"path": "a.jsonl", "propmt_field": "x"}, "propmt_field"),
        ({"task": "addition", "system_prompt": "x"}, "needs a chat template"),
    ],
)
def test_data_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataSettings(**settings)


def test_student_fraction_needs_another_sampler() -> None:
    assert SamplingSettings().student_share == 1.0
    assert SamplingSettings(sampler="teacher:big").student_share == 0.0
    assert SamplingSettings(sampler="teacher:big", student_fraction=0.25).student_share == 0.25
    with pytest.raises(ValidationError, match="name the other model"):
        SamplingSettings(student_fraction=0.5)


def test_chat_messages_and_texts_go_through_the_template(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(CHARACTERS + "usmad")
    tokenizer.chat_template = TEMPLATE
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {"prompt": "1+2"},
            {"prompt": [{"role": "user", "content": "3"}, {"role": "assistant", "content": "4"}]},
        ],
    )
    options: dict[str, Any] = {"path": path, "shuffle": False, "holdout": 0.0}

    def texts(**more: Any) -> list[str]:
        settings = DataSettings(**options, **more)
        encoder, source = PromptEncoder(tokenizer, settings), load_prompts(settings, seed=0)
        return [encoder.text(source.example(i)) for i in range(2)]

    assert texts() == ["u:1+2,=", "u:3,a:4,="]
    assert texts(system_prompt="0") == ["s:0,u:1+2,=", "s:0,u:3,a:4,="]
    assert texts(chat_template_arguments={"mark": "-"}) == ["u:1+2,-", "u:3,a:4,-"]
    assert texts(chat_template="never")[0] == "1+2"
    settings = DataSettings(**options)
    [encoded] = PromptEncoder(tokenizer, settings).encode([load_prompts(settings, seed=0).example(0)])
    assert encoded.ids.dtype == np.int32
    assert tokenizer.decode(encoded.ids) == "u:1+2,="


def test_chat_template_is_refused_where_there_is_none(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": [{"role": "user", "content": "1"}]}])
    settings = DataSettings(path=path, holdout=0.0)
    tokenizer = character_tokenizer(CHARACTERS)
    with pytest.raises(TutelageError, match="need a tokenizer with a chat template"):
        PromptEncoder(tokenizer, settings).encode([load_prompts(settings, seed=0).example(0)])
    with pytest.raises(TutelageError, match="no chat template"):
        PromptEncoder(tokenizer, DataSettings(path=path, chat_template="always"))


def test_checkers() -> None:
    assert exact(" 42\n", "42") == 1.0
    assert exact("42.", "42") == 0.0
    assert numeric("so 3 + 4 is 1,007.50 in all.", "#### 1007.5") == 1.0
    assert numeric("the answer is -3", "3") == 0.0
    assert numeric("none", "3") == 0.0
    assert boxed(r"first \boxed{1}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}") == 1.0
    assert boxed(r"\boxed{ 1,000 }", "1000.0") == 1.0
    assert boxed(r"\boxed{x", "x") == 0.0
    assert boxed(r"\boxed{4} and \boxed{5", "4") == 1.0
    assert boxed("4", "4") == 0.0


@pytest.mark.parametrize(
    ("checker", "answer", "text", "said"),
    [
        ("exact", "7", " 7 ", None),
        ("exact", "7", "8", "The answer '8' is wrong."),
        ("exact", "7", " ", "There is no answer."),
        ("numeric", "7", "so 7.0", None),
        ("numeric", "7", "7 or 8,000", "The last number, 8000, is wrong."),
        ("numeric", "7", "seven", "There is no number in the answer."),
        ("boxed", "7", r"\boxed{7}", None),
        ("boxed", "7", r"\boxed{{8}}", r"\boxed{{8}} is wrong."),
        ("boxed", "7", "7", r"There is no \boxed{} in the answer."),
    ],
)
def test_checkers_say_what_is_wrong_and_not_what_is_right(
    tmp_path: Path, checker: str, answer: str, text: str, said: str | None
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "answer": answer}])
    source = load_prompts(
        DataSettings.model_validate(
            {"path": path, "answer_field": "answer", "checker": checker, "holdout": 0.0}
        ),
        seed=0,
    )
    assert source.feedback(source.example(0), text) == said


def test_without_an_answer_there_is_nothing_to_say(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl")
    source = load_prompts(DataSettings(path=path, holdout=0.0), seed=0)
    assert source.feedback(source.example(0), "7") is None
