"""What vLLM is asked about a sequence: one request, or several whose answers belong together."""

from __future__ import annotations

from collections.abc import Sequence as Members
from dataclasses import dataclass
from typing import Any, Protocol

from tutelage_client.types import ScoreRequest, Sequence, SequenceScore, Signal


@dataclass(frozen=True)
class Question:
    """A vLLM request.

    Attributes:
        replies: how many are sampled; vLLM has the prompt for each of them.
        about: what `Scoring.answer` has to know of it beside the sequence.
    """

    prompt: list[int]
    params: Any
    replies: int = 1
    about: Any = None

    @property
    def held(self) -> int:
        """Ids of it that are kept in lists until it is answered."""
        return self.replies * len(self.prompt)


@dataclass(frozen=True)
class Answered:
    """A question with vLLM's finished output."""

    question: Question
    output: Any


class Scoring(Protocol):
    """How a sequence becomes vLLM requests and their outputs a score: Pooled, Stock, Judged or Written.

    A sequence that needs no asking, or cannot be asked about, is answered at once.
    """

    def questions(
        self, request: ScoreRequest, sequence: Sequence, *, read_cache: bool
    ) -> Members[Question] | SequenceScore: ...

    def answer(
        self, answered: Members[Answered], sequence: Sequence, signal: Signal
    ) -> SequenceScore | None: ...
