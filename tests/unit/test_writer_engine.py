"""A writer on transformers: it samples the model's distribution, and the same for the same request."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from support.engine_requests import run_engine
from support.judges import JUDGED
from support.writers import save_random_writer, similarity, writing
from transformers import AutoModelForCausalLM
from tutelage_client import codec
from tutelage_client.errors import TutelageError
from tutelage_client.types import Score, ScoreRequest

from services.models import generate
from services.models.choose import Choice, choose
from services.models.writer_settings import WriterSettings
from services.teacher.engines.transformers import TransformersEngine
from services.teacher.engines.words import MOST_ROWS
from services.teacher.engines.writer import WriterScorer
from student_trainer.tasks.characters import MODEL_ROWS, character_tokenizer

OWN = character_tokenizer(JUDGED)
MANY = 4000
LIKELY = "0::+ff"  # what the writer would say, too, now and then
TEMPERATURE = 1.5
SETTINGS = WriterSettings(user="{prompt}=", temperature=TEMPERATURE, max_continuations=MANY)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_writer(tmp_path_factory.mktemp("writer"))


@pytest_asyncio.fixture(loop_scope="function")
async def engine(directory: Path) -> AsyncIterator[TransformersEngine]:
    async with run_engine(directory, writer=SETTINGS) as started:
        yield started


def ids(text: str) -> list[int]:
    return OWN(text)["input_ids"]


def asked(
    responses: list[str], anchors: list[list[int]], continuations: int, size: int, prompt: str = "1+1"
) -> ScoreRequest:
    return codec.build_request(
        [ids(prompt)],
        [ids(text) for text in responses],
        anchors=anchors,
        signal=writing(continuations, size),
    )


def agreements(score: Score) -> list[list[float]]:
    found = []
    for sequence in score.raise_for_errors().sequences:
        assert sequence.agreement is not None
        found.append(sequence.agreement.tolist())
    return found


def expectation(directory: Path, before: str, text: str) -> tuple[float, float]:
    """Mean and standard deviation of one continuation's similarity, over all there are of len(text)."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    characters = {number: token for token, number in OWN.get_vocab().items() if len(token) == 1}

    def next_probabilities(rows: list[list[int]]) -> torch.Tensor:
        with torch.inference_mode():
            logits = model(torch.tensor([[*ids(before), *row] for row in rows])).logits[:, -1]
        return torch.softmax(logits.double() / TEMPERATURE, dim=-1)

    open_rows: dict[tuple[int, ...], float] = {(): 1.0}
    done: dict[tuple[int, ...], float] = {}
    for _ in text:
        rows = list(open_rows)
        probabilities = next_probabilities([list(row) for row in rows]).tolist()
        grown: dict[tuple[int, ...], float] = {}
        for (place, row), token in product(enumerate(rows), range(MODEL_ROWS)):
            probability = open_rows[row] * probabilities[place][token]
            if token == OWN.eos_token_id:
                done[row] = done.get(row, 0.0) + probability
            else:
                grown[(*row, token)] = probability
        open_rows = grown
    done = {**open_rows, **{row: p for row, p in done.items()}}
    assert math.isclose(sum(done.values()), 1.0, rel_tol=1e-9)
    values = [(p, similarity("".join(characters.get(i, "") for i in row), text)) for row, p in done.items()]
    mean = sum(p * value for p, value in values)
    return mean, math.sqrt(sum(p * (value - mean) ** 2 for p, value in values))


async def test_the_mean_over_many_continuations_is_the_expectation_over_all(
    engine: TransformersEngine, directory: Path
) -> None:
    response, anchors = LIKELY, [0, 2, 4]
    score = await engine.score(asked([response], [anchors], MANY, 2))
    for anchor, found in zip(anchors, agreements(score)[0], strict=True):
        mean, deviation = expectation(directory, f"1+1={response[:anchor]}", response[anchor : anchor + 2])
        assert deviation > 0.1, "a writer that is certain would prove little"
        assert abs(found - mean) < 4 * deviation / math.sqrt(MANY), (anchor, found, mean, deviation)


async def test_an_answer_depends_on_the_request_alone(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is asked, beside whom, in which order, and in how many batches it is sampled."""
    responses = [LIKELY, "12", ":::6c", LIKELY[:4] + "21", "gfedcba0123"]
    anchors = [[0, 3], [0], [1], [0, 3], [0, 2, 4, 8]]
    first = agreements(await engine.score(asked(responses, anchors, 60, 2)))
    again, backwards, *singles = await asyncio.gather(
        engine.score(asked(responses, anchors, 60, 2)),
        engine.score(asked(responses[::-1], anchors[::-1], 60, 2)),
        *(engine.score(asked([r], [a], 60, 2)) for r, a in zip(responses, anchors, strict=True)),
    )
    assert agreements(again) == first
    assert agreements(backwards)[::-1] == first
    assert [agreements(single)[0] for single in singles] == first
    assert isinstance(engine._scorer, WriterScorer)
    monkeypatch.setattr(engine._scorer.generator, "_batch_tokens", 40)
    assert agreements(await engine.score(asked(responses, anchors, 60, 2))) == first
    assert len({value for row in first for value in row}) > 3, "equal numbers would prove little"
    other = agreements(await engine.score(asked(responses, anchors, 60, 2, prompt="1+2")))
    assert other != first


async def test_a_smaller_number_of_continuations_is_the_beginning_of_a_larger_one(
    engine: TransformersEngine,
) -> None:
    """The j-th continuation has its own random numbers: n of them are n of the more."""
    found = [agreements(await engine.score(asked(["a+b=12"], [[2]], n, 4)))[0][0] for n in (1, 2, 3, 4)]
    singles = np.diff([0.0, *(n * value for n, value in enumerate(found, 1))])
    quarters = singles * 4  # texts of at most 4 characters against one of 4
    assert np.allclose(quarters, np.round(quarters), atol=1e-5)
    assert ((quarters > -1e-5) & (quarters < 4 + 1e-5)).all()


async def test_so_many_rows_at_once_are_bounded_that_their_logits_are(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few thousand short texts fit the cache, and with a large vocabulary their logits would not fit."""
    rows: list[int] = []

    def counted(logits: torch.Tensor, *given: Any, **how: Any) -> Choice:
        rows.append(len(logits))
        return choose(logits, *given, **how)

    monkeypatch.setattr(generate, "choose", counted)
    await engine.score(asked([LIKELY], [[0, 2, 4]], 500, 1))
    assert max(rows) == MOST_ROWS < 1500


async def test_nobody_elses_random_numbers_are_used(engine: TransformersEngine) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    await engine.score(asked(["a+b=12"], [[0, 2]], 5, 2))
    assert torch.equal(torch.get_rng_state(), before)


async def test_a_model_that_ends_nothing_does_not_start(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "endless")
    (tmp_path / "endless" / "generation_config.json").write_text("{}")
    for name in ("config.json", "tokenizer_config.json"):
        file = tmp_path / "endless" / name
        settings = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in settings.items() if not k.startswith("eos_token")}))
    with pytest.raises(TutelageError, match="what writes needs an end token"):
        async with run_engine(tmp_path / "endless", writer=SETTINGS):
            pass


async def test_work_is_counted_and_what_is_not_audited_costs_nothing(engine: TransformersEngine) -> None:
    score = await engine.score(asked(["a+b=12", "a"], [[], []], 5, 2))
    assert agreements(score) == [[], []]
    assert score.usage.tokens_computed == 0
    score = await engine.score(asked(["a+b=12"], [[0, 2]], 5, 2))
    assert 4 + 6 < score.usage.tokens_computed <= 4 + 6 + 2 * 5 * 2
    assert replace(score.usage, tokens_computed=0, queue_ms=0, compute_ms=0).positions == 6
