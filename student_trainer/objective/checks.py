"""Which combinations of settings mean something: refusals, and warnings for the ones that mislead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from student_trainer.objective.plan import AUDIT, JUDGE, TRUNCATED
from student_trainer.objective.settings import (
    Divergence,
    NoCorrection,
    ObjectiveError,
    ObjectiveSettings,
    PpoCorrection,
)

SLOPED = ("kl_student_teacher", "kl_teacher_student")  # f′(1) is not 0
HEAVY_TAILED = (
    "kl_teacher_student",
    "jeffreys",
    "chi_square_student_teacher",
    "chi_square_teacher_student",
)
SELDOM = frozenset({"success", "failure", "feedback"})  # fields that some responses of most groups lack
ENTROPY_GATES = ("teacher_entropy_above", "teacher_entropy_below")
TEACHER_GATES = (*ENTROPY_GATES, "evidence_above")
REWARD_GATES = ("reward_above", "reward_below")


def check_mix(row: ObjectiveSettings, needs_teacher: bool) -> None:
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


def check_estimator(row: ObjectiveSettings, needs_teacher: bool) -> None:
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
    if row.tail == "renormalise_teacher" and row.divergence != "kl_teacher_student":
        raise ObjectiveError(
            'objective.tail: got "renormalise_teacher", whose target is zero outside the support; allowed '
            f'only with divergence = "kl_teacher_student", got {row.divergence!r}'
        )
    if row.estimator == "pathwise" and row.horizon != 0:
        _check_future(row)
    if row.entry_clip is not None and row.tail in ("stop_gradient", "stop_gradient_mean"):
        raise ObjectiveError(
            f"objective.tail: got {row.tail!r} with entry_clip, which bounds shares that are differentiated; "
            'allowed: "raw", "renormalise", "bucket", or support = "full"'
        )


def _check_future(row: ObjectiveSettings) -> None:
    """Whether the divergences of later positions are what a position can be charged with."""
    refused = {
        "tail": (row.tail == "stop_gradient_mean", '"stop_gradient", "renormalise", "bucket"'),
        "weights.teacher_entropy": (row.weights.teacher_entropy, "false"),
        "weights.surprise": (row.weights.surprise, "false"),
        "tokens.top_fraction": (row.tokens.top_fraction is not None, "unset"),
    }
    for name, (chosen, allowed) in refused.items():
        if chosen:
            raise ObjectiveError(
                f"objective.horizon: got {row.horizon!r} with {name}, under which the divergence that is "
                f"trained is not the one that earlier tokens cause; allowed: 0, or {name}: {allowed}"
            )
    crossed = row.divergence == "kl_teacher_student" and row.custom.divergence is None
    if row.charge == "cross_entropy" and not (crossed and row.tail in ("renormalise", "renormalise_teacher")):
        raise ObjectiveError(
            'objective.charge: "cross_entropy" goes with divergence = "kl_teacher_student" and tail '
            f'"renormalise" or "renormalise_teacher"; got {row.divergence!r}, tail {row.tail!r}'
        )


def check_custom(row: ObjectiveSettings, needs_teacher: bool) -> None:
    """Whether the user's functions have something to do."""
    custom = row.custom
    score_function = needs_teacher and row.estimator == "score_function" and row.mix != "multiply"
    needs: dict[str, tuple[bool, bool, str]] = {
        "divergence": (
            custom.divergence is not None,
            needs_teacher and row.mix != "multiply",
            'a teacher and no mix = "multiply"',
        ),
        "advantage": (
            custom.advantage is not None,
            score_function,
            'a teacher, estimator = "score_function" and no mix = "multiply"',
        ),
        "teacher_entropy": (
            custom.teacher_entropy,
            needs_teacher
            and row.support != "full"
            and (custom.token_weight is not None or custom.advantage is not None),
            "a token_weight or an advantage, and a teacher that is asked over the wire",
        ),
    }
    for name, (chosen, fits, reason) in needs.items():
        if chosen and not fits:
            raise ObjectiveError(f"objective.custom.{name}: is set, but it only acts with {reason}")


def check_gates(row: ObjectiveSettings, needs_teacher: bool) -> None:
    tokens = row.tokens
    gates = [f"tokens.{name}" for name in TEACHER_GATES if getattr(tokens, name) is not None]
    if row.gate is not None and row.gate.entropy_of == "teacher":
        gates.append("gate.entropy_of")
    if gates and (not needs_teacher or row.support == "full"):
        raise ObjectiveError(
            f"objective.{gates[0]}: needs a teacher that is asked over the wire "
            f"(support other than full, distill_coefficient other than 0)"
        )
    for name in REWARD_GATES:
        if getattr(tokens, name) is not None and not needs_teacher:
            raise ObjectiveError(
                f"objective.tokens.{name}: chooses what is distilled and needs a teacher "
                "(distill_coefficient other than 0)"
            )
    low, high = tokens.reward_above, tokens.reward_below
    if low is not None and high is not None and low >= high:
        raise ObjectiveError(
            f"objective.tokens.reward_below: got {high} with reward_above = {low}, so that no reward is in "
            "range; allowed: a larger one"
        )


def check_weights(row: ObjectiveSettings, needs_teacher: bool) -> None:
    """Whether every weight, selection and gate finds what it needs."""
    pathwise = needs_teacher and row.estimator == "pathwise"
    top_k = pathwise and row.support in TRUNCATED
    score_function = needs_teacher and row.estimator == "score_function"
    needs: dict[str, tuple[bool, bool, str]] = {
        "weights.prefix": (
            row.weights.prefix is not None,
            score_function and row.mix != "multiply",
            'a teacher, estimator = "score_function" and no mix = "multiply"',
        ),
        "weights.teacher_entropy": (
            row.weights.teacher_entropy,
            top_k,
            'estimator = "pathwise" and a top-k support',
        ),
        "weights.surprise": (row.weights.surprise, pathwise, 'estimator = "pathwise"'),
        "tokens.top_fraction": (
            row.tokens.top_fraction is not None,
            top_k and row.mix == "replace",
            'estimator = "pathwise", a top-k support and mix = "replace"',
        ),
        "gate": (row.gate is not None, needs_teacher, "a teacher (distill_coefficient other than 0)"),
        "entropy_factor": (row.entropy_factor is not None, needs_teacher, "a teacher"),
    }
    for name, (chosen, fits, reason) in needs.items():
        if chosen and not fits:
            raise ObjectiveError(f"objective.{name}: is set, but it only acts with {reason}")


def effective_temperature(row: ObjectiveSettings, student_temperature: float, needs_teacher: bool) -> float:
    if not student_temperature > 0:
        raise ObjectiveError(f"sampling.temperature: must be positive to train, got {student_temperature}")
    temperature = student_temperature if row.temperature is None else row.temperature
    if temperature != student_temperature and needs_behaviour(row, needs_teacher):
        raise ObjectiveError(
            f"objective.temperature: got {temperature}, but this objective compares with log-probabilities "
            f"taken at sampling.temperature = {student_temperature}; leave it unset"
        )
    return temperature


def needs_behaviour(row: ObjectiveSettings, needs_teacher: bool) -> bool:
    own = row.log_ratio == "student" or row.preference is not None
    uses_advantage = needs_teacher and row.estimator == "score_function" and not own
    corrected = not isinstance(row.correction, NoCorrection) or row.weights.rollout_cap is not None
    return uses_advantage or corrected


def check_guided(row: ObjectiveSettings, needs_teacher: bool, guided: bool) -> None:
    """Whether u and the samples mean something where the sampler's student sees another context.

    Pairs are compared as they were sampled, whichever the context.
    """
    if row.preference is not None:
        return
    corrected = not isinstance(row.correction, NoCorrection) or row.weights.rollout_cap is not None
    if guided and not corrected and (row.estimator == "score_function" or row.mix != "replace"):
        raise ObjectiveError(
            'objective.correction: got "none" with [sampling] context, under which tokens have other '
            'probabilities than under the prompt that is trained; allowed: kind = "importance" or "ppo", or '
            "weights.rollout_cap"
        )
    if guided and needs_teacher and row.log_ratio == "behaviour":
        raise ObjectiveError(
            'objective.log_ratio: got "behaviour" with [sampling] context, under which μ is of another '
            'prompt than p; allowed: "student"'
        )


def check_judge(settings: ObjectiveSettings, teachers: Sequence[str]) -> None:
    """A judge is one of the run's teachers, and its request is called by no view's name."""
    if settings.judge is None:
        return
    if teachers and settings.judge not in teachers:
        raise ObjectiveError(
            f"objective.judge: got teacher {settings.judge!r}, allowed: {', '.join(teachers)}"
        )
    if JUDGE in settings.views:
        raise ObjectiveError(f"objective.views.{JUDGE}: with objective.judge the name is taken, use another")


def check_audit(settings: ObjectiveSettings, teachers: Sequence[str]) -> None:
    """Whether audited chunks have a place in the loss, and a writer."""
    audit = settings.audit
    if audit is None:
        return
    needs: dict[str, tuple[bool, str]] = {
        "mix": (settings.mix == "route", '"route", by which every other token is distilled'),
        "correction": (isinstance(settings.correction, NoCorrection), 'kind = "none"'),
        "reward_coefficient": (settings.reward_coefficient != 0, "any but 0, what it scales"),
        "horizon": (settings.horizon == 0, "0"),
    }
    for name, (fits, allowed) in needs.items():
        if not fits:
            value = getattr(settings, name)
            got = getattr(value, "kind", value)
            raise ObjectiveError(f"objective.{name}: got {got!r} with objective.audit; allowed: {allowed}")
    for name in TEACHER_GATES:
        if (bound := getattr(settings.tokens, name)) is not None:
            raise ObjectiveError(
                f"objective.tokens.{name}: got {bound} with objective.audit, whose chunks are weighed and "
                "trained as a whole; leave one of the two out"
            )
    if teachers and audit.teacher not in teachers:
        raise ObjectiveError(
            f"objective.audit.teacher: got {audit.teacher!r}, allowed: {', '.join(teachers)}"
        )
    if AUDIT in settings.views:
        raise ObjectiveError(f"objective.views.{AUDIT}: with objective.audit the name is taken, use another")


def temperature_warnings(temperature: float, student_temperature: float) -> tuple[str, ...]:
    if temperature == student_temperature:
        return ()
    return (
        f"objective.temperature = {temperature} is not sampling.temperature = {student_temperature}: that "
        "trainer and sampler mean the same positions cannot be checked from their log-probabilities",
    )


def objective_warnings(
    row: ObjectiveSettings, divergence: Divergence | Literal["custom"], needs_teacher: bool
) -> tuple[str, ...]:
    """What a user should know before starting."""
    if not needs_teacher:
        return ()
    warnings = [
        f'objective.views.{name}.missing = "error" ends the run at the first response without '
        '{success}, {failure} or {feedback}; another template, or "same", lets it go on'
        for name, view in row.views.items()
        if view.missing == "error" and view.templates and all(t.fields & SELDOM for t in view.templates)
    ]
    if row.support in TRUNCATED and row.tail == "raw" and divergence in SLOPED:
        warnings.append(
            'objective.tail = "raw" truncates the sum without correction: its gradient is not zero where '
            'student and teacher agree. "stop_gradient", "renormalise" and "bucket" have no such bias'
        )
    if row.support == "sampled" and row.mix != "multiply":
        if _heavy_tailed(row, divergence) and row.advantage_clip is None:
            warnings.append(
                f"objective.divergence = {divergence!r} from sampled tokens weighs by a power of q/p, whose "
                "tail is heavy; consider objective.advantage_clip or a top-k support"
            )
        if row.score_weight == "stopped" and divergence != "kl_student_teacher":
            warnings.append(
                'objective.score_weight = "stopped" is not the gradient of the divergence and can point away '
                'from it; "exact" is'
            )
    if row.mix == "multiply" and row.distill_coefficient != 0 and row.ratio_gate != "rewarded":
        warnings.append(
            'objective.ratio_gate: mix = "multiply" without a gate pulls on tokens that the reward says '
            'nothing about, from failed responses too; "rewarded" keeps the factor to responses with A > 0'
        )
    return tuple(warnings)


def _heavy_tailed(row: ObjectiveSettings, divergence: Divergence | Literal["custom"]) -> bool:
    """Whether the weight of a sampled token has no variance worth the name when q and p differ."""
    outside = row.alpha is not None and not 0 <= row.alpha <= 1
    return divergence in HEAVY_TAILED or (divergence == "alpha" and outside)
