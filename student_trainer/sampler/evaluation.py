"""Accuracy on held-out prompts, greedily and sampled at temperature 1, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tutelage_client.errors import invalid

from services.models.generate import Response, Row
from student_trainer.sampler.groups import GroupSampler
from student_trainer.tasks import Example


def evaluate(sampler: GroupSampler, *, prompts: int, policy_version: int) -> dict[str, Any]:
    """Answer the first `prompts` held-out prompts with the student's weights that are loaded now.

    Returns:
        JSON-ready: `version`, `prompts`, and for `greedy` and `sampled` each `accuracy`,
        `standard_error`, `mean_tokens` and `finished` (share of responses that ended).
    """
    examples = sampler.prompts.held_out(prompts)
    if any(example.answer is None for example in examples):
        raise invalid("data.answer_field: evaluation needs answers to check responses against")
    # Counting down from −1: a training group never has these random numbers.
    rows = [Row(prompt.ids, -1 - i, 0) for i, prompt in enumerate(sampler.encoder.encode(examples))]
    result: dict[str, Any] = {"version": policy_version, "prompts": len(examples)}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        responses = sampler.student.generate(
            rows,
            seed=sampler.seed,
            temperature=temperature,
            max_new_tokens=sampler.sampling.max_new_tokens,
        )
        result[name] = _summary(sampler, examples, responses)
    return result


def _summary(
    sampler: GroupSampler, examples: Sequence[Example], responses: Sequence[Response]
) -> dict[str, float]:
    rewards = [
        sampler.prompts.reward(example, text) or 0.0
        for example, text in zip(examples, sampler.texts(responses), strict=True)
    ]
    accuracy = float(np.mean(rewards))
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1.0 - accuracy) / len(rewards)),
        "mean_tokens": float(np.mean([len(response.ids) for response in responses])),
        "finished": float(np.mean([response.finished for response in responses])),
    }
