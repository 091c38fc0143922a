"""Work of a vLLM engine's thread: requests, what was asked about them, and counts of what was done."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tutelage_client.types import Score, ScoreRequest, SequenceScore

from services.teacher.engines.batching import Answer
from services.teacher.engines.vllm.questions import Answered, Question


@dataclass(eq=False)
class Job:
    """A request on its way; after it was submitted the thread alone changes it."""

    request: ScoreRequest
    answer: Answer[Score]
    arrived: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0
    tokens_computed: int = 0
    tokens_reused: int = 0
    compute_seconds: float = 0.0
    alone: bool = False  # it was in a step that failed, and gets its second chance by itself
    handed: int = 0  # sequences, from the first on, that vLLM was asked about
    held: int = 0  # prompt ids of sequences that are not answered yet
    open: set[str] = field(default_factory=set)
    waiting: dict[int, dict[int, Answered | None]] = field(default_factory=dict)  # by sequence and question
    scores: dict[int, SequenceScore] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """One question about a sequence inside vLLM."""

    job: Job
    index: int
    number: int
    question: Question
    read_cache: bool


@dataclass
class Counters:
    """What the thread has done since it started."""

    steps: int = 0
    requests: int = 0
    positions: int = 0
    tokens_computed: int = 0
    tokens_reused: int = 0
    withdrawn: int = 0
    rescored: int = 0
    failed_steps: int = 0
