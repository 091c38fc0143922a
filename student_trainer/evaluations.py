"""Evaluations: ordered from the samplers for a policy version, logged when the answer is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from tutelage.v1.rollout_pb2 import SampleOrder

from services.queue import Queue
from student_trainer.config import RunConfig
from student_trainer.ledger import Ledger
from student_trainer.policy_store import PolicyStore

log = structlog.get_logger(__name__)

MAX_REORDERS = 3


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy on the held-out prompts, each in [0, 1], answered greedily and sampled at temperature 1."""

    policy_version: int
    prompts: int
    greedy: float
    sampled: float


class Evaluations:
    """The evaluations of one run; what is still open is part of the ledger."""

    def __init__(self, queue: Queue, config: RunConfig, ledger: Ledger, store: PolicyStore) -> None:
        self._queue = queue
        self._run = config.run.name
        self._every = config.training.evaluate_every
        self._steps = config.training.steps
        self._ledger = ledger
        self._store = store
        self._ordered: set[int] = set()
        self._reorders = 0

    @property
    def pending(self) -> list[int]:
        return self._ledger.pending_evaluations

    def note(self, version: int) -> None:
        """Remember in the ledger that `version` is to be evaluated, when it is one of those."""
        due = self._every and (version % self._every == 0 or version == self._steps)
        if due and version not in self.pending:
            self.pending.append(version)

    async def order(self, *, resuming: bool = False) -> None:
        """Ask for what is pending.

        A version published for the first time by this process may have an answer already, left by
        a trainer that was killed further on: it was about other weights and is deleted. When
        `resuming`, answers are about the weights of the checkpoint and are kept.
        """
        for version in list(self.pending):
            if version in self._ordered:
                continue
            if not resuming:
                await self._queue.publish_progress(self._run, {_field(version): None})
            elif self._store.get(version) is None and await self._answer(version) is None:
                log.warning("policy version is gone and will not be evaluated", policy_version=version)
                self.pending.remove(version)
                continue
            self._ordered.add(version)
            await self._place(version)

    async def order_again(self) -> bool:
        """Place open orders anew, for a queue that lost them; what it still has stays as it is.

        Returns:
            False once that has been done too often: nothing is pending any more.
        """
        if self._reorders == MAX_REORDERS:
            self._ordered.clear()
            self.pending.clear()
            return False
        self._reorders += 1
        for version in self._ordered:
            await self._place(version)
        return True

    async def _place(self, version: int) -> None:
        order = SampleOrder(
            id=f"{self._run}-e{version}",
            run=self._run,
            policy_version=version,
            exact=True,
            evaluation=True,
        )
        await self._queue.place_order(order, again=True)

    def collect(self, progress: Mapping[str, Any]) -> list[Evaluation]:
        """Answers that have come in with the run's progress; they are no longer pending."""
        found = []
        for version in sorted(self._ordered):
            if (answer := progress.get(_field(version))) is not None:
                found.append(_evaluation(answer))
                self._ordered.discard(version)
                self.pending.remove(version)
        return found

    async def _answer(self, version: int) -> Any:
        return (await self._queue.read_progress(self._run)).get(_field(version))


def _field(version: int) -> str:
    return f"eval:{version}"


def _evaluation(answer: dict[str, Any]) -> Evaluation:
    return Evaluation(
        policy_version=int(answer["version"]),
        prompts=int(answer["prompts"]),
        greedy=float(answer["greedy"]["accuracy"]),
        sampled=float(answer["sampled"]["accuracy"]),
    )
