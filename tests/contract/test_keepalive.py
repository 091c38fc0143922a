"""Pings that watch a silent call are allowed as often as the client sends them."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from support.teachers import RecordingScorer, serve
from tutelage.v1.teacher_pb2_grpc import TeacherServiceStub
from tutelage_client import codec
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
