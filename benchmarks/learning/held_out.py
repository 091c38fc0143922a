"""What a student can do: accuracy on held-out prompts and its exact divergence from a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tutelage_client.types import Int32Array

from benchmarks.learning.arms import Answered
from benchmarks.learning.skills import MAX_NEW_TOKENS, held_out, known
from services.models.generate import Response, Row
from services.models.layout import build_layout
from services.models.load import LoadedModel
from services.models.packed import hidden_states
from student_trainer.sampler.checkers import numeric
from student_trainer.sampler.generate import Generator


@dataclass(frozen=True, slots=True)
class Found:
    """Of one set: shares of right answers in [0, 1], and tokens of a sampled response."""

    greedy: float
    sampled: float
    length: float


class HeldOut:
    """The prompts of a set with their answers, encoded once."""

    def __init__(self, answered: Answered, count: int, tokenizer: Any) -> None:
        problems = held_out(answered.skill, count)
        self.name = answered.name
        self._answers = [problem.answer for problem in problems]
        self._tokenizer = tokenizer
        self.prompts = [
            np.array(tokenizer(known(problem, answered.given) + problem.prompt)["input_ids"], dtype=np.int32)
            for problem in problems
        ]

    def ask(self, student: Generator, seed: int) -> tuple[Found, list[Response]]:
        """Greedily and at T = 1; the responses are those at T = 1."""
        greedy = self._responses(student, seed, 0.0)
        sampled = self._responses(student, seed, 1.0)
        found = Found(
            greedy=self._accuracy(greedy),
            sampled=self._accuracy(sampled),
            length=float(np.mean([len(response.ids) for response in sampled])),
        )
        return found, sampled

    def _responses(self, student: Generator, seed: int, temperature: float) -> list[Response]:
        # Counting down from −1, as evaluations do: a training group never has these random numbers.
        rows = [Row(prompt, -1 - place, 0) for place, prompt in enumerate(self.prompts)]
        return student.generate(rows, seed=seed, temperature=temperature, max_new_tokens=MAX_NEW_TOKENS)

    def _accuracy(self, responses: Sequence[Response]) -> float:
        texts = self._tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)
        rewards = [numeric(text, answer) for text, answer in zip(texts, self._answers, strict=True)]
        return float(np.mean(rewards))


@torch.inference_mode()
def divergence(
    student: LoadedModel, teacher: LoadedModel, prompts: Sequence[Int32Array], responses: Sequence[Response]
) -> float:
    """Mean over response positions of KL(student‖teacher) over the whole vocabulary, nats."""
    layout = build_layout(prompts, [(place, response.ids) for place, response in enumerate(responses)])
    log_p, log_q = (
        torch.log_softmax(
            loaded.head.logits(hidden_states(loaded.model, layout)[layout.score_rows]).double(), -1
        )
        for loaded in (student, teacher)
    )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
