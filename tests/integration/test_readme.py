"""What the README tells a newcomer to type works as it stands there, against a running teacher."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from google.protobuf import json_format
from support.teachers import TeacherProcess, teacher_process
from tutelage.v1 import teacher_pb2 as pb
from tutelage.v1.teacher_pb2_grpc import TeacherServiceStub
from typer.testing import CliRunner

from launcher.cli import app
from services.teacher.settings import TeacherSettings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with teacher_process(tmp_path_factory.mktemp("teacher"), fake={"vocab_size": 32_000}) as process:
        yield process


def json_after(command: str) -> str:
    """The body given to `-d '…'` of the first command that contains `command`."""
    match = re.search(re.escape(command) + r".*?-d '(\{.*?\})'", README, re.DOTALL)
    assert match, command
    return match[1]


def output_of_python_in(document: str, teacher: TeacherProcess) -> str:
    (snippet,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    script = snippet.replace("127.0.0.1:50051", teacher.grpc)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_the_python_snippet_scores(teacher: TeacherProcess) -> None:
    output = output_of_python_in(README, teacher)
    assert "Identity(name='fake'" in output
    assert "(3, 8) (3, 2) [ True  True  True]" in output


def test_the_python_snippet_of_the_api_scores_all_but_the_sequence_that_cannot_be(
    teacher: TeacherProcess,
) -> None:
    first, second, refused = output_of_python_in((ROOT / "docs/api.md").read_text(), teacher).splitlines()
    assert (first[:5], second[:5]) == ("0 [-1", "1 [-1")
    assert refused == (
        "2 INVALID_ARGUMENT sequences[2].response_ids: got ids from -5 to 26, allowed are 0 to 31999"
    )


def test_the_curl_body_scores(teacher: TeacherProcess) -> None:
    command = "curl -s 'http://127.0.0.1:8081/v1/score?arrays=list'"
    body, address = json.loads(json_after(command)), f"{teacher.http}/v1/score?arrays=list"
    answer = httpx.post(address, json=body, timeout=30).raise_for_status().json()
    assert [len(ids) for ids in answer["sequences"][0]["top_ids"]] == [4, 4]


def test_the_grpcurl_body_scores(teacher: TeacherProcess) -> None:
    request = json_format.Parse(json_after("grpcurl -plaintext"), pb.ScoreRequest())
    with grpc.insecure_channel(teacher.grpc) as channel:
        answer = TeacherServiceStub(channel).Score(request, timeout=30)  # type: ignore[no-untyped-call]
    assert answer.sequences[0].num_positions == 2


def test_every_teacher_command_is_one_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[TeacherSettings] = []
    monkeypatch.setattr("services.teacher.process.main", started.append)
    commands = re.findall(r"^tutelage (teacher (?:.*\\\n)*.*)$", README, re.MULTILINE)
    for command in commands:
        ran = CliRunner().invoke(app, shlex.split(command.replace("\\\n", "")))
        assert ran.exit_code == 0, ran.output
    assert [settings.engine for settings in started] == ["transformers", "fake", "vllm"]
    assert started[2].vllm.engine_args == {"kv_cache_dtype": "fp8"}
