"""A writer of responses that is no model: it writes the worked answer of every prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning.skills import ADDITION, SUBTRACTION, Problem
from services.models.generate import Response, Row

_PROMPT = re.compile(r"(\d+)([+-])(\d+)=$")


class AnswerWriter:
    """A Generator that knows the answers; the probability of what it writes is 1."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def generate(
        self, rows: Sequence[Row], *, seed: int, temperature: float, max_new_tokens: int, candidates: int = 0
    ) -> list[Response]:
        prompts = self._tokenizer.batch_decode([row.prompt_ids for row in rows])
        return [self._answer(prompt) for prompt in prompts]

    def interrupt(self) -> None:
        """Nothing to end: an answer takes no time."""

    def load_weights(self, directory: Path) -> None:
        """It has none."""

    def close(self) -> None:
        """It holds nothing."""

    def _answer(self, prompt: str) -> Response:
        found = _PROMPT.search(prompt)
        if found is None:
            raise ValueError(f"prompt: got {prompt!r}, which ends with no problem")
        skill = ADDITION if found[2] == "+" else SUBTRACTION
        solution = Problem(skill, int(found[1]), int(found[3])).solution()
        ids = [*self._tokenizer(solution)["input_ids"], self._tokenizer.eos_token_id]
        return Response(np.array(ids, np.int32), np.zeros(len(ids), np.float32), None, True)
