"""`tutelage status`: a live view of a running stack, or one look at it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

import redis
from rich.console import Console
from rich.live import Live
from tutelage_client.errors import TutelageError

from launcher.status_look import Lookout, StackLook, as_document
from launcher.status_view import render, waiting_for
from services import strict_json
from services.logs import log_to_stderr
from services.queue import LeaseSettings, Queue
from services.queue.connection import without_secrets

if TYPE_CHECKING:
    from student_trainer.config import RunConfig

LOOK_SECONDS = 1.0
PATIENCE_SECONDS = 5.0
PLAIN_WIDTH = 120  # of a table that nobody's terminal bounds


def watch(
    url: str,
    namespace: str,
    *,
    heartbeat_seconds: float,
    expected: RunConfig | None,
    once: bool,
    as_json: bool,
) -> int:
    """Show the stack until Ctrl-C, or once; 0.

    Raises:
        TutelageError: UNAVAILABLE, asked for one look and the queue did not answer.
    """
    log_to_stderr(logging.ERROR)  # the view itself says that the queue is away
    queue = Queue(url, namespace, lease=LeaseSettings(heartbeat=heartbeat_seconds))
    lookout, console = Lookout(queue, expected), Console(highlight=False)
    if once or as_json or not console.is_terminal:
        look = asyncio.run(_once(queue, lookout))
        if as_json:
            print(strict_json.dumps(as_document(look)))
        else:
            console.width = console.width if console.is_terminal else PLAIN_WIDTH
            console.print(render(look))
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_live(queue, lookout, console))
    return 0


async def _once(queue: Queue, lookout: Lookout) -> StackLook:
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await lookout.look()
    except (TimeoutError, redis.RedisError, OSError) as error:
        why = f"queue server {without_secrets(queue.url)}: {_reason(error)}"
        raise TutelageError("UNAVAILABLE", why) from error
    finally:
        await queue.close()


async def _live(queue: Queue, lookout: Lookout, console: Console) -> None:
    last: StackLook | None = None
    task = asyncio.current_task()
    assert task is not None
    with Live(console=console, auto_refresh=False, redirect_stderr=False) as live:
        # Python 3.11's wait_for, which redis-py uses, can swallow the cancellation that Ctrl-C is.
        while not task.cancelling():
            problem = None
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    last = await lookout.look()
            except (TimeoutError, redis.RedisError, OSError) as error:
                problem = _reason(error)
            if last is None:
                live.update(waiting_for(without_secrets(queue.url), problem or ""), refresh=True)
            else:
                live.update(render(last, problem), refresh=True)
            await asyncio.sleep(LOOK_SECONDS)


def _reason(error: BaseException) -> str:
    return str(error) or f"no answer in {PATIENCE_SECONDS:g} s"
