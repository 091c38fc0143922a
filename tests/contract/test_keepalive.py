"""How long a connection lives: pings that watch a silent call are allowed, and its age ends no call."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from support.teachers import RecordingScorer, serve
from tutelage.v1.teacher_pb2_grpc import TeacherServiceStub
from tutelage_client import AsyncTeacherClient, codec
from tutelage_client.connect import KEEPALIVE_MS, channel_options

from services.api import grpc_server


def test_the_server_allows_the_pings_that_the_client_sends() -> None:
    options = dict(channel_options(1 << 20))
    assert options["grpc.keepalive_time_ms"] == KEEPALIVE_MS
    assert grpc_server.MIN_PING_INTERVAL_MS <= KEEPALIVE_MS / 2


async def test_a_long_silent_call_outlives_its_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty times as fast as in life. With gRPC's own bound the fifth ping ends the call after 4.3 s."""
    monkeypatch.setattr(grpc_server, "MIN_PING_INTERVAL_MS", grpc_server.MIN_PING_INTERVAL_MS // 30)
    fast = {"grpc.keepalive_time_ms": KEEPALIVE_MS // 30, "grpc.http2.max_pings_without_data": 0}
    scorer = RecordingScorer()
    scorer.gate.clear()
    async with serve(scorer) as doors:
        options = [*{**dict(channel_options(1 << 20)), **fast}.items()]
        async with grpc.aio.insecure_channel(doors.grpc, options) as channel:
            request = codec.request_to_proto(codec.build_request([[1]], [[2]]))
            call = TeacherServiceStub(channel).Score(request, timeout=30)
            await asyncio.sleep(6.0)
            scorer.gate.set()
            assert len((await call).sequences) == 1


async def test_a_connection_of_some_age_is_made_anew_and_no_call_notices() -> None:
    scorer = RecordingScorer()
    scorer.gate.clear()
    request = codec.build_request([[1]], [[2]])
    async with serve(scorer, max_connection_age_seconds=1.0) as doors:
        async with grpc.aio.insecure_channel(doors.grpc) as channel:
            call = TeacherServiceStub(channel).Score(codec.request_to_proto(request), timeout=60)
            await channel.channel_ready()
            await asyncio.wait_for(channel.wait_for_state_change(grpc.ChannelConnectivity.READY), 10)
            await asyncio.sleep(1.0)
            scorer.gate.set()
            assert len((await call).sequences) == 1
        async with AsyncTeacherClient(doors.grpc) as client:
            end = time.monotonic() + 3.5
            while time.monotonic() < end:
                await client.score_request(request)
