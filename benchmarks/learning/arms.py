"""What an arm, a claim and an experiment are; an arm becomes a run file like any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.learning.models import MODELS, ModelSpec, model_path
from benchmarks.learning.skills import ADDITION, MAX_NEW_TOKENS, data_file

CONTENT_VERSION = 1  # raise it when arms are run in another way that their settings do not show
RESPONSES = 128  # of one step, in every arm
STEPS = 60
WARMUP = 5

Who = Literal["student", "answers"]
Pick = Literal["random", "entropy"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything; `--quick` and the tests have less."""

    steps: int = STEPS
    responses: int = RESPONSES
    evaluation_prompts: int = 500

    @property
    def looks(self) -> tuple[int, ...]:
        """Steps after which held-out prompts are answered."""
        return tuple(sorted({0, 2 * self.steps // 5, self.steps}))


@dataclass(frozen=True, slots=True)
class Answered:
    """Held-out prompts that an arm is judged on, alone or with something known before them."""

    skill: str = ADDITION
    given: str = ""

    @property
    def name(self) -> str:
        return f"{self.skill}, {self.given} given" if self.given else self.skill


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train one start.

    Attributes:
        objective: the [objective] section of its run file.
        start: the model it begins with.
        teachers: names in the run file, and the model behind each; "answers" and "penalty" are no models
            (see scorers).
        sampler: who writes the responses: the student, "teacher:NAME", or "answers" (the worked answers).
        group: responses of one prompt.
        fixed: the start writes all responses; 0: the student as it is now. n: the first n steps'
            responses, again and again.
        fraction, pick: train on this fraction of the positions, chosen at random or by the teacher's entropy.
        trained: no: only look at the start, to compare others with.
    """

    name: str
    objective: Mapping[str, Any]
    start: str = "sloppy"
    teachers: Mapping[str, str] = field(default_factory=dict)
    skills: Sequence[str] = (ADDITION,)
    sampler: str = "student"
    group: int = 1
    learning_rate: float = 1e-3
    fixed: int = 0
    fraction: float = 1.0
    pick: Pick = "random"
    trained: bool = True

    def models(self, specs: Mapping[str, ModelSpec] = MODELS) -> list[str]:
        """Names of the models that must be there first."""
        return [self.start, *(model for model in self.teachers.values() if model in specs)]

    def document(
        self, seed: int, directory: Path, sizes: Sizes, specs: Mapping[str, ModelSpec] = MODELS
    ) -> dict[str, Any]:
        """The run file of this arm."""
        teachers: dict[str, dict[str, str]] = {}
        for name, model in self.teachers.items():
            known = model in specs
            teachers[name] = (
                {"model": str(model_path(directory / "models", model, seed, specs))}
                if known
                else {"engine": "fake"}
            )
        document: dict[str, Any] = {
            "run": {
                "name": "learning", "directory": str(directory / "run"), "seed": seed, "deterministic": True,
            },
            "teachers": teachers,
            "student": {
                "model": str(model_path(directory / "models", self.start, seed, specs)), "device": "cpu",
            },
            "data": {
                "path": str(data_file(directory / "data", self.skills)),
                "answer_field": "answer", "checker": "numeric", "holdout": 0.0, "chat_template": "never",
                "tag_field": "skill",
            },
            "sampling": {
                "samples_per_prompt": self.group, "max_new_tokens": MAX_NEW_TOKENS,
                "batch_size": sizes.responses, "groups_per_order": max(1, sizes.responses // self.group),
            },
            "objective": dict(self.objective),
            "training": {
                "steps": sizes.steps, "prompts_per_step": max(1, sizes.responses // self.group),
                "learning_rate": self.learning_rate, "warmup_steps": min(WARMUP, sizes.steps),
            },
        }  # fmt: skip
        if self.sampler.startswith("teacher:"):
            document["sampling"]["sampler"] = self.sampler
        return document


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of an arm at its end: `on` a set of held-out prompts, or the divergence from the teacher."""

    figure: Literal["greedy", "sampled", "length", "kl"]
    on: str = ADDITION

    @property
    def text(self) -> str:
        texts = {
            "greedy": f"greedy accuracy on {self.on}",
            "sampled": f"accuracy at T = 1 on {self.on}",
            "length": f"response length on {self.on}",
            "kl": "KL to the teacher",
        }
        return texts[self.figure]


@dataclass(frozen=True, slots=True)
class Claim:
    """An ordering that was reported: `more` has more of `measure` than `less`, or as much where `alike`.

    Attributes:
        says: the report, in its own terms.
        source: who says so.
        more, less: arms, or START.
        alike: both within so much of one another is what is claimed; None: more is.
        less_measure: of `less`, where it is another one.
    """

    says: str
    source: str
    more: str
    less: str
    measure: Measure
    alike: float | None = None
    less_measure: Measure | None = None


@dataclass(frozen=True, slots=True)
class Experiment:
    """Arms that share a budget, and what was reported about them."""

    name: str
    title: str
    question: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    sets: tuple[Answered, ...] = (Answered(),)
    judge: str | None = None  # the model whose divergence is measured
    notes: tuple[str, ...] = ()

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


START = "before"  # in claims: the arms' common start, untrained


def arm_key(
    experiment: Experiment,
    arm: Arm,
    seed: int,
    sizes: Sizes,
    specs: Mapping[str, ModelSpec] = MODELS,
) -> str:
    """A name for the result that changes with everything that decides it, and with nothing else.

    Arms of two experiments that are the same but for their names have one result.
    """
    models = [model_path(Path(), name, seed, specs).name for name in arm.models(specs)]
    document = {
        "version": CONTENT_VERSION,
        "arm": asdict(replace(arm, name="", objective=dict(arm.objective), teachers=dict(arm.teachers))),
        "sets": [asdict(answered) for answered in experiment.sets],
        "judge": experiment.judge,
        "sizes": asdict(sizes),
        "seed": seed,
        "models": models,
    }
    digest = hashlib.sha256(json.dumps(document, sort_keys=True, default=list).encode()).hexdigest()
    return f"arm-{seed}-{digest[:12]}"
