"""Sizes at the limit pass; one over is refused quickly, with a client error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from support.teachers import VOCAB, Doors, RecordingScorer, http_client, serve
from tutelage_client import AsyncTeacherClient, Limits, ScoreRequest, Sequence, Signal, TutelageError, codec

pytestmark = pytest.mark.asyncio(loop_scope="module")

# The sizes of a real teacher, so that "quickly" means something.
REAL = Limits(
    max_sequences=64,
    max_sequence_tokens=4096,
    max_request_tokens=65_536,
    max_top_k=VOCAB,
    max_candidates=128,
    max_message_bytes=24 * 1024 * 1024,
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def doors() -> AsyncIterator[Doors]:
    async with serve(RecordingScorer(REAL)) as opened:
        yield opened


def request(
    count: int = 1, context: int = 1, response: int = 1, candidates: int = 0, top_k: int = 0
) -> ScoreRequest:
    def row(tokens: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        return np.ones(tokens, dtype=np.int32)

    ids = np.ones((response, candidates), dtype=np.int32) if candidates else None
    return ScoreRequest(
        contexts=(row(context),),
        sequences=tuple(Sequence(str(i), 0, row(response), ids) for i in range(count)),
        signal=Signal(top_k=top_k, candidates=candidates > 0),
    )


# name: (a request at the limit, one just over it)
AT_AND_OVER = {
    "sequences": (request(count=64), request(count=65)),
    "sequence tokens": (request(context=4000, response=96), request(context=4000, response=97)),
    "request tokens": (
        request(count=32, context=1024, response=(65_536 - 1024) // 32),
        request(count=32, context=1025, response=(65_536 - 1024) // 32),
    ),
    "top_k": (request(top_k=VOCAB), request(top_k=VOCAB + 1)),
    "candidates": (
        request(candidates=128),
        request(candidates=129),
    ),
}


@pytest.mark.parametrize("name", AT_AND_OVER)
async def test_a_size_at_the_limit_passes_and_one_over_is_refused(doors: Doors, name: str) -> None:
    at, over = AT_AND_OVER[name]
    async with AsyncTeacherClient(doors.grpc) as client:
        (await client.score_request(at)).raise_for_errors()
        with pytest.raises(TutelageError, match="INVALID_ARGUMENT"):
            (await client.score_request(over)).raise_for_errors()


async def test_a_refusal_takes_at_most_ten_milliseconds(doors: Doors) -> None:
    async with AsyncTeacherClient(doors.grpc) as client:
        for name, (_, over) in AT_AND_OVER.items():
            times = []
            for _ in range(5):
                began = time.perf_counter()
                with pytest.raises(TutelageError, match="INVALID_ARGUMENT"):
                    (await client.score_request(over)).raise_for_errors()
                times.append(time.perf_counter() - began)
            assert min(times) <= 0.010, name


async def test_an_answer_that_would_not_fit_a_message_is_refused_before_it_is_computed(doors: Doors) -> None:
    positions = REAL.max_message_bytes // (1 + 4 + 8 * VOCAB)
    fits = request(count=8, response=positions // 8 - 1, top_k=VOCAB)
    too_big = request(count=8, response=positions // 8 + 1, top_k=VOCAB)
    async with AsyncTeacherClient(doors.grpc) as client:
        assert len((await client.score_request(fits)).raise_for_errors().sequences) == 8
        with pytest.raises(TutelageError, match="its answer would have"):
            await client.score_request(too_big)


async def test_a_message_over_the_byte_limit_is_refused_by_both_doors() -> None:
    limits = Limits(max_message_bytes=4096)
    scorer = RecordingScorer(limits)
    async with serve(scorer) as doors:
        data = codec.request_to_proto(request(response=1100)).SerializeToString()
        async with grpc.aio.insecure_channel(doors.grpc) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary("/tutelage.v1.TeacherService/Score")(data)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with http_client(doors.http) as client:
            headers = {"content-type": "application/x-protobuf"}
            reply = await client.post("/v1/score", content=data, headers=headers)

            async def chunks():  # type: ignore[no-untyped-def]
                for start in range(0, len(data), 1000):
                    yield data[start : start + 1000]

            chunked = await client.post("/v1/score", content=chunks(), headers=headers)
    assert (reply.status_code, chunked.status_code) == (413, 413)
    assert not scorer.reached


async def test_the_client_does_not_retry_a_message_that_is_too_large() -> None:
    scorer = RecordingScorer(Limits(max_message_bytes=4096))
    async with serve(scorer) as doors, AsyncTeacherClient(doors.grpc) as client:
        with pytest.raises(TutelageError, match="RESOURCE_EXHAUSTED"):
            await asyncio.wait_for(client.score_request(request(response=1100)), 5)
