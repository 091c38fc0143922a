"""A judge behind the teacher's doors and queue: its words become a number from 0 to 1, or an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from support.engine_requests import run_engine
from support.judges import JUDGED, SETTINGS, save_judge
from support.queue_data import make_group
from support.teachers import http_client, serve, teacher_process
from support.vllm_engines import run_vllm
from tutelage.v1.rollout_pb2 import Rollout, ViewRequest
from tutelage.v1.teacher_pb2 import Context, ScoreResponse
from tutelage.v1.teacher_pb2 import Signal as SignalMessage
from tutelage_client import AsyncTeacherClient, codec
from tutelage_client.errors import TutelageError
from tutelage_client.types import ScoreRequest, Signal

from services.models.fingerprint import tokenizer_fingerprint
from services.models.judge_settings import JudgeSettings
from services.queue import Queue
from services.queue.embedded import EmbeddedServer
from services.teacher.engine import Engine
from student_trainer.tasks.characters import character_tokenizer

JUDGE = Signal(sampled=False, judgement=True)
# The caller's tokenizer has other ids than the judge's for the same characters.
STUDENT = character_tokenizer(JUDGED[::-1])


@dataclass(frozen=True)
class Judges:
    """Where the judge and the tokenizer of its callers lie."""

    model: Path
    tokenizer: Path

    @property
    def settings(self) -> JudgeSettings:
        return SETTINGS.model_copy(update={"tokenizer": str(self.tokenizer)})


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Judges:
    root = tmp_path_factory.mktemp("judge")
    STUDENT.save_pretrained(root / "student")
    return Judges(save_judge(root / "judge"), root / "student")


@pytest_asyncio.fixture(loop_scope="function", params=["transformers", "vllm"])
async def engine(request: pytest.FixtureRequest, judges: Judges) -> AsyncIterator[Engine]:
    if request.param == "transformers":
        async with run_engine(judges.model, name="judge", judge=judges.settings) as started:
            yield started
    else:
        pytest.importorskip("vllm", reason="vLLM is not installed")
        async with run_vllm(judges.model, engine={"name": "judge", "judge": judges.settings}) as started_vllm:
            yield started_vllm


def ids(text: str) -> list[int]:
    return STUDENT(text)["input_ids"]


def asked(responses: list[str], signal: Signal = JUDGE) -> ScoreRequest:
    return codec.build_request([ids("1+1")], [ids(text) for text in responses], signal=signal)


async def test_words_become_a_number_or_an_error_and_each_stands_alone(engine: Engine) -> None:
    """One engine start for everything that is asked of an engine."""
    identity, limits = engine.identity, engine.limits
    assert identity.engine.endswith("-judge")
    assert identity.tokenizer_fingerprint == tokenizer_fingerprint(STUDENT)
    assert limits.judge
    assert (limits.max_top_k, limits.max_candidates, limits.entropy) == (0, 0, False)
    long = "2" * (256 - SETTINGS.max_new_tokens) + "a"
    score = await engine.score(asked(["a", "2b", "c", "d", "2", long, "22a", "a<end>"]))
    assert [answer.judgement for answer in score.sequences] == [
        7 / 9,
        0.0,
        None,
        None,
        None,
        None,
        7 / 9,
        7 / 9,
    ]
    assert [answer.verdict for answer in score.sequences][:2] == ["7", "0"]
    errors = [answer.error for answer in score.sequences]
    assert [error and error.code for error in errors][2:6] == ["OUT_OF_RANGE"] * 3 + ["INVALID_ARGUMENT"]
    assert "last line is 'x', must be '0 … 9'" in errors[2].message  # type: ignore[union-attr]
    assert "cut after 4 tokens" in errors[3].message  # type: ignore[union-attr]
    assert "the judge takes 256" in errors[5].message  # type: ignore[union-attr]
    texts = await engine.score(replace(asked(["a"]), context_texts=("2<end>",)))
    assert "the prompt spells '<end>'" in texts.sequences[0].error.message  # type: ignore[union-attr]
    many = await asyncio.gather(*(engine.score(asked([text] * 3)) for text in ("a", "b", "2a") * 4))
    assert [one.sequences[2].judgement for one in many] == [7 / 9, 0.0, 7 / 9] * 4
    with pytest.raises(TutelageError, match="FAILED_PRECONDITION: weights: got others"):
        await engine.load_weights(Path("anywhere"), 1)


async def test_a_judge_answers_no_log_probabilities_and_a_teacher_no_judgement(judges: Judges) -> None:
    """Through both doors; what the judge could not say is counted."""
    async with (
        run_engine(judges.model, name="judge", judge=judges.settings) as engine,
        serve(engine) as doors,
        AsyncTeacherClient(doors.grpc) as client,
        http_client(doors.http) as http,
    ):
        for signal in (Signal(), Signal(judgement=True), Signal(sampled=False, entropy=True)):
            with pytest.raises(TutelageError, match="this teacher is a judge, ask for judgement"):
                await client.score_request(asked(["a"], signal))
        with pytest.raises(TutelageError, match=r"signal.temperature: got 0.5, a judge answers only 1"):
            await client.score_request(asked(["a"], replace(JUDGE, temperature=0.5)))
        score = await client.score_request(asked(["a", "c"]))
        message = codec.request_to_proto(asked(["a", "c"]))
        headers = {"content-type": "application/x-protobuf"}
        packed = await http.post("/v1/score", content=message.SerializeToString(), headers=headers)
        body = {
            "contexts": [{"ids": ids("1+1")}],
            "sequences": [{"id": "0", "response_ids": ids("a")}],
            "signal": {"judgement": True},
        }
        shown = (await http.post("/v1/score", json=body, params={"arrays": "list"})).json()
        metrics = (await http.get("/metrics")).text
    by_http = codec.score_from_proto(ScoreResponse.FromString(packed.content))
    assert by_http.sequences == score.sequences
    assert shown["sequences"] == [{"id": "0", "judgement": 7 / 9, "verdict": "7"}]
    assert 'tutelage_sequence_errors_total{code="OUT_OF_RANGE"} 2.0' in metrics
    async with (
        run_engine(judges.model) as plain,
        serve(plain) as doors,
        AsyncTeacherClient(doors.grpc) as client,
    ):
        with pytest.raises(TutelageError, match=r"signal.judgement: got true, this teacher is no judge"):
            await client.score_request(asked(["a"]))


@pytest.fixture
def queue_url(tmp_path: Path) -> Iterator[str]:
    with EmbeddedServer(tmp_path / "queue", dies_with_parent=True) as server:
        yield server.url


async def test_a_judge_is_a_member_of_the_queue_like_any_teacher(
    judges: Judges, queue_url: str, tmp_path: Path
) -> None:
    """A process of its own takes the job of a group; the group comes back with what it said."""
    group = make_group("r", 0)
    del group.rollouts[:]
    group.rollouts.extend(Rollout(response_ids=codec.pack_ids(ids(text))) for text in ("b", "c", "2a"))
    view = ViewRequest(
        view="judge",
        teacher="judge",
        signal=SignalMessage(judgement=True),
        contexts=[Context(ids=codec.pack_ids(ids("1+1")))],
    )
    settings = {
        "engine": "transformers",
        "name": "judge",
        "model": str(judges.model),
        "judge": judges.settings.model_dump(),
        "queue_url": queue_url,
        "threads": 1,
    }
    async with Queue(queue_url) as queue:
        await queue.submit_group(group, [view])
        with teacher_process(tmp_path / "replica", **settings) as replica:
            reader = queue.scored("r")
            async with asyncio.timeout(30):
                while not (found := await reader.read(1, 200)):
                    pass
            metrics = (await asyncio.to_thread(httpx.get, f"{replica.http}/metrics")).text
    score = codec.score_from_proto(found[0].scores["judge"])
    assert [answer.judgement for answer in score.sequences] == [0.0, None, 7 / 9]
    assert score.identity.name == "judge"
    assert 'tutelage_queue_jobs_total{outcome="committed"} 1.0' in metrics
