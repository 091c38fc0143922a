"""Fixed rollouts: which response a group gets, and which files are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.teachers import ids
from tutelage_client.errors import TutelageError
from tutelage_client.types import Identity, SequenceScore, Signal

from services.models.fingerprint import tokenizer_fingerprint
from services.models.generate import GenerationInterruptedError, Response, Row
from services.score_file import ScoredResponse, ScoreFileWriter, ScoreHeader
from student_trainer.cached_scores import check_cached_scores
from student_trainer.config import parse_run_config
from student_trainer.sampler.data import PromptSource
from student_trainer.sampler.prompts import PromptEncoder
from student_trainer.sampler.replay import Replay
from student_trainer.sampler.settings import DataSettings, SamplingSettings
from student_trainer.tasks.addition import CHARACTERS, Addition
from student_trainer.tasks.characters import character_tokenizer

TOKENIZER = character_tokenizer(CHARACTERS)
FINGERPRINT = tokenizer_fingerprint(TOKENIZER)
END = TOKENIZER.eos_token_id
ENCODER = PromptEncoder(TOKENIZER, DataSettings(task="addition"))
EXAMPLES = (5, 60, 700, 8000)
EACH = 3  # responses to each prompt


class Small(Addition):
    """The first numbers only, none held out."""

    def __len__(self) -> int:
        return 9000

    def held_out(self) -> npt.NDArray[np.bool_]:
        return np.zeros(len(self), np.bool_)


def response(example: int, number: int, **changes: Any) -> ScoredResponse:
    """Told apart by its first two tokens."""
    context = ENCODER.encode([Addition().example(example)])[0].ids
    tokens = ids(3 + EXAMPLES.index(example), 3 + number, *([END] if number == 0 else []))
    given: dict[str, Any] = {
        "behaviour_logprobs": -np.arange(1, len(tokens) + 1, dtype=np.float32),
        "sampling_temperature": 1.0,
        "example": example,
    }
    score = SequenceScore("", sampled=np.zeros(len(tokens), np.float32), valid=np.ones(len(tokens), np.bool_))
    return ScoredResponse(f"{example}/{number}", context, tokens, score, **given | changes)


def written(path: Path, rows: Sequence[ScoredResponse], fingerprint: str = FINGERPRINT) -> Path:
    identity = Identity("big", "m", "r", 0, fingerprint, 32, "fake", "1", "float32", "float32")
    with ScoreFileWriter(path, ScoreHeader(identity, Signal())) as file:
        for row in rows:
            file.write(row)
    return path


def rows(**changes: Any) -> list[ScoredResponse]:
    """Responses of different prompts take turns, as a sampler's epochs would write them."""
    return [response(example, number, **changes) for number in range(EACH) for example in EXAMPLES]


def open_replay(
    path: Path, prompts: PromptSource | None = None, **sampling: Any
) -> tuple[Replay, PromptSource]:
    settings = SamplingSettings(sampler=f"file:{path}", max_new_tokens=4, **sampling)
    replay = Replay(path, settings, fingerprint=FINGERPRINT, end_ids=[END])
    prompts = PromptSource(Small(), seed=7)
    replay.restrict(prompts, ENCODER)
    return replay, prompts


def replayed(replay: Replay, prompts: PromptSource, group: int, size: int = 1) -> list[Response]:
    context = ENCODER.encode([prompts.example(group)])[0].ids
    asked = [Row(context, group, sample) for sample in range(size)]
    return replay.generate(asked, seed=0, temperature=1.0, max_new_tokens=4)


def name(response: Response) -> tuple[int, int]:
    return EXAMPLES[int(response.ids[0]) - 3], int(response.ids[1]) - 3


def test_an_epoch_has_every_prompt_of_the_file_and_the_next_one_its_next_response(tmp_path: Path) -> None:
    replay, prompts = open_replay(written(tmp_path / "f.parquet", rows()))
    epochs = [
        [name(replayed(replay, prompts, epoch * len(EXAMPLES) + place)[0]) for place in range(len(EXAMPLES))]
        for epoch in range(EACH + 1)
    ]
    for epoch, found in enumerate(epochs):
        assert sorted(found) == [(example, epoch % EACH) for example in EXAMPLES]
    assert [example for example, _ in epochs[0]] != [example for example, _ in epochs[1]], "a new order"


def test_a_group_is_a_function_of_its_index(tmp_path: Path) -> None:
    path = written(tmp_path / "f.parquet", rows())
    one, other = open_replay(path, samples_per_prompt=2), open_replay(path, samples_per_prompt=2)
    indices = range(12)
    forwards = [[name(found) for found in replayed(*one, index, 2)] for index in indices]
    backwards = [[name(found) for found in replayed(*other, index, 2)] for index in reversed(indices)]
    assert forwards == backwards[::-1]
    numbers = [
        sorted(number for found in forwards[e * 4 : e * 4 + 4] for _, number in found) for e in range(3)
    ]
    assert numbers == [[0] * 4 + [1] * 4, [0] * 4 + [2] * 4, [1] * 4 + [2] * 4]


def test_ids_and_log_probabilities_are_the_files(tmp_path: Path) -> None:
    replay, prompts = open_replay(written(tmp_path / "f.parquet", rows()))
    found = [replayed(replay, prompts, index)[0] for index in range(8)]
    for answer in found:
        expected = response(*name(answer))
        assert answer.ids.tolist() == expected.response_ids.tolist()
        assert expected.behaviour_logprobs is not None
        assert answer.logprobs.tobytes() == expected.behaviour_logprobs.tobytes()
        assert answer.finished == (name(answer)[1] == 0), "by its end token, where the file does not say"
    marked, prompts = open_replay(written(tmp_path / "g.parquet", rows(finished=True)))
    assert all(replayed(marked, prompts, index)[0].finished for index in range(12))


def test_prompts_are_found_by_their_tokens_where_rows_do_not_number_them(tmp_path: Path) -> None:
    unnumbered = written(tmp_path / "f.parquet", [replace(row, example=None) for row in rows()])
    _, prompts = open_replay(unnumbered)
    assert prompts.training.tolist() == list(EXAMPLES)


@pytest.mark.parametrize(
    ("content", "sampling", "complaint"),
    [
        (rows(), {"samples_per_prompt": EACH + 1}, r"samples_per_prompt: got 4; .* has 3 responses"),
        ([], {}, "holds no response"),
        ([response(5, 0, behaviour_logprobs=None)], {}, "has no behaviour_logprobs"),
        (
            [response(5, 0, sampling_temperature=0.7)],
            {},
            r"sampled at temperature 0\.7, \[sampling\] temperature is 1",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    content: list[ScoredResponse], sampling: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "f.parquet", content)
    with pytest.raises(TutelageError, match=complaint):
        replayed(*open_replay(path, **sampling), 0)


def test_another_tokenizer_and_longer_responses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TutelageError, match="its responses would be other tokens"):
        open_replay(written(tmp_path / "f.parquet", rows(), fingerprint="another"))
    settings = SamplingSettings(max_new_tokens=2)
    with pytest.raises(TutelageError, match=r"row 0 .* has 3 tokens, allowed are 1 to max_new_tokens, 2"):
        Replay(written(tmp_path / "g.parquet", rows()), settings, fingerprint=FINGERPRINT, end_ids=[END])


def test_a_prompt_that_the_file_does_not_answer_is_named(tmp_path: Path) -> None:
    replay, _ = open_replay(written(tmp_path / "f.parquet", rows()))
    with pytest.raises(TutelageError, match=r"answers 4 prompts, and not that of group 9, \[1, 2\]"):
        replay.generate([Row(ids(1, 2), 9, 0)], seed=0, temperature=1.0, max_new_tokens=4)
    replay.interrupt()
    with pytest.raises(GenerationInterruptedError):
        replay.generate([], seed=0, temperature=1.0, max_new_tokens=4)


@pytest.mark.parametrize("said", [None, 1.0])
def test_responses_that_do_not_say_their_temperature_are_believed_but_not_in_silence(
    tmp_path: Path, said: float | None
) -> None:
    path = written(tmp_path / "s.parquet", rows(sampling_temperature=said))
    config = parse_run_config(
        {
            "run": {"name": "r"},
            "student": {"model": "m"},
            "teachers": {"t": {"model": "t"}},
            "data": {"task": "addition"},
            "objective": {"preset": "lightning"},
            "sampling": {"sampler": f"file:{path}"},
            "training": {"steps": 1},
        }
    )
    found = check_cached_scores(config, config.plan(), FINGERPRINT)
    assert not found.problems
    assert any("does not say at which temperature" in warning for warning in found.warnings) == (said is None)
