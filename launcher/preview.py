"""What each view of a run would see for one example, token by token; needs a tokenizer and no model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from tutelage_client.types import Int32Array

from student_trainer.config import RunConfig
from student_trainer.objective.plan import Plan
from student_trainer.objective.view_settings import ContextTemplate
from student_trainer.sampler.contexts import AUXILIARY, Context, Sampled, without_thinking
from student_trainer.sampler.examples import Examples, load_examples
from student_trainer.sampler.prompts import EncodedPrompt

OWN_WEIGHTS = {
    "initial": "the student before training",
    "live": "the student as it is trained",
    "ema": "the student's moving average",
}


@dataclass(frozen=True, slots=True)
class Response:
    """A response of the group, as if it had been sampled."""

    text: str
    ids: Int32Array  # [R], with the end token
    reward: float | None


@dataclass(frozen=True, slots=True)
class Seen:
    """What a view sees before one response.

    Attributes:
        response: which response; None: nothing depends on one, or there is none.
        privileged: bool [C], the context's tokens that the student's own prompt has not.
        refused: whether a run would end here, for want of a template that can be filled.
    """

    response: int | None
    context: Context
    privileged: tuple[bool, ...]
    refused: bool


@dataclass(frozen=True, slots=True)
class ViewPreview:
    """One view: who scores, what is asked, what is seen."""

    name: str
    teacher: str
    weights: str
    coefficient: float
    signal: str
    templates: tuple[ContextTemplate, ...]
    seen: tuple[Seen, ...]


@dataclass(frozen=True, slots=True)
class Preview:
    """One example of a run under all its views."""

    run: str
    number: int
    place: str
    tag: str
    prompt: EncodedPrompt
    guide: EncodedPrompt | None  # what the student samples under, where that is not its prompt
    guided: int  # responses of a group that it samples under it
    responses: tuple[Response, ...]
    views: tuple[ViewPreview, ...]
    trained: tuple[int, int | None]  # first response position that is trained on, and the end


@dataclass(frozen=True, slots=True)
class _Run:
    config: RunConfig
    plan: Plan
    examples: Examples
    own: EncodedPrompt
    special: Collection[int]


def preview(config: RunConfig, tokenizer: Any, number: int, texts: Sequence[str]) -> Preview:
    """Example `number` of the run's order under every view, with `texts` as its sampled responses.

    Raises:
        TutelageError: INVALID_ARGUMENT for what would end the run: data, tags, templates without sense.
    """
    # A view that would refuse is shown with the student's prompt, and what it lacks.
    plan = config.plan()
    auxiliary = None if plan.auxiliary is None else plan.auxiliary.model_copy(update={"missing": "same"})
    lenient = replace(plan, missing=dict.fromkeys(plan.missing, "same"), auxiliary=auxiliary)
    examples = load_examples(config, lenient, tokenizer)
    example = examples.prompts.example(number)
    (prompt,) = examples.encoder.encode([example])
    responses = tuple(_response(tokenizer, examples, number, text) for text in texts)
    sampled = Sampled(
        number,
        example,
        texts=tuple(texts),
        answers=without_thinking(tokenizer, [response.ids for response in responses]) if texts else (),
        rewards=tuple(response.reward for response in responses),
    )
    (contexts,) = examples.contexts.contexts([sampled], [prompt])
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    run = _Run(config, plan, examples, prompt, special)
    guided = config.sampling.guided
    skip, keep = plan.tokens.skip_first_n, plan.tokens.keep_first_n
    return Preview(
        run=config.run.name,
        number=number,
        place=examples.prompts.place(number),
        tag=examples.labels.tag(number, example),
        prompt=prompt,
        guide=examples.contexts.guided([number], [example])[0] if guided else None,
        guided=guided,
        responses=responses,
        views=tuple(
            _view(run, sampled, view, contexts.get(view, (Context(prompt),))) for view in plan.view_requests
        )
        + _auxiliary(run, contexts),
        trained=(skip, keep),
    )


def _response(tokenizer: Any, examples: Examples, number: int, text: str) -> Response:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    reward = examples.prompts.reward(examples.prompts.example(number), text)
    return Response(text, np.array(ids, dtype=np.int32), reward)


def _view(run: _Run, sampled: Sampled, view: str, contexts: Sequence[Context]) -> ViewPreview:
    plan, examples = run.plan, run.examples
    tag = examples.labels.tag(sampled.index, sampled.example)
    teacher = examples.labels.teacher(view, sampled.index, tag)
    _, signal = plan.view_requests[view]
    asked = {
        "log-probability": signal.sampled,
        f"top {signal.top_k}": signal.top_k,
        f"the student's {plan.student_candidates} candidates": signal.candidates,
        "entropy": signal.entropy,
    }
    factor = examples.labels.weights(sampled.index, sampled.example).get(view, 1.0)
    return ViewPreview(
        name=view,
        teacher=teacher,
        weights=_weights(run.config, plan.implied_teachers, teacher),
        coefficient=plan.views[view] * factor,
        signal=", ".join(name for name, wanted in asked.items() if wanted),
        templates=plan.contexts.get(view, ()),
        seen=_seen(run, contexts, strict=plan.missing.get(view) == "error"),
    )


def _auxiliary(run: _Run, contexts: Mapping[str, Sequence[Context]]) -> tuple[ViewPreview, ...]:
    """The context of the auxiliary loss, which no teacher sees."""
    settings = run.plan.auxiliary
    if settings is None:
        return ()
    return (
        ViewPreview(
            name=AUXILIARY,
            teacher="the trainer itself",
            weights="the student as it is trained",
            coefficient=settings.coefficient,
            signal="the whole vocabulary",
            templates=settings.templates,
            seen=_seen(run, contexts[AUXILIARY], strict=settings.missing == "error"),
        ),
    )


def _seen(run: _Run, contexts: Sequence[Context], *, strict: bool) -> tuple[Seen, ...]:
    """One for all responses where their contexts are the same."""
    shared = len({context.prompt.ids.tobytes() for context in contexts}) == 1
    return tuple(
        Seen(
            None if shared else place,
            context,
            privileged_tokens(run.own.ids, context.prompt.ids, run.special),
            refused=strict and context.template is None,
        )
        for place, context in enumerate(contexts[:1] if shared else contexts)
    )


def _weights(config: RunConfig, implied: Mapping[str, str], teacher: str) -> str:
    if teacher in implied:
        weights = implied[teacher]
        return OWN_WEIGHTS.get(weights, weights)
    entry = config.teachers.get(teacher)
    return "" if entry is None else entry.model or entry.engine


def privileged_tokens(own: Int32Array, seen: Int32Array, special: Collection[int] = ()) -> tuple[bool, ...]:
    """bool [C]: tokens of `seen` that are not the student's own prompt.

    The prompt is what both begin with, what both end with, and the longest piece between that both have.
    Where a piece put in could as well begin a little earlier, it begins with a special token.
    """
    mine, theirs = own.tolist(), seen.tolist()
    shorter = min(len(mine), len(theirs))
    start = next((i for i in range(shorter) if mine[i] != theirs[i]), shorter)
    left = shorter - start
    end = next((i for i in range(left) if mine[-1 - i] != theirs[-1 - i]), left)
    if start + end == len(mine):
        back = 0
        for k in range(1, start + 1):
            if theirs[start - k] != theirs[len(theirs) - end - k]:
                break
            back = k if theirs[start - k] in special else back
        start, end = start - back, end + back
    marks = [False] * start + [True] * (len(theirs) - start - end) + [False] * end
    matcher = SequenceMatcher(a=mine, b=theirs, autojunk=False)
    longest = matcher.find_longest_match(start, len(mine) - end, start, len(theirs) - end)
    marks[longest.b : longest.b + longest.size] = [False] * longest.size
    return tuple(marks)
