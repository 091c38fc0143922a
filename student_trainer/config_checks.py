"""What must hold between the sections of a run file."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from student_trainer.objective.plan import Plan
from student_trainer.objective.settings import ObjectiveError
from student_trainer.objective.view_settings import SIBLINGS

if TYPE_CHECKING:
    from student_trainer.config import RunConfig

_TEACHER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def check_sections(config: RunConfig) -> None:
    """Raise ValueError, naming section and key, for the first pair of sections that disagree."""
    _check_teacher_names(config)
    plan = _check_objective(config)
    _check_judge(config, plan)
    _check_audit(config, plan)
    _check_reward(config, plan)
    _check_preference(config, plan)
    _check_sampler(config)
    _check_sampling_engine(config)
    _check_teacher_engines(config)
    _check_self_teachers(config, plan)
    _check_evaluation(config)
    _check_ports(config)


def _check_teacher_names(config: RunConfig) -> None:
    for name in config.teachers:
        if not _TEACHER_NAME.fullmatch(name):
            raise ValueError(
                f"[teachers] {name!r}: a name starts with a letter or digit and holds "
                "letters, digits, '_', '.', '-'"
            )


def _check_objective(config: RunConfig) -> Plan:
    try:
        plan = config.plan()
    except ObjectiveError as error:
        raise ValueError(str(error)) from error
    if plan.in_process:
        raise ValueError(
            'objective.support: "full" needs student and teacher in one process; this trainer scores '
            'through the queue, where a top-k support with tail = "bucket" and a large k comes close'
        )
    if plan.tokens.marked_only and not plan.contexts:
        raise ValueError(
            "objective.tokens.marked_only: is set, but no view has a context of its own, by which responses "
            "are marked"
        )
    if not config.teachers and set(plan.scoring_teachers) - set(plan.implied_teachers):
        raise ValueError("[teachers.NAME]: the objective needs a teacher, and the run file has none")
    if plan.routes and config.data.tag_field is None:
        raise ValueError(
            f"objective.views.{next(iter(plan.routes))}.route: needs [data] tag_field, which says the "
            "examples' tags"
        )
    _check_context_fields(config, plan)
    return plan


def _check_context_fields(config: RunConfig, plan: Plan) -> None:
    """Whether one template of every context can be filled at all in this run."""
    answers = config.data.task is not None or config.data.answer_field is not None
    siblings, told = config.sampling.samples_per_prompt > 1, sorted(SIBLINGS)
    needs = [
        *(
            (name, answers, "answers to check: [data] answer_field or a built-in [data] task")
            for name in told
        ),
        *((name, siblings, "siblings: [sampling] samples_per_prompt above 1") for name in told),
        ("other_prompt", config.training.prompts_per_step > 1, "[training] prompts_per_step above 1"),
    ]
    never = {field: reason for field, there, reason in needs if not there}
    found = {f"objective.views.{view}.context": templates for view, templates in plan.contexts.items()}
    if plan.auxiliary is not None:
        found["objective.auxiliary.context"] = plan.auxiliary.templates
    if config.sampling.context is not None:
        found["sampling.context"] = (config.sampling.context,)
    for where, templates in found.items():
        if all(template.fields & never.keys() for template in templates):
            field = min(templates[0].fields & never.keys())
            raise ValueError(f"{where}: {{{field}}} needs {never[field]}")


def _check_judge(config: RunConfig, plan: Plan) -> None:
    """The judge judges, and nobody who judges is asked for log-probabilities."""
    for name, entry in config.teachers.items():
        if name == plan.judge and entry.judge is None and entry.address is None:
            raise ValueError(f"objective.judge: [teachers.{name}] needs a section [teachers.{name}.judge]")
        if name != plan.judge and entry.judge is not None and name in plan.scoring_teachers:
            raise ValueError(
                f"[teachers.{name}.judge]: a judge answers no log-probability, and a view of the objective "
                "asks for them; name it in [objective] judge"
            )


def _check_audit(config: RunConfig, plan: Plan) -> None:
    """The writer writes, nobody who writes is asked for log-probabilities, and responses may have chunks."""
    writer = None if plan.audit is None else plan.audit.teacher
    for name, entry in config.teachers.items():
        if name == writer and entry.writer is None and entry.address is None:
            raise ValueError(
                f"objective.audit.teacher: [teachers.{name}] needs a section [teachers.{name}.writer]"
            )
        if name != writer and entry.writer is not None and name in plan.scoring_teachers:
            raise ValueError(
                f"[teachers.{name}.writer]: a writer answers no log-probability, and a view of the objective "
                "asks for them; name it in [objective.audit] teacher"
            )
        if name == writer and entry.writer is not None:
            for key in ("chunks", "continuations"):
                got, most = getattr(plan.audit, key), getattr(entry.writer, f"max_{key}")
                if got > most:
                    raise ValueError(
                        f"objective.audit.{key}: got {got}, allowed: 1 to {most}, "
                        f"[teachers.{name}.writer] max_{key}"
                    )
    longest = config.sampling.max_new_tokens
    if plan.audit is not None and plan.audit.chunk_tokens > longest:
        raise ValueError(
            f"objective.audit.chunk_tokens: got {plan.audit.chunk_tokens} with [sampling] max_new_tokens = "
            f"{longest}, so that no response has a chunk; allowed: at most that"
        )


def _check_reward(config: RunConfig, plan: Plan) -> None:
    if not plan.needs_reward and not plan.gates_reward:
        return
    if plan.judge is None and config.data.task is None and config.data.answer_field is None:
        asking = f"mix: got {plan.mix!r}" if plan.needs_reward else "tokens: a reward gate is set"
        raise ValueError(
            f"objective.{asking}; a reward needs answers to check, [data] answer_field or a built-in "
            "[data] task, or objective.judge"
        )
    if not plan.needs_reward:
        return
    if config.sampling.samples_per_prompt < 2:
        raise ValueError(
            "[sampling] samples_per_prompt: got 1; a reward's advantage compares the responses of one "
            "prompt, so at least 2 are needed"
        )


def _check_preference(config: RunConfig, plan: Plan) -> None:
    """Whether every group has responses of both kinds."""
    if plan.preference is None:
        return
    guided, size = config.sampling.guided, config.sampling.samples_per_prompt
    if not 0 < guided < size:
        raise ValueError(
            f"[sampling] guided_samples: {guided} of samples_per_prompt = {size} responses are sampled under "
            "[sampling] context; objective.preference compares these with the others and needs a context, "
            "and at least one of each"
        )
    if config.sampling.sampler != "student":
        raise ValueError(
            f'[sampling] sampler: got "{config.sampling.sampler}" with objective.preference, which compares '
            'what the student itself sampled; allowed: "student"'
        )


def _check_sampler(config: RunConfig) -> None:
    sampler = config.sampling.sampler
    if not sampler.startswith("teacher:"):
        return
    entry = config.teachers.get(sampler.removeprefix("teacher:"))
    if entry is not None and entry.adapter is not None:
        raise ValueError(f"[sampling] sampler: got {sampler!r}, which has an adapter; samplers load none")
    if entry is None or entry.model is None:
        known = ", ".join(sorted(name for name, t in config.teachers.items() if t.model)) or "none"
        raise ValueError(f"[sampling] sampler: got {sampler!r}, teachers with a model are {known}")


def _check_sampling_engine(config: RunConfig) -> None:
    if config.run.deterministic and config.sampling.engine == "vllm":
        raise ValueError(
            '[run] deterministic: got true with [sampling] engine = "vllm", whose logits depend on what is '
            'computed beside them; use engine = "transformers", or deterministic = false'
        )


def _check_teacher_engines(config: RunConfig) -> None:
    for name, entry in config.teachers.items():
        if config.run.deterministic and entry.engine == "vllm" and entry.address is None:
            raise ValueError(
                f'[run] deterministic: got true with [teachers.{name}] engine = "vllm", whose scores depend '
                'on what is computed beside them; use engine = "transformers", or deterministic = false'
            )


def _check_self_teachers(config: RunConfig, plan: Plan) -> None:
    from student_trainer.channels import channels_of, max_lag

    channels, staleness = channels_of(plan, config.run.name), config.training.max_staleness
    for name, channel in channels.items():
        if name in config.teachers and config.teachers[name].address is None:
            raise ValueError(
                f"[teachers.{name}]: has the name of the teacher with the student's own weights ({channel}), "
                "which needs no section; [self_teacher] says how it is started, or give the address of one "
                "that somebody else runs"
            )
    if not plan.implied_teachers and "self_teacher" in config.model_fields_set:
        raise ValueError(
            "[self_teacher]: is set, but no view has weights that need such a teacher: initial, live, ema or "
            "checkpoint:PATH"
        )
    if config.self_teacher.in_process:
        _check_in_process(config)
    if config.run.deterministic and config.self_teacher.engine == "vllm":
        raise ValueError(
            '[run] deterministic: got true with [self_teacher] engine = "vllm", whose scores depend on what '
            'is computed beside them; use engine = "transformers", or deterministic = false'
        )
    if config.run.deterministic and channels and max_lag(plan, staleness) < staleness:
        raise ValueError(
            f"objective.max_lag: got {plan.max_lag}; a deterministic run scores with the policy that "
            f"sampled, which is max_staleness = {staleness} behind: allowed: at least that"
        )


def _check_in_process(config: RunConfig) -> None:
    """While a model loads, its dtype is torch's default for the whole process, also for what trains there."""
    for where, dtype in (("student", config.student.dtype), ("self_teacher", config.self_teacher.dtype)):
        if dtype not in (None, "float32"):
            raise ValueError(
                f'[self_teacher] in_process: got true with [{where}] dtype = "{dtype}"; in one process with '
                'the trainer everything is "float32", with in_process = false a process of its own scores'
            )


def _check_evaluation(config: RunConfig) -> None:
    if config.training.evaluate_every and config.data.task is None:
        if config.data.holdout == 0.0:
            raise ValueError("[training] evaluate_every: needs held-out prompts, but [data] holdout is 0")
        if config.data.answer_field is None:
            raise ValueError(
                "[training] evaluate_every: needs [data] answer_field to check responses against"
            )


def _check_ports(config: RunConfig) -> None:
    port, replicas = config.metrics.sampler_port, config.sampling.replicas
    if port and replicas > 1:
        raise ValueError(
            f"metrics.sampler_port: got {port} with sampling.replicas = {replicas}; several samplers cannot "
            "listen on one port, 0 gives each a free one"
        )
