"""What the service promises about time, load, bad numbers and streams, through its real doors."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

import grpc
import httpx
import numpy as np
import pytest
from support.teachers import VOCAB, RecordingScorer, SeveralTeachers, http_client, serve
from tutelage.v1 import teacher_pb2 as pb
from tutelage.v1.teacher_pb2_grpc import TeacherServiceStub
from tutelage_client import (
    PAD_ID,
    AsyncTeacherClient,
    Pins,
    RetryPolicy,
    ScoreRequest,
    Signal,
    TeacherClient,
    TutelageError,
    codec,
)
from tutelage_client.connect import as_tutelage_error

ONCE = RetryPolicy(attempts=1)
BODY = {
    "contexts": [{"ids": [1, 2, 3]}],
    "sequences": [{"id": "a", "response_ids": [4, 5]}],
    "signal": {"sampled": True},
}


def small(request_id: str = "", tokens: int = 4) -> ScoreRequest:
    return codec.build_request([[1, 2]], [list(range(tokens - 2))], request_id=request_id)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for is on the far side of a socket
            await asyncio.sleep(0.001)


async def reached(scorer: RecordingScorer, count: int = 1) -> None:
    await until(lambda: len(scorer.reached) >= count)


async def cancelled(scorer: RecordingScorer) -> float:
    await until(lambda: bool(scorer.cancelled_at))
    return scorer.cancelled_at[0]


@pytest.mark.parametrize("door", ["grpc", "stream", "http"])
async def test_a_cancel_reaches_the_engine_within_100_ms(door: str) -> None:
    scorer = RecordingScorer()
    scorer.gate.clear()

    async def endless() -> AsyncIterator[ScoreRequest]:
        yield small("1")
        await asyncio.Event().wait()

    async with serve(scorer) as doors, AsyncTeacherClient(doors.grpc) as client:
        if door == "grpc":
            call = asyncio.create_task(client.score_request(small()))
        elif door == "stream":
            call = asyncio.create_task(anext(client.score_stream(endless())))  # type: ignore[arg-type]
        else:
            http = http_client(doors.http)
            call = asyncio.create_task(http.post("/v1/score", json=BODY))  # type: ignore[arg-type]
        await reached(scorer)
        began = time.perf_counter()
        call.cancel()
        assert await cancelled(scorer) - began <= 0.1
        await asyncio.gather(call, return_exceptions=True)
        await asyncio.wait_for(doors.core.drained(), 1)
        assert doors.core.admission.queued_tokens == 0


async def test_expired_work_never_reaches_the_engine() -> None:
    scorer = RecordingScorer()
    async with serve(scorer) as doors:
        with pytest.raises(TutelageError, match="DEADLINE_EXCEEDED"):
            await doors.core.score(small(), transport="grpc", remaining_seconds=0.0)
        async with http_client(doors.http) as http:
            reply = await http.post("/v1/score", json=BODY, headers={"Request-Timeout": "0"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "DEADLINE_EXCEEDED")
            reply = await http.post("/v1/score", json=BODY, headers={"Request-Timeout": "soon"})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "request-timeout")
    assert not scorer.reached


async def test_a_deadline_that_passes_in_the_engine_withdraws_the_work() -> None:
    scorer = RecordingScorer()
    scorer.gate.clear()
    async with serve(scorer) as doors, AsyncTeacherClient(doors.grpc, retry=ONCE) as client:
        began = time.perf_counter()
        with pytest.raises(TutelageError, match="DEADLINE_EXCEEDED"):
            await client.score_request(small(), timeout=0.2)
        assert await cancelled(scorer) - began <= 0.3
        async with http_client(doors.http) as http:
            reply = await http.post("/v1/score", json=BODY, headers={"Request-Timeout": "0.1"})
        assert reply.status_code == 504


async def test_overload_is_refused_with_429_and_accepted_work_meets_its_deadline() -> None:
    """Four times the capacity for four seconds, through both doors; every request has a deadline."""
    rate, tokens, deadline, seconds = 2_000.0, 50, 1.0, 4.0
    scorer = RecordingScorer(tokens_per_second=rate, vocab_size=VOCAB)
    request = codec.build_request([[1] * 20], [[2] * 30])
    body = codec.request_to_proto(request).SerializeToString()
    headers = {"content-type": "application/x-protobuf", "Request-Timeout": str(deadline)}
    accepted: list[float] = []
    refused: list[float] = []
    others: list[object] = []

    async with serve(scorer, max_queued_tokens=1_000, max_message_bytes=1 << 20) as doors:
        channel = grpc.aio.insecure_channel(doors.grpc)
        stub = TeacherServiceStub(channel)
        message = pb.ScoreRequest.FromString(body)

        async def by_grpc() -> None:
            began = time.perf_counter()
            try:
                await stub.Score(message, timeout=deadline)
                accepted.append(time.perf_counter() - began)
            except grpc.aio.AioRpcError as error:
                answer = as_tutelage_error(error)
                if answer.code == "RESOURCE_EXHAUSTED" and answer.retry_after:
                    refused.append(answer.retry_after)
                else:
                    others.append(answer)

        async def by_http(http: httpx.AsyncClient) -> None:
            began = time.perf_counter()
            reply = await http.post("/v1/score", content=body, headers=headers)
            if reply.status_code == 200:
                accepted.append(time.perf_counter() - began)
            elif reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1:
                refused.append(reply.status_code)
            else:
                others.append(reply.status_code)

        offered = 4 * rate / tokens
        async with http_client(doors.http) as http, asyncio.TaskGroup() as group:
            began = time.perf_counter()
            for number in range(int(offered * seconds)):
                await asyncio.sleep(max(0.0, began + number / offered - time.perf_counter()))
                group.create_task(by_http(http) if number % 8 == 0 else by_grpc())
        await channel.close()

    assert not others
    assert refused
    assert np.percentile(accepted, 99) <= deadline
    assert len(accepted) * tokens >= 0.6 * rate * seconds, "a busy service must still be of use"


async def test_positions_that_are_not_finite_are_masked_and_counted() -> None:
    scorer = RecordingScorer(nan_rate=0.3)
    request = codec.build_request(
        [[1, 2]],
        [list(range(30))] * 2,
        candidate_ids=[np.tile(np.array([3, -1, 4], dtype=np.int32), (30, 1))] * 2,
        signal=Signal(True, 4, True, True),
    )
    async with serve(scorer) as doors, AsyncTeacherClient(doors.grpc) as client:
        score = (await client.score_request(request)).raise_for_errors()
        bad = 0
        for sequence in score.sequences:
            assert sequence.valid is not None
            bad += int((~sequence.valid).sum())
            for array in (sequence.sampled, sequence.entropy, sequence.top_logprobs):
                assert array is not None
                assert np.isfinite(array[sequence.valid]).all()
                assert np.isnan(array[~sequence.valid]).all()
            assert sequence.top_ids is not None
            assert (sequence.top_ids[~sequence.valid] == PAD_ID).all()
            assert sequence.candidate_logprobs is not None
            assert np.isfinite(sequence.candidate_logprobs[sequence.valid][:, [0, 2]]).all()
            assert np.isnan(sequence.candidate_logprobs[:, 1]).all()
        assert 5 <= bad <= 35
        assert f"tutelage_invalid_positions_total {bad:.1f}" in doors.core.metrics.exposition().decode()
        async with http_client(doors.http) as http:
            body = codec.request_to_proto(request)
            document = {
                "contexts": [{"ids": [1, 2]}],
                "sequences": [{"id": s.id, "response_ids": list(range(30))} for s in body.sequences],
                "signal": {"sampled": True, "top_k": 2, "entropy": True},
            }
            reply = await http.post("/v1/score", params={"arrays": "list"}, json=document)
    assert reply.status_code == 200
    assert "NaN" not in reply.text
    assert "Infinity" not in reply.text
    sequence = json.loads(reply.text)["sequences"][0]
    nulls = [value is None for value in sequence["sampled"]]
    assert any(nulls)
    assert nulls == [not valid for valid in sequence["valid"]]


async def test_an_engine_answer_of_the_wrong_shape_is_an_error_not_a_score() -> None:
    class Shifted(RecordingScorer):
        async def score(self, request: ScoreRequest):  # type: ignore[no-untyped-def]
            from dataclasses import replace

            score = await super().score(request)
            short = replace(score.sequences[0], sampled=score.sequences[0].sampled[1:])  # type: ignore[index]
            return replace(score, sequences=(short,))

    async with serve(Shifted()) as doors, AsyncTeacherClient(doors.grpc) as client:
        with pytest.raises(TutelageError, match="engine answered sampled with shape"):
            await client.score_request(small())


async def test_an_engine_that_breaks_is_an_internal_error_without_its_secrets() -> None:
    class Broken(RecordingScorer):
        async def score(self, request: ScoreRequest):  # type: ignore[no-untyped-def]
            raise ValueError("/secret/path")

    async with serve(Broken()) as doors, AsyncTeacherClient(doors.grpc) as client:
        with pytest.raises(TutelageError, match="INTERNAL: engine failed with ValueError") as failed:
            await client.score_request(small())
        assert "secret" not in str(failed.value)
        async with http_client(doors.http) as http:
            reply = await http.post("/v1/score", json=BODY)
        assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")


async def test_weights_replaced_while_a_request_waits_fail_its_pin(tmp_path) -> None:  # type: ignore[no-untyped-def]
    scorer = RecordingScorer()
    scorer.gate.clear()
    request = codec.build_request([[1]], [[2]], pins=Pins(weights_version=0))
    async with serve(scorer) as doors, AsyncTeacherClient(doors.grpc) as client:
        call = asyncio.create_task(client.score_request(request))
        await reached(scorer)
        await scorer.engine.load_weights(tmp_path, 1)
        scorer.gate.set()
        with pytest.raises(TutelageError, match=r"FAILED_PRECONDITION: pins\.weights_version: got 0"):
            await call


async def test_a_stream_answers_as_requests_finish_and_refuses_bad_ones_alone() -> None:
    scorer = RecordingScorer()
    requests = [small(str(i)) for i in range(20)]
    requests.insert(3, codec.build_request([[1]], [[2]], signal=Signal(top_k=99), request_id="bad"))
    async with serve(scorer) as doors, AsyncTeacherClient(doors.grpc) as client:
        answers = {answer.request_id: answer async for answer in client.score_stream(requests)}
        whole = await client.score_request(small())
    assert set(answers) == {*map(str, range(20)), "bad"}
    bad = answers.pop("bad")
    assert bad.score is None
    assert bad.error is not None
    assert bad.error.code == "INVALID_ARGUMENT"
    for answer in answers.values():
        assert answer.score is not None
        np.testing.assert_array_equal(answer.score.sequences[0].sampled, whole.sequences[0].sampled)


async def test_what_a_stream_s_requests_raise_is_raised_to_its_reader_with_its_cause() -> None:
    def requests() -> Iterator[ScoreRequest]:
        yield small("sent")
        raise KeyError("mine")

    async def requests_later() -> AsyncIterator[ScoreRequest]:
        for request in requests():
            yield request

    def read(address: str) -> list[str]:
        with TeacherClient(address) as client:
            answers = client.score_stream(requests())
            ids = [next(answers).request_id]
            with pytest.raises(TutelageError, match="INVALID_ARGUMENT: requests: raised KeyError") as failed:
                next(answers)
            assert isinstance(failed.value.__cause__, KeyError)
            return ids

    async with serve(RecordingScorer()) as doors:
        assert await asyncio.to_thread(read, doors.grpc) == ["sent"]
        async with AsyncTeacherClient(doors.grpc) as client:
            answers = client.score_stream(requests_later())
            assert (await anext(answers)).request_id == "sent"
            with pytest.raises(TutelageError, match="INVALID_ARGUMENT: requests: raised KeyError") as failed:
                await anext(answers)
            assert isinstance(failed.value.__cause__, KeyError)
            bad = codec.build_request([[1]], [[2]], request_id="\ud800")
            with pytest.raises(TutelageError, match="INVALID_ARGUMENT"):
                await anext(client.score_stream([bad]))


async def test_a_stream_is_slowed_down_not_refused_when_the_service_is_full() -> None:
    scorer = RecordingScorer(tokens_per_second=20_000)
    requests = [small(str(i), tokens=40) for i in range(50)]
    async with serve(scorer, max_queued_tokens=100) as doors, AsyncTeacherClient(doors.grpc) as client:
        answers = [answer async for answer in client.score_stream(requests)]
        assert len(answers) == 50
        assert all(answer.error is None for answer in answers)


async def test_draining_answers_what_was_accepted_and_refuses_the_rest() -> None:
    scorer = RecordingScorer()
    scorer.gate.clear()
    async with serve(scorer) as doors, AsyncTeacherClient(doors.grpc, retry=ONCE) as client:
        accepted = asyncio.create_task(client.score_request(small()))
        stream = client.score_stream([small("s")])
        streamed = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        await reached(scorer, 2)
        doors.core.begin_drain()
        with pytest.raises(TutelageError, match="UNAVAILABLE"):
            await client.score_request(small())
        async with http_client(doors.http) as http:
            reply = await http.post("/v1/score", json=BODY)
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
            assert (await http.get("/ready")).status_code == 503
            assert (await http.get("/health")).status_code == 200
        scorer.gate.set()
        assert (await accepted).sequences[0].num_positions == 2
        assert (await streamed).score is not None
        await asyncio.wait_for(doors.core.drained(), 1)
    assert len(scorer.reached) == 2


async def test_the_teacher_describes_itself_alike_through_both_doors() -> None:
    scorer = RecordingScorer()
    async with serve(scorer) as doors, AsyncTeacherClient(doors.grpc) as client:
        served = await client.get_teacher("fake")
        async with http_client(doors.http) as http:
            headers = {"accept": "application/x-protobuf"}
            packed = await http.get("/v1/teacher", headers=headers)
            models = (await http.get("/v1/models")).json()
        with pytest.raises(TutelageError, match="NOT_FOUND"):
            await client.get_teacher("somebody")
    assert codec.teacher_from_proto(pb.GetTeacherResponse.FromString(packed.content)) == served
    assert served.identity == scorer.identity
    assert served.limits == scorer.limits
    assert models["data"][0]["id"] == "fake"
    assert models["data"][0]["max_model_len"] == scorer.limits.max_sequence_tokens


async def test_several_teachers_behind_one_address_answer_under_their_own_names() -> None:
    scorer = SeveralTeachers("math", "code")
    async with (
        serve(scorer) as doors,
        AsyncTeacherClient(doors.grpc, retry=ONCE) as client,
        http_client(doors.http) as http,
    ):
        scores = []
        for name in ("math", "code"):
            assert (await client.get_teacher(name)).identity.name == name
            scores.append(await client.score_request(replace(small(), teacher=name)))
            reply = await http.post("/v1/score", json={**BODY, "teacher": name})
            assert reply.json()["identity"]["name"] == name
        models = (await http.get("/v1/models")).json()["data"]
        unnamed = [await http.post("/v1/score", json=BODY), await http.get("/v1/teacher")]
        other = await http.post("/v1/score", json={**BODY, "teacher": "art"})
        metrics = (await http.get("/metrics")).text
    assert [score.identity.name for score in scores] == ["math", "code"]
    sampled = [score.sequences[0].sampled for score in scores]
    assert (sampled[0] != sampled[1]).any()
    assert [model["id"] for model in models] == ["math", "code"]
    for reply in unnamed:
        assert reply.status_code == 400
        assert "got none" in reply.text
        assert "here are 'math', 'code'" in reply.text
    assert (other.status_code, "here are 'math', 'code'" in other.text) == (404, True)
    assert metrics.count("tutelage_teacher_info{") == 1, "dashboards join it to the replica's other figures"
    assert 'teacher="math,code"' in metrics
