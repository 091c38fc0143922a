"""Makes the secrets of a stack once: the queue's password and address, a token, Grafana's password.

python -m launcher.stack_secrets DIRECTORY --queue HOST:PORT

What is there is kept, so a stack that starts again finds its own. No secret has a default.
"""

from __future__ import annotations

import argparse
import os
import secrets
from pathlib import Path

PASSWORD, ADDRESS, TOKEN, GRAFANA = "queue-password", "queue-url", "token", "grafana-password"


def make_secrets(directory: Path, queue: str) -> None:
    """Files `queue-password`, `queue-url`, `token` and `grafana-password`, readable by their owner alone."""
    directory.mkdir(parents=True, exist_ok=True)
    password = _kept(directory / PASSWORD, secrets.token_hex(24))
    _write(directory / ADDRESS, f"redis://:{password}@{queue}/0")
    _kept(directory / TOKEN, secrets.token_hex(24))
    _kept(directory / GRAFANA, secrets.token_hex(24))


def _kept(path: Path, fresh: str) -> str:
    """What the file holds; `fresh`, written to it, when it holds nothing."""
    found = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not found:
        _write(path, fresh)
    return found or fresh


def _write(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w", encoding="utf-8") as file:
        file.write(content + "\n")
    temporary.replace(path)


def main() -> None:
    """Entry point of `python -m launcher.stack_secrets`."""
    parser = argparse.ArgumentParser(description="Make the secrets of a stack, once.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--queue", required=True, metavar="HOST:PORT", help="where the queue listens")
    arguments = parser.parse_args()
    make_secrets(arguments.directory, arguments.queue)


if __name__ == "__main__":
    main()
