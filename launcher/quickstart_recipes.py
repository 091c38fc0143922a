"""Shapes and training settings of the quickstart's two models; no torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """A Qwen3-shaped model and its supervised training on the addition task."""

    layers: int
    hidden: int
    heads: int
    feed_forward: int
    steps: int
    sloppy_examples: int = 0  # 0: fresh correct examples; else so many, carries forgotten
    carry_forgotten: float = 0.0  # probability, per carry
    batch: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 50


TEACHER = ModelRecipe(layers=3, hidden=128, heads=4, feed_forward=384, steps=600)
# What it has to learn by distillation: to carry. Its answers have the right form and sloppy sums.
STUDENT = ModelRecipe(
    layers=2, hidden=96, heads=3, feed_forward=288, steps=600, sloppy_examples=4000, carry_forgotten=0.8
)
RECIPES = {"teacher": TEACHER, "student": STUDENT}
