"""From a run file to a ready sampler: student, prompts, other sampler, pins, self-tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tutelage_client.errors import TutelageError, invalid
from tutelage_client.types import Int32Array

from services.models.fingerprint import tokenizer_fingerprint
from services.models.load import LoadedModel, load_weights
from student_trainer.config import RunConfig
from student_trainer.objective.plan import Plan
from student_trainer.policy_store import PolicyStore, PolicyVersion
from student_trainer.sampler.engines import ModelSource, load_plain, open_generator, self_test
from student_trainer.sampler.examples import Examples, load_examples
from student_trainer.sampler.groups import GroupSampler, OtherSampler
from student_trainer.sampler.pins import TeacherPins
from student_trainer.sampler.policy import StudentPolicy, end_ids
from student_trainer.sampler.replay import Replay
from student_trainer.sampler.settings import SamplingSettings

SELF_TEST_PROMPTS = 3


def build_sampler(config: RunConfig, first: PolicyVersion) -> tuple[StudentPolicy, GroupSampler]:
    """Load everything a sampler needs and prove that its log-probabilities are right.

    Args:
        first: the policy version to start from.
    """
    with ExitStack() as opened:
        built = _build(config, first, opened)
        opened.pop_all()
    return built


def _build(config: RunConfig, first: PolicyVersion, opened: ExitStack) -> tuple[StudentPolicy, GroupSampler]:
    sampling = config.sampling
    plan = config.plan()
    # Responses of another model, or under another context, carry no candidates of the student's own, and
    # none carries entropies.
    foreign = sampling.student_share < 1.0 or sampling.context is not None
    reads_back = plan.audit is not None or (foreign and plan.student_candidates > 0)
    source = ModelSource(first.path, None, config.student.dtype, config.student.device)
    plain = load_plain(sampling, source, stays=reads_back)
    if plain.tokenizer is None:
        raise invalid(f"student.model: the policy in {first.path} has no tokenizer")
    _check_candidates(plan, plain)
    examples = load_examples(config, plan, plain.tokenizer)
    replay = _replay(sampling, source, plain, examples)
    test_prompts = _test_prompts(examples)
    student = open_generator(sampling, source, plain, candidates=plan.student_candidates)
    opened.callback(student.close)
    self_test(student, sampling, source, plain, test_prompts, stays=reads_back)
    other = replay or _other_sampler(config, plain, test_prompts, opened)
    load: list[Callable[[Path], object]] = [student.load_weights]
    if reads_back and sampling.engine == "vllm":
        load.append(partial(load_weights, plain.model))
    sampler = GroupSampler(
        run=config.run.name,
        seed=config.run.seed,
        sampling=sampling,
        plan=plan,
        examples=examples,
        tokenizer=plain.tokenizer,
        student=student,
        student_model=plain.model if reads_back else None,
        pins=TeacherPins(config, plan, tokenizer_fingerprint(plain.tokenizer)),
        other=other,
    )
    return StudentPolicy(PolicyStore(first.path.parent), first, load), sampler


def _replay(
    sampling: SamplingSettings, source: ModelSource, student: LoadedModel, examples: Examples
) -> OtherSampler | None:
    """The score file that [sampling] sampler names; the run then has the prompts that it answers."""
    if sampling.replayed is None:
        return None
    fingerprint, ends = tokenizer_fingerprint(student.tokenizer), end_ids(student, source.path)
    replay = Replay(sampling.replayed, sampling, fingerprint=fingerprint, end_ids=ends)
    replay.restrict(examples.prompts, examples.encoder)
    return OtherSampler(sampling.sampler, replay)


def _other_sampler(
    config: RunConfig, student: LoadedModel, test_prompts: list[Int32Array], opened: ExitStack
) -> OtherSampler | None:
    """The model that [sampling] sampler names, unless it is the student."""
    sampling = config.sampling
    if sampling.sampler == "student":
        return None
    source = ModelSource(sampling.sampler, None, config.student.dtype, config.student.device)
    kind, _, name = sampling.sampler.partition(":")
    if kind == "teacher" and name:
        entry = config.teachers[name]
        if entry.model is None:
            raise invalid(f"sampling.sampler: teacher {name!r} has no model to sample from")
        source = ModelSource(entry.model, entry.revision, entry.dtype, config.student.device)
    plain = load_plain(sampling, source, stays=False)
    theirs, ours = tokenizer_fingerprint(plain.tokenizer), tokenizer_fingerprint(student.tokenizer)
    if theirs != ours or plain.vocab_size > student.vocab_size:
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"sampling.sampler: {source.path} has tokenizer {theirs[:12] or 'none'} and {plain.vocab_size} "
            f"rows, the student {ours[:12]} and {student.vocab_size}; its responses would be other tokens",
        )
    generator = open_generator(sampling, source, plain, candidates=0)
    opened.callback(generator.close)
    self_test(generator, sampling, source, plain, test_prompts, stays=False)
    return OtherSampler(sampling.sampler, generator)


def _test_prompts(examples: Examples) -> list[Int32Array]:
    first = [examples.prompts.example(index) for index in range(SELF_TEST_PROMPTS)]
    return [prompt.ids for prompt in examples.encoder.encode(first)]


def _check_candidates(plan: Plan, student: LoadedModel) -> None:
    if plan.student_candidates > student.vocab_size:
        raise invalid(
            f"objective.k: got {plan.student_candidates}, the student has {student.vocab_size} tokens"
        )
