"""An HTTP server inside the process's own event loop, with sockets and signals of the process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from services.api.settings import ServiceSettings


class HttpServer:
    """One listening HTTP server, run inside the caller's event loop."""

    def __init__(self, app: FastAPI, host: str, port: int, settings: ServiceSettings) -> None:
        tls = settings.tls
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            lifespan="off",
            http="h11",  # not whatever is installed beside us: limits and errors stay the same everywhere
            ws="none",
            server_header=False,
            ssl_certfile=None if tls is None else tls.certificate,
            ssl_keyfile=None if tls is None else tls.key,
            ssl_ca_certs=None if tls is None or tls.client_authority is None else str(tls.client_authority),
            ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.client_authority else ssl.CERT_NONE,
        )
        self._server = _Uvicorn(config)
        self._scheme = "http" if tls is None else "https"
        self._task: asyncio.Task[None] | None = None
        self.url = ""

    async def start(self) -> None:
        """Bind and answer; raises OSError when the address is taken."""
        config = self._server.config
        listener = _listen(config.host, config.port)
        port = listener.getsockname()[1]
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.url = f"{self._scheme}://{host}:{port}"
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        up = asyncio.create_task(self._server.up.wait())
        await asyncio.wait({self._task, up}, return_when=asyncio.FIRST_COMPLETED)
        if not up.done():
            up.cancel()
            await self._task

    async def stop(self, grace_seconds: float) -> None:
        """Close the listener and wait for running answers, at most `grace_seconds`."""
        if self._task is None:
            return
        self._server.should_exit = True
        await asyncio.wait({self._task}, timeout=grace_seconds)
        self._server.force_exit = True
        await self._task


class _Uvicorn(uvicorn.Server):
    """Signals belong to the process that runs the server, not to the server."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"HTTP cannot listen on {host}:{port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener
