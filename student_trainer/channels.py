"""The weight channels of a run: what it publishes of the student, for samplers and for self-teachers.

    live     RUN_DIR/policy   the weights that are trained, after every step
    ema      RUN_DIR/ema      their moving average, after every step
    initial  RUN_DIR/initial  the weights before training, once, as version 0

A teacher that follows a channel stamps its scores with the publication that computed them. Which
publications there were is in the ledger, so a score is trained on only if this very run made its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from student_trainer.ledger import Ledger
from student_trainer.objective.plan import Plan
from student_trainer.objective.view_names import SELF, self_teacher
from student_trainer.policy_store import PolicyStore, content_stamp, fresh_stamp
from student_trainer.verify import RefusedGroupError, TrainingGroup

if TYPE_CHECKING:
    from student_trainer.config import RunConfig
    from student_trainer.learner import Learner

DIRECTORIES = {"live": "policy", "ema": "ema", "initial": "initial"}


def channel_directory(run_directory: Path, channel: str) -> Path:
    """Where a run publishes a channel."""
    return run_directory / DIRECTORIES[channel]


def channels_of(plan: Plan, run: str) -> dict[str, str]:
    """Teachers of the plan that score with the student's own weights: name → channel."""
    known = {self_teacher(channel, run): channel for channel in SELF}
    return {name: known[name] for name in plan.scoring_teachers if name in known}


def max_lag(plan: Plan, max_staleness: int) -> int:
    """Updates that moving weights may be behind those that their scores train."""
    return max_staleness if plan.max_lag is None else plan.max_lag


def weights_lags(groups: Iterable[TrainingGroup], channels: Mapping[str, str], version: int) -> list[int]:
    """Updates by which the weights that scored are behind `version`: one figure per group and moving view.

    Args:
        channels: of the teachers with the student's own weights; those of "initial" do not move.
    """
    scored_by = (identity for group in groups for identity in group.scored_by.values())
    return [
        version - identity.weights_version
        for identity in scored_by
        if channels.get(identity.name, "initial") != "initial"
    ]


def withdraw(run_directory: Path) -> None:
    """Delete every publication: a run that begins has made none, and another one's have the same numbers."""
    for channel in DIRECTORIES:
        PolicyStore(channel_directory(run_directory, channel)).discard_above(-1)


def publish_initial(config: RunConfig, learner: Learner) -> None:
    """Publish the student as it is now, before training, where that is wanted and was not done."""
    if "initial" in channels_of(learner.plan, config.run.name).values():
        store = PolicyStore(channel_directory(config.run.directory, "initial"), _stamp(config))
        store.discard_above(0)
        if store.get(0) is None:
            store.publish(0, learner.export)


def _stamp(config: RunConfig) -> Callable[[Path], str]:
    return content_stamp if config.run.deterministic else fresh_stamp


class OldWeightsError(RefusedGroupError):
    """Scored by the right weights, which have grown too old since: as with staleness, nothing is wrong."""


@dataclass(frozen=True, slots=True)
class WeightsRule:
    """Which published weights may have scored what is trained.

    Attributes:
        channels: of the teachers with the student's own weights.
        max_lag: updates that moving weights may be behind those that are trained.
        deterministic: moving weights are those of the policy that sampled, and no others.
    """

    channels: Mapping[str, str]
    max_lag: int
    deterministic: bool = False

    def check(self, group: TrainingGroup, ledger: Ledger) -> None:
        """Raise RefusedGroupError for a score of weights that must not train step `ledger.step`."""
        for view, identity in group.scored_by.items():
            if (channel := self.channels.get(identity.name)) is None:
                continue
            version, published = identity.weights_version, ledger.publications.get(channel, {})
            where = (
                f"view {view!r}: scored by {channel} version {version} (publication {identity.weights_id!r})"
            )
            if version not in published or published[version] != identity.weights_id:
                here = f"{published[version]!r}" if version in published else "none"
                raise RefusedGroupError("weights", f"{where}; of that version this run knows {here}")
            if channel == "initial":
                continue
            if self.deterministic and version != group.policy_version:
                raise RefusedGroupError("weights", f"{where}, needs exactly {group.policy_version}")
            if ledger.step - version > self.max_lag:
                raise OldWeightsError(
                    "weights",
                    f"{where}, {ledger.step - version} updates behind version {ledger.step}; max_lag is "
                    f"{self.max_lag}",
                )


class Channels:
    """Publishes what the run needs, and writes down what it has published.

    Args:
        ledger: its `publications` are kept up to date.
    """

    def __init__(self, config: RunConfig, learner: Learner, ledger: Ledger) -> None:
        wanted = set(channels_of(learner.plan, config.run.name).values())
        directory, stamp = config.run.directory, _stamp(config)
        self._ledger = ledger
        self._initial = PolicyStore(directory / DIRECTORIES["initial"]) if "initial" in wanted else None
        self.live = PolicyStore(directory / DIRECTORIES["live"], stamp)
        # The average first: where a sampler sees a policy, its average is there too.
        self._moving: dict[str, tuple[PolicyStore, Callable[[Path], None]]] = {}
        if "ema" in wanted:
            self._moving["ema"] = PolicyStore(directory / DIRECTORIES["ema"], stamp), learner.export_ema
        self._moving["live"] = self.live, learner.export
        self._remembered = max(
            config.training.max_staleness, max_lag(learner.plan, config.training.max_staleness)
        )

    def begin(self) -> None:
        """Withdraw what a killed trainer published after the checkpoint, and publish what is missing."""
        for store, _ in self._moving.values():
            store.discard_above(self._ledger.step)
        if self._initial is not None and (found := self._initial.get(0)) is not None:
            self._ledger.publications["initial"] = {0: found.stamp}
        self._publish(again=False)

    def publish(self) -> None:
        """The student after step `ledger.step`."""
        self._publish(again=True)

    def prune(self, oldest: int, pinned: Collection[int]) -> None:
        """Delete versions below `oldest`; of the policy, not those that are `pinned`."""
        for store, _ in self._moving.values():
            store.prune(oldest, pinned if store is self.live else ())

    def _publish(self, *, again: bool) -> None:
        version = self._ledger.step
        for channel, (store, export) in self._moving.items():
            found = None if again else store.get(version)
            published = found or store.publish(version, export, lineage=self._ledger.lineage)
            known = self._ledger.publications.get(channel, {})
            self._ledger.publications[channel] = {
                older: stamp
                for older, stamp in known.items()
                if version - self._remembered <= older < version
            } | {version: published.stamp}
