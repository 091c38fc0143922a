"""Plan: a checked objective with every default filled in, which the loss and the trainer read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tutelage_client.types import Signal

from student_trainer.objective.extension_settings import (
    AuditSettings,
    AuxiliarySettings,
    HiddenSettings,
    PreferenceSettings,
)
from student_trainer.objective.functions import FunctionSource
from student_trainer.objective.settings import (
    Charge,
    Correction,
    Divergence,
    Estimator,
    GateSettings,
    LogRatio,
    MissingView,
    Mix,
    Normalisation,
    Ratio,
    RatioGate,
    ScoreWeight,
    Support,
    Tail,
    Target,
    TokenSettings,
    WeightSettings,
)
from student_trainer.objective.view_settings import ContextTemplate, MissingContext

JUDGE = "judge"  # the request about a group that asks the judge; no view has this name beside one
AUDIT = "audit"  # likewise the one that asks the writer
DEFAULT_BETA = 0.5
DEFAULT_ALPHA = 0.5
DEFAULT_K = 64
DEFAULT_RATIO_CLIP = 0.2
DEFAULT_EMA_RATE = 0.05
TRUNCATED = ("teacher_topk", "student_topk", "union")


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked objective with every default filled in.

    Attributes:
        beta, alpha: parameters of divergence "jsd" and "alpha"; idle otherwise.
        score_weight: "exact" is w_f; "stopped" is −f(u), another direction but for KL(p‖q).
        entry_clip: bound on each token's share of a pathwise divergence.
        views: coefficient of each view in the target; empty when no teacher is needed.
        target: how several views make one target, or each a loss of its own.
        view_clips: bound on the distance between a view and the first one, in nats, where there is one.
        teachers: name of the teacher behind each view ("" when the run file did not say, or the tag decides).
        view_requests: what is asked of whom, per view; empty for support "full".
        contexts: templates of the views with a privileged context, in the order they are tried.
        missing: what such a view does where no template can be filled.
        routes: tag → teacher, of the views whose teacher depends on the example's tag.
        weight_fields: field of the example with a factor of the view's coefficient.
        implied_teachers: teachers that need no section of the run file: name → "initial", "live", "ema" or
            "checkpoint:PATH".
        missing_view: what happens to a group that only some views scored.
        ema_rate: share of the student that enters its moving average at every update.
        max_lag: updates that live and averaged weights may be behind those they train; None: as staleness.
        student_candidates: ids the sampler records per position, 0 for none.
        k: ids per position and side, 0 without a top-k support.
        horizon: later tokens credited to a token; None is the rest of the response.
        charge: what a later token costs with a pathwise horizon.
        temperature: of student and teacher alike.
        sampling_temperature: at which the behaviour log-probabilities are taken.
        weights: detached factors of a position's loss.
        ratio, ratio_gate, entropy_factor, entropy_window: the teacher's factor with mix "multiply".
        gate: thresholds of the gate whose state `objective_loss` is given.
        custom: the user's functions, by kind; with one for the divergence, `divergence` is "custom".
        hidden: a loss beside the objective, of hidden states that the only view's teacher answers.
        auxiliary: a loss beside the objective, which needs the responses under a context of its own.
        guided: whether the sampler's student saw another context than the trainer's; with `own_samples`
            for some responses of a group only.
        preference: pairs of responses are trained on, in place of a divergence of tokens.
        log_ratio: whose probability of the sampled token stands below q in u.
        needs_teacher, needs_reward, needs_behaviour: what a TokenBatch must carry.
        judge: teacher whose judgement is the reward; None: the task's checker says it.
        audit: what a writer is asked about chunks of every response, and what its answers weigh.
        warnings: what a user should know before starting.
    """

    divergence: Divergence | Literal["custom"]
    beta: float
    support: Support
    k: int
    tail: Tail
    estimator: Estimator
    correction: Correction
    horizon: int | None
    discount: float
    charge: Charge
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
    alpha: float = DEFAULT_ALPHA
    score_weight: ScoreWeight = "exact"
    entry_clip: float | None = None
    target: Target = "log_linear"
    view_clips: Mapping[str, float] = field(default_factory=dict)
    weights: WeightSettings = field(default=WeightSettings())
    ratio: Ratio = "teacher_over_student"
    ratio_gate: RatioGate = "none"
    entropy_factor: float | None = None
    entropy_window: int = 0
    gate: GateSettings | None = None
    log_ratio: LogRatio = "behaviour"
    custom: Mapping[str, FunctionSource] = field(default_factory=dict)
    guided: bool = False
    own_samples: bool = False
    preference: PreferenceSettings | None = None
    auxiliary: AuxiliarySettings | None = None
    hidden: HiddenSettings | None = None
    contexts: Mapping[str, tuple[ContextTemplate, ...]] = field(default_factory=dict)
    missing: Mapping[str, MissingContext] = field(default_factory=dict)
    routes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    weight_fields: Mapping[str, str] = field(default_factory=dict)
    implied_teachers: Mapping[str, str] = field(default_factory=dict)
    missing_view: MissingView = "drop"
    ema_rate: float = DEFAULT_EMA_RATE
    max_lag: int | None = None
    judge: str | None = None
    audit: AuditSettings | None = None

    @property
    def beside(self) -> Mapping[str, tuple[str, Signal]]:
        """What is asked about every group beside the views: of the judge, and of the writer."""
        found: dict[str, tuple[str, Signal]] = {}
        if self.judge is not None:
            found[JUDGE] = (self.judge, Signal(sampled=False, judgement=True))
        if self.audit is not None:
            size, count = self.audit.chunk_tokens, self.audit.continuations
            asked = Signal(sampled=False, continuations=count, chunk_tokens=size)
            found[AUDIT] = (self.audit.teacher, asked)
        return found

    @property
    def requests(self) -> Mapping[str, tuple[str, Signal]]:
        """What is asked of whom about every group: the views, and what is asked beside them."""
        return {**self.view_requests, **self.beside}

    def teachers_of(self, view: str) -> tuple[str, ...]:
        """Every teacher that may score the view; one, but for a routed view."""
        if view in self.beside:
            return (self.beside[view][0],)
        route = self.routes.get(view)
        return (self.teachers[view],) if route is None else tuple(sorted(set(route.values())))

    def teacher_of(self, view: str, tag: str) -> str | None:
        """The teacher that scores the view for examples of this tag; None where no one is named."""
        if view in self.beside:
            return self.beside[view][0]
        route = self.routes.get(view)
        return self.teachers[view] if route is None else route.get(tag)

    @property
    def scoring_teachers(self) -> tuple[str, ...]:
        """Every teacher that is asked through the queue, sorted."""
        return tuple(sorted({name for view in self.requests for name in self.teachers_of(view)}))

    @property
    def plain_view(self) -> bool:
        """Whether the target is just what the only view answers."""
        return list(self.views.values()) == [1.0] and not self.weight_fields

    @property
    def gates_reward(self) -> bool:
        """Whether a TokenBatch must carry the responses' rewards as they are."""
        return self.tokens.reward_above is not None or self.tokens.reward_below is not None

    @property
    def carries_rewards(self) -> bool:
        """Whether a TokenBatch says them, where they are known: to a gate, or to the user's functions."""
        return self.gates_reward or self.tells_tokens

    @property
    def tells_tokens(self) -> bool:
        """Whether a function of the user's reads what is known of the tokens."""
        return "token_weight" in self.custom or "advantage" in self.custom

    @property
    def uses_old(self) -> bool:
        """Whether it matters what the student's probabilities were when the step began."""
        return self.weights.rollout_cap is not None or self.needs_own

    @property
    def needs_own(self) -> bool:
        """Whether those probabilities must be known before the loss of any position is."""
        return self.log_ratio == "student" or self.audit is not None

    @property
    def in_process(self) -> bool:
        """Whether student and teacher heads must sit in the trainer's process (support "full")."""
        return self.needs_teacher and self.support == "full"

    @property
    def behaviour_comparable(self) -> bool:
        """Whether behaviour log-probabilities are of the student's distribution that is trained.

        Of groups with guided responses those of the others are, `TrainingGroup.sampled_as_trained`.
        """
        return self.temperature == self.sampling_temperature and (self.own_samples or not self.guided)
