"""Closed by default: every route and RPC asks for a token, except health; beyond loopback one is required."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import SecretStr, ValidationError
from support.teachers import Doors, RecordingScorer, http_client, serve
from tutelage.v1 import teacher_pb2 as pb
from tutelage.v1.teacher_pb2_grpc import TeacherServiceStub
from tutelage_client import RetryPolicy, TeacherClient, Tls, TutelageError

from services.api.settings import ServiceSettings, TlsSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKENS = ("first-secret", "second-secret")
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def doors() -> AsyncIterator[Doors]:
    async with serve(RecordingScorer(), tokens=[SecretStr(token) for token in TOKENS]) as opened:
        yield opened


async def code_of(call: grpc.aio.UnaryUnaryCall[Message, Message]) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


@pytest.mark.parametrize("token", [None, "wrong", "first-secre", "first-secrets", ""])
async def test_every_rpc_without_an_accepted_token_is_refused_except_health(
    doors: Doors, token: str | None
) -> None:
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    async with grpc.aio.insecure_channel(doors.grpc) as channel:
        stub = TeacherServiceStub(channel)
        assert await code_of(stub.GetTeacher(pb.GetTeacherRequest(), metadata=metadata)) == "UNAUTHENTICATED"
        assert await code_of(stub.Score(pb.ScoreRequest(), metadata=metadata)) == "UNAUTHENTICATED"
        silent = stub.ScoreStream(metadata=metadata, timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await silent.read()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await reflection.read()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), metadata=metadata)
        assert answer.status == SERVING


@pytest.mark.parametrize("method", ["GetTeacher", "Score"])
async def test_a_call_without_a_token_is_refused_before_its_message_is_read(
    doors: Doors, method: str
) -> None:
    async with grpc.aio.insecure_channel(doors.grpc) as channel:
        silent = channel.stream_stream(f"/tutelage.v1.TeacherService/{method}")(timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await silent.read()
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_every_http_route_without_a_token_is_refused_except_the_probes(doors: Doors) -> None:
    with_token = {"authorization": f"Bearer {TOKENS[1]}"}
    async with http_client(doors.http) as client:
        paths = (await client.get("/openapi.json", headers=with_token)).json()["paths"]
        routes = [(method, path) for path, methods in paths.items() for method in methods]
        assert {"/v1/score", "/v1/teacher", "/v1/models", "/metrics", "/health", "/ready"} <= set(paths)
        for method, path in [*routes, ("get", "/openapi.json"), ("get", "/docs"), ("get", "/nothing")]:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKENS[0]}):
                reply = await client.request(method, path, headers=headers)
                if path in ("/health", "/ready"):
                    assert reply.status_code == 200
                else:
                    assert (path, reply.status_code) == (path, 401)
                    assert reply.json()["error"]["type"] == "authentication_error"
                    assert "secret" not in reply.text


@pytest.mark.parametrize("token", TOKENS)
async def test_each_of_several_tokens_opens_both_doors(doors: Doors, token: str) -> None:
    async with http_client(doors.http) as client:
        reply = await client.get("/v1/models", headers={"authorization": f"Bearer {token}"})
        assert reply.status_code == 200
    async with grpc.aio.insecure_channel(doors.grpc) as channel:
        call = TeacherServiceStub(channel).GetTeacher(
            pb.GetTeacherRequest(), metadata=(("authorization", f"Bearer {token}"),)
        )
        assert await code_of(call) == "OK"


async def test_reflection_describes_the_service(doors: Doors) -> None:
    metadata = (("authorization", f"Bearer {TOKENS[0]}"),)
    async with grpc.aio.insecure_channel(doors.grpc) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(metadata=metadata)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        call.cancel()
    names = {service.name for service in answer.list_services_response.service}
    assert {"tutelage.v1.TeacherService", "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "teacher.example"])
async def test_listening_beyond_loopback_without_a_token_is_refused_at_start(host: str) -> None:
    with pytest.raises(ValidationError, match="without a token"):
        ServiceSettings(host=host)
    with pytest.raises(ValidationError, match="without a token"):
        ServiceSettings(metrics_host=host)
    assert ServiceSettings(host=host, tokens=(SecretStr("x"),)).host == host


async def test_an_empty_token_or_token_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="empty token"):
        ServiceSettings(tokens=(SecretStr(" "),))
    file = tmp_path / "tokens"
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="without a token"):
        ServiceSettings(host="0.0.0.0", token_file=file).read_tokens()


def make_certificates(directory: Path) -> None:
    """An authority, a server certificate for 127.0.0.1 and a client certificate."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=directory)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test-authority")
    for name in ("server", "client"):
        (directory / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
        openssl("req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-extfile", "names", "-out", f"{name}.pem",
        )  # fmt: skip


async def test_mutual_tls_admits_only_callers_with_a_certificate(tmp_path: Path) -> None:
    import asyncio
    import ssl

    import httpx

    make_certificates(tmp_path)
    tls = TlsSettings(
        certificate=tmp_path / "server.pem", key=tmp_path / "server.key", client_authority=tmp_path / "ca.pem"
    )
    authority = (tmp_path / "ca.pem").read_bytes()
    known = Tls(authority, (tmp_path / "client.pem").read_bytes(), (tmp_path / "client.key").read_bytes())

    def ask(given: Tls | None) -> str:
        with TeacherClient(doors.grpc, tls=given, retry=RetryPolicy(attempts=1)) as client:
            return client.get_teacher().identity.name

    async with serve(RecordingScorer(), tls=tls) as doors:
        assert await asyncio.to_thread(ask, known) == "fake"
        for stranger in (Tls(authority), None):
            with pytest.raises(TutelageError, match="UNAVAILABLE"):
                await asyncio.to_thread(ask, stranger)
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        async with httpx.AsyncClient(base_url=doors.http, verify=context) as http:
            with pytest.raises(httpx.TransportError):
                await http.get("/health")
        context.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
        async with httpx.AsyncClient(base_url=doors.http, verify=context) as http:
            assert (await http.get("/health")).status_code == 200
