"""What a judge or a writer on transformers does with a request that nobody waits for any more."""

from __future__ import annotations

import asyncio
import inspect
import threading
from pathlib import Path
from typing import Any

import pytest
from support.engine_requests import run_engine
from support.judges import JUDGED, save_judge
from support.writers import writing
from tutelage_client import codec
from tutelage_client.types import ScoreRequest, Signal

from services.models.judge_settings import JudgeSettings
from services.models.writer_settings import WriterSettings
from services.teacher.engines.judge import JudgeScorer
from services.teacher.engines.transformers import TransformersEngine
from services.teacher.engines.writer import WriterScorer
from student_trainer.tasks.characters import character_tokenizer

OWN = character_tokenizer(JUDGED)
LONG = 100  # tokens that are written where nobody withdraws
JUDGE = JudgeSettings(user="{prompt}={response}", reply="{score}", max_new_tokens=LONG)
WRITER = WriterSettings(user="{prompt}=")


def asked(teacher: str, text: str) -> ScoreRequest:
    """A sequence after which the hand-made model says d for ever, or, after a, 7 and no more."""
    signal = Signal(sampled=False, judgement=True) if teacher == "judge" else writing(1, len(text) - 1)
    anchors = None if teacher == "judge" else [[1]]
    return codec.build_request(
        [OWN("1+1")["input_ids"]], [OWN(text)["input_ids"]], anchors=anchors, signal=signal
    )


class Gate:
    """Lets `passes` forward passes by, then holds the next until it is opened."""

    def __init__(self, engine: TransformersEngine, passes: int) -> None:
        assert isinstance(engine._scorer, JudgeScorer | WriterScorer)
        self.reached, self.opened, self.count = threading.Event(), threading.Event(), 0
        model: Any = engine._scorer.loaded.model
        forward = model.forward

        def gated(*given: Any, **how: Any) -> Any:
            self.count += 1
            if self.count == passes:
                self.reached.set()
                assert self.opened.wait(30)
            return forward(*given, **how)

        # Where the signature is looked at, it has to stay what it is.
        gated.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        model.forward = gated


@pytest.mark.parametrize("teacher", ["judge", "writer"])
async def test_the_rest_of_a_withdrawn_request_is_not_written(tmp_path: Path, teacher: str) -> None:
    settings: dict[str, Any] = {teacher: JUDGE if teacher == "judge" else WRITER}
    async with run_engine(save_judge(tmp_path / "model"), **settings) as engine:
        gate = Gate(engine, passes=5)
        long = asyncio.create_task(engine.score(asked(teacher, "d" * LONG)))
        await asyncio.to_thread(gate.reached.wait, 30)
        behind = asyncio.create_task(engine.score(asked(teacher, "aa")))
        long.cancel()
        await asyncio.sleep(0)
        gate.opened.set()
        (score,) = (await behind).raise_for_errors().sequences
        assert score.judgement == 7 / 9 if teacher == "judge" else score.agreement is not None
        assert gate.count < 5 + 10, "the withdrawn request was written to its end"
        assert engine.dropped_requests == 1
        assert engine.counters.requests == 1
