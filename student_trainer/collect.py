"""Collecting the groups of one step: nothing twice, nothing stale, nothing unverified."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import structlog
from tutelage.v1.rollout_pb2 import Group
from tutelage_client.errors import TutelageError

from services.logs import about
from services.queue import ScoredGroup, ScoredReader
from student_trainer.channels import OldWeightsError, WeightsRule, max_lag
from student_trainer.config import RunConfig
from student_trainer.ledger import Ledger
from student_trainer.lineage import updates_between
from student_trainer.pacing import REPLACEMENTS_FROM, Pacer
from student_trainer.spans import record_collected
from student_trainer.verify import Expectations, RefusedGroupError, TrainingGroup, verify_group
from student_trainer.waiting import Watch

log = structlog.get_logger(__name__)

BLOCK_MS = 500
MAX_REORDERS = 3


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the queue delivered and still holds: the group without its payload, and that payload's bytes."""

    scored: ScoredGroup
    num_bytes: int


class Collector:
    """Reads scored groups until a step has enough.

    A deterministic run takes exactly the groups of the step, in index order; otherwise groups are
    taken as they arrive, and staleness is checked at this moment, so time spent in the queue counts.
    What was consumed is acknowledged only after a checkpoint covers it.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        reader: ScoredReader,
        pacer: Pacer,
        watch: Watch,
        ledger: Ledger,
        expected: Expectations,
        stop: asyncio.Event,
    ) -> None:
        self._run = config.run
        self._per_step = config.training.prompts_per_step
        self._staleness = config.training.max_staleness
        self._teachers = expected.plan.scoring_teachers
        self._reader = reader
        self._pacer = pacer
        self._watch = watch
        self._ledger = ledger
        self._expected = expected
        self._weights = WeightsRule(
            expected.channels,
            max_lag(expected.plan, config.training.max_staleness),
            deterministic=config.run.deterministic,
        )
        self._stop = stop
        self._early: dict[int, TrainingGroup] = {}  # deterministic runs: groups of this and later steps
        self._delivered: list[Delivery] = []  # to be acknowledged once consumed
        self._refused_in_a_row = 0
        # What is on its way at a resumption may all be of weights that the checkpoint does not know.
        self._ordered_now_from = REPLACEMENTS_FROM + ledger.replacements if len(ledger.lineage) > 1 else 0
        self._idle_looks = 0
        self._reorders = 0
        self.duplicates = 0

    async def collect(self, show: Callable[[str], Awaitable[None]]) -> list[TrainingGroup] | None:
        """The groups of step `ledger.step`, or None when asked to stop first.

        Args:
            show: called with a status while nothing arrives.

        Raises:
            TutelageError: FAILED_PRECONDITION when groups are refused one after the other, or a
                deterministic run cannot have the group it needs.
        """
        batch: dict[int, TrainingGroup] = {}
        while True:
            batch |= self._take_early()
            if len(batch) == self._per_step:
                return [batch[index] for index in (sorted(batch) if self._run.deterministic else batch)]
            if self._stop.is_set():
                return None
            wanted = self._per_step - len(batch)
            arrived = await self._reader.read(wanted, BLOCK_MS)
            if not arrived:
                await self._wait(show)
                continue
            self._watch.news()
            self._idle_looks = self._reorders = 0
            dropped = 0
            for scored in arrived:
                with about(scored.group.traceparent, group=scored.group.id):
                    dropped += self._drops(scored, batch)
            await self._pacer.replace(dropped, self._ledger.step)

    async def acknowledge(self) -> None:
        """Let the queue forget what has been trained or dropped; only after a checkpoint says so too."""
        consumed = self._consumed()
        await self._reader.acknowledge([delivery.scored for delivery in consumed])
        done = {delivery.scored.entry for delivery in consumed}
        self._delivered = [delivery for delivery in self._delivered if delivery.scored.entry not in done]

    def consumed_bytes(self) -> int:
        """Payload that the queue could forget after a checkpoint."""
        return sum(delivery.num_bytes for delivery in self._consumed())

    def _consumed(self) -> list[Delivery]:
        return [delivery for delivery in self._delivered if self._ledger.knows(delivery.scored.group.index)]

    def _take_early(self) -> dict[int, TrainingGroup]:
        """Groups of this step that are here; by now the weights that had to score them are published."""
        first = self._ledger.step * self._per_step
        taken = {i: self._early.pop(i) for i in range(first, first + self._per_step) if i in self._early}
        for group in taken.values():
            try:
                self._weights.check(group, self._ledger)
            except RefusedGroupError as error:
                self._refuse(group.id, group.index, error)
        return taken

    def _drops(self, scored: ScoredGroup, batch: dict[int, TrainingGroup]) -> bool:
        """Put a delivered group where it belongs; True when it was dropped and needs a replacement."""
        index = scored.group.index
        self._delivered.append(_delivery(scored))
        if self._ledger.knows(index) or index in batch or index in self._early:
            self.duplicates += 1
            log.info("group delivered again")
            record_collected(scored, duplicate=True)
            return False
        try:
            group = self._check_staleness(verify_group(scored, self._expected, self._ledger.pins))
            if not self._run.deterministic:
                self._weights.check(group, self._ledger)
        except RefusedGroupError as error:
            record_collected(scored, dropped=(error.reason, error.message))
            self._refuse(scored.group.id, index, error)
            return True
        record_collected(scored)
        self._refused_in_a_row = 0
        (self._early if self._run.deterministic else batch)[index] = group
        return False

    def _check_staleness(self, group: TrainingGroup) -> TrainingGroup:
        """The group with its distance; raises when that is too far from the weights it would train.

        After a resumption groups may come from versions that were published after the checkpoint:
        the way to their weights leads back to the checkpoint, so that is what counts.
        """
        if self._run.deterministic:
            step = group.index // self._per_step
            exact = max(0, step - self._staleness)
            if group.policy_version != exact:
                message = f"sampled by policy version {group.policy_version}, needs exactly {exact}"
                raise RefusedGroupError("stale", message)
            return replace(group, distance=step - exact)
        ledger = self._ledger
        distance = updates_between(ledger.lineage, ledger.step, group.lineage, group.policy_version)
        if distance > self._staleness:
            raise RefusedGroupError(
                "stale",
                f"sampled by policy version {group.policy_version}, {distance} updates from version "
                f"{ledger.step}; max_staleness is {self._staleness}",
            )
        return replace(group, distance=distance)

    def _refuse(self, name: str, index: int, refused: RefusedGroupError) -> None:
        reason, message = refused.reason, refused.message
        log.warning("group dropped", reason=reason, detail=message)
        if self._run.deterministic:
            raise TutelageError(
                "FAILED_PRECONDITION",
                f"group {name} cannot be trained ({reason}): {message}. A deterministic run "
                "takes no other group in its place",
            )
        self._ledger.drop(index, reason)
        aged = reason == "stale" or isinstance(refused, OldWeightsError)
        if not aged and index >= self._ordered_now_from:
            self._refused_in_a_row += 1
            if self._refused_in_a_row >= max(self._per_step, 8):
                raise TutelageError(
                    "FAILED_PRECONDITION",
                    f"{self._refused_in_a_row} groups in a row were refused, the last one ({reason}): "
                    f"{message}",
                )

    async def _wait(self, show: Callable[[str], Awaitable[None]]) -> None:
        status = await self._watch.look("scores")
        if status is None:
            return
        await show(status)
        # Nothing arrives and nobody works, twice: the queue lost work that it had acknowledged, or
        # the samplers cannot do what is asked of them.
        idle = await self._watch.idle(self._teachers)
        self._idle_looks = self._idle_looks + 1 if idle else 0
        if self._idle_looks < 2:
            return
        self._idle_looks = 0
        if self._reorders == MAX_REORDERS:
            raise TutelageError(
                "FAILED_PRECONDITION",
                f"step {self._ledger.step} lacks groups after ordering them {MAX_REORDERS} times again; "
                + await self._watch.given_up(),
            )
        self._reorders += 1
        log.warning("samplers and teachers are idle: ordering what is missing again")
        await self._pacer.place_missing(self._ledger.step)


def _delivery(scored: ScoredGroup) -> Delivery:
    kept = replace(scored, group=Group(id=scored.group.id, index=scored.group.index), scores={}, errors={})
    scores = sum(response.ByteSize() for response in scored.scores.values())
    return Delivery(kept, scored.group.ByteSize() + scores)
