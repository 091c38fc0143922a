"""What every view of a group sees: privileged contexts, built where the tokenizer is.

A view with templates shows each rollout a context of its own, filled with what is known about its
example, its siblings and itself. Response ids never change between views; only what stands before them
does. Every choice is a function of seed, group index and rollout, so that a redelivered order makes it again.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tutelage_client.errors import TutelageError, invalid
from tutelage_client.types import PAD_ID, Int32Array

from services.models.uniforms import uniforms
from student_trainer.objective.plan import Plan
from student_trainer.objective.view_settings import GROUP_FIELDS, ROLLOUT_FIELDS, SIBLINGS, ContextTemplate
from student_trainer.sampler.data import PromptSource
from student_trainer.sampler.prompts import EncodedPrompt, PromptEncoder, question
from student_trainer.tasks import Example

THINKING, THINKING_ENDS = "<think>", "</think>"
GUIDE = "sampling.context"
AUXILIARY = "objective.auxiliary"  # among the views, for which the trainer itself is asked
LOOKED_AT = 64  # examples among which a template's field must occur
# Sample indices of random numbers that are no rollout's; -1 decides who samples.
_OTHER_PROMPT = -(2**32)
_SIBLING = -2  # and downwards, one for each rollout


@dataclass(frozen=True, slots=True)
class Sampled:
    """A group as far as contexts depend on it; n rollouts."""

    index: int
    example: Example
    texts: tuple[str, ...] = ()  # n, sampled special tokens removed
    answers: tuple[str, ...] = ()  # n, and without thinking
    rewards: tuple[float | None, ...] = ()  # n


@dataclass(frozen=True, slots=True)
class Context:
    """What one view sees before one response.

    Attributes:
        template: place of the view's template that was filled; None: the student's own prompt.
        lacking: for every template that was tried and could not be filled, the fields that are not there.
    """

    prompt: EncodedPrompt
    template: int | None = None
    lacking: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class _Filled:
    example: Example  # with the prompt that the view sees
    template: int | None
    lacking: tuple[tuple[str, ...], ...]


class ContextBuilder:
    """Fills the templates of a plan's views.

    Args:
        prompts_per_step: groups of one optimizer step, among which {other_prompt} is found.
        guide: template under which the student samples, if it is not its own prompt.

    Raises:
        TutelageError: INVALID_ARGUMENT for a template that can never be filled.
    """

    def __init__(
        self,
        plan: Plan,
        prompts: PromptSource,
        encoder: PromptEncoder,
        *,
        seed: int,
        prompts_per_step: int,
        guide: ContextTemplate | None = None,
    ) -> None:
        self._plan = plan
        self._prompts = prompts
        self._encoder = encoder
        self._seed = seed
        self._per_step = prompts_per_step
        self._guide = guide
        self._shown, self._missing_context = dict(plan.contexts), dict(plan.missing)
        if plan.auxiliary is not None:
            self._shown[AUXILIARY] = plan.auxiliary.templates
            self._missing_context[AUXILIARY] = plan.auxiliary.missing
        for where, templates in self._templates().items():
            for template in templates:
                self._check_template(where, template)

    @property
    def reads_answers(self) -> bool:
        """Whether a template asks for what a sibling answered."""
        return any(template.fields & SIBLINGS for found in self._shown.values() for template in found)

    def contexts(
        self, groups: Sequence[Sampled], own: Sequence[EncodedPrompt]
    ) -> list[dict[str, tuple[Context, ...]]]:
        """For each group, by view with templates: the context of every rollout.

        A group that is not sampled yet has one context, without what only responses tell.

        Args:
            own: the student's own prompt of each group.

        Raises:
            TutelageError: INVALID_ARGUMENT where no template of a view can be filled and its `missing` is
                "error".
        """
        filled = [
            {
                view: [self._fill(view, templates, group, place) for place in _places(group)]
                for view, templates in self._shown.items()
            }
            for group in groups
        ]
        encoded = self._encode([each for group in filled for view in group.values() for each in view])
        return [
            {
                view: tuple(
                    Context(
                        prompt if each.template is None else encoded[_key(each.example)],
                        each.template,
                        each.lacking,
                    )
                    for each in rollouts
                )
                for view, rollouts in group.items()
            }
            for group, prompt in zip(filled, own, strict=True)
        ]

    def guided(self, indices: Sequence[int], examples: Sequence[Example]) -> list[EncodedPrompt]:
        """What the student samples under, for each group; only with a `guide`."""
        assert self._guide is not None
        reworded = []
        for index, example in zip(indices, examples, strict=True):
            values, lacking = self._values(self._guide, Sampled(index, example), None)
            if lacking:
                raise self._missing(GUIDE, Sampled(index, example), (lacking,))
            reworded.append(self._reworded(GUIDE, self._guide, example, values))
        return self._encoder.encode(reworded)

    def _fill(
        self, view: str, templates: Sequence[ContextTemplate], group: Sampled, place: int | None
    ) -> _Filled:
        """The first template whose fields are all there, for one rollout."""
        tried: list[tuple[str, ...]] = []
        for number, template in enumerate(templates):
            values, lacking = self._values(template, group, place)
            if not lacking:
                where = _where(view)
                example = self._reworded(where, template, group.example, values)
                return _Filled(example, number, tuple(tried))
            tried.append(lacking)
        if self._missing_context[view] == "error":
            raise self._missing(_where(view), group, tuple(tried), place)
        return _Filled(group.example, None, tuple(tried))

    def _values(
        self, template: ContextTemplate, group: Sampled, place: int | None
    ) -> tuple[dict[str, str], tuple[str, ...]]:
        """What the template's fields are for a rollout (None: for the group), and which are not there."""
        found = {name: self._value(name, group, place) for name in sorted(template.fields)}
        values = {name: value for name, value in found.items() if value is not None and value.strip()}
        return values, tuple(name for name in found if name not in values)

    def _value(self, name: str, group: Sampled, place: int | None) -> str | None:
        example = group.example
        if name in ROLLOUT_FIELDS:
            return self._rollout_value(name, group, place)
        if name == "prompt":
            return question(example)
        if name == "other_prompt":
            return self._other_prompt(group.index)
        return example.answer if name == "answer" else _text(example.fields.get(name))

    def _rollout_value(self, name: str, group: Sampled, place: int | None) -> str | None:
        said = _text(group.example.fields.get(name)) if name == "feedback" else None
        if said is not None or place is None:
            return said
        if name in SIBLINGS:
            text = self._sibling(group, place, succeeded=name == "success")
        elif name == "response":
            text = group.texts[place]
        else:
            text = self._prompts.feedback(group.example, group.texts[place])
        return None if text is None else self._encoder.special.without(text)

    def _sibling(self, group: Sampled, place: int, *, succeeded: bool) -> str | None:
        """A sibling's successful or failed response without its thinking, never that of `place` itself."""
        found = [
            answer
            for sibling, (answer, reward) in enumerate(zip(group.answers, group.rewards, strict=True))
            if sibling != place and answer and reward is not None and (reward >= 1.0) == succeeded
        ]
        if not found:
            return None
        draw = float(uniforms(self._seed, group.index, _SIBLING - place, 1)[0])
        return found[int(draw * len(found))]

    def _other_prompt(self, index: int) -> str | None:
        """The prompt of another example of the same step; None where the step has but one example."""
        mine = self._prompts.training_index(index)
        first = index - index % self._per_step
        start = int(float(uniforms(self._seed, index, _OTHER_PROMPT, 1)[0]) * self._per_step)
        for offset in range(self._per_step):
            other = first + (start + offset) % self._per_step
            if self._prompts.training_index(other) != mine:
                return question(self._prompts.example(other))
        return None

    def _reworded(
        self, where: str, template: ContextTemplate, example: Example, values: Mapping[str, str]
    ) -> Example:
        given = {"feedback"} if _text(example.fields.get("feedback")) is not None else set()
        user, system = (
            None if text is None else self._encoder.special.fill(text, values, ROLLOUT_FIELDS - given)
            for text in (template.user, template.system)
        )
        try:
            return self._encoder.reworded(example, user=user, system=system)
        except TutelageError as error:
            raise invalid(f"{where}.{error.message}") from error

    def _encode(self, filled: Sequence[_Filled]) -> dict[str, EncodedPrompt]:
        """Every different prompt once."""
        different = {_key(each.example): each.example for each in filled if each.template is not None}
        return dict(zip(different, self._encoder.encode(list(different.values())), strict=True))

    def _templates(self) -> dict[str, tuple[ContextTemplate, ...]]:
        """By the place in the run file where they stand."""
        views = {_where(view): found for view, found in self._shown.items()}
        return views if self._guide is None else {**views, GUIDE: (self._guide,)}

    def _check_template(self, where: str, template: ContextTemplate) -> None:
        if template.system is not None and not self._encoder.chats:
            raise invalid(f"{where}.system: needs a chat template, which the student's tokenizer has not")
        own = template.fields - GROUP_FIELDS - ROLLOUT_FIELDS
        if not own:
            return
        looked_at = range(min(LOOKED_AT, len(self._prompts.training)))
        known = {name for index in looked_at for name in self._prompts.example(index).fields}
        for name in sorted(own - known):
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise invalid(
                f"{where}: got field {name!r}, which none of the first {len(looked_at)} examples has; their "
                f"fields are {sorted(known)}, beside {sorted(GROUP_FIELDS | ROLLOUT_FIELDS)}{hint}"
            )

    def _missing(
        self, where: str, group: Sampled, lacking: tuple[tuple[str, ...], ...], place: int | None = None
    ) -> TutelageError:
        rollout = "" if place is None else f", response {place},"
        absent = "; ".join(", ".join(f"{{{name}}}" for name in names) for names in lacking)
        remedy = "" if where == GUIDE else ', another template, or missing = "same" for the view'
        row = self._prompts.place(group.index)
        return invalid(f"{where}: {row}{rollout} lacks {absent}; give the field{remedy}")


def _where(view: str) -> str:
    return f"{view}.context" if view == AUXILIARY else f"objective.views.{view}.context"


def _places(group: Sampled) -> Sequence[int | None]:
    return range(len(group.texts)) if group.texts else (None,)


def without_thinking(tokenizer: Any, responses: Sequence[Int32Array]) -> tuple[str, ...]:
    """Each response's text after its thinking, special tokens removed; "" when it is still thinking."""
    ends = tokenizer.convert_tokens_to_ids(THINKING_ENDS)
    if ends is None or ends == tokenizer.unk_token_id:
        ends = PAD_ID
    left = [ids[max(np.flatnonzero(ids == ends), default=-1) + 1 :] for ids in responses]
    texts = tokenizer.batch_decode(left, skip_special_tokens=True)
    answers = [text.rpartition(THINKING_ENDS)[2].strip() for text in texts]
    return tuple("" if THINKING in answer else answer for answer in answers)


def _text(value: Any) -> str | None:
    """A field as text; tables and lists as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _key(example: Example) -> str:
    return json.dumps(example.prompt, ensure_ascii=False)
