"""Whether a process is well, for health checks of containers: exit status 0, or 1 and a line that says why.

python -m launcher.health http://127.0.0.1:8081/ready
python -m launcher.health RUN.toml --sampler NAME
python -m launcher.health RUN.toml --trainer
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import ssl
import sys
from pathlib import Path
from urllib.parse import urlsplit

PATIENCE_SECONDS = 5.0


def ask(url: str) -> str | None:
    """What is wrong with the answer of an HTTP probe on this machine; None when it is well."""
    address = urlsplit(url)
    host, port = address.hostname or "127.0.0.1", address.port
    connection: http.client.HTTPConnection
    if address.scheme == "https":
        # The process asks itself: what it presents need not carry the name of the loopback.
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(host, port, timeout=PATIENCE_SECONDS, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", address.path or "/")
        answer = connection.getresponse()
        body = answer.read(200).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        return f"{url}: {error}"
    finally:
        connection.close()
    return None if answer.status == http.HTTPStatus.OK else f"{url}: {answer.status} {body}"


async def look_for(run_file: Path, sampler: str | None, queue_url: str | None) -> str | None:
    """A process of a run says in the queue that it lives. None when it does.

    Args:
        sampler: its name; None looks for the trainer.
    """
    from tutelage_client.errors import TutelageError

    from services.queue import TRAINER_ROLE, sampler_role
    from student_trainer.config import load_run_config
    from student_trainer.run_queue import run_queue

    config = load_run_config(run_file, queue_url=queue_url)
    run = config.run.name
    role, name = (TRAINER_ROLE, run) if sampler is None else (sampler_role(run), sampler)
    queue = run_queue(config)
    try:
        await queue.open(PATIENCE_SECONDS)
        living = await asyncio.wait_for(queue.alive(role), PATIENCE_SECONDS)
    except (TutelageError, TimeoutError) as error:
        return f"queue: {error or 'no answer'}"
    finally:
        await queue.close()
    return None if name in living else f"{role} {name!r} is not present in the queue"


def main() -> int:
    """Entry point of `python -m launcher.health`."""
    from launcher.cli_errors import one_line_errors
    from launcher.queue_address import given_queue_url

    parser = argparse.ArgumentParser(description="Health check of a container.")
    parser.add_argument("target", help="http:// or https:// address of a probe, or a run file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sampler", metavar="NAME", help="with a run file: the sampler to look for")
    which.add_argument("--trainer", action="store_true", help="with a run file: look for its trainer")
    arguments = parser.parse_args()
    if arguments.sampler is None and not arguments.trainer:
        problem = ask(arguments.target)
    else:
        with one_line_errors():
            problem = asyncio.run(look_for(Path(arguments.target), arguments.sampler, given_queue_url()))
    if problem is not None:
        print(problem, file=sys.stderr)
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
