"""What every rank but the first does: whatever rank 0 does next, until it ends."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import structlog

from student_trainer.checkpoint import Checkpoint, write_part
from student_trainer.learner import Learner
from student_trainer.ranks import Ranks

log = structlog.get_logger(__name__)


def follow(learner: Learner, ranks: Ranks) -> bool:
    """Take part until the leader says that this start ends; False when the run was stopped before its end.

    SIGTERM and SIGINT are passed on to the leader: all ranks stop after the same step.
    """
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    while True:
        told = ranks.hear()
        match told["do"]:
            case "beat":
                ranks.collect(b"stop" if signals else b"")
            case "step":
                learner.assist(
                    told["step"],
                    traces=told["traces"],
                    updates=told["updates"],
                    distill_open=told["distill_open"],
                )
            case "load":
                learner.load(Checkpoint.read(Path(told["path"])))
            case "save":
                write_part(Path(told["directory"]), learner.state_tensors(), ranks)
            case "export":
                learner.student.weights(keep=False)
            case "export_ema" if learner.ema is not None:
                learner.student.weights(learner.ema.averages, keep=False)
            case "export_adapter":
                learner.student.adapter(keep=False)
            case "end":
                log.info("ended with rank 0", rank=ranks.rank)
                return bool(told["finished"])
            case unknown:
                raise ValueError(f"rank 0 said {unknown!r}")
