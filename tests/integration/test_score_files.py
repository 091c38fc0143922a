"""Score files: what `tutelage score` writes, how a killed run goes on, an engine that answers from one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.teachers import RecordingScorer, TeacherProcess, ids, teacher_process
from tutelage_client import TeacherClient, codec
from tutelage_client.errors import TutelageError
from tutelage_client.types import Limits, ScoreRequest, Sequence, Signal

from launcher.score import ScoreOptions, score_file
from launcher.score_files import read_rows
from launcher.score_text import Encoder
from services.score_file import ScoreFile, read_header
from services.teacher.engines.file import FileEngine
from student_trainer.tasks.characters import character_tokenizer

ROWS = [
    {
        "id": f"row {i}",
        "context_ids": [1 + i % 7, 2],
        "response_ids": [3 + (i + j) % 20 for j in range(1 + i % 5)],
    }
    for i in range(60)
]
SIGNAL = Signal(top_k=3, entropy=True)


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    settings: dict[str, Any] = {"fake": {"vocab_size": 32}}
    with teacher_process(tmp_path_factory.mktemp("replica"), **settings) as teacher:
        yield teacher


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "rows.jsonl", ROWS)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(replica: TeacherProcess, output: Path, **changes: Any) -> ScoreOptions:
    given: dict[str, Any] = {
        "teacher": replica.grpc,
        "model": None,
        "engine": "transformers",
        "tokenizer": None,
        "output": output,
        "signal": SIGNAL,
        "batch_tokens": 20,
        "token": None,
    }
    return ScoreOptions(**given | changes)


def as_bytes(path: Path) -> list[Any]:
    """Every row's values, arrays as bytes."""
    file = ScoreFile(path)
    found = []
    for index in range(len(file)):
        row = file.row(index)
        score = row.score
        ids_and_scores = (row.context_ids, row.response_ids, score.sampled, score.top_ids, score.top_logprobs)
        arrays = (*ids_and_scores, row.behaviour_logprobs, score.entropy, score.valid)
        found.append((row.id, *(None if a is None else (str(a.dtype), a.tobytes()) for a in arrays)))
    return found


def test_a_score_file_holds_what_the_teacher_answered_and_who_it_was(
    replica: TeacherProcess, tmp_path: Path
) -> None:
    logprobs = [-0.1, -0.25, -1 / 3, -4.0]
    said = {"behaviour_logprobs": logprobs, "sampling_temperature": 0.7, "finished": True}
    rows = [ROWS[3] | said, ROWS[4] | {"example": 12}]
    output = tmp_path / "scores.parquet"
    asked = Signal(top_k=3, entropy=True, temperature=0.7)
    assert (
        score_file(
            written(tmp_path / "r.jsonl", rows), options(replica, output, signal=asked, written_by="w")
        )
        == 0
    )
    with TeacherClient(replica.grpc) as client:
        identity = client.get_teacher().identity
        live = client.score_request(
            codec.build_request([[4, 2], [5, 2]], [row["response_ids"] for row in rows], signal=asked)
        )
    header = read_header(output)
    assert (header.identity, header.signal, header.written_by) == (identity, asked, "w")
    file = ScoreFile(output)
    first, second = file.row(0), file.row(1)
    assert (first.id, first.sampling_temperature, first.finished, first.example) == ("row 3", 0.7, True, None)
    assert (second.behaviour_logprobs, second.finished, second.example) == (None, None, 12)
    assert first.behaviour_logprobs is not None
    assert first.behaviour_logprobs.tolist() == np.float32(logprobs).tolist()
    for row, score in zip((first, second), live.sequences, strict=True):
        for field in ("sampled", "top_ids", "top_logprobs", "entropy", "valid"):
            np.testing.assert_array_equal(getattr(row.score, field), getattr(score, field))
            assert getattr(row.score, field).dtype == getattr(score, field).dtype


def positions(replica: TeacherProcess) -> int:
    with urllib.request.urlopen(f"{replica.http}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    line = next(line for line in text.splitlines() if line.startswith("tutelage_scored_positions_total"))
    return int(float(line.split()[1]))


def test_a_run_killed_half_way_goes_on_and_asks_nothing_twice(tmp_path: Path, source: Path) -> None:
    output, whole = tmp_path / "scores.parquet", tmp_path / "whole.parquet"
    journal = tmp_path / ".scores.parquet.journal"
    settings: dict[str, Any] = {"fake": {"vocab_size": 32, "latency_seconds": 0.03}}
    total = sum(len(row["response_ids"]) for row in ROWS)
    with teacher_process(tmp_path / "slow", **settings) as slow:
        command = [
            *(sys.executable, "-m", "launcher", "score", str(source), "--teacher", slow.grpc, "--top-k", "3"),
            *("--entropy", "--batch-tokens", "12", "--output", str(output)),
        ]
        killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.stat().st_size > 4000):
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert not output.exists()
        with journal.open("ab") as file:
            file.write(b"\x40\0\0\0\0\0\0\0torn")  # what a write that was cut leaves
        time.sleep(0.1)  # requests of the killed process that were on their way
        before = positions(slow)
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        done = int(ran.stdout.split("goes on after ")[1].split()[0])
        assert 0 < done < len(ROWS)
        assert positions(slow) - before == total - sum(len(row["response_ids"]) for row in ROWS[:done])
        score_file(source, options(slow, whole))
    assert as_bytes(output) == as_bytes(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "rows.jsonl",
        "scores.parquet",
        "slow",
        "whole.parquet",
    ]


def test_a_journal_of_something_else_is_refused_and_left(
    replica: TeacherProcess, tmp_path: Path, source: Path
) -> None:
    output = tmp_path / "scores.parquet"
    settings: dict[str, Any] = {"fake": {"vocab_size": 32, "exit_after": 5}}
    with teacher_process(tmp_path / "dies", **settings) as dies, pytest.raises(TutelageError):
        score_file(source, options(dies, output))
    journal = tmp_path / ".scores.parquet.journal"
    size = journal.stat().st_size
    for changes in ({"signal": Signal()}, {"written_by": "somebody"}):
        with pytest.raises(
            TutelageError, match=r"unfinished run .* with another (signal|written_by); delete it"
        ):
            score_file(source, options(replica, output, **changes))
    with pytest.raises(TutelageError, match="with another source"):
        score_file(written(tmp_path / "other.jsonl", ROWS[:5]), options(replica, output))
    assert journal.stat().st_size == size
    assert score_file(source, options(replica, output)) == 0
    assert len(ScoreFile(output)) == len(ROWS)


def test_a_journal_without_an_answer_holds_nobody_up(
    replica: TeacherProcess, tmp_path: Path, source: Path
) -> None:
    output = tmp_path / "scores.parquet"
    with pytest.raises(TutelageError, match=r"signal\.temperature"):
        score_file(source, options(replica, output, signal=Signal(temperature=-1.0)))
    with pytest.raises(TutelageError, match=r"signal\.top_k"):
        score_file(source, options(replica, output, signal=Signal(top_k=33)))
    assert score_file(source, options(replica, output)) == 0


def test_two_commands_do_not_write_one_file(replica: TeacherProcess, tmp_path: Path, source: Path) -> None:
    from launcher.score_journal import Journal

    output = tmp_path / "scores.parquet"
    with Journal(output, {}), pytest.raises(TutelageError, match="another `tutelage score` is writing it"):
        score_file(source, options(replica, output))


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = character_tokenizer("aehiorsntuwy<>?!\n")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_chat_messages_are_read_with_the_template_and_end_where_a_sampler_stops(
    chat: Path, tmp_path: Path
) -> None:
    turn = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so!"}]
    rows = [
        {"messages": turn},
        {"prompt": turn[:1], "response": "so!"},
        {"prompt": "<user>why?<assistant>", "response": "so!<end>"},
    ]
    encoder = Encoder(str(chat))
    whole, cut, text = read_rows(written(tmp_path / "chat.jsonl", rows), encoder)
    assert whole.context_ids.tolist() == cut.context_ids.tolist() == text.context_ids.tolist()
    assert whole.response_ids.tolist() == text.response_ids.tolist()
    assert len(whole.response_ids) == 4, (
        "three letters and the end token, not what the template writes after it"
    )
    assert whole.response_ids[:-1].tolist() == cut.response_ids.tolist()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"behaviour_logprobs": [-1.0]}, "line 1: behaviour_logprobs must be 4 numbers"),
        ({"behaviour_logprobs": [-1.0, float("nan"), -1.0, -1.0]}, "must be 4 numbers"),
        ({"finished": 1}, "finished: got 1, must be true or false"),
        ({"sampling_temperature": "hot"}, "sampling_temperature: got 'hot', must be a number"),
        ({"context_ids": None, "messages": [{"role": "user", "content": "x"}]}, "context_ids must be a list"),
    ],
)
def test_a_line_that_says_something_wrong_is_named(
    change: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "rows.jsonl", [ROWS[3] | change])
    with pytest.raises(TutelageError, match=complaint):
        list(read_rows(path, Encoder(None)))


@pytest.fixture
async def engine(replica: TeacherProcess, tmp_path: Path, source: Path) -> FileEngine:
    import asyncio

    output = tmp_path / "scores.parquet"
    await asyncio.to_thread(score_file, source, options(replica, output))
    engine = FileEngine(output, name="cached", limits=Limits())
    await engine.start()
    return engine


async def test_the_file_engine_answers_what_the_teacher_did(engine: FileEngine) -> None:
    contexts = tuple(ids(*ROWS[i]["context_ids"]) for i in (8, 50))
    sequences = tuple(Sequence(f"s{i}", at, ids(*ROWS[i]["response_ids"])) for at, i in enumerate((8, 50)))
    live = RecordingScorer(vocab_size=32, limits=Limits())
    for asked in (SIGNAL, Signal(), Signal(top_k=2, sampled=False)):
        request = ScoreRequest(contexts, sequences, asked)
        cached, expected = await engine.score(request), await live.score(request)
        for one, other in zip(cached.sequences, expected.sequences, strict=True):
            assert one.id == other.id
            for field in ("sampled", "top_ids", "top_logprobs", "entropy", "valid"):
                np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    assert (engine.identity.name, engine.identity.model) == ("cached", "fake-32")
    assert (engine.limits.max_top_k, engine.limits.entropy, engine.limits.max_candidates) == (3, True, 0)


async def test_what_the_file_does_not_hold_fails_alone_and_says_what_was_asked(engine: FileEngine) -> None:
    contexts = (ids(*ROWS[0]["context_ids"]), ids(9, 9, 9))
    known = ids(*ROWS[0]["response_ids"])
    request = ScoreRequest(
        contexts, (Sequence("a", 0, known), Sequence("b", 0, ids(30, 31)), Sequence("c", 1, known)), Signal()
    )
    found, other_response, other_context = (await engine.score(request)).sequences
    assert found.error is None
    assert other_response.error is not None
    assert other_context.error is not None
    assert other_response.error.code == "NOT_FOUND"
    assert "response of 2 tokens (30, 31) to a context of 2 (1, 2)" in other_response.error.message
    assert "9 other responses to this context" in other_response.error.message
    assert "no response to this context" in other_context.error.message


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (Signal(temperature=0.5), "signal.temperature: got 0.5, .* was scored at 1.0"),
        (Signal(top_k=4), "signal.top_k: got 4, .* has 3"),
        (Signal(candidates=True), "signal.candidates: got true"),
        (Signal(hidden_layers=(1,)), r"signal\.hidden_layers: got \(1,\), .* has \(\)"),
        (Signal(sampled=False, judgement=True), "signal.judgement: got True, .* has False"),
    ],
)
async def test_a_signal_that_the_file_cannot_answer_is_refused(
    engine: FileEngine, asked: Signal, complaint: str
) -> None:
    request = ScoreRequest((ids(1, 2),), (Sequence("a", 0, ids(3)),), asked)
    with pytest.raises(TutelageError, match=complaint):
        await engine.score(request)


def test_what_is_no_score_file_is_refused_with_its_name(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain, text = tmp_path / "plain.parquet", tmp_path / "text.parquet"
    pq.write_table(pa.table({"a": [1]}), plain)
    text.write_text("nothing")
    for path, complaint in (
        (plain, "has no header"), (text, "no Parquet file"), (tmp_path / "none.parquet", "no such file")
    ):  # fmt: skip
        with pytest.raises(TutelageError, match=complaint) as caught:
            read_header(path)
        assert str(path) in caught.value.message


def test_row_groups_are_read_when_they_are_asked_for_from_any_thread(
    replica: TeacherProcess, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr("services.score_file.GROUP_ROWS", 7)
    output = tmp_path / "scores.parquet"
    score_file(source, options(replica, output))
    file = ScoreFile(output)
    order = np.random.default_rng(0).permutation(len(ROWS)).tolist()
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(file.row, order))
    assert [row.id for row in rows] == [ROWS[i]["id"] for i in order]
    assert [row.response_ids.tolist() for row in rows] == [ROWS[i]["response_ids"] for i in order]
    assert file._file.num_row_groups == 9
    assert os.path.getsize(output) < 100_000
