"""The models of the experiments: trained once from scratch by supervised learning, then found again.

A teacher is the same for all seeds; a start (a student before its arm) is trained anew for each seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.learning.skills import ADDITION, LETTERS, SUBTRACTION, known, problem, training_pairs
from launcher.quickstart_recipes import STUDENT, TEACHER, ModelRecipe

if TYPE_CHECKING:
    from torch import Tensor

CONTENT_VERSION = 1  # raise it when training changes in a way that the settings do not show


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of example.

    Attributes:
        share: of the batch.
        given: what stands before the prompt, see `skills.known`.
        forgotten: probability that a carry or borrow is written and then forgotten.
        jumps: answer with the result alone, no work shown.
        examples: so many distinct ones, seen again and again; 0: always new ones.
    """

    share: float
    skill: str
    given: str = ""
    forgotten: float = 0.0
    jumps: bool = False
    examples: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """How a model comes to be; `after` names the model that it goes on from."""

    recipe: ModelRecipe
    parts: tuple[Part, ...]
    per_seed: bool = True
    after: str | None = None


_BIG = replace(TEACHER, sloppy_examples=0)
_SMALL = replace(STUDENT, sloppy_examples=0, carry_forgotten=0.0)
_SLOPPY = 0.8

MODELS: Mapping[str, ModelSpec] = {
    # Teachers. Each of the first two has never seen the other's operation.
    "adder": ModelSpec(_BIG, (Part(1.0, ADDITION),), per_seed=False),
    "subtractor": ModelSpec(_BIG, (Part(1.0, SUBTRACTION),), per_seed=False),
    "base": ModelSpec(replace(_BIG, steps=400), (Part(1.0, ADDITION, forgotten=_SLOPPY),), per_seed=False),
    "expert": ModelSpec(
        replace(_BIG, steps=40, learning_rate=3e-4, warmup_steps=10),
        (Part(1.0, ADDITION),),
        per_seed=False,
        after="base",
    ),
    # Starts.
    "sloppy": ModelSpec(_SMALL, (Part(1.0, ADDITION, forgotten=_SLOPPY, examples=4000),)),
    "sloppy at both": ModelSpec(
        replace(_SMALL, steps=800),
        (
            Part(0.5, ADDITION, forgotten=_SLOPPY, examples=4000),
            Part(0.5, SUBTRACTION, forgotten=_SLOPPY, examples=4000),
        ),
    ),
    "taught": ModelSpec(replace(_SMALL, steps=300), (Part(1.0, ADDITION),)),
    # Sloppy, unless it is told the rule or the solution; told the result, it jumps to it.
    "reader": ModelSpec(
        replace(_SMALL, steps=1200),
        (
            Part(0.4, ADDITION, forgotten=_SLOPPY, examples=4000),
            Part(0.25, ADDITION, given="rule"),
            Part(0.2, ADDITION, given="solution"),
            Part(0.15, ADDITION, given="result", jumps=True),
        ),
    ),
    # Adds; subtracts sloppily, and well only by repeating a solution that it is shown.
    "learner": ModelSpec(
        replace(_SMALL, steps=1200),
        (
            Part(0.5, ADDITION),
            Part(0.2, SUBTRACTION, forgotten=_SLOPPY, examples=4000),
            Part(0.15, ADDITION, given="solution"),
            Part(0.15, SUBTRACTION, given="solution"),
        ),
    ),
}


def model_path(directory: Path, name: str, seed: int, specs: Mapping[str, ModelSpec] = MODELS) -> Path:
    """Where the model lies, or will: a name that changes with everything that decides the weights."""
    spec = specs[name]
    own = seed if spec.per_seed else 0
    return directory / f"{name.replace(' ', '-')}-{own}-{_key(name, own, specs)}"


def _key(name: str, seed: int, specs: Mapping[str, ModelSpec]) -> str:
    spec = specs[name]
    before = None if spec.after is None else _key(spec.after, seed, specs)
    document = {"version": CONTENT_VERSION, "seed": seed, "before": before, **asdict(spec)}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]


def make_model(
    directory: Path,
    name: str,
    seed: int,
    report: Callable[[int, int], None],
    specs: Mapping[str, ModelSpec] = MODELS,
) -> Path:
    """Train the model unless it is there; `report(step, steps)` after every step.

    The model that it goes on from must be there. One thread, float32; a function of settings and seed.
    """
    path = model_path(directory, name, seed, specs)
    if path.is_dir():
        return path
    import torch

    from launcher.quickstart_training import fit, new_model
    from services.models.export import export_model
    from services.models.load import load_causal_lm
    from student_trainer.tasks.characters import character_tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    spec = specs[name]
    if spec.after is None:
        model = new_model(spec.recipe)
    else:
        before = model_path(directory, spec.after, seed, specs)
        model = load_causal_lm(before, device="cpu", attention="plain").model
    tokenizer = character_tokenizer(LETTERS)
    examples = Examples(spec, seed, tokenizer)
    fit(model, spec.recipe, examples, lambda step, _: report(step, spec.recipe.steps))
    return export_model(model, tokenizer, path)


class Examples:
    """Padded batches of a mixture of parts; what comes before the answer is not learned."""

    def __init__(self, spec: ModelSpec, seed: int, tokenizer: object) -> None:
        self._spec = spec
        self._random = np.random.default_rng(seed)
        self._tokenizer = tokenizer
        self._fixed = [
            [self._text(part) for _ in range(part.examples)] if part.examples else None for part in spec.parts
        ]

    def next(self) -> tuple[Tensor, Tensor]:
        from launcher.quickstart_training import IGNORED

        shares = [part.share for part in self._spec.parts]
        chosen = self._random.choice(len(shares), size=self._spec.recipe.batch, p=shares)
        pairs = [self._pair(int(which)) for which in chosen]
        encoded = self._tokenizer(  # type: ignore[operator]
            [before + after for before, after in pairs],
            padding=True, padding_side="right", return_tensors="pt",
        )  # fmt: skip
        labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORED)
        for row, (before, _) in zip(labels, pairs, strict=True):
            row[: len(before)] = IGNORED
        return encoded["input_ids"], labels

    def _pair(self, which: int) -> tuple[str, str]:
        fixed = self._fixed[which]
        return (
            self._text(self._spec.parts[which])
            if fixed is None
            else fixed[int(self._random.integers(len(fixed)))]
        )

    def _text(self, part: Part) -> tuple[str, str]:
        """Context with prompt, and answer with its end; one character is one token."""
        found = problem(part.skill, int(self._random.choice(training_pairs())))
        forgotten = [bool(x) for x in self._random.random(2) < part.forgotten]
        answer = f":{found.answer}" if part.jumps else found.solution(forgotten)
        return known(found, part.given) + found.prompt, f"{answer}{self._tokenizer.eos_token}"  # type: ignore[attr-defined]
