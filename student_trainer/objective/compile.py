"""Settings → Plan: what the loss does, and the signals it needs. Signals are never configured."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tutelage_client.types import Limits, Signal

from student_trainer.objective.presets import idle_fields, resolve
from student_trainer.objective.settings import (
    Correction,
    Divergence,
    Estimator,
    Mix,
    NoCorrection,
    Normalisation,
    ObjectiveError,
    ObjectiveSettings,
    PpoCorrection,
    Support,
    Tail,
    TokenSettings,
)

DEFAULT_BETA = 0.5
DEFAULT_K = 64
DEFAULT_RATIO_CLIP = 0.2
ENTROPY_GATES = ("teacher_entropy_above", "teacher_entropy_below")
TRUNCATED = ("teacher_topk", "student_topk", "union")


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked objective with every default filled in.

    Attributes:
        views: coefficient of each view in Σ_v c_v · log q_v; empty when no teacher is needed.
        teachers: name of the teacher behind each view ("" when the run file did not say).
        view_requests: what is asked of whom, per view; empty for support "full".
        student_candidates: ids the sampler records per position, 0 for none.
        k: ids per position and side, 0 without a top-k support.
        horizon: later tokens credited to a token; None is the rest of the response.
        temperature: of student and teacher alike.
        sampling_temperature: at which the behaviour log-probabilities are taken.
        needs_teacher, needs_reward, needs_behaviour: what a TokenBatch must carry.
        warnings: what a user should know before starting.
    """

    divergence: Divergence
    beta: float
    support: Support
    k: int
    tail: Tail
    estimator: Estimator
    correction: Correction
    horizon: int | None
    discount: float
    advantage_clip: float | None
    temperature: float
    sampling_temperature: float
    tokens: TokenSettings
    mix: Mix
    distill_coefficient: float
    reward_coefficient: float
    advantage_std: bool
    ratio_clip: float
    route_reward: str
    normalisation: Normalisation
    views: Mapping[str, float]
    teachers: Mapping[str, str]
    view_requests: Mapping[str, tuple[str, Signal]]
    student_candidates: int
    needs_teacher: bool
    needs_reward: bool
    needs_behaviour: bool
    preset: str | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def in_process(self) -> bool:
        """Whether student and teacher heads must sit in the trainer's process (support "full")."""
        return self.needs_teacher and self.support == "full"

    @property
    def behaviour_comparable(self) -> bool:
        """Whether behaviour log-probabilities are of the student's distribution that is trained."""
        return self.temperature == self.sampling_temperature


def compile_plan(
    settings: ObjectiveSettings, *, student_temperature: float, teachers: Sequence[str] = ()
) -> Plan:
    """Check an objective and derive what it needs.

    Args:
        settings: as written in the run file; the preset is resolved here.
        student_temperature: at which the rollouts are sampled.
        teachers: names of the run's teachers; empty skips the check of names.

    Raises:
        ObjectiveError: a combination without meaning; says which field and what is allowed.
    """
    row = resolve(settings)
    for name, reason in idle_fields(row).items():
        raise ObjectiveError(
            f"objective.{name}: set to {getattr(row, name)!r}, but it only acts with {reason}"
        )
    needs_teacher = row.distill_coefficient != 0
    divergence, beta = _divergence(row)
    _check_mix(row, needs_teacher)
    _check_estimator(row, needs_teacher)
    _check_gates(row, needs_teacher)
    temperature = _temperature(row, student_temperature, needs_teacher)
    names = _teachers(row, teachers) if needs_teacher else {}
    views = {view: row.views[view].coefficient if row.views else 1.0 for view in names}
    if needs_teacher:
        _check_views(row, divergence, views)
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
        needs_reward=row.mix != "replace" and row.reward_coefficient != 0,
        needs_behaviour=_needs_behaviour(row, needs_teacher),
        preset=settings.preset,
        warnings=_temperature_warnings(temperature, student_temperature)
        + _warnings(row, divergence, needs_teacher),
    )


def check_limits(plan: Plan, teacher: str, limits: Limits) -> list[str]:
    """What `teacher` cannot serve of the plan, as sentences; empty when all is well."""
    problems: list[str] = []
    for view, (name, signal) in plan.view_requests.items():
        if name not in ("", teacher):
            continue
        where = f"objective view {view!r} of teacher {teacher!r}"
        if signal.top_k > limits.max_top_k:
            problems.append(
                f"{where}: k = {signal.top_k} asks for top_k above the teacher's limit {limits.max_top_k}"
            )
        if signal.candidates and plan.student_candidates > limits.max_candidates:
            problems.append(
                f"{where}: k = {plan.student_candidates} asks for candidates above the teacher's limit "
                f"{limits.max_candidates}"
            )
        if signal.entropy and not limits.entropy:
            problems.append(f"{where}: an entropy gate is set, but the teacher does not serve entropy")
        if signal.temperature != 1 and not limits.temperature:
            problems.append(
                f"{where}: temperature {signal.temperature} is asked for, but the teacher only serves 1"
            )
    return problems


def _divergence(row: ObjectiveSettings) -> tuple[Divergence, float]:
    if row.divergence != "jsd":
        return row.divergence, DEFAULT_BETA
    beta = DEFAULT_BETA if row.beta is None else row.beta
    ends: dict[float, Divergence] = {0.0: "kl_teacher_student", 1.0: "kl_student_teacher"}
    return ends.get(beta, "jsd"), beta


def _check_mix(row: ObjectiveSettings, needs_teacher: bool) -> None:
    rewarded = row.mix != "replace" and row.reward_coefficient != 0
    if not needs_teacher and not rewarded:
        raise ObjectiveError(
            "objective.distill_coefficient: got 0 and no reward is mixed in, so nothing would be trained"
        )
    if row.mix == "multiply":
        if row.estimator == "pathwise":
            raise ObjectiveError(
                'objective.mix: "multiply" scales the advantage of the sampled token and needs '
                'estimator = "score_function", got "pathwise"'
            )
        if row.reward_coefficient == 0 or not 0 <= row.distill_coefficient <= 1:
            raise ObjectiveError(
                'objective.distill_coefficient: with mix = "multiply" it blends the factor and lies in '
                f"[0, 1], and reward_coefficient is not 0; got {row.distill_coefficient} and "
                f"{row.reward_coefficient}"
            )
        if row.horizon != 0:
            raise ObjectiveError(f'objective.horizon: must be 0 with mix = "multiply", got {row.horizon!r}')


def _check_estimator(row: ObjectiveSettings, needs_teacher: bool) -> None:
    if not needs_teacher:
        return
    if row.estimator == "score_function" and row.support != "sampled":
        raise ObjectiveError(
            'objective.support: estimator = "score_function" weighs the sampled token and allows '
            f'"sampled" only, got {row.support!r}; "pathwise" sums over the whole support exactly'
        )
    if row.estimator == "pathwise" and row.support == "sampled":
        raise ObjectiveError(
            'objective.support: got "sampled" with estimator = "pathwise"; the derivative through one '
            'sampled log-probability has zero mean. Use "score_function" or another support'
        )
    if row.estimator == "pathwise" and row.mix == "replace" and isinstance(row.correction, PpoCorrection):
        raise ObjectiveError(
            'objective.correction: "ppo" clips the sampled token\'s surrogate, which estimator = '
            '"pathwise" has only for a mixed-in reward; allowed: "none", "importance"'
        )


def _check_gates(row: ObjectiveSettings, needs_teacher: bool) -> None:
    gates = [name for name in ENTROPY_GATES if getattr(row.tokens, name) is not None]
    if gates and (not needs_teacher or row.support == "full"):
        raise ObjectiveError(
            f"objective.tokens.{gates[0]}: needs a teacher that is asked over the wire "
            f"(support other than full, distill_coefficient other than 0)"
        )


def _temperature(row: ObjectiveSettings, student_temperature: float, needs_teacher: bool) -> float:
    if not student_temperature > 0:
        raise ObjectiveError(f"sampling.temperature: must be positive to train, got {student_temperature}")
    temperature = student_temperature if row.temperature is None else row.temperature
    if temperature != student_temperature and _needs_behaviour(row, needs_teacher):
        raise ObjectiveError(
            f"objective.temperature: got {temperature}, but this objective compares with log-probabilities "
            f"taken at sampling.temperature = {student_temperature}; leave it unset"
        )
    return temperature


def _needs_behaviour(row: ObjectiveSettings, needs_teacher: bool) -> bool:
    uses_advantage = needs_teacher and row.estimator == "score_function"
    return uses_advantage or not isinstance(row.correction, NoCorrection)


def _teachers(row: ObjectiveSettings, teachers: Sequence[str]) -> dict[str, str]:
    """The teacher's name behind every view."""
    weights = {view: spec.weights for view, spec in row.views.items()} or {"teacher": "teacher"}
    return {view: _teacher_name(view, spec, teachers) for view, spec in weights.items()}


def _teacher_name(view: str, weights: str, teachers: Sequence[str]) -> str:
    kind, _, name = weights.partition(":")
    if kind != "teacher":
        raise ObjectiveError(
            f'objective.views.{view}.weights: got {weights!r}, allowed: "teacher" or "teacher:NAME"'
        )
    if not name:
        if len(teachers) > 1:
            raise ObjectiveError(
                f'objective.views.{view}.weights: "teacher" is ambiguous, allowed: '
                + ", ".join(f'"teacher:{known}"' for known in teachers)
            )
        return teachers[0] if teachers else ""
    if teachers and name not in teachers:
        nearest = difflib.get_close_matches(name, teachers, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ObjectiveError(
            f"objective.views.{view}.weights: got teacher {name!r}, allowed: {', '.join(teachers)}{hint}"
        )
    return name


def _check_views(row: ObjectiveSettings, divergence: Divergence, views: Mapping[str, float]) -> None:
    """A log-linear target Σ c_v log q_v stays unnormalised only where its constant cancels."""
    plain = len(views) == 1 and next(iter(views.values())) == 1
    cancels = row.support == "sampled" and divergence == "kl_student_teacher" and row.horizon == 0
    if plain or (cancels and row.mix != "multiply"):
        return
    got = ", ".join(f"{view}: {coefficient}" for view, coefficient in views.items())
    raise ObjectiveError(
        f"objective.views: got {{{got}}}; more than one view, or a coefficient other than 1, needs no "
        'normalisation only with divergence = "kl_student_teacher", support = "sampled", horizon = 0 and a '
        "mix other than multiply. Otherwise exactly one view with coefficient 1 is allowed "
        "(distill_coefficient scales the whole loss)"
    )


def _signal(row: ObjectiveSettings, k: int, temperature: float) -> Signal:
    gated = any(getattr(row.tokens, name) is not None for name in ENTROPY_GATES)
    return Signal(
        sampled=row.support == "sampled" or row.monitor,
        top_k=k if row.support in ("teacher_topk", "union") else 0,
        candidates=row.support in ("student_topk", "union"),
        entropy=gated,
        temperature=temperature,
    )


def _temperature_warnings(temperature: float, student_temperature: float) -> tuple[str, ...]:
    if temperature == student_temperature:
        return ()
    return (
        f"objective.temperature = {temperature} is not sampling.temperature = {student_temperature}: that "
        "trainer and sampler mean the same positions cannot be checked from their log-probabilities",
    )


def _warnings(row: ObjectiveSettings, divergence: Divergence, needs_teacher: bool) -> tuple[str, ...]:
    if not needs_teacher:
        return ()
    warnings = []
    if row.support in TRUNCATED and row.tail == "raw" and divergence != "jsd":
        warnings.append(
            'objective.tail = "raw" truncates the sum without correction: its gradient is not zero where '
            'student and teacher agree. "stop_gradient", "renormalise" and "bucket" have no such bias'
        )
    if row.support == "sampled" and divergence == "kl_teacher_student" and row.advantage_clip is None:
        warnings.append(
            "KL(teacher‖student) from sampled tokens weighs by q/p, whose tail is heavy; consider "
            "objective.advantage_clip or a top-k support"
        )
    return tuple(warnings)
