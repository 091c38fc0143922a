"""Experiments without another model: the student itself, told more than it is told when it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.learning.arms import START, Answered, Arm, Claim, Experiment, Measure
from benchmarks.learning.from_teachers import GROUP, GRPO, OPD, SUPERVISED, K, Objective, sampled
from benchmarks.learning.scorers import ANSWERS
from benchmarks.learning.skills import ADDITION, HINT, RULE, SUBTRACTION

TOLD_THE_RULE = {"user": f"{RULE}{{prompt}}"}
TOLD_THE_SOLUTION = {"user": f"{{solution}}{HINT}{{prompt}}"}
TOLD_THE_RESULT = {"user": f"{{answer}}{HINT}{{prompt}}"}
SHOWN_A_SUCCESS = {"user": f"{{success}}{HINT}{{prompt}}"}


def told(context: Any, weights: str = "initial", **more: Any) -> Objective:
    """On-policy distillation from oneself under another context."""
    return {**OPD, "views": {"self": {"weights": weights, "context": context, **more}}}


def _reader(name: str, objective: Objective, **how: Any) -> Arm:
    return Arm(name, objective, start="reader", **how)


PLAIN, LENGTH = Measure("sampled"), Measure("length")
CONTEXT = Experiment(
    name="c-privileged-context",
    title="Privileged context: a shared rule, a solution, a bare result",
    question="Does the student without the context become what it is with it, and what leaks when the "
    "context holds the answer?",
    sets=(Answered(), Answered(given="rule"), Answered(given="solution"), Answered(given="result")),
    arms=(
        _reader("told the rule", told(TOLD_THE_RULE)),
        _reader("told the solution", told(TOLD_THE_SOLUTION)),
        _reader("told the result", told(TOLD_THE_RESULT)),
    ),
    claims=(
        Claim(
            "a rule in the context moves into the weights: without it as good as the start with it",
            "on-policy context distillation (OPCD)",
            "told the rule", START, PLAIN, alike=0.05,
            less_measure=Measure("sampled", f"{ADDITION}, rule given"),
        ),
        Claim(
            "a solution in the teacher's context helps the student that never sees it",
            "OPSD", "told the solution", START, PLAIN,
        ),
        Claim(
            "a bare result in the context leaks: the student copies the form, its answers get short",
            "reports on privileged information in self-distillation",
            START, "told the result", LENGTH,
        ),
        Claim(
            "and it answers worse than one whose teacher saw the work",
            "reports on privileged information in self-distillation",
            "told the solution", "told the result", PLAIN,
        ),
    ),
    notes=(
        "The start was trained to work sloppily, with care when it is told the rule or the solution, and to "
        "jump to the answer when it is told the result: that jump is the leak, made on purpose.",
    ),
)  # fmt: skip


def _learner(name: str, objective: Objective, **how: Any) -> Arm:
    return Arm(name, objective, start="learner", skills=(SUBTRACTION,), **how)


def _supervised(name: str, learning_rate: float) -> Arm:
    teachers: Mapping[str, str] = {"teacher": ANSWERS}
    return _learner(name, SUPERVISED, teachers=teachers, sampler=ANSWERS, learning_rate=learning_rate)


NEW, OLD = Measure("sampled", SUBTRACTION), Measure("sampled", ADDITION)
SECOND_SKILL = Experiment(
    name="d-second-skill",
    title="Subtraction after addition, with forgetting measured",
    question="The student adds, forgets to borrow when it subtracts, and learns better from prompts of "
    "subtraction alone. What is left of its addition?",
    sets=(Answered(SUBTRACTION), Answered(ADDITION)),
    arms=(
        _learner("from oneself with the solution", told(TOLD_THE_SOLUTION)),
        _learner("from an expert, on-policy", OPD, teachers={"teacher": "subtractor"}),
        _supervised("supervised on answers", 1e-3),
        _supervised("supervised, a third of the rate", 3e-4),
    ),
    claims=(
        Claim("the new skill is learned from oneself", "SDFT", "from oneself with the solution", START, NEW),
        Claim(
            "on-policy self-distillation forgets less than supervised training", "SDFT",
            "from oneself with the solution", "supervised on answers", OLD,
        ),
        Claim(
            "on-policy distillation from an expert forgets less than supervised training",
            "Thinking Machines Lab 2025",
            "from an expert, on-policy", "supervised on answers", OLD,
        ),
        Claim(
            "and learns the new skill as well", "SDFT",
            "from oneself with the solution", "supervised on answers", NEW, alike=0.05,
        ),
    ),
    notes=(
        "The start forgets four borrows in five. It can repeat a solution that stands before the prompt.",
        "Arms are compared at equal tokens, not at equal skill: who learned less may have forgotten less.",
    ),
)  # fmt: skip


def _from_feedback(name: str, *contexts: Mapping[str, str]) -> Arm:
    view = {"context": list(contexts)}
    return _reader(name, {"preset": "sdpo", "k": K, "views": {"hindsight": view}}, group=GROUP)


FEEDBACK = Experiment(
    name="e-feedback",
    title="A sibling's success or the solution, against a scalar reward",
    question="Does a student whose teacher sees what was right learn faster than one that is told how good "
    "each answer was?",
    arms=(
        _from_feedback("a sibling's success", SHOWN_A_SUCCESS),
        _from_feedback("success, else the solution", SHOWN_A_SUCCESS, TOLD_THE_SOLUTION),
        sampled("GRPO", GRPO, start="reader", group=GROUP),
    ),
    claims=(
        Claim(
            "hindsight beats GRPO at equal tokens", "SDPO",
            "success, else the solution", "GRPO", PLAIN,
        ),
        Claim("a sibling's success alone beats GRPO", "SDPO", "a sibling's success", "GRPO", PLAIN),
    ),
    notes=(
        "The tokenizer has characters for sums and none for words, so no checker says what was wrong.",
        "The start knows how to work with care once it is told the rule or the solution, and a reward finds "
        "that too.",
    ),
)  # fmt: skip
