"""Settings → Plan: what the loss does, and the signals it needs. Signals are never configured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from tutelage_client.types import Limits, Signal

from student_trainer.objective.checks import (
    ENTROPY_GATES,
    check_audit,
    check_custom,
    check_estimator,
    check_gates,
    check_guided,
    check_judge,
    check_mix,
    check_weights,
    effective_temperature,
    needs_behaviour,
    objective_warnings,
    temperature_warnings,
)
from student_trainer.objective.extension_settings import AuditSettings
from student_trainer.objective.functions import find_functions
from student_trainer.objective.plan import (
    DEFAULT_ALPHA,
    DEFAULT_BETA,
    DEFAULT_EMA_RATE,
    DEFAULT_K,
    DEFAULT_RATIO_CLIP,
    TRUNCATED,
    Plan,
)
from student_trainer.objective.preference_checks import check_preference
from student_trainer.objective.presets import idle_fields, resolve
from student_trainer.objective.settings import Divergence, ObjectiveError, ObjectiveSettings
from student_trainer.objective.view_checks import check_views
from student_trainer.objective.view_names import check_scorers, implied_teachers, routes, teacher_names

__all__ = ["Plan", "check_limits", "compile_plan"]


def compile_plan(
    settings: ObjectiveSettings,
    *,
    student_temperature: float,
    teachers: Sequence[str] = (),
    run: str = "run",
    guided: bool = False,
    own_samples: bool = False,
) -> Plan:
    """Check an objective and derive what it needs.

    Args:
        settings: as written in the run file; the preset is resolved here.
        student_temperature: at which the rollouts are sampled.
        teachers: names of the run's teachers; empty skips the check of names.
        run: the run's name, of which the teachers with the student's own weights have theirs.
        guided: whether the sampler's student sees another context than the trainer's.
        own_samples: with `guided`, whether some responses of every group are sampled without that context.

    Raises:
        ObjectiveError: a combination without meaning; says which field and what is allowed.
    """
    row = resolve(settings)
    for name, reason in idle_fields(row).items():
        raise ObjectiveError(
            f"objective.{name}: set to {getattr(row, name)!r}, but it only acts with {reason}"
        )
    needs_teacher = row.distill_coefficient != 0
    check_guided(row, needs_teacher, guided)
    if guided and row.log_ratio is None and row.estimator == "score_function" and row.preference is None:
        row = row.model_copy(update={"log_ratio": "student"})
    divergence, beta, alpha = _divergence(row)
    check_mix(row, needs_teacher)
    custom = find_functions(row.custom)
    check_custom(row, needs_teacher)
    check_estimator(row, needs_teacher)
    check_gates(row, needs_teacher)
    check_weights(row, needs_teacher)
    temperature = effective_temperature(row, student_temperature, needs_teacher)
    check_judge(row, teachers)
    check_audit(row, teachers)
    asked_beside = {row.judge, None if row.audit is None else row.audit.teacher}
    scorers = [name for name in teachers if name not in asked_beside]
    names = teacher_names(row, run, scorers) if needs_teacher else {}
    routed = routes(row, teachers) if needs_teacher else {}
    check_scorers(names, routed, teachers, scorers)
    views = {view: row.views[view].coefficient if row.views else 1.0 for view in names}
    if needs_teacher:
        check_views(row, divergence, views)
    check_preference(row, views)
    _check_hidden(row, views)
    truncated = needs_teacher and row.support in TRUNCATED
    k = (row.k or DEFAULT_K) if truncated else 0
    signal = _signal(row, k, temperature)
    in_process = needs_teacher and row.support == "full"
    return Plan(
        divergence=divergence,
        beta=beta,
        support=row.support,
        k=k,
        tail=row.tail or "bucket",
        estimator=row.estimator,
        correction=row.correction,
        horizon=None if row.horizon == "response" else row.horizon,
        discount=row.discount,
        charge=row.charge or "divergence",
        advantage_clip=row.advantage_clip,
        temperature=temperature,
        sampling_temperature=student_temperature,
        tokens=row.tokens,
        mix=row.mix,
        distill_coefficient=row.distill_coefficient,
        reward_coefficient=row.reward_coefficient,
        advantage_std=row.advantage_std,
        ratio_clip=row.ratio_clip or DEFAULT_RATIO_CLIP,
        route_reward=row.route_reward or "non_zero",
        normalisation=row.normalisation,
        views=views,
        teachers=names,
        view_requests={} if in_process else {view: (name, signal) for view, name in names.items()},
        student_candidates=k if truncated and row.support != "teacher_topk" else 0,
        needs_teacher=needs_teacher,
        needs_reward=row.mix != "replace" and row.reward_coefficient != 0 and row.audit is None,
        needs_behaviour=needs_behaviour(row, needs_teacher),
        preset=settings.preset,
        warnings=temperature_warnings(temperature, student_temperature)
        + objective_warnings(row, divergence, needs_teacher),
        alpha=alpha,
        score_weight=row.score_weight or "exact",
        entry_clip=row.entry_clip,
        target=row.target or "log_linear",
        weights=row.weights,
        ratio=row.ratio or "teacher_over_student",
        ratio_gate=row.ratio_gate or "none",
        entropy_factor=row.entropy_factor,
        entropy_window=row.entropy_window or 0,
        gate=row.gate,
        log_ratio=row.log_ratio or "behaviour",
        guided=guided,
        own_samples=own_samples,
        preference=row.preference,
        auxiliary=row.auxiliary,
        hidden=row.hidden,
        custom=custom,
        view_clips={name: view.clip for name, view in row.views.items() if view.clip is not None},
        contexts={
            name: row.views[name].templates for name in names if row.views and row.views[name].templates
        },
        missing={name: view.missing for name, view in row.views.items() if name in names and view.templates},
        routes=routed,
        weight_fields={
            name: view.weight_field
            for name, view in row.views.items()
            if name in names and view.weight_field is not None
        },
        implied_teachers=implied_teachers(row, run, teachers) if needs_teacher else {},
        missing_view=row.missing_view,
        ema_rate=row.ema_rate or DEFAULT_EMA_RATE,
        max_lag=row.max_lag,
        judge=row.judge,
        audit=row.audit,
    )


def check_limits(plan: Plan, teacher: str, limits: Limits) -> list[str]:
    """What `teacher` cannot serve of the plan, as sentences; empty when all is well."""
    problems: list[str] = []
    if plan.judge == teacher and not limits.judge:
        problems.append(f"objective.judge: teacher {teacher!r} is no judge")
    if plan.audit is not None and plan.audit.teacher == teacher:
        problems += _audit_problems(plan.audit, limits)
    for view, (_, signal) in plan.view_requests.items():
        if not {"", teacher}.intersection(plan.teachers_of(view)):
            continue
        where = f"objective view {view!r} of teacher {teacher!r}"
        if limits.judge:
            problems.append(f"{where}: the teacher is a judge, which answers no log-probability")
            continue
        if limits.max_continuations:
            problems.append(f"{where}: the teacher is a writer, which answers no log-probability")
            continue
        if signal.top_k > limits.max_top_k:
            problems.append(
                f"{where}: k = {signal.top_k} asks for top_k above the teacher's limit {limits.max_top_k}"
            )
        if signal.candidates and plan.student_candidates > limits.max_candidates:
            problems.append(
                f"{where}: k = {plan.student_candidates} asks for candidates above the teacher's limit "
                f"{limits.max_candidates}"
            )
        if signal.hidden_layers and signal.hidden_layers[-1] > limits.hidden_layers:
            problems.append(
                f"{where}: objective.hidden asks for layer {signal.hidden_layers[-1]}, the teacher answers "
                f"{limits.hidden_layers} layers"
            )
        if signal.entropy and not limits.entropy:
            problems.append(f"{where}: a gate or factor needs entropy, which the teacher does not serve")
        if signal.temperature != 1 and not limits.temperature:
            problems.append(
                f"{where}: temperature {signal.temperature} is asked for, but the teacher only serves 1"
            )
    return problems


def _audit_problems(audit: AuditSettings, limits: Limits) -> list[str]:
    if not limits.max_continuations:
        return [f"objective.audit.teacher: teacher {audit.teacher!r} is no writer"]
    if audit.continuations > limits.max_continuations:
        return [
            f"objective.audit.continuations: got {audit.continuations}, teacher {audit.teacher!r} writes at "
            f"most {limits.max_continuations}"
        ]
    return []


def _check_hidden(row: ObjectiveSettings, views: Mapping[str, float]) -> None:
    if row.hidden is not None and (len(views) != 1 or row.support == "full"):
        raise ObjectiveError(
            "objective.hidden: goes with one view, whose teacher answers through the queue; got "
            f"{len(views)} views and support {row.support!r}"
        )


def _divergence(row: ObjectiveSettings) -> tuple[Divergence | Literal["custom"], float, float]:
    """The divergence with its parameters; where a family ends in one of the KLs, that KL."""
    if row.custom.divergence is not None:
        return "custom", DEFAULT_BETA, DEFAULT_ALPHA
    beta = DEFAULT_BETA if row.beta is None else row.beta
    alpha = DEFAULT_ALPHA if row.alpha is None else row.alpha
    divergence = row.divergence
    if divergence == "jsd":
        ends: dict[float, Divergence] = {0.0: "kl_teacher_student", 1.0: "kl_student_teacher"}
        divergence = ends.get(beta, divergence)
    if divergence == "alpha":
        ends = {0.0: "kl_student_teacher", 1.0: "kl_teacher_student"}
        divergence = ends.get(alpha, divergence)
    return divergence, beta, alpha


def _signal(row: ObjectiveSettings, k: int, temperature: float) -> Signal:
    gated = any(getattr(row.tokens, name) is not None for name in ENTROPY_GATES)
    gated = gated or row.entropy_factor is not None
    gated = gated or row.custom.teacher_entropy
    gated = gated or (row.gate is not None and row.gate.entropy_of == "teacher")
    told = row.custom.token_weight is not None or row.custom.advantage is not None
    told = told or row.tokens.evidence_above is not None
    return Signal(
        sampled=row.support == "sampled" or row.monitor or told,
        top_k=k if row.support in ("teacher_topk", "union") else 0,
        candidates=row.support in ("student_topk", "union"),
        entropy=gated,
        temperature=temperature,
        hidden_layers=() if row.hidden is None else row.hidden.layers,
    )
