"""Experiments with teachers: which arms share a budget, and which orderings papers report about them.

Settings that are not the subject of an experiment are those of the quickstart: 128 responses a step at
T = 1, one update per batch, learning rate 1e-3 for pathwise losses and 3e-4 for score functions, linear
decay to 10%.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.learning.arms import START, Answered, Arm, Claim, Experiment, Measure
from benchmarks.learning.scorers import ANSWERS, PENALTY
from benchmarks.learning.skills import ADDITION, SKILLS, SUBTRACTION

Objective = Mapping[str, Any]
SCORE_FUNCTION = 3e-4  # learning rate
K = 24  # of 32 tokens; the rest is one bucket

OPD: Objective = {
    "divergence": "kl_student_teacher", "support": "student_topk", "k": K, "tail": "bucket",
    "estimator": "pathwise",
}  # fmt: skip
KD: Objective = {
    "divergence": "kl_teacher_student", "support": "teacher_topk", "k": K, "tail": "bucket",
    "estimator": "pathwise",
}  # fmt: skip
SUPERVISED: Objective = {**KD, "k": 1}
SAMPLED: Objective = {"preset": "thinking-machines"}
GRPO: Objective = {"preset": "grpo"}
GROUP = 8  # responses to a prompt where a reward compares them

THE_ADDER = {"teacher": "adder"}


def sampled(name: str, objective: Objective = SAMPLED, **how: Any) -> Arm:
    """An arm trained by a score function."""
    return Arm(name, objective, learning_rate=SCORE_FUNCTION, **how)


STRONG_TO_WEAK = Experiment(
    name="a-strong-to-weak",
    title="Strong to weak: on-policy distillation and what it is compared with",
    question="Does a student learn more from a teacher's scores of its own responses than from as many "
    "tokens of anything else?",
    judge="adder",
    arms=(
        Arm("on-policy distillation", OPD, teachers=THE_ADDER),
        sampled("on-policy, sampled tokens", teachers=THE_ADDER),
        Arm("off-policy distillation", KD, teachers=THE_ADDER, sampler="teacher:teacher"),
        Arm("supervised on answers", SUPERVISED, teachers={"teacher": ANSWERS}, sampler=ANSWERS),
        sampled("GRPO, no teacher", GRPO, group=GROUP),
        sampled("penalty, no teacher", teachers={"teacher": PENALTY}),
    ),
    claims=(
        Claim(
            "on-policy distillation beats off-policy distillation at equal tokens",
            "Agarwal et al. 2024 (GKD); Thinking Machines Lab 2025",
            "on-policy distillation", "off-policy distillation", Measure("greedy"),
        ),
        Claim(
            "the same, judged by samples",
            "Agarwal et al. 2024 (GKD)",
            "on-policy distillation", "off-policy distillation", Measure("sampled"),
        ),
        Claim(
            "off-policy distillation stays further from the teacher on the student's own responses",
            "Agarwal et al. 2024 (GKD)",
            "off-policy distillation", "on-policy distillation", Measure("kl"),
        ),
        Claim(
            "on-policy distillation beats reinforcement learning from the reward at equal tokens",
            "Qwen3 technical report 2025; Thinking Machines Lab 2025",
            "on-policy distillation", "GRPO, no teacher", Measure("sampled"),
        ),
        Claim(
            "on-policy distillation beats supervised training on answers",
            "Qwen3 technical report 2025",
            "on-policy distillation", "supervised on answers", Measure("sampled"),
        ),
        Claim(
            "a fixed penalty on unlikely tokens does as well as a teacher's advantages",
            "reported as a control for sampled-token distillation",
            "penalty, no teacher", "on-policy, sampled tokens", Measure("sampled"), alike=0.05,
        ),
        Claim(
            "that penalty makes the student better than it was",
            "reported as a control for sampled-token distillation",
            "penalty, no teacher", START, Measure("greedy"),
        ),
    ),
)  # fmt: skip


def extrapolated(factor: float) -> Arm:
    """G-OPD's objective at one λ; λ = 1 needs no reference."""
    objective: dict[str, Any] = {"preset": "g-opd"}
    teachers = {"teacher": "expert"}
    if factor != 1.0:
        views = {
            "expert": {"weights": "teacher:expert", "coefficient": factor},
            "reference": {"weights": "teacher:reference", "coefficient": 1.0 - factor},
        }
        objective, teachers = {"preset": "exopd", "views": views}, {"expert": "expert", "reference": "base"}
    return sampled(f"λ = {factor:g}", objective, teachers=teachers)


EXTRAPOLATION = Experiment(
    name="b-extrapolation",
    title="Reward extrapolation: λ of G-OPD with a teacher that has room",
    question="Does a student go past a teacher that was trained too little, along the way from the teacher's "
    "base to the teacher?",
    judge="adder",
    arms=(
        *(extrapolated(factor) for factor in (0.5, 1.0, 1.25, 1.5)),
        Arm("the teacher itself", SAMPLED, start="expert", teachers={"teacher": "expert"}, trained=False),
    ),
    claims=(
        Claim(
            "λ = 1.25 beats plain distillation", "G-OPD / ExOPD", "λ = 1.25", "λ = 1", Measure("sampled")
        ),
        Claim(
            "λ = 0.5 stays behind plain distillation", "G-OPD / ExOPD", "λ = 1", "λ = 0.5",
            Measure("sampled"),
        ),
        Claim(
            "λ = 1.5 does worse than λ = 1.25", "G-OPD / ExOPD", "λ = 1.25", "λ = 1.5", Measure("sampled")
        ),
        Claim(
            "with λ = 1.25 the student goes past its teacher", "G-OPD / ExOPD",
            "λ = 1.25", "the teacher itself", Measure("sampled"),
        ),
    ),
    notes=("The teacher is its base and 40 steps more; the divergence is from the fully trained adder.",),
)  # fmt: skip

ON_ADDITION, ON_SUBTRACTION = Measure("sampled", ADDITION), Measure("sampled", SUBTRACTION)
EXPERTS = {"adder": "adder", "subtractor": "subtractor"}
ROUTED: Objective = {**OPD, "views": {"expert": {"route": {ADDITION: "adder", SUBTRACTION: "subtractor"}}}}


def of_both(name: str, objective: Objective, teachers: Mapping[str, str]) -> Arm:
    """An arm on the prompts of both skills."""
    return Arm(name, objective, start="sloppy at both", teachers=teachers, skills=SKILLS)


TWO_EXPERTS = Experiment(
    name="f-two-experts",
    title="Two experts into one student",
    question="Does routing each prompt to the expert of its skill lift both skills, where one expert lifts "
    "one and destroys the other?",
    sets=(Answered(ADDITION), Answered(SUBTRACTION)),
    arms=(
        of_both("routed by skill", ROUTED, EXPERTS),
        of_both("the adder alone", OPD, THE_ADDER),
        of_both("the subtractor alone", OPD, {"teacher": "subtractor"}),
    ),
    claims=(
        Claim("routing lifts addition", "G-OPD; MAD-OPD", "routed by skill", START, ON_ADDITION),
        Claim("routing lifts subtraction", "G-OPD; MAD-OPD", "routed by skill", START, ON_SUBTRACTION),
        Claim(
            "the adder alone loses subtraction", "control", START, "the adder alone", ON_SUBTRACTION
        ),
        Claim(
            "the subtractor alone loses addition", "control", START, "the subtractor alone", ON_ADDITION
        ),
        Claim(
            "with prompts of both skills, routing teaches even addition better than the adder alone",
            "control", "routed by skill", "the adder alone", ON_ADDITION,
        ),
    ),
)  # fmt: skip


CACHED: Objective = {"preset": "lightning"}
FEW, ALL = 20, 10**6  # steps' worth of fixed responses

LIGHTNING = Experiment(
    name="g-cached",
    title="Cached against live scores",
    question="Are scores of the start's own responses, taken once, as good as scores of what the student "
    "writes while it learns?",
    judge="adder",
    arms=(
        *(
            sampled(f"{how}, start {condition}", objective, start=start, teachers=THE_ADDER, fixed=fixed)
            for condition, start in (("of right sums", "taught"), ("of sloppy sums", "sloppy"))
            for how, objective, fixed in (("live", SAMPLED, 0), ("cached", CACHED, ALL))
        ),
        sampled(
            f"cached, {FEW} steps again and again", CACHED, start="taught", teachers=THE_ADDER, fixed=FEW
        ),
    ),
    claims=(
        Claim(
            "cached scores do as well as live ones for a start that saw what the teacher saw",
            "Lightning OPD",
            "cached, start of right sums", "live, start of right sums", Measure("sampled"), alike=0.05,
        ),
        Claim(
            "they do as well for a start that saw other data",
            "control",
            "cached, start of sloppy sums", "live, start of sloppy sums", Measure("sampled"), alike=0.05,
        ),
    ),
    notes=(
        "Cached scores are of the responses of the start; nothing is sampled again. A teacher that never "
        "changes would score them no differently later, so each was asked once.",
        "The report asks that the teacher which scores wrote the start's training data. No model wrote it: "
        "one start saw right sums, as the teacher did, for 300 steps, the other 4,000 sums with forgotten "
        "carries. They differ in how good they are, too, so this neither meets the condition nor tests it.",
        "The source trains at a learning rate of 2e-6; here every arm has 3e-4 and goes far from its start.",
    ),
)  # fmt: skip


def selected(name: str, fraction: float, how: str) -> Arm:
    """On-policy distillation on a fraction of the positions, divided by all of them.

    What `top_fraction` drops counts as zero in the mean. Positions without a score do not count, so the
    loss of the others is made smaller by the fraction.
    """
    if how == "disagreement":
        return Arm(name, {**OPD, "tokens": {"top_fraction": fraction}}, teachers=THE_ADDER)
    pick = "entropy" if how == "entropy" else "random"
    objective = {**OPD, "distill_coefficient": fraction}
    return Arm(name, objective, teachers=THE_ADDER, fraction=fraction, pick=pick)


BUDGETS = (0.05, 0.1, 0.5)
TOKEN_BUDGETS = Experiment(
    name="h-token-budgets",
    title="Token budgets: which positions are worth training on",
    question="Do the few positions where student and teacher disagree teach as much as all of them?",
    judge="adder",
    arms=(
        Arm("all tokens", OPD, teachers=THE_ADDER),
        *(
            selected(f"{fraction:.0%} by {how}", fraction, how)
            for how in ("disagreement", "entropy", "chance")
            for fraction in BUDGETS
        ),
    ),
    claims=(
        Claim(
            "5% of the tokens by disagreement suffice", "TA-OPD", "5% by disagreement", "all tokens",
            Measure("sampled"), alike=0.05,
        ),
        Claim(
            "10% by disagreement do as well as all", "TA-OPD", "10% by disagreement", "all tokens",
            Measure("sampled"), alike=0.05,
        ),
        Claim(
            "disagreement chooses better than chance (5%)", "TA-OPD", "5% by disagreement", "5% by chance",
            Measure("sampled"),
        ),
        Claim(
            "disagreement chooses better than entropy (5%)", "TA-OPD", "5% by disagreement", "5% by entropy",
            Measure("sampled"),
        ),
    ),
    notes=(
        "Entropy is the teacher's. All arms sample and score the same tokens; the loss sees a part.",
        "However the part is chosen, its loss is divided by all tokens.",
    ),
)  # fmt: skip


def rewarded(name: str, **objective: Any) -> Arm:
    """An arm whose reward compares the responses of a prompt."""
    common = {"divergence": "kl_student_teacher", "support": "sampled", "estimator": "score_function"}
    teachers = THE_ADDER if objective else {}
    return sampled(name, {**common, **objective} if objective else GRPO, group=GROUP, teachers=teachers)


def multiplied(ratio: str, gate: str) -> dict[str, Any]:
    return {
        "mix": "multiply", "ratio": ratio, "ratio_gate": gate, "ratio_clip": 1.0, "distill_coefficient": 1.0,
        "advantage_std": True,
    }  # fmt: skip


REWARD_MIXING = Experiment(
    name="i-reward-mixing",
    title="A teacher beside a reward: add, multiply, and multiply without a gate",
    question="What does a teacher add to a verifiable reward, and does its factor need a gate?",
    judge="adder",
    arms=(
        rewarded("reward alone"),
        rewarded("added", mix="add", advantage_std=True),
        rewarded("multiplied, gated", **multiplied("teacher_over_student", "rewarded")),
        rewarded("multiplied, no gate", **multiplied("teacher_over_student", "none")),
        rewarded("inverse ratio, gated", **multiplied("student_over_teacher", "rewarded")),
        rewarded("inverse ratio, no gate", **multiplied("student_over_teacher", "none")),
    ),
    claims=(
        Claim("adding a teacher to the reward helps", "KEPO", "added", "reward alone", Measure("sampled")),
        Claim(
            "the reward multiplied by a gated ratio helps", "RLSD", "multiplied, gated", "reward alone",
            Measure("sampled"),
        ),
        Claim(
            "without the gate the inverse ratio collapses, below its start", "RLRT", START,
            "inverse ratio, no gate", Measure("sampled"),
        ),
        Claim(
            "the gate prevents that collapse", "RLRT", "inverse ratio, gated", START, Measure("sampled")
        ),
        Claim(
            "without the gate the ratio towards the teacher collapses, below its start", "RLSD", START,
            "multiplied, no gate", Measure("sampled"),
        ),
    ),
)  # fmt: skip
