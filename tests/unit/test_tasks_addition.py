"""The addition task: answers, held-out pairs, checker and tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer
from tutelage_client.errors import TutelageError

from services.models.fingerprint import tokenizer_fingerprint
from student_trainer.tasks import load_task
from student_trainer.tasks.addition import CHARACTERS, MAX_ANSWER_TOKENS, Addition, operands, solution
from student_trainer.tasks.characters import MODEL_ROWS, character_tokenizer


@pytest.mark.parametrize(
    ("first", "second", "worked"),
    [
        (347, 585, "12,13,09:932"),
        (999, 999, "18,19,19:1998"),
        (100, 100, "00,00,02:200"),
        (905, 95 + 100, "10,10,11:1100"),
    ],
)
def test_worked_answer_has_carry_and_digit_per_column(first: int, second: int, worked: str) -> None:
    assert solution(first, second) == worked


def test_every_worked_answer_is_right_and_fits() -> None:
    task = Addition()
    for index in np.random.default_rng(0).integers(len(task), size=2_000):
        first, second = operands(int(index))
        example = task.example(int(index))
        assert example.prompt == f"{first}+{second}="
        assert task.reward(example, str(example.fields["solution"])) == 1.0
        assert int(str(example.fields["solution"]).split(":")[1]) == first + second
        assert len(str(example.fields["solution"])) + 1 <= MAX_ANSWER_TOKENS


def test_forgotten_carry_is_written_but_not_added() -> None:
    assert solution(347, 585, (True, False)) == "12,12,09:922"
    assert solution(347, 585, (True, True)) == "12,12,08:822"
    assert solution(111, 222, (True, True)) == solution(111, 222)


@pytest.mark.parametrize("text", ["", "932", "12,13,09:931", "12,13,09:9321", "12,13,09:932,", "932:"])
def test_checker_wants_the_sum_after_the_colon(text: str) -> None:
    task = Addition()
    example = task.example((347 - 100) * 900 + (585 - 100))
    assert example.prompt == "347+585="
    assert task.reward(example, text) == 0.0
    assert task.reward(example, "anything:932") == 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("12,13,09:932", None),
        ("anything:932", None),
        ("11,13,09:931", "-1"),
        ("12,03,09:832", "-2"),
        ("12,13,08:832", "-3"),
        ("12,13,09:933", "-4"),
        ("12,13,09:932:", "-4"),
        ("12", "-2"),
        ("", "-1"),
    ],
)
def test_feedback_names_the_first_wrong_part_in_the_tasks_own_characters(text: str, said: str | None) -> None:
    task = Addition()
    feedback = task.feedback(task.example((347 - 100) * 900 + (585 - 100)), text)
    assert feedback == said
    assert feedback is None or set(feedback) <= set(CHARACTERS)


def test_a_tenth_is_held_out_and_both_orders_of_a_pair_together() -> None:
    task = Addition()
    held_out = task.held_out()
    assert held_out.shape == (len(task),)
    assert 0.09 < held_out.mean() < 0.11
    table = held_out.reshape(900, 900)
    np.testing.assert_array_equal(table, table.T)


def test_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(TutelageError, match="'multiplication', allowed are \\['addition'\\]"):
        load_task("multiplication")


def test_tokenizer_round_trips_through_its_saved_form(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "347+585=12,13,09:932"
    ids = loaded(text)["input_ids"]
    assert len(ids) == len(text), "one token per character, nothing added"
    assert max(ids) < len(loaded) <= MODEL_ROWS
    assert loaded.decode(ids) == text
    assert loaded.decode([*ids, loaded.eos_token_id], skip_special_tokens=True) == text
    assert loaded("1?")["input_ids"][1] == loaded.unk_token_id
    assert loaded.pad_token_id not in ids
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def test_ids_beyond_the_tokenizer_decode_to_nothing() -> None:
    tokenizer = character_tokenizer(CHARACTERS)
    ids = tokenizer("12")["input_ids"]
    assert tokenizer.decode([*ids, MODEL_ROWS - 1]) == "12"
