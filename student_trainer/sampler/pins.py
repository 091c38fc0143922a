"""Which teacher may score a group, and of moving weights which version: the pins that go with a job."""

from __future__ import annotations

from tutelage.v1.teacher_pb2 import Pins

from student_trainer.channels import channels_of, max_lag
from student_trainer.config import RunConfig
from student_trainer.objective.plan import Plan


class TeacherPins:
    """Pins for requests about groups.

    A teacher with another tokenizer refuses to score; the fake engine has none to compare. Of the student's
    own moving weights a deterministic run takes those of the policy that sampled. Any other takes weights
    that are no older, or as much older as `objective.max_lag` exceeds what staleness may add later.
    """

    def __init__(self, config: RunConfig, plan: Plan, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        self._without_tokenizer = {name for name, entry in config.teachers.items() if entry.engine == "fake"}
        channels = channels_of(plan, config.run.name)
        self._moving = {name for name, channel in channels.items() if channel != "initial"}
        self._exact = config.run.deterministic
        staleness = config.training.max_staleness
        self._slack = max(0, max_lag(plan, staleness) - staleness)

    def of(self, teacher: str, policy_version: int) -> Pins:
        """For a group that `policy_version` sampled."""
        pins = Pins()
        if teacher not in self._without_tokenizer:
            pins.tokenizer_fingerprint = self._fingerprint
        if teacher in self._moving and self._exact:
            pins.weights_version = policy_version
        elif teacher in self._moving:
            pins.min_weights_version = max(0, policy_version - self._slack)
        return pins
