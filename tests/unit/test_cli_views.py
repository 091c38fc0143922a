"""`tutelage views`: what each view would see, marked, from a run file and a tokenizer alone."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from support.text_tokenizer import text_tokenizer
from typer.testing import CliRunner

from launcher.cli import app
from launcher.preview import privileged_tokens
from student_trainer.tasks.addition import CHARACTERS
from student_trainer.tasks.characters import character_tokenizer

RUN_FILE = """
[run]
name = "maths"

[teachers.algebra]
model = "some/algebra-teacher"

[teachers.poems]
model = "some/poet"

[student]
model = "{student}"

[data]
path = "{data}"
answer_field = "answer"
tag_field = "kind"
holdout = 0.0
shuffle = false

[sampling]
samples_per_prompt = 2
context = {{ user = "Hint: {{solution}} {{prompt}}" }}

[objective]
target = "losses"
correction = {{ kind = "importance", cap = 2.0 }}
tokens = {{ skip_first_n = 1 }}

[objective.views.expert]
route = {{ a = "algebra", p = "poems" }}
weight_field = "trust"
coefficient = 2.0

[objective.views.self]
weights = "ema"
context = [{{ user = "{{prompt}} See: {{success}}" }}, {{ user = "{{prompt}} {{feedback}}" }}]
missing = "{missing}"

[training]
steps = 1
"""
ROWS = [
    {"prompt": "2+2?", "answer": "4", "solution": "two and two", "kind": "a", "trust": 0.5},
    {"prompt": "Rhyme?", "answer": "time", "solution": "chime", "kind": "p", "trust": 1},
    {"prompt": "Sing!", "answer": "la", "solution": "la", "kind": "song", "trust": 1},
]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return write_run_file(tmp_path, "same")


def write_run_file(directory: Path, missing: str) -> Path:
    student, data = directory / "student", directory / "rows.jsonl"
    text_tokenizer(chat=True).save_pretrained(student)
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    path = directory / "run.toml"
    path.write_text(RUN_FILE.format(student=student, data=data, missing=missing))
    return path


def views(run_file: Path, *arguments: str) -> Result:
    environment = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["views", str(run_file), *arguments], env=environment)


def shown(result: Result) -> str:
    """What it printed, without the frame and the padding."""
    assert result.exit_code == 0, result.output
    return "\n".join(line.strip("│").rstrip().removeprefix(" ") for line in result.output.splitlines())


def test_each_view_is_shown_with_who_scores_it_and_what_it_sees(run_file: Path) -> None:
    text = shown(views(run_file, "--response", "4", "--response", "5"))
    assert "maths, example 0" in text
    assert "tag 'a'" in text
    assert "under [sampling] context: <|im_start|>user\nHint: two and two 2+2?<|im_end|>" in text
    assert re.search(r"response 0 4\s+reward 1\nresponse 1 5\s+reward 0", text)
    expert, own = text.split("view self")
    assert re.search(r"scored by algebra\s+some/algebra-teacher", expert)
    assert re.search(r"coefficient 1\n", expert), "2.0 times the example's 0.5"
    assert "before all 2 responses: the student's own prompt" in expert
    assert "⟦" not in expert.split("view expert")[1], "nothing there that the student does not see"
    assert re.search(r"scored by maths\.ema\s+the student's moving average", own)
    # The wrong response sees its sibling's success; the right one has neither a sibling's nor an objection.
    assert "before response 0: the student's own prompt, not marked" in own
    assert "template 1 of 2 lacks {success}\n  template 2 of 2 lacks {feedback}" in own
    assert "before response 1: template 1 of 2" in own
    assert "2+2?⟦ See: 4⟧<|im_end|>" in own


def test_positions_are_those_of_the_response_and_nothing_else_is_scored(run_file: Path) -> None:
    text = shown(views(run_file, "--response", "5", "--response", "4", "--all"))
    own = (
        text.split("view self")[1]
        .split("before response 0: template 1 of 2")[1]
        .split("before response 1")[0]
    )
    rows = re.findall(r"^ *(\d+)\s+(\d+)\s+('(?:[^'\\]|\\.)*')\s+(?:(\d+)\s+)?(\S.*)$", own, re.MULTILINE)
    assert [int(index) for index, *_ in rows] == list(range(len(rows))), "every token, in order"
    tokenizer = text_tokenizer(chat=True)
    context = "<|im_start|>user\n2+2? See: 4<|im_end|>\n<|im_start|>assistant\n"
    ids = [*tokenizer(context)["input_ids"], *tokenizer("5")["input_ids"], tokenizer.eos_token_id]
    assert [int(id_) for _, id_, *_ in rows] == ids
    scored = {int(index): position for index, _, _, position, _ in rows if position}
    assert scored == {len(ids) - 2: "0", len(ids) - 1: "1"}
    privileged = "".join(token[1:-1] for _, _, token, _, what in rows if what.startswith("privileged"))
    assert privileged == " See: 4"
    assert [what for *_, position, what in rows if position] == ["scored, not trained on", "scored"]


def test_without_a_response_it_says_what_is_lacking(run_file: Path) -> None:
    text = shown(views(run_file, "--example", "1"))
    assert re.search(r"scored by poems\s+some/poet", text)
    assert "lacks {success}\n  template 2 of 2 lacks {feedback}" in text
    assert "Without a response there are no positions" in text


def test_view_that_would_end_the_run_is_shown_as_refused(tmp_path: Path) -> None:
    text = shown(views(write_run_file(tmp_path, "error"), "--response", "4"))
    assert "refused, the run would stop here\n  template 1 of 2 lacks {success}\n" in text


def test_tag_without_a_teacher_is_one_clear_line(run_file: Path) -> None:
    result = views(run_file, "--example", "2")
    assert result.exit_code == 2
    assert (
        f"objective.views.expert.route: row 2 of {run_file.parent / 'rows.jsonl'} has kind = 'song', "
        "allowed: a, p"
    ) in result.output


def test_help_teaches_with_examples(run_file: Path) -> None:
    text = shown(CliRunner().invoke(app, ["views", "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"}))
    assert "tutelage views run.toml --example 7 --response" in text


@pytest.mark.parametrize(
    ("own", "seen", "marks"),
    [
        ("abc", "abc", "..."),
        ("abc", "abXYc", "..##."),
        ("abc", "XYabcZ", "##...#"),
        ("<ab>", "<XabY>", ".#..#."),
        ("ab", "", ""),
        ("aa", "aaa", "..#"),
        ("|p", "|s||p", "###.."),
        ("xap", "xabap", "..##."),
    ],
)
def test_what_the_student_does_not_see_is_marked(own: str, seen: str, marks: str) -> None:
    ids = [np.array([ord(c) for c in text], dtype=np.int32) for text in (own, seen)]
    assert "".join(".#"[mark] for mark in privileged_tokens(ids[0], ids[1], {ord("|")})) == marks


def test_guide_shows_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's run file is one, and its commands run on it."""
    guide = (Path(__file__).parents[2] / "docs" / "views.md").read_text()
    (run_file,) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(run_file)
    character_tokenizer(CHARACTERS).save_pretrained("models/student")
    (commands,) = re.findall(r"```sh\n(.*?)```", guide, re.DOTALL)
    outputs = []
    for command in commands.strip().splitlines():
        program, *arguments = shlex.split(command)
        assert program == "tutelage"
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})
        outputs.append(shown(result))
    assert "template 1 of 2 lacks {success}" in outputs[0]
    assert re.search(r"scored by self\.ema\s+the student's moving average", outputs[1])
    assert "before response 1: template 2 of 2" in outputs[1] or "before all 2 responses" in outputs[1]


def test_context_of_the_auxiliary_loss_is_shown_beside_the_views(tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, "same")
    auxiliary = '[objective.auxiliary]\nkind = "consistency"\ncontext = { system = "{solution}" }\n'
    run_file.write_text(run_file.read_text().replace("[training]", f"{auxiliary}\n[training]"))
    text = shown(views(run_file, "--response", "4")).split("view objective.auxiliary")[1]
    assert "scored by the trainer itself" in text
    assert "⟦<|im_start|>system\ntwo and two<|im_end|>\n⟧<|im_start|>user\n2+2?" in text
