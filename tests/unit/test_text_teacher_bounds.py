"""What a judge and a writer hold of a request's prompts at once, on transformers and for vLLM."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence as Members
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.engine_requests import run_engine
from support.judges import JUDGED, save_judge
from support.writers import writing
from tutelage_client import codec
from tutelage_client.types import Identity, Score, ScoreRequest, Sequence, SequenceScore, Signal

from services.models.generate import TransformersGenerator
from services.models.judge_settings import JudgeSettings
from services.models.vllm_adapter import StepEngine
from services.models.writer_settings import WriterSettings
from services.teacher.engines.batching import Answer
from services.teacher.engines.vllm import thread
from services.teacher.engines.vllm.questions import Answered, Question
from services.teacher.engines.vllm.work import Job
from services.teacher.judge import Judge
from services.teacher.writer import Writer
from student_trainer.tasks.characters import character_tokenizer

OWN = character_tokenizer(JUDGED)
MANY = 30
IDENTITY = Identity("t", "model", "rev", 0, "ab", 100, "vllm", "1", "float32", "float32")


def asked(teacher: str, text: str, count: int) -> ScoreRequest:
    judged = teacher == "judge"
    signal = Signal(sampled=False, judgement=True) if judged else writing(1, 1)
    return codec.build_request(
        [OWN("1+1")["input_ids"]],
        [OWN(text)["input_ids"]] * count,
        anchors=None if judged else [[1]] * count,
        signal=signal,
    )


@pytest.mark.parametrize("teacher", ["judge", "writer"])
async def test_prompts_are_made_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str
) -> None:
    own: dict[str, Any] = {
        "judge": JudgeSettings(user="{prompt}={response}", reply="{score}", max_new_tokens=4)
    }
    if teacher == "writer":
        own = {"writer": WriterSettings(user="{prompt}=")}
    made = [0]
    held: list[int] = []
    generate = TransformersGenerator.generate

    def counted(original: Any) -> Any:
        def one_more(self: Any, *given: Any) -> Any:
            made[0] += 1
            return original(self, *given)

        return one_more

    def emptied(self: Any, rows: Any, **how: Any) -> Any:
        held.append(made[0])
        made[0] = 0
        return generate(self, rows, **how)

    monkeypatch.setattr(Judge, "prompt_ids", counted(Judge.prompt_ids))
    monkeypatch.setattr(Writer, "chunks", counted(Writer.chunks))
    monkeypatch.setattr(TransformersGenerator, "generate", emptied)
    async with run_engine(save_judge(tmp_path / "model"), **own) as engine:
        whole = await engine.score(asked(teacher, "aa", MANY))
        assert held == [MANY]
        held.clear()
        monkeypatch.setattr("services.teacher.engines.words.CACHE_TOKENS", 40)
        parts = await engine.score(asked(teacher, "aa", MANY))
    assert str(parts.sequences) == str(whole.sequences)
    assert sum(held) == MANY
    assert max(held) <= 40 // 5 + 1


class Instant:
    """A StepEngine that answers the oldest request in every step, and remembers how much it had at once."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[int]] = {}
        self.most = 0
        self.order: list[int] = []
        self.aborted: list[str] = []

    def add(self, request_id: str, prompt: list[int], _params: Any, _adapter: str | None = None) -> None:
        self.waiting[request_id] = prompt
        self.order.append(prompt[0])
        self.most = max(self.most, sum(map(len, self.waiting.values())))

    def step(self) -> list[Any]:
        first = next(iter(self.waiting))
        del self.waiting[first]
        return [SimpleNamespace(request_id=first, finished=True, num_cached_tokens=0)]

    def abort(self, request_ids: Members[str]) -> None:
        for request_id in request_ids:
            self.waiting.pop(request_id, None)
        self.aborted += request_ids

    def settle(self) -> None: ...

    def close(self) -> None: ...


class Repeats:
    """Two questions of a hundred ids about every sequence; `made` are those without an answer."""

    def __init__(self) -> None:
        self.made = self.most = 0

    def questions(self, request: ScoreRequest, sequence: Sequence, *, read_cache: bool) -> list[Question]:
        del request, read_cache
        self.made += 2
        self.most = max(self.most, self.made)
        return [Question([int(sequence.response_ids[0])] * 100, None) for _ in range(2)]

    def answer(self, answered: Members[Answered], sequence: Sequence, signal: Signal) -> SequenceScore:
        del signal
        self.made -= len(answered)
        return SequenceScore(sequence.id, judgement=0.5)


def numbered(first: int, count: int) -> ScoreRequest:
    return codec.build_request([[1]], [[first + i] for i in range(count)])


async def test_vllm_is_handed_prompts_as_earlier_ones_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order of arrival, those of other requests behind them; a withdrawn one's are not made any more."""
    monkeypatch.setattr(thread, "HANDED_TOKENS", 500)
    engine, scoring = Instant(), Repeats()
    line = thread.EngineThread(lambda: engine, scoring, lambda _name: IDENTITY)  # type: ignore[arg-type,return-value]
    ready, ended = Answer[None](), Answer[None]()
    jobs = [Job(numbered(100 * i, MANY), Answer[Score]()) for i in range(4)]
    for job in jobs:
        line.submit(job)
    jobs[2].answer.future.cancel()
    live = line.start(ready, ended)
    scores = [await job.answer.future for job in jobs if job is not jobs[2]]
    line.close()
    await asyncio.to_thread(live.join, 30)
    assert [len(score.sequences) for score in scores] == [MANY] * 3
    assert engine.most <= 500 + 200
    assert scoring.most <= 5 + 2
    expected = [100 * i + place for i in (0, 1, 3) for place in range(MANY) for _ in range(2)]
    assert engine.order == expected
    assert not line._units


async def test_prompts_of_a_request_that_is_withdrawn_half_way_are_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(thread, "HANDED_TOKENS", 500)
    engine, scoring = Instant(), Repeats()
    long, behind = (Job(numbered(first, 1000), Answer[Score]()) for first in (0, 5000))
    answer = scoring.answer

    def withdrawing(*given: Any) -> SequenceScore:
        loop.call_soon_threadsafe(long.answer.future.cancel)
        while not long.answer.withdrawn:
            time.sleep(0.001)
        return answer(*given)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(scoring, "answer", withdrawing)
    line = thread.EngineThread(lambda: engine, scoring, lambda _name: IDENTITY)  # type: ignore[arg-type,return-value]
    line.submit(long)
    live = line.start(Answer[None](), Answer[None]())
    with pytest.raises(asyncio.CancelledError):
        await long.answer.future
    line.submit(behind)
    await behind.answer.future
    line.close()
    await asyncio.to_thread(live.join, 30)
    assert len([first for first in engine.order if first < 5000]) < 10
    assert engine.aborted
    assert not line._units


class Unsearched(list[str]):
    """Ids in which nobody may look for one."""

    def __contains__(self, _: object) -> bool:
        raise AssertionError("one after another, for every continuation there is")


def test_a_withdrawn_requests_questions_are_not_searched_one_after_another() -> None:
    parents = {f"own-{i}": SimpleNamespace(external_req_id=str(i)) for i in range(9)}
    engine = StepEngine.__new__(StepEngine)
    processor = SimpleNamespace(parent_requests=parents)
    engine._engine = SimpleNamespace(abort_request=lambda _ids: None, output_processor=processor)
    engine.abort(Unsearched(["1", "3", "nobody's"]))
    assert sorted(parents) == [f"own-{i}" for i in (0, 2, 4, 5, 6, 7, 8)]
