"""Direct callers and queued jobs beside a run of the stack, from inside one of its containers.

python -m support.stack_load OPTIONS_AS_JSON

Works until its standard input ends; then waits for what is queued and prints, as JSON, what it has seen.
Every second it prints how far it is.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.queue import LeaseSettings, Queue
from support.direct_load import DirectLoad
from support.queue_load import QueueLoad

TOLERANCE = 1e-3  # nats: what a batch is computed beside moves the last bits


@dataclass(frozen=True, slots=True)
class Options:
    """Addresses as "host:port"; secrets as files."""

    grpc: list[str]
    http: list[str]
    name: str
    teacher: str
    run: str
    queue_url_file: str
    token_file: str | None = None
    heartbeat: float = 2.0
    ahead: int = 16
    patience: float = 120.0


async def work(options: Options, url: str, token: str | None) -> dict[str, Any]:
    """Until standard input ends; what was seen."""
    direct = DirectLoad(
        options.grpc, options.http, name=options.name, tolerance=TOLERANCE, token=token, pause=0.05
    )
    problems: list[str] = []
    async with Queue(url, lease=LeaseSettings(heartbeat=options.heartbeat)) as queue:
        load = QueueLoad(queue, options.teacher, run=options.run, ahead=options.ahead)
        async with load, direct:
            ending = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
            while not ending.done():
                await asyncio.wait({ending}, timeout=1.0)
                tell(
                    {
                        "answered": direct.answered,
                        "failures": len(direct.failures),
                        "scored": len(load.received),
                    }
                )
            try:
                await load.finish(options.patience)
            except (AssertionError, TimeoutError) as error:
                problems.append(f"queue: {type(error).__name__}: {error}"[:2000])
    return {
        "done": True,
        "answered": direct.answered,
        "asked_again": direct.asked_again,
        "failures": direct.failures[:10] + problems,
        "submitted": load.submitted,
        "received": len(load.received),
        "twice": sum(count - 1 for count in load.received.values()),
    }


def tell(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    began = time.monotonic()
    given = Options(**json.loads(sys.argv[1]))
    queue_url = Path(given.queue_url_file).read_text().strip()
    bearer = Path(given.token_file).read_text().split()[0] if given.token_file else None
    tell(asyncio.run(work(given, queue_url, bearer)) | {"seconds": time.monotonic() - began})
