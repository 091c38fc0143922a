"""A judge on transformers: greedy whatever its files say of sampling, in bounded batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_requests import run_engine
from support.judges import JUDGED
from support.writers import save_random_writer
from tutelage_client import codec
from tutelage_client.types import ScoreRequest, Sequence, SequenceScore, Signal

from services.models.judge_settings import JudgeSettings
from services.teacher.engines.judge import JudgeScorer
from services.teacher.judge import Judge
from student_trainer.tasks.characters import character_tokenizer

OWN = character_tokenizer(JUDGED)
SETTINGS = JudgeSettings(user="{prompt}={response}", reply="{score}", max_new_tokens=12)
RESPONSES = ["a", "b+b=12", "0123456789", "gfedcba", "5:5-5:5-5", "2", "x"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_writer(tmp_path_factory.mktemp("judge"), seed=1)


@pytest.fixture(autouse=True)
def _replies_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of what is read in them, which for a random model is nothing."""

    def shown(self: Judge, sequence: Sequence, reply: Any, *, ended: bool) -> SequenceScore:
        del self
        return SequenceScore(sequence.id, judgement=0.0, verdict=f"{list(reply)} {ended}")

    monkeypatch.setattr(Judge, "judgement", shown)


def asked(responses: list[str]) -> ScoreRequest:
    ids = [OWN(text)["input_ids"] for text in responses]
    return codec.build_request([OWN("1+1")["input_ids"]], ids, signal=Signal(sampled=False, judgement=True))


def with_generation(directory: Path, copy: Path, **settings: Any) -> Path:
    """The model, whose files say more about how it is sampled."""
    shutil.copytree(directory, copy)
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return copy


async def replies(directory: Path, *batches: list[str]) -> list[str]:
    found = []
    async with run_engine(directory, judge=SETTINGS) as engine:
        for batch in batches:
            score = await engine.score(asked(batch))
            found += [one.verdict for one in score.raise_for_errors().sequences]
    return found


async def test_what_a_models_files_say_of_sampling_changes_no_reply(directory: Path, tmp_path: Path) -> None:
    """vLLM does none of it, and two engines give one response one reward."""
    plain = await replies(directory, RESPONSES)
    assert len(set(plain)) > 3, "equal replies would prove little"
    for name, settings in (
        ("repeats", {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}),
        ("lengths", {"min_new_tokens": 9, "suppress_tokens": list(range(5, 25))}),
        ("beams", {"num_beams": 3}),
    ):
        assert await replies(with_generation(directory, tmp_path / name, **settings), RESPONSES) == plain, (
            name
        )


async def test_a_reply_does_not_depend_on_who_is_judged_beside_it(directory: Path, tmp_path: Path) -> None:
    other = with_generation(directory, tmp_path / "other", repetition_penalty=1.5)
    together = await replies(other, RESPONSES)
    assert await replies(other, *([text] for text in RESPONSES)) == together
    assert await replies(other, RESPONSES[::-1]) == together[::-1]


async def test_it_reads_no_more_rows_at_once_than_a_writer_does(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context is in the cache for every response: a small request could be all of the memory."""
    expected = await replies(directory, RESPONSES)
    monkeypatch.setattr("services.teacher.engines.words.MOST_ROWS", 3)
    async with run_engine(directory, judge=SETTINGS) as engine:
        assert isinstance(engine._scorer, JudgeScorer)
        model: Any = engine._scorer.loaded.model
        rows: list[int] = []
        hook = model.model.embed_tokens.register_forward_hook(
            lambda _module, given, _output: rows.append(len(given[0]))
        )
        score = await engine.score(asked(RESPONSES))
        hook.remove()
    assert [one.verdict for one in score.sequences] == expected
    assert max(rows) == 3


async def test_nobody_elses_random_numbers_are_used(directory: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    await replies(directory, RESPONSES)
    assert torch.equal(torch.get_rng_state(), before)
