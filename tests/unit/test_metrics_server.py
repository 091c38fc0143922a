"""The small HTTP port of trainer, samplers and exporter: what it says, and to whom."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pydantic import ValidationError
from tutelage_client.errors import TutelageError

from services import metrics_server
from services.access import TokenCheck
from services.exporter.process import ExporterSettings
from services.metrics_server import MAX_CALLERS, PLAIN, MetricsServer
from student_trainer.sections import MetricsSettings


def get(server: MetricsServer, path: str, token: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=10)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def is_well(server: MetricsServer) -> bool:
    try:
        return get(server, "/health")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def figures() -> tuple[str, bytes]:
    return PLAIN, b"seven\n"


def test_pages_are_served_and_others_are_named() -> None:
    with MetricsServer({"/figures": figures}) as server:
        assert server.address.startswith("http://127.0.0.1:")
        assert get(server, "/health") == (200, "ok\n")
        assert get(server, "/figures?x=1") == (200, "seven\n")
        assert get(server, "/elsewhere") == (404, "have /figures, /health\n")


def test_only_probes_answer_without_the_token() -> None:
    pages = {"/figures": figures, "/ready": lambda: (PLAIN, b"ok\n")}
    with MetricsServer(pages, tokens=TokenCheck(["open-sesame"])) as server:
        for token in (None, "wrong", ""):
            assert get(server, "/figures", token)[0] == 401
            assert get(server, "/elsewhere", token)[0] == 401, "a stranger learns no names"
        assert get(server, "/figures", "open-sesame") == (200, "seven\n")
        assert get(server, "/health") == get(server, "/ready") == (200, "ok\n")


def test_a_page_that_fails_says_so_and_the_next_one_is_served() -> None:
    def fail() -> tuple[str, bytes]:
        raise RuntimeError("secret detail")

    with MetricsServer({"/bad": fail, "/figures": figures}) as server:
        status, text = get(server, "/bad")
        assert status == 500
        assert "secret" not in text
        assert get(server, "/figures")[0] == 200


def test_a_taken_port_is_an_error_of_one_line() -> None:
    with MetricsServer({}) as server:
        port = urlsplit(server.address).port or 0
        with pytest.raises(TutelageError, match=f"cannot listen on 127.0.0.1:{port}") as refusal:
            MetricsServer({}, port=port)
    assert refusal.value.code == "UNAVAILABLE"


def test_callers_beyond_the_limit_are_turned_away_and_make_room_when_they_go() -> None:
    with MetricsServer({"/figures": figures}) as server:
        where = urlsplit(server.address)
        address = (where.hostname or "", where.port or 0)
        silent = [socket.create_connection(address) for _ in range(MAX_CALLERS)]
        try:
            late = socket.create_connection(address, timeout=5)
            late.sendall(b"GET /figures HTTP/1.0\r\n\r\n")
            assert late.recv(100) == b"", "no thread for it"
            late.close()
        except ConnectionResetError:
            pass
        finally:
            for connection in silent:
                connection.close()
        answered = threading.Event()

        def ask() -> None:
            while not answered.is_set():
                try:
                    if get(server, "/figures")[0] == 200:
                        answered.set()
                except (OSError, http.client.HTTPException):
                    continue

        threading.Thread(target=ask, daemon=True).start()
        assert answered.wait(10)


@pytest.mark.parametrize("slow", ["asking", "listening"])
def test_callers_that_trickle_make_room_when_their_time_is_over(
    slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte in time, and never done: the probes of everybody else must not fail for long."""
    monkeypatch.setattr(metrics_server, "REQUEST_SECONDS", 2.0)
    page = PLAIN, bytes(32 << 20)
    with MetricsServer({"/figures": figures, "/ready": lambda: page}) as server:
        where = urlsplit(server.address)
        callers = [
            socket.create_connection((where.hostname or "", where.port or 0)) for _ in range(MAX_CALLERS)
        ]
        ended = threading.Event()

        def trickle(caller: socket.socket) -> None:
            try:
                caller.sendall(b"GET /ready HTTP/1.0\r\n" + (b"\r\n" if slow == "listening" else b"X: "))
                while not ended.wait(0.1):
                    if slow == "asking":
                        caller.sendall(b"x")
                    elif not caller.recv(1):
                        return
            except OSError:
                pass

        threads = [threading.Thread(target=trickle, args=(caller,)) for caller in callers]
        for thread in threads:
            thread.start()

        def wait_for_health(answered: bool) -> None:
            end = time.monotonic() + 6
            while is_well(server) is not answered:
                assert time.monotonic() < end, f"never {answered}"
                time.sleep(0.02)

        try:
            wait_for_health(False)
            wait_for_health(True)
        finally:
            ended.set()
            for thread, caller in zip(threads, callers, strict=True):
                thread.join()
                caller.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.5", "::", "trainer"])
def test_beyond_loopback_a_token_is_required(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="without a token"):
        ExporterSettings(queue_url="redis://queue", host=host)
    with pytest.raises(ValidationError, match=r"set metrics\.token_file"):
        MetricsSettings(host=host)
    missing = MetricsSettings(host=host, token_file=tmp_path / "missing")
    with pytest.raises(TutelageError, match="missing"):
        missing.tokens()
    (tmp_path / "token").write_text("one\n\ntwo\n")
    found = MetricsSettings(host=host, token_file=tmp_path / "token").tokens()
    assert found.allows("Bearer two")
    assert not found.allows("Bearer three")


def test_loopback_needs_no_token() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert not ExporterSettings(queue_url="redis://queue", host=host).token_check().required
        assert not MetricsSettings(host=host).tokens().required
