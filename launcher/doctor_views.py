"""What `tutelage doctor` sees of a run's views: contexts that cannot be filled, tags that nobody scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage_client.errors import TutelageError

from launcher.doctor_checks import Finding
from launcher.model_facts import ModelFacts

if TYPE_CHECKING:
    from student_trainer.config import RunConfig
    from student_trainer.objective.plan import Plan
    from student_trainer.sampler.contexts import Context
    from student_trainer.sampler.examples import Examples


def check_views(
    config: RunConfig, student: ModelFacts | None, teachers: Mapping[str, ModelFacts]
) -> Iterator[Finding]:
    """Contexts, tags and factors of the first examples, as a sampler would meet them.

    Args:
        student, teachers: what is known of the models; nothing is looked at without the student.
    """
    from student_trainer.sampler.examples import load_examples

    plan = config.plan()
    reads = (plan.contexts, plan.routes, plan.weight_fields, plan.auxiliary, config.sampling.context)
    if not any(reads):
        return
    if config.data.path is not None and not config.data.path.is_file():
        return  # check_data has said so
    if config.data.dataset is not None and not Path(config.data.dataset).is_dir():
        yield Finding("unknown", "views", "the data set is on the hub; `tutelage views` fetches and shows it")
        return
    tokenizer = None if student is None else _tokenizer(config)
    if tokenizer is None:
        yield Finding(
            "unknown", "views", "contexts are built with the student's tokenizer, which is not here"
        )
        return
    lenient = replace(plan, missing=dict.fromkeys(plan.missing, "same"), auxiliary=None)
    try:
        examples = load_examples(_quick(config), lenient, tokenizer)
        count = _check_labels(config, plan, examples)
        found = _contexts(examples, count)
    except TutelageError as error:
        yield Finding("fail", "views", error.message)
        return
    for view in plan.contexts:
        yield _filled(plan, view, [contexts[view][0] for contexts in found])
        if plan.preference is not None and plan.contexts[view] != (config.sampling.context,):
            yield Finding(
                "warn",
                f"view {view}",
                "its context is not the text of [sampling] context, under which the preferred responses are "
                "sampled; objective.preference takes the view for what sampled them",
            )
        facts = [
            student if name in plan.implied_teachers else teachers.get(name)
            for name in plan.teachers_of(view)
        ]
        longest = (
            max(len(contexts[view][0].prompt.ids) for contexts in found) + config.sampling.max_new_tokens
        )
        for known in facts:
            if known is not None and known.max_tokens is not None and longest > known.max_tokens:
                yield Finding(
                    "warn",
                    f"view {view}",
                    f"a context with sampling.max_new_tokens comes to {longest:,} tokens, {known.name} takes "
                    f"{known.max_tokens:,}; responses under it would be left out",
                )
    if plan.routes or plan.weight_fields:
        yield Finding("ok", "views", f"tags and factors of the first {count} examples have their teachers")


def _quick(config: RunConfig) -> RunConfig:
    """Without counting the tokens of every prompt."""
    return config.model_copy(update={"data": config.data.model_copy(update={"max_prompt_tokens": None})})


def _tokenizer(config: RunConfig) -> Any:
    from launcher.model_facts import NotHere, read_tokenizer

    try:
        return read_tokenizer(config.student.model, config.student.revision, download=False)
    except NotHere:
        return None


def _check_labels(config: RunConfig, plan: Plan, examples: Examples) -> int:
    """How many examples were looked at; raises for the first that nobody scores or whose factor is none."""
    from student_trainer.sampler.contexts import LOOKED_AT

    count = min(LOOKED_AT, len(examples.prompts.training))
    for index in range(count):
        example = examples.prompts.example(index)
        tag = examples.labels.tag(index, example)
        for view in plan.view_requests:
            examples.labels.teacher(view, index, tag)
        examples.labels.weights(index, example)
        if config.sampling.context is not None:
            examples.contexts.guided([index], [example])
    return count


def _contexts(examples: Examples, count: int) -> list[dict[str, tuple[Context, ...]]]:
    from student_trainer.sampler.contexts import Sampled

    groups = [Sampled(index, examples.prompts.example(index)) for index in range(count)]
    return examples.contexts.contexts(groups, examples.encoder.encode([group.example for group in groups]))


def _filled(plan: Plan, view: str, contexts: Sequence[Context]) -> Finding:
    """How many of the examples' contexts are known, wait for responses, or can never be built."""
    from student_trainer.objective.view_settings import ROLLOUT_FIELDS

    known = sum(context.template is not None for context in contexts)
    waits = sum(
        context.template is None and any(set(names) <= ROLLOUT_FIELDS for names in context.lacking)
        for context in contexts
    )
    never = len(contexts) - known - waits
    subject, parts = f"view {view}", [f"of {len(contexts)} examples {known} have a context"]
    if waits:
        parts.append(f"{waits} wait for their responses")
    if never and plan.missing[view] == "error":
        return Finding("fail", subject, f"{', '.join(parts)}, {never} lack a field, and would end the run")
    if never:
        parts.append(f"{never} see the student's own prompt")
    return Finding("warn" if never == len(contexts) else "ok", subject, ", ".join(parts))
