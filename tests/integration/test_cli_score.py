"""`tutelage score`: a file against a model loaded here and against a running teacher."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import Result
from support.teachers import TeacherProcess, teacher_process
from support.training_run import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from launcher.cli import app

PAIRS = [("12+30=", "42"), ("12+30=", "7"), ("5+5=", "10,0")]


def tutelage(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("score") / "model", seed=3)


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    settings: dict[str, Any] = {"fake": {"vocab_size": 32}}
    with teacher_process(tmp_path_factory.mktemp("replica"), **settings) as teacher:
        yield teacher


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in PAIRS))
    return path


def plain_scores(model: Path, prompt: str, response: str) -> list[float]:
    """One forward pass of transformers, nothing shared or packed."""
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    context, answer = tokenizer(prompt)["input_ids"], tokenizer(response)["input_ids"]
    with torch.no_grad():
        logprobs = torch.log_softmax(network(torch.tensor([context + answer])).logits[0], -1)
    return [float(logprobs[len(context) - 1 + t, token]) for t, token in enumerate(answer)]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_text_is_scored_as_transformers_would(model: Path, texts: Path) -> None:
    ran = tutelage("score", str(texts), "--model", str(model), "--top-k", "2", "--entropy")
    assert ran.exit_code == 0, ran.output
    records = read(texts.with_suffix(".scores.jsonl"))
    assert [record["id"] for record in records] == ["1", "2", "3"]
    for record, (prompt, response) in zip(records, PAIRS, strict=True):
        assert record["sampled"] == pytest.approx(plain_scores(model, prompt, response), abs=1e-4)
        assert [len(ids) for ids in record["top_ids"]] == [2] * len(response)
        assert all(0.0 < entropy < math.log(32) for entropy in record["entropy"])


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_text_is_scored_by_vllm_as_transformers_would(texts: Path) -> None:
    model = write_model(texts.parent / "model", seed=3, head_dim=32)
    # A process of its own: vLLM changes the process that it runs in.
    command = [
        sys.executable,
        "-m",
        "launcher",
        "score",
        str(texts),
        "--model",
        str(model),
        "--engine",
        "vllm",
    ]
    subprocess.run([*command, "--top-k", "2"], check=True, timeout=150)
    for record, (prompt, response) in zip(read(texts.with_suffix(".scores.jsonl")), PAIRS, strict=True):
        assert record["sampled"] == pytest.approx(plain_scores(model, prompt, response), abs=1e-4)
        assert [len(ids) for ids in record["top_ids"]] == [2] * len(response)


def test_small_batches_give_the_same_scores_in_the_same_order(model: Path, texts: Path) -> None:
    paths = [texts.parent / "whole.jsonl", texts.parent / "small.jsonl"]
    for path, tokens in zip(paths, ("10000", "1"), strict=True):
        ran = tutelage(
            "score", str(texts), "--model", str(model), "--batch-tokens", tokens, "--output", str(path)
        )
        assert ran.exit_code == 0, ran.output
    for whole, small in zip(*map(read, paths), strict=True):
        assert whole["response_ids"] == small["response_ids"]
        assert whole["sampled"] == pytest.approx(small["sampled"], abs=1e-5)


def test_ids_are_scored_by_a_running_teacher_into_parquet(replica: TeacherProcess, tmp_path: Path) -> None:
    source, output = tmp_path / "ids.jsonl", tmp_path / "scores.parquet"
    source.write_text('{"id": "a", "context_ids": [1, 2], "response_ids": [3, 4, 5]}\n')
    ran = tutelage("score", str(source), "--teacher", replica.grpc, "--output", str(output))
    assert ran.exit_code == 0, ran.output
    (row,) = pq.read_table(output).to_pylist()
    assert (row["id"], row["response_ids"], row["error"]) == ("a", [3, 4, 5], None)
    assert len(row["sampled"]) == 3
    assert all(value < 0.0 for value in row["sampled"])


def test_a_refused_response_is_recorded_and_the_others_are_scored(
    replica: TeacherProcess, tmp_path: Path
) -> None:
    source, output = tmp_path / "ids.jsonl", tmp_path / "scores.jsonl"
    lines = [{"context_ids": [1], "response_ids": ids} for ids in ([3], [99], [4])]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = tutelage("score", str(source), "--teacher", replica.grpc, "--output", str(output))
    assert ran.exit_code == 1
    records = read(output)
    assert [record["sampled"] is None for record in records] == [False, True, False]
    assert records[1]["error"].startswith("INVALID_ARGUMENT")
    assert "2 responses scored, 1 refused" in ran.stdout


def test_many_short_rows_go_in_requests_that_the_teacher_takes(tmp_path: Path) -> None:
    source, output = tmp_path / "ids.jsonl", tmp_path / "scores.jsonl"
    rows = [{"context_ids": [1 + i % 30], "response_ids": [3] * (1 + i % 5)} for i in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, limits in (("few", {"max_sequences": 7}), ("short", {"max_request_tokens": 20})):
        settings: dict[str, Any] = {"fake": {"vocab_size": 32}, "limits": limits}
        with teacher_process(tmp_path / name, **settings) as teacher:
            ran = tutelage("score", str(source), "--teacher", teacher.grpc, "--output", str(output))
        assert ran.exit_code == 0, ran.output
        records = read(output)
        assert [record["response_ids"] for record in records] == [row["response_ids"] for row in rows]
        assert all(record["error"] is None for record in records)


def test_a_teacher_that_is_not_there_leaves_no_file(tmp_path: Path) -> None:
    source, output = tmp_path / "ids.jsonl", tmp_path / "scores.jsonl"
    source.write_text('{"context_ids": [1], "response_ids": [2]}\n')
    ran = tutelage("score", str(source), "--teacher", "127.0.0.1:1", "--output", str(output))
    assert ran.exit_code == 1
    assert ran.stderr.startswith("tutelage: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.jsonl"]


def test_text_without_a_tokenizer_is_refused(replica: TeacherProcess, texts: Path) -> None:
    ran = tutelage("score", str(texts), "--teacher", replica.grpc)
    assert ran.exit_code == 2
    assert "name its --tokenizer" in ran.stderr


def test_a_tokenizer_other_than_the_teachers_is_refused(model: Path, texts: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from student_trainer.tasks.characters import character_tokenizer

    other: PreTrainedTokenizerFast = character_tokenizer("0123456789+=,:abc")
    other.save_pretrained(texts.parent / "other")
    settings: dict[str, Any] = {"engine": "transformers", "model": str(model), "device": "cpu"}
    with teacher_process(texts.parent / "served", **settings) as served:
        arguments = ("score", str(texts), "--teacher", served.grpc, "--tokenizer")
        refused = tutelage(*arguments, str(texts.parent / "other"))
        accepted = tutelage(*arguments, str(model))
    assert refused.exit_code == 2
    assert "ids would stand for other text" in refused.stderr
    assert accepted.exit_code == 0, accepted.output
