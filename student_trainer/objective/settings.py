"""The objective's settings: six independent choices, strict, as they stand in a run file."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt, model_validator

from student_trainer.objective.extension_settings import (
    AuditSettings,
    AuxiliarySettings,
    CustomSettings,
    HiddenSettings,
    PreferenceSettings,
)
from student_trainer.objective.view_settings import StrictSettings, ViewSettings

Divergence: TypeAlias = Literal[
    "kl_student_teacher",
    "kl_teacher_student",
    "jsd",
    "jeffreys",
    "hellinger",
    "total_variation",
    "chi_square_student_teacher",
    "chi_square_teacher_student",
    "alpha",
]
Support: TypeAlias = Literal["sampled", "teacher_topk", "student_topk", "union", "full"]
Tail: TypeAlias = Literal[
    "raw", "stop_gradient", "stop_gradient_mean", "renormalise", "renormalise_teacher", "bucket"
]
Estimator: TypeAlias = Literal["pathwise", "score_function"]
Target: TypeAlias = Literal["log_linear", "mixture", "losses"]
ScoreWeight: TypeAlias = Literal["exact", "stopped"]
Ratio: TypeAlias = Literal["teacher_over_student", "student_over_teacher", "first_over_second"]
RatioGate: TypeAlias = Literal["none", "rewarded"]
Mix: TypeAlias = Literal["replace", "add", "multiply", "route"]
Normalisation: TypeAlias = Literal["token_mean", "sequence_mean"]
Charge: TypeAlias = Literal["divergence", "cross_entropy"]
Horizon: TypeAlias = NonNegativeInt | Literal["response"]
LogRatio: TypeAlias = Literal["behaviour", "student"]
MissingView: TypeAlias = Literal["drop", "renormalise"]


class ObjectiveError(ValueError):
    """Settings that contradict each other or that a teacher cannot serve; says what is allowed."""


class NoCorrection(StrictSettings):
    """Trust the samples as they are: L = −A · log p(y)."""

    kind: Literal["none"] = Field("none", description="no correction")


class ImportanceCorrection(StrictSettings):
    """Weigh by p/μ of the sampled token, truncated at `cap` (none: never truncated)."""

    kind: Literal["importance"] = Field(description="weigh by p/μ")
    cap: Annotated[FiniteFloat, Field(gt=0)] | None = Field(None, description="largest weight")


class PpoCorrection(StrictSettings):
    """The clipped surrogate of PPO, optionally with the second clip for negative advantages."""

    kind: Literal["ppo"] = Field(description="clip p/μ to 1 ± clip")
    clip: Annotated[FiniteFloat, Field(gt=0, lt=1)] = Field(0.2, description="width of the clip")
    clip_high: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        None, description="upper clip where it differs from `clip`"
    )
    dual_clip: Annotated[FiniteFloat, Field(gt=1)] | None = Field(
        None, description="bound on p/μ where the advantage is negative"
    )


Correction: TypeAlias = Annotated[
    NoCorrection | ImportanceCorrection | PpoCorrection, Field(discriminator="kind")
]


class TokenSettings(StrictSettings):
    """Which response positions are trained on; all conditions must hold.

    What a gate or `top_fraction` drops counts as zero in the mean.
    """

    skip_first_n: NonNegativeInt = Field(0, description="leave out the first n response positions")
    keep_first_n: PositiveInt | None = Field(None, description="train on the first n positions only")
    skip_ids: tuple[NonNegativeInt, ...] = Field(
        (), description="leave out positions whose token has one of these ids, as the report's rock tokens do"
    )
    teacher_entropy_above: FiniteFloat | None = Field(None, description="nats; asks for `entropy`")
    teacher_entropy_below: FiniteFloat | None = Field(None, description="nats; asks for `entropy`")
    marked_only: bool = Field(
        False,
        description="only responses for which every view with a template had its own context, such as those "
        "with feedback",
    )
    evidence_above: FiniteFloat | None = Field(
        None,
        description="nats; only where log q(y) − log p(y) of the sampled token, p the student as it is, is "
        "above it: tokens that the target supports",
    )
    reward_above: FiniteFloat | None = Field(
        None,
        description="distil only responses whose verifiable reward is above it; a mixed-in reward trains all",
    )
    reward_below: FiniteFloat | None = Field(
        None, description="distil only responses whose verifiable reward is below it, likewise"
    )
    top_fraction: Annotated[FiniteFloat, Field(gt=0, lt=1)] | None = Field(
        None,
        description="pathwise, top-k support: only this fraction of a micro-batch's positions, the first by "
        "divergence × the teacher's mass on the support",
    )


class WeightSettings(StrictSettings):
    """Detached factors of a position's loss; they multiply."""

    prefix: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        None,
        description="score_function: 1 + prefix · (1 − Σ|A| up to here / Σ|A| of the response), A the "
        "distillation advantage",
    )
    teacher_entropy: bool = Field(
        False, description="pathwise, top-k support: the target's entropy over the support, nats"
    )
    surprise: bool = Field(False, description="pathwise: 1 − p of the sampled token")
    rollout_cap: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        None,
        description="min(p_old/μ, cap): from the sampler's probabilities to the trainer's when the step "
        "starts; `correction` then compares p with p_old",
    )


class GateSettings(StrictSettings):
    """Distillation beside a reward acts only while a step's mean entropy is high enough."""

    entropy_of: Literal["student", "teacher"] = Field(
        "student", description="whose mean entropy; the teacher's asks for `entropy`"
    )
    entropy_on: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        None, description="nats; at or above it the gate opens; unset: the mean over the warm-up steps"
    )
    warmup_steps: PositiveInt | None = Field(
        None, description="without entropy_on: first steps of the run (5); the gate opens after them"
    )
    off_fraction: Annotated[FiniteFloat, Field(gt=0, le=1)] = Field(
        0.93, description="below this fraction of entropy_on it closes"
    )

    @model_validator(mode="after")
    def _one_level(self) -> Self:
        if self.entropy_on is not None and self.warmup_steps is not None:
            raise ValueError("warmup_steps: set beside entropy_on, which needs none; allowed: one of the two")
        return self


class ObjectiveSettings(StrictSettings):
    """What the trainer minimises. `preset` names a published row; other keys override it."""

    preset: str | None = Field(
        None, description="name of a published method, or a file.toml of your own, relative to the run file"
    )
    views: dict[str, ViewSettings] = Field(
        default_factory=dict, description='empty: one view called "teacher" of the run\'s only teacher'
    )
    target: Target | None = Field(
        None,
        description="of several views: Σ c_v log q_v, normalised where it must be (log_linear, the "
        "default), log Σ c_v q_v (mixture), or Σ c_v of every view's own loss (losses)",
    )
    missing_view: MissingView = Field(
        "drop",
        description="a group one of whose views could not be scored: dropped, or trained on its other views "
        "with their coefficients rescaled (renormalise); both are counted",
    )
    ema_rate: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = Field(
        None,
        description='weights "ema": share of the student that enters it at every update (0.05), '
        "ema ← (1 − rate) · ema + rate · student",
    )
    max_lag: NonNegativeInt | None = Field(
        None,
        description='weights "live" and "ema": updates that they may be behind the weights they train; '
        "default: training.max_staleness",
    )
    auxiliary: AuxiliarySettings | None = Field(None, description="a loss beside the objective")
    hidden: HiddenSettings | None = Field(
        None, description="a loss beside the objective: hidden states towards the only view's teacher's"
    )
    preference: PreferenceSettings | None = Field(
        None,
        description="in place of a divergence: responses sampled under [sampling] context are preferred to "
        "the group's others, with one view under the same context",
    )
    custom: CustomSettings = Field(CustomSettings(), description="functions of your own")
    divergence: Divergence = Field(
        "kl_student_teacher", description="what is minimised, argument order spelled out"
    )
    beta: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = Field(
        None, description="jsd only (0.5): 0 is KL(teacher‖student), 1 is KL(student‖teacher)"
    )
    alpha: Annotated[FiniteFloat, Field(ge=-2, le=3)] | None = Field(
        None,
        description="alpha only (0.5): (Σ q^α p^(1−α) − 1) / (α(α − 1)), p student, q teacher; "
        "0 is KL(student‖teacher), 1 is KL(teacher‖student)",
    )
    support: Support = Field("sampled", description="token ids per position that enter the loss")
    k: PositiveInt | None = Field(None, description="ids per position for top-k supports (64)")
    tail: Tail | None = Field(None, description="what happens outside a top-k support (bucket)")
    estimator: Estimator = Field(
        "score_function",
        description="differentiate the divergence (pathwise), or weigh the sampled token's log-probability",
    )
    score_weight: ScoreWeight | None = Field(
        None,
        description="score_function: the divergence's true weight (exact), or −f(q/p) as a stopped gradient "
        "leaves it (stopped), which points elsewhere; for comparison",
    )
    log_ratio: LogRatio | None = Field(
        None,
        description="score_function and multiply: u is q/μ as published implementations take it (behaviour), "
        "or q/p with the student's own p as the step starts (student), as guided sampling needs",
    )
    entry_clip: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        None, description="pathwise: bound on the share of each token of the support"
    )
    correction: Correction = Field(NoCorrection(), description="for samples of an older policy")
    horizon: Horizon = Field(
        0, description='later tokens whose divergence is credited to a token; "response" is all of them'
    )
    discount: Annotated[FiniteFloat, Field(ge=0, le=1)] = Field(
        1.0, description="factor per later token within the horizon"
    )
    charge: Charge | None = Field(
        None,
        description="pathwise with a horizon: what a later token costs, its divergence (default) or its "
        "cross-entropy, by which it costs, too, where the teacher is undecided",
    )
    advantage_clip: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        None,
        description="bound on a token's distillation advantage and on what a later token adds to it, in nats",
    )
    temperature: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        None, description="of both distributions; unset: the sampling temperature"
    )
    tokens: TokenSettings = Field(TokenSettings(), description="which positions are trained on")
    weights: WeightSettings = Field(WeightSettings(), description="factors of a position's loss")
    mix: Mix = Field("replace", description="how a verifiable reward's advantage joins the distillation")
    judge: str | None = Field(
        None,
        description="teacher whose judgement of every response, from 0 to 1, is its reward, in place of the "
        "task's checker",
    )
    audit: AuditSettings | None = Field(
        None, description="mix = route: chunks that a writer weighs, in place of a verifiable reward"
    )
    distill_coefficient: FiniteFloat = Field(
        1.0, description="factor of the distillation part; 0: no teacher"
    )
    reward_coefficient: FiniteFloat = Field(1.0, description="factor of the reward's advantage")
    advantage_std: bool = Field(
        False, description="divide group-centred rewards by the group's standard deviation"
    )
    ratio_clip: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = Field(
        None, description="mix = multiply: the teacher's factor stays in 1 ± ratio_clip (0.2)"
    )
    ratio: Ratio | None = Field(
        None,
        description="mix = multiply: the factor is (q/p)^sign A (teacher_over_student, the default), its "
        "inverse, or (q₁/q₂)^sign A of two views, the student left out",
    )
    ratio_gate: RatioGate | None = Field(
        None, description="mix = multiply: the ratio acts everywhere (none) or only where A > 0 (rewarded)"
    )
    entropy_factor: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        None,
        description="multiply: also times clip(1 − entropy_factor · teacher's entropy / log V, 0.1, 1); "
        "asks for `entropy`",
    )
    entropy_window: PositiveInt | None = Field(
        None, description="mix = multiply: the least entropy of this and so many later tokens enters it"
    )
    gate: GateSettings | None = Field(None, description="a mix with the reward: gate of the distillation")
    route_reward: Literal["non_zero", "positive"] | None = Field(
        None, description="mix = route: reward advantages that send a position to the reward (non_zero)"
    )
    normalisation: Normalisation = Field(
        "token_mean", description="mean over all tokens of the batch, or over responses of their token means"
    )
    monitor: bool = Field(
        True, description="also ask for log q(y) where the loss needs none, for metrics and the report"
    )
