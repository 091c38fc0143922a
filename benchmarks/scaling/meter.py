"""What the autoscalers are told about the queue: the exporter's figures, and for KEDA the stream itself."""

from __future__ import annotations

from benchmarks.scaling.host import TEACHER
from services.queue import Queue, connect


class Meter:
    """Reads every metric of both rules; `unit`: simulated tokens that one token of the queue stands for."""

    def __init__(self, queue: Queue, unit: float) -> None:
        self._queue = queue
        self._unit = unit
        self._stream = queue.keys.jobs(TEACHER)
        self._client = connect(queue.url)

    async def read(self) -> dict[str, float]:
        """Metrics by the names that the rules have for them."""
        stats = await self._queue.teacher_stats(TEACHER)
        values = {
            "tutelage_queue_waiting_tokens": stats.waiting_tokens * self._unit,
            "tutelage_queue_in_flight_tokens": stats.in_flight_tokens * self._unit,
        }
        return values | await self._as_keda()

    async def _as_keda(self) -> dict[str, float]:
        """Lag and pending entries of the consumer group, as KEDA's redis-streams trigger asks for them."""
        if not await self._client.exists(self._stream.stream):
            return {"lag": 0.0, "pending": 0.0}
        (group,) = await self._client.xinfo_groups(self._stream.stream)
        return {"lag": float(group["lag"]), "pending": float(group["pending"])}

    async def aclose(self) -> None:
        await self._client.aclose()
