"""From a run file to a ready sampler: student, prompts, other sampler, pins, self-tests."""

from __future__ import annotations

import structlog
from tutelage.v1.teacher_pb2 import Pins
from tutelage_client.errors import TutelageError, invalid
from tutelage_client.types import Int32Array

from services.models.fingerprint import tokenizer_fingerprint
from services.models.load import LoadedModel, load_causal_lm
from student_trainer.config import RunConfig
from student_trainer.objective.compile import Plan, compile_plan
from student_trainer.policy_store import PolicyStore, PolicyVersion
from student_trainer.sampler.data import PromptSource, load_prompts
from student_trainer.sampler.generate import TransformersGenerator
from student_trainer.sampler.groups import GroupSampler, OtherSampler
from student_trainer.sampler.policy import StudentPolicy, end_ids
from student_trainer.sampler.prompts import PromptEncoder
from student_trainer.sampler.verify import check_generator

SELF_TEST_PROMPTS = 3

log = structlog.get_logger(__name__)


def build_sampler(config: RunConfig, first: PolicyVersion) -> tuple[StudentPolicy, GroupSampler]:
    """Load everything a sampler needs and prove that its log-probabilities are right.

    Args:
        first: the policy version to start from.
    """
    sampling = config.sampling
    plan = compile_plan(
        config.objective, student_temperature=sampling.temperature, teachers=sorted(config.teachers)
    )
    policy = StudentPolicy(
        PolicyStore(first.path.parent),
        first,
        dtype=config.student.dtype,
        device=config.student.device,
        packed=sampling.student_share < 1.0 and plan.student_candidates > 0,
    )
    _check_candidates(plan, policy.loaded)
    tokenizer = policy.loaded.tokenizer
    encoder = PromptEncoder(tokenizer, config.data)
    prompts = load_prompts(
        config.data,
        seed=config.run.seed,
        prompt_tokens=lambda examples: [len(prompt.ids) for prompt in encoder.encode(examples)],
    )
    test_prompts = _test_prompts(prompts, encoder)
    student = _generator(config, policy.loaded, config.student.model)
    difference = check_generator(
        student,
        policy.model,
        test_prompts,
        temperature=sampling.temperature,
        max_new_tokens=sampling.max_new_tokens,
    )
    log.info("self-test passed", policy_version=policy.version, largest_difference=difference)
    sampler = GroupSampler(
        run=config.run.name,
        seed=config.run.seed,
        sampling=sampling,
        plan=plan,
        prompts=prompts,
        encoder=encoder,
        tokenizer=tokenizer,
        student=student,
        student_model=policy.model,
        pins=_pins(config, tokenizer_fingerprint(tokenizer)),
        other=_other_sampler(config, policy.loaded, test_prompts),
    )
    return policy, sampler


def _generator(config: RunConfig, loaded: LoadedModel, path: str) -> TransformersGenerator:
    return TransformersGenerator(
        loaded.model, end_ids=end_ids(loaded, path), batch_size=config.sampling.batch_size
    )


def _other_sampler(
    config: RunConfig, student: LoadedModel, test_prompts: list[Int32Array]
) -> OtherSampler | None:
    """The model that [sampling] sampler names, unless it is the student."""
    sampling = config.sampling
    if sampling.sampler == "student":
        return None
    path, revision, dtype, device = sampling.sampler, None, config.student.dtype, config.student.device
    kind, _, name = sampling.sampler.partition(":")
    if kind == "teacher" and name:
        entry = config.teachers[name]
        if entry.model is None:
            raise invalid(f"sampling.sampler: teacher {name!r} has no model to sample from")
        path, revision, dtype = entry.model, entry.revision, entry.dtype
    loaded = load_causal_lm(path, dtype=dtype, device=device, revision=revision, attention="plain")
    theirs, ours = tokenizer_fingerprint(loaded.tokenizer), tokenizer_fingerprint(student.tokenizer)
    if theirs != ours or loaded.vocab_size > student.vocab_size:
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"sampling.sampler: {path} has tokenizer {theirs[:12] or 'none'} and {loaded.vocab_size} rows, "
            f"the student {ours[:12]} and {student.vocab_size}; its responses would be other tokens",
        )
    generator = _generator(config, loaded, path)
    check_generator(
        generator,
        loaded.model,
        test_prompts,
        temperature=sampling.temperature,
        max_new_tokens=sampling.max_new_tokens,
    )
    return OtherSampler(sampling.sampler, generator)


def _test_prompts(prompts: PromptSource, encoder: PromptEncoder) -> list[Int32Array]:
    examples = [prompts.example(index) for index in range(SELF_TEST_PROMPTS)]
    return [prompt.ids for prompt in encoder.encode(examples)]


def _check_candidates(plan: Plan, student: LoadedModel) -> None:
    if plan.student_candidates > student.vocab_size:
        raise invalid(
            f"objective.k: got {plan.student_candidates}, the student has {student.vocab_size} tokens"
        )


def _pins(config: RunConfig, fingerprint: str) -> dict[str, Pins]:
    """A teacher with another tokenizer refuses to score. The fake engine has none to compare."""
    return {
        name: Pins(tokenizer_fingerprint=fingerprint)
        for name, entry in config.teachers.items()
        if entry.engine != "fake"
    }
