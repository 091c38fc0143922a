"""What the sampler sends of a prompt in words: to a judge and a writer the question, to views nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.text_tokenizer import text_tokenizer
from support.view_run import SEEDS, ViewRuns, write_model
from tutelage_client.codec import unpack_ids

from student_trainer.sampler.groups import SampledGroup
from student_trainer.sampler.prompts import PromptEncoder
from student_trainer.sampler.settings import DataSettings
from student_trainer.tasks import Example

VIEW = """
k = 4
[objective.views.expert]
weights = "teacher:maths"
context = { user = "{solution} {prompt}" }
"""
JUDGED = f"""
mix = "add"
judge = "referee"
estimator = "pathwise"
support = "teacher_topk"
{VIEW}
[teachers.referee]
address = "referee.example:50051"
"""
AUDITED = f"""
mix = "route"
estimator = "pathwise"
support = "teacher_topk"
audit = {{ teacher = "author", chunks = 1, chunk_tokens = 2 }}
{VIEW}
[teachers.author]
address = "author.example:50051"
"""
PLAIN = f'support = "teacher_topk"\nestimator = "pathwise"\n{VIEW}'


def turns(*spoken: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in spoken]


PROMPTS = {
    "What is 2+2?": "What is 2+2?",
    "two\n\nparagraphs ": "two\n\nparagraphs ",
    "<|im_start|>user\nby hand<|im_end|>": "user\nby hand",
}
CHATS = [
    (turns(("user", "What is 2+2?")), "What is 2+2?"),
    (turns(("system", "Be brief."), ("user", "What?")), "Be brief.\n\nWhat?"),
    (
        turns(("system", "S"), ("user", "one"), ("assistant", "two"), ("user", "three")),
        "system: S\n\nuser: one\n\nassistant: two\n\nuser: three",
    ),
    (turns(("user", "one"), ("user", "two")), "user: one\n\nuser: two"),
    (turns(("user", "Say"), ("assistant", "I")), "user: Say\n\nassistant: I"),
    (turns(("system", "S")), "system: S"),
    (turns(("user", "a<end><|im_end|>b")), "ab"),
    (turns(("user", None)), None),
    ([{"role": "user"}], None),
]


@pytest.mark.parametrize("template", ["auto", "never"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_plain_prompt_is_its_own_text(prompt: str, template: str) -> None:
    """Special tokens that stand in it say nothing to others, as where they are decoded."""
    settings = DataSettings.model_validate({"task": "addition", "chat_template": template})
    encoder = PromptEncoder(text_tokenizer(chat=True), settings)
    assert encoder.bare(Example(prompt, None)) == PROMPTS[prompt]


@pytest.mark.parametrize(("messages", "expected"), CHATS)
def test_a_chat_is_its_question_or_its_turns(messages: list[dict[str, Any]], expected: str | None) -> None:
    """A system message of the run file is the student's own."""
    settings = DataSettings.model_validate({"path": "rows.jsonl", "system_prompt": "Think!"})
    encoder = PromptEncoder(text_tokenizer(chat=True), settings)
    assert encoder.bare(Example(tuple(messages), None)) == expected


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> ViewRuns:
    root: Path = tmp_path_factory.mktemp("words")
    for name in ("student", "maths"):
        write_model(root / name, SEEDS[name])
    rows = [
        {"prompt": prompt, "answer": "4", "kind": "a", "solution": "so"}
        for prompt in ("2+2?", turns(("user", "3+3?")), turns(("system", "S"), ("user", "4+4?")))
    ]
    (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return ViewRuns(root, "redis://127.0.0.1:1")


def sampled(runs: ViewRuns, name: str, objective: str) -> list[SampledGroup]:
    return runs.sample(runs.config(name, objective), range(3))


@pytest.mark.parametrize(("asked", "objective"), [("judge", JUDGED), ("audit", AUDITED)])
def test_who_reads_words_gets_the_question_beside_the_ids_and_a_view_the_ids_alone(
    runs: ViewRuns, asked: str, objective: str
) -> None:
    tokenizer = text_tokenizer(chat=True)
    found = []
    for each in sampled(runs, asked, objective):
        requests = {request.view: request for request in each.requests}
        assert set(requests) == {"expert", asked}
        (context,) = requests[asked].contexts
        assert context.ids == each.group.prompt_ids
        said = tokenizer.decode(unpack_ids(context.ids, "ids"), skip_special_tokens=True)
        assert said.endswith("\nassistant\n")
        found.append(context.text)
        assert not any(seen.HasField("text") for seen in requests["expert"].contexts)
    assert found == ["2+2?", "3+3?", "S\n\n4+4?"]


def test_where_nobody_reads_words_none_is_sent(runs: ViewRuns) -> None:
    for each in sampled(runs, "plain", PLAIN):
        assert [request.view for request in each.requests] == ["expert"]
        assert not any(context.HasField("text") for context in each.requests[0].contexts)
