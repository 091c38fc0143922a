"""A heartbeat: a daemon thread with its own connection, so that nothing the event loop does can stop it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import redis
import structlog

from services.queue.connection import Outage, connect_blocking, is_away

log = structlog.get_logger(__name__)

MIN_TIMEOUT = 1.0
RETRY_SECONDS = 0.5


class Heart(threading.Thread):
    """Calls `beat(client)` every `interval` seconds until stopped; survives outages of the server."""

    def __init__(self, url: str, interval: float, beat: Callable[[redis.Redis], None], name: str) -> None:
        super().__init__(name=f"heart-{name}", daemon=True)
        self._client = connect_blocking(url, timeout=max(MIN_TIMEOUT, interval))
        self._interval = interval
        self._beat = beat
        self._stopping = threading.Event()
        self._contact_since: float | None = None
        self._was_away = False

    def run(self) -> None:
        outage = Outage()
        while not self._stopping.is_set():
            started, pause = time.monotonic(), self._interval
            try:
                if self._contact_since is None:
                    self._contact_since = self._first_contact()
                self._beat(self._client)
                outage.worked()
            except (redis.RedisError, OSError) as error:
                if is_away(error):
                    self._contact_since, self._was_away = None, True
                    pause = min(pause, RETRY_SECONDS)
                    outage.failed("heartbeat", error)
                else:
                    log.warning("heartbeat refused", thread=self.name, error=str(error))
            self._stopping.wait(max(0.0, pause - (time.monotonic() - started)))
        self._client.close()

    def _first_contact(self) -> float:
        """When everybody else has been able to reach this server since, as far as we can know."""
        uptime = float(self._client.info("server")["uptime_in_seconds"])
        return time.monotonic() - (0.0 if self._was_away else uptime)

    @property
    def in_contact(self) -> float:
        """Seconds of unbroken contact.

        After an outage every lease looks run out, because nobody could renew; a worker may take
        over what is not renewed only when the others have had a lease's time to renew.
        """
        since = self._contact_since
        return 0.0 if since is None else time.monotonic() - since

    def stop(self, timeout: float = 5.0) -> None:
        """End the thread after its current beat."""
        self._stopping.set()
        if self.is_alive():
            self.join(timeout)
