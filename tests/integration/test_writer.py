"""A writer behind the teacher's doors and queue: how far its texts agree with a response's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import pytest_asyncio
from support.engine_requests import run_engine
from support.judges import JUDGED
from support.queue_data import make_group
from support.teachers import http_client, serve, teacher_process
from support.vllm_engines import run_vllm
from support.writers import SETTINGS, save_random_writer, save_writer, similarity, writing
from tutelage.v1.rollout_pb2 import Rollout, ViewRequest
from tutelage.v1.teacher_pb2 import Context, ScoreResponse
from tutelage_client import AsyncTeacherClient, TeacherClient, codec
from tutelage_client.errors import TutelageError
from tutelage_client.types import Score, ScoreRequest, Signal

from services.models.fingerprint import tokenizer_fingerprint
from services.models.writer_settings import WriterSettings
from services.queue import Queue
from services.queue.embedded import EmbeddedServer
from services.teacher.engine import Engine
from student_trainer.tasks.characters import character_tokenizer

# The caller's tokenizer has other ids than the writer's for the same characters.
STUDENT = character_tokenizer(JUDGED[::-1])
POSITIONS = 256


@dataclass(frozen=True)
class Writers:
    """Where the writer and the tokenizer of its callers lie."""

    model: Path
    tokenizer: Path

    @property
    def settings(self) -> WriterSettings:
        return SETTINGS.model_copy(update={"tokenizer": str(self.tokenizer)})


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Writers:
    root = tmp_path_factory.mktemp("writer")
    STUDENT.save_pretrained(root / "student")
    return Writers(save_writer(root / "writer"), root / "student")


@pytest_asyncio.fixture(loop_scope="function", params=["transformers", "vllm"])
async def engine(request: pytest.FixtureRequest, writers: Writers) -> AsyncIterator[Engine]:
    if request.param == "transformers":
        async with run_engine(writers.model, name="writer", writer=writers.settings) as started:
            yield started
    else:
        pytest.importorskip("vllm", reason="vLLM is not installed")
        own = {"name": "writer", "writer": writers.settings}
        async with run_vllm(writers.model, engine=own, max_num_batched_tokens=POSITIONS) as started_vllm:
            yield started_vllm


def ids(text: str) -> list[int]:
    return STUDENT(text)["input_ids"]


def asked(
    responses: list[str],
    anchors: list[list[int]],
    size: int = 2,
    signal: Signal | None = None,
    prompt: str = "1+1",
) -> ScoreRequest:
    return codec.build_request(
        [ids(prompt)],
        [ids(text) for text in responses],
        anchors=anchors,
        signal=signal or writing(3, size),
    )


def agreements(score: Score) -> list[list[float] | None]:
    return [None if one.agreement is None else one.agreement.tolist() for one in score.sequences]


def single(value: float) -> float:
    return float(np.float32(value))


async def test_texts_become_numbers_or_an_error_and_each_response_stands_alone(engine: Engine) -> None:
    """One engine start for everything that is asked of an engine."""
    identity, limits = engine.identity, engine.limits
    assert identity.engine.endswith("-writer")
    assert identity.tokenizer_fingerprint == tokenizer_fingerprint(STUDENT)
    assert (limits.max_continuations, limits.judge) == (SETTINGS.max_continuations, False)
    assert (limits.max_top_k, limits.max_candidates, limits.entropy) == (0, 0, False)
    responses = ["abcabc", "abddx", "e1", "e<end>", "ab", "d" * POSITIONS, "<end>a"]
    anchors = [[0, 2, 4], [0, 2], [0], [1], [], [0, POSITIONS - 2], [0]]
    sizes = [2, 2, 1, 1, 2, 2, 2]
    together = await asyncio.gather(
        *(engine.score(asked([r], [a], n)) for r, a, n in zip(responses, anchors, sizes, strict=True))
    )
    assert [agreements(score)[0] for score in together] == [
        [1.0, 1.0, 1.0],
        [1.0, 0.0],  # after b it writes ca
        [0.0],  # a for e
        [1.0],  # it ends, and the response says no more
        [],
        None,
        [1.0],  # of two tokens one is no text, so that it may write one
    ]
    error = together[5].sequences[0].error
    assert error is not None
    assert error.code == "INVALID_ARGUMENT"
    longest = f"got {POSITIONS + 2} tokens with the question and 2 for the reply"
    assert error.message == f"writer: {longest}, the writer takes {POSITIONS}"
    texts = await engine.score(replace(asked(["ab"], [[0]]), context_texts=("2<end>",)))
    error = texts.sequences[0].error
    assert error is not None
    assert "the prompt spells '<end>'" in error.message
    long = await engine.score(asked(["abcdcbaabc", "ab"], [[0, 5], []], 5))
    expected = [single(similarity("abcab", "abcdc")), single(similarity("cabca", "baabc"))]
    assert agreements(long) == [expected, []]
    assert long.usage.positions == 12
    assert long.usage.tokens_computed > 0
    with pytest.raises(TutelageError, match="FAILED_PRECONDITION: weights: got others"):
        await engine.load_weights(Path("anywhere"), 1)


async def test_vllm_samples_the_same_again_and_differs_among_continuations(
    writers: Writers, tmp_path: Path
) -> None:
    """With a writer that may say anything; what is drawn depends on the request alone.

    The prompts that wait are several times what a step computes, and each has a seed.
    """
    pytest.importorskip("vllm", reason="vLLM is not installed")
    model = save_random_writer(tmp_path / "random")
    settings = WriterSettings(user="{prompt}=", temperature=1.5, tokenizer=str(writers.tokenizer))
    own = {"writer": settings}
    async with run_vllm(model, engine=own, max_num_batched_tokens=POSITIONS) as engine:
        responses, anchors = ["a+b=12a+b=12", "gfedcba0123"], [[0, 4, 8], [0, 4]]
        prompt = "1+2=3,4" * 9
        many = [asked(responses, anchors, 3, writing(n, 3), prompt) for n in (1, 16, 16)]
        one, first, again = [agreements(await engine.score(request)) for request in many]
        reverse = await engine.score(asked(responses[::-1], anchors[::-1], 3, writing(16, 3), prompt))
        steps = engine.counters.steps
        long = asyncio.create_task(engine.score(asked(["0" * 200], [[0, 50, 100]], 50, writing(16, 50))))
        async with asyncio.timeout(30):
            while engine.counters.steps < steps + 3:  # noqa: ASYNC110 - the thread tells nobody of a step
                await asyncio.sleep(0.001)
        assert not long.done()
        long.cancel()
        residue = await engine.residue()
        taken = engine.counters.steps - steps
        after = agreements(await engine.score(many[1]))
    assert again == first == after == agreements(reverse)[::-1]
    thirds = np.array([value for row in first for value in row or []]) * 16 * 3
    assert len(set(thirds.tolist())) > 2, "equal numbers would prove little"
    assert (np.round(thirds) % 16 > 0).any(), "of 16 equal texts the mean would be of thirds"
    assert one != first
    assert engine.counters.withdrawn == 1
    assert taken < 50, "48 continuations of 50 tokens were given up"
    assert (residue.requests, residue.worker_requests, residue.blocks) == (0, 0, 0)


async def test_a_writer_answers_nothing_else_through_any_door(writers: Writers) -> None:
    async with (
        run_engine(writers.model, name="writer", writer=writers.settings) as engine,
        serve(engine) as doors,
        AsyncTeacherClient(doors.grpc) as client,
        http_client(doors.http) as http,
    ):
        for signal in (Signal(), replace(writing(3, 2), sampled=True), replace(writing(3, 2), entropy=True)):
            with pytest.raises(TutelageError, match="this teacher is a writer, ask for continuations"):
                await client.score_request(asked(["ab"], [[0]], signal=signal))
        with pytest.raises(TutelageError, match=r"signal.continuations: got 17, allowed are 1 to 16"):
            await client.score_request(asked(["ab"], [[0]], signal=writing(17, 2)))
        request = asked(["abdd", "abc", "a"], [[0, 2], [2], []])
        score = await client.score_request(request)
        content = codec.request_to_proto(request).SerializeToString()
        packed = await http.post(
            "/v1/score", content=content, headers={"content-type": "application/x-protobuf"}
        )
        body = {
            "contexts": [{"ids": ids("1+1")}],
            "sequences": [
                {"id": "0", "response_ids": ids("abdd"), "anchors": [0, 2]},
                {"id": "1", "response_ids": ids("a"), "anchors": []},
            ],
            "signal": {"continuations": 3, "chunk_tokens": 2},
        }
        shown = (await http.post("/v1/score", json=body, params={"arrays": "list"})).json()
        limits = (await http.get("/v1/teacher")).json()["limits"]
        plain = await client.score(
            [ids("1+1")], [ids("abdd")], sampled=False, anchors=[[0]], continuations=2, chunk_tokens=3
        )
        metrics = (await http.get("/metrics")).text
        with TeacherClient(doors.grpc) as blocking:
            same = await asyncio.to_thread(
                blocking.score,
                [ids("1+1")],
                [ids("abdd")],
                sampled=False,
                anchors=[[0]],
                continuations=2,
                chunk_tokens=3,
            )
    assert agreements(score) == [[1.0, 0.0], None, []]
    error = score.sequences[1].error
    assert error is not None
    assert error.message == "sequences[1].anchors: got 2 to 2, allowed are 0 to 1"
    by_http = codec.score_from_proto(ScoreResponse.FromString(packed.content))
    assert agreements(by_http) == agreements(score)
    assert shown["sequences"] == [{"id": "0", "agreement": [1.0, 0.0]}, {"id": "1", "agreement": []}]
    assert limits["max_continuations"] == 16
    assert agreements(plain) == agreements(same) == [[single(2 / 3)]]
    assert 'tutelage_sequence_errors_total{code="INVALID_ARGUMENT"} 2.0' in metrics


@pytest.fixture
def queue_url(tmp_path: Path) -> Iterator[str]:
    with EmbeddedServer(tmp_path / "queue", dies_with_parent=True) as server:
        yield server.url


async def test_a_writer_is_a_member_of_the_queue_like_any_teacher(
    writers: Writers, queue_url: str, tmp_path: Path
) -> None:
    """A process of its own takes the job of a group; the group comes back with the agreements."""
    group = make_group("r", 0)
    del group.rollouts[:]
    for text, anchors in (("abdd", [0, 2]), ("a", []), ("xab", [1])):
        group.rollouts.append(
            Rollout(response_ids=codec.pack_ids(ids(text)), anchors=codec.pack_ids(anchors))
        )
    view = ViewRequest(
        view="audit",
        teacher="writer",
        signal=codec.signal_to_proto(writing(3, 2)),
        contexts=[Context(ids=codec.pack_ids(ids("1+1")))],
    )
    settings = {
        "engine": "transformers",
        "name": "writer",
        "model": str(writers.model),
        "writer": writers.settings.model_dump(),
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
    score = codec.score_from_proto(found[0].scores["audit"])
    # Nothing follows x, so that every character is as likely and it is no certainty that it writes ab.
    *known, last = agreements(score)
    assert known == [[1.0, 0.0], []]
    assert last is not None
    assert 0 <= last[0] < 1
    assert score.identity.name == "writer"
    assert 'tutelage_queue_jobs_total{outcome="committed"} 1.0' in metrics
