"""Privileged contexts: what every view sees before a response, and nothing of anybody else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.text_tokenizer import text_tokenizer
from tutelage_client.errors import TutelageError

from student_trainer.objective.compile import Plan, compile_plan
from student_trainer.objective.settings import ObjectiveSettings
from student_trainer.objective.view_settings import ContextTemplate
from student_trainer.sampler.contexts import Context, ContextBuilder, Sampled, without_thinking
from student_trainer.sampler.data import PromptSource, load_prompts
from student_trainer.sampler.prompts import EncodedPrompt, PromptEncoder
from student_trainer.sampler.settings import DataSettings

PER_STEP = 4
ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"question{i}?",
        "answer": f"answer{i}!",
        "solution": f"solution{i};",
        "level": i,
        "hint": None,
    }
    for i in range(40)
]


def make_plan(views: dict[str, Any]) -> Plan:
    settings = {"views": views, "target": "losses"} if len(views) > 1 else {"views": views}
    return compile_plan(
        ObjectiveSettings.model_validate(settings), student_temperature=1.0, teachers=["big"], run="run"
    )


class Bench:
    """A builder over a file of rows, plain or with a chat template."""

    def __init__(
        self,
        directory: Path,
        views: dict[str, Any],
        *,
        chat: bool = False,
        rows: Sequence[dict[str, Any]] = ROWS,
        guide: ContextTemplate | None = None,
        **data: Any,
    ) -> None:
        path = directory / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        data_settings = DataSettings(path=path, answer_field="answer", holdout=0.0, **data)
        self.prompts: PromptSource = load_prompts(data_settings, seed=3)
        self.encoder = PromptEncoder(text_tokenizer(chat=chat), data_settings)
        self.builder = ContextBuilder(
            make_plan(views), self.prompts, self.encoder, seed=3, prompts_per_step=PER_STEP, guide=guide
        )

    def sampled(self, index: int, *texts: str) -> Sampled:
        example = self.prompts.example(index)
        rewards = tuple(self.prompts.reward(example, text) for text in texts)
        return Sampled(index, example, texts=texts, answers=texts, rewards=rewards)

    def own(self, groups: Sequence[Sampled]) -> list[EncodedPrompt]:
        return self.encoder.encode([group.example for group in groups])

    def contexts(self, *groups: Sampled) -> list[dict[str, tuple[Context, ...]]]:
        return self.builder.contexts(groups, self.own(groups))

    def seen(self, index: int, *texts: str, view: str = "v") -> list[str]:
        """The text that each rollout of one group is scored under, which is also what its ids say."""
        (found,) = self.contexts(self.sampled(index, *texts))
        for context in found[view]:
            assert self.encoder._tokenizer.decode(context.prompt.ids) == context.prompt.text
        return [context.prompt.text for context in found[view]]


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    def make(context: Any, *, missing: str | None = None, **how: Any) -> Bench:
        view = {"weights": "initial", "context": context}
        return Bench(tmp_path, {"v": view if missing is None else view | {"missing": missing}}, **how)

    return make


def test_plain_text_is_the_template_filled(bench: Callable[..., Bench]) -> None:
    plain = bench({"user": "{solution} then {prompt} {{x}} {level}"})
    example = plain.prompts.example(5)
    i = example.fields["level"]
    assert plain.seen(5, "a", "b") == [f"solution{i}; then question{i}? {{x}} {i}"] * 2


def test_chat_template_puts_user_text_and_system_in_their_places(bench: Callable[..., Bench]) -> None:
    """The last user message's text changes; every other message of the conversation stays."""
    history = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "2+2?"},
    ]
    rows = [{"prompt": history, "answer": "4", "solution": "two twos"}]
    template = {"user": "{prompt} (as {solution})", "system": "Answer {answer}."}
    assert bench(template, chat=True, rows=rows).seen(0, "x") == [
        "<|im_start|>system\nAnswer 4.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>user\n2+2? (as two twos)<|im_end|>\n"
        "<|im_start|>assistant\n"
    ]
    assert (
        bench({"system": "Answer {answer}."}, chat=True, rows=rows, system_prompt="Be brief.")
        .seen(0, "x")[0]
        .startswith("<|im_start|>system\nAnswer 4.\n\nBe brief.<|im_end|>\n<|im_start|>user\nhello")
    )


def test_values_are_never_read_as_templates(bench: Callable[..., Bench]) -> None:
    rows = [{"prompt": "p", "answer": "{solution} {0}", "solution": "{answer}"}]
    assert bench({"user": "{answer}{solution}"}, rows=rows).seen(0, "x") == ["{solution} {0}{answer}"]


def test_view_without_a_filled_template_sees_the_students_prompt(bench: Callable[..., Bench]) -> None:
    same = bench([{"user": "{success}"}, {"user": "{hint}"}], missing="same")
    (found,) = same.contexts(same.sampled(2, "wrong", "wrong too"))
    (own,) = same.own([same.sampled(2)])
    for context in found["v"]:
        assert (context.prompt.text, context.template) == (own.text, None)
        np.testing.assert_array_equal(context.prompt.ids, own.ids)
        assert context.lacking == (("success",), ("hint",))


def test_missing_field_is_refused_with_view_row_and_field(bench: Callable[..., Bench]) -> None:
    refusing = bench([{"user": "{prompt}{hint}{success}"}])
    place = refusing.prompts.place(2)
    with pytest.raises(
        TutelageError, match=r"objective\.views\.v\.context: .* lacks \{hint\}, \{success\}"
    ) as e:
        refusing.seen(2, "wrong")
    assert place in str(e.value)


def test_first_template_whose_fields_are_there_is_taken(bench: Callable[..., Bench]) -> None:
    both = bench([{"user": "S:{success}"}, {"user": "F:{feedback}"}], missing="same")
    answer = both.prompts.example(1).answer
    assert answer is not None
    # The only success has no successful sibling, and nothing is wrong with it.
    assert both.seen(1, "bad", answer) == [f"S:{answer}", both.own([both.sampled(1)])[0].text]
    assert both.seen(1, "bad", "worse") == ["F:The answer 'bad' is wrong.", "F:The answer 'worse' is wrong."]


def test_field_that_no_example_has_is_refused_at_once(bench: Callable[..., Bench]) -> None:
    with pytest.raises(TutelageError, match=r"'solutoin', which none .* did you mean 'solution'\?"):
        bench({"user": "{solutoin}"}, missing="same")


def test_system_message_needs_a_chat_template(bench: Callable[..., Bench]) -> None:
    with pytest.raises(TutelageError, match=r"objective\.views\.v\.context\.system: needs a chat template"):
        bench({"system": "{answer}"})
    plain = bench({"system": "{answer}"}, chat=True, chat_template="never")
    with pytest.raises(TutelageError, match=r"objective\.views\.v\.context\.system: needs a chat template"):
        plain.seen(0, "x")


def test_example_says_its_feedback_itself_where_it_has_some(bench: Callable[..., Bench]) -> None:
    rows = [{**ROWS[0], "feedback": "mind the units"}]
    assert bench({"user": "{feedback}"}, rows=rows).seen(0, "a", "b") == ["mind the units"] * 2


def test_names_of_the_rollout_go_before_fields_called_the_same(bench: Callable[..., Bench]) -> None:
    rows = [{**ROWS[0], "response": "theirs", "success": "theirs", "other_prompt": "theirs"}]
    named = bench([{"user": "{success}"}, {"user": "{response}"}], missing="same", rows=rows)
    assert named.seen(0, "ours") == ["ours"]
    unsampled = Sampled(0, named.prompts.example(0))
    ((context,),) = [found["v"] for found in named.contexts(unsampled)]
    assert (context.template, context.lacking) == (None, (("success",), ("response",)))


@pytest.mark.parametrize("special", [False, True])
def test_thinking_is_no_part_of_a_success(special: bool) -> None:
    tokenizer = text_tokenizer(chat=True, special_thinking=special)
    texts = ["<think>a</think>b</think> c<end>", "plain<end>", "<think>d</think>\n<end>"]
    responses = [np.array(tokenizer(text)["input_ids"], dtype=np.int32) for text in texts]
    assert without_thinking(tokenizer, responses) == ("c", "plain", "")


def test_response_that_never_stopped_thinking_has_no_answer() -> None:
    tokenizer = text_tokenizer(chat=True)
    ids = np.array(tokenizer("<think>answer!")["input_ids"], dtype=np.int32)
    assert without_thinking(tokenizer, [ids]) == ("",)


def test_guiding_context_is_filled_without_a_response(bench: Callable[..., Bench]) -> None:
    guide = ContextTemplate(user="{solution}{prompt}")
    guided = bench("same", guide=guide)
    examples = [guided.prompts.example(i) for i in (3, 9)]
    found = guided.builder.guided([3, 9], examples)
    assert [p.text for p in found] == [e.fields["solution"] + e.fields["prompt"] for e in examples]
    lacking = bench("same", guide=ContextTemplate(user="{hint}"))
    with pytest.raises(
        TutelageError, match=r"sampling\.context: row \d+ of .* lacks \{hint\}; give the field$"
    ):
        lacking.builder.guided([3], examples[:1])


MARKED = {"user": "P{prompt} A{answer} S{success} F{feedback} R{response} O{other_prompt} X{solution}"}
OUTCOMES = st.lists(st.booleans(), min_size=2, max_size=5)


def outcomes_as_groups(plain: Bench, outcomes: dict[int, list[bool]]) -> list[Sampled]:
    """Every response is unlike any other, so that a text says whose it is."""
    groups = []
    for index, solved in outcomes.items():
        texts = tuple(f"[{index}.{place}]" for place in range(len(solved)))
        rewards = tuple(float(each) for each in solved)
        groups.append(replace(plain.sampled(index), texts=texts, answers=texts, rewards=rewards))
    return groups


@settings(max_examples=60, deadline=None)
@given(outcomes=st.dictionaries(st.integers(0, 90), OUTCOMES, min_size=1, max_size=6))
def test_context_says_nothing_of_another_group_or_of_ones_own_success(
    tmp_path_factory: pytest.TempPathFactory, outcomes: dict[int, list[bool]]
) -> None:
    plain = shared_bench(tmp_path_factory)
    groups = outcomes_as_groups(plain, outcomes)
    for group, views in zip(groups, plain.contexts(*groups), strict=True):
        mine = group.example.fields["level"]
        step = range(group.index - group.index % PER_STEP, group.index - group.index % PER_STEP + PER_STEP)
        beside = {plain.prompts.example(i).fields["level"] for i in step} - {mine}
        for place, context in enumerate(views["v"]):
            text = context.prompt.text
            successes = {i for i, reward in enumerate(group.rewards) if reward and i != place}
            if not successes:
                assert context.template is None
                assert context.lacking == (("success",),)
                continue
            said = re.fullmatch(
                r"Pquestion(\d+)\? Aanswer(\d+)! S\[(\d+)\.(\d+)\] FThe answer '\[(\d+)\.(\d+)\]' is wrong\. "
                r"R\[(\d+)\.(\d+)\] Oquestion(\d+)\? Xsolution(\d+);",
                text,
            )
            assert said is not None, text
            prompt, answer, *rest, other, solution = map(int, said.groups())
            assert {prompt, answer, solution} == {mine}
            assert (rest[0], rest[1] in successes) == (group.index, True)
            assert rest[2:] == [group.index, place] * 2
            assert other in beside


@settings(max_examples=30, deadline=None)
@given(
    outcomes=st.dictionaries(st.integers(0, 90), OUTCOMES, min_size=2, max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_redelivered_order_gives_the_same_contexts_in_any_batch(
    tmp_path_factory: pytest.TempPathFactory, outcomes: dict[int, list[bool]], order: Any
) -> None:
    plain = shared_bench(tmp_path_factory)
    groups = outcomes_as_groups(plain, outcomes)
    together = {group.index: found for group, found in zip(groups, plain.contexts(*groups), strict=True)}
    order.shuffle(groups)
    for group in groups:
        (alone,) = plain.contexts(group)
        for context, before in zip(alone["v"], together[group.index]["v"], strict=True):
            np.testing.assert_array_equal(context.prompt.ids, before.prompt.ids)
            assert (context.template, context.lacking) == (before.template, before.lacking)


def shared_bench(factory: pytest.TempPathFactory, made: list[Bench] = []) -> Bench:  # noqa: B006
    """One for all examples that hypothesis draws."""
    if not made:
        view = {"weights": "initial", "context": MARKED, "missing": "same"}
        made.append(Bench(factory.mktemp("contexts"), {"v": view}))
    return made[0]


def test_a_failure_is_a_siblings_and_never_a_success(bench: Callable[..., Bench]) -> None:
    plain = bench({"user": "{failure}"}, missing="same")
    (group,) = outcomes_as_groups(plain, {3: [True, False, False]})
    (found,) = plain.contexts(group)
    failures = {1: group.texts[1], 2: group.texts[2]}
    shown = [context.prompt.text for context in found["v"]]
    assert shown[0] in failures.values()
    assert shown[1:] == [failures[2], failures[1]]
    (group,) = outcomes_as_groups(plain, {3: [True, True]})
    (found,) = plain.contexts(group)
    assert [context.lacking for context in found["v"]] == [(("failure",),)] * 2


def test_siblings_are_chosen_among_all_successes(bench: Callable[..., Bench]) -> None:
    plain = bench({"user": "{success}"}, missing="same")
    chosen = set()
    for index in range(40):
        (group,) = outcomes_as_groups(plain, {index: [True] * 4})
        (found,) = plain.contexts(group)
        chosen |= {(place, context.prompt.text[-2]) for place, context in enumerate(found["v"])}
    assert chosen == {(place, str(other)) for place in range(4) for other in range(4) if place != other}
