"""The stack of docker-compose.yml, really run: to the end, also while its parts are killed or replaced.

python tests/compose/check_stack.py | tee tests/compose/last-run.txt

Needs root, a Docker engine with compose, and the images that docker-compose.yml names (or stand-ins for them
in PYTHON_IMAGE, VALKEY_IMAGE, TORCH_INDEX). Works in a compose project of its own, which it removes first.
Not part of `make test`. Ends with status 0 when everything held.
"""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import time
from pathlib import Path

from kills import killed_in_turn
from outcome import Check, report_outcome
from restarts import restarted_and_scaled
from stack import Stack, longer_quickstart, run
from strangers import closed_to_strangers

PARTS = ("quickstart", "kills", "restarts")
# Of runs that are still under way when the last component was killed, the last teacher restarted.
STEPS_FOR_KILLS, STEPS_PER_RESTART = 400, 20


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the stack; kill and replace parts of it.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--restarts", type=int, default=4, help="of teachers, one at a time")
    parser.add_argument("--minutes", type=int, default=25, help="after which the check has failed")
    parser.add_argument("--keep", action="store_true", help="leave the stack of the last part running")
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60 * arguments.minutes)
    stack = Stack()
    check = Check(stack)
    print_machine()
    stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")
    build(stack)
    for number, part in enumerate(arguments.parts):
        if number:
            forget_the_run(stack)
        stack.say(f"part {part}")
        if part == "quickstart":
            finished_quickstart(check)
        elif part == "kills":
            with longer_quickstart(STEPS_FOR_KILLS) as stack.run:
                killed_in_turn(check)
        else:
            with longer_quickstart(100 + STEPS_PER_RESTART * arguments.restarts) as stack.run:
                restarted_and_scaled(check, arguments.restarts)
    if not arguments.keep:
        stack.compose("down", "--volumes", "--timeout", "40")
    print(f"\n{len(check.failed)} failed" + "".join(f"\n  {what}" for what in check.failed))
    return 1 if check.failed else 0


def too_long(_number: int, _frame: object) -> None:
    raise SystemExit("FAILED: the whole check takes too long")


def print_machine() -> None:
    engine = run(["docker", "version", "--format", "{{.Server.Version}}"]).strip()
    compose = run(["docker", "compose", "version", "--short"]).strip()
    commit = run(["git", "rev-parse", "--short", "HEAD"], check=False).strip()
    cores = run(["nproc"]).strip()
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"commit {commit}, Docker {engine}, compose {compose}, {platform.system()} {platform.machine()}")
    print(f"{cores} cores, load {load} before the start\n", flush=True)


def build(stack: Stack) -> None:
    begun = time.monotonic()
    stack.compose("build")
    stack.say(f"docker compose build: {time.monotonic() - begun:.0f} s")
    listed = run(["docker", "images", "--format", "{{.Repository}}:{{.Tag}} {{.Size}}"])
    sizes = sorted({line for line in listed.splitlines() if line.startswith("tutelage-")})
    for line in sizes:
        stack.say(f"image {line}")


def forget_the_run(stack: Stack) -> None:
    """The next part begins with an empty queue and no checkpoints; the models stay."""
    stack.compose("down", "--timeout", "40")
    for volume in ("runs", "queue"):
        run(["docker", "volume", "rm", f"{stack.project}_{volume}"])


def finished_quickstart(check: Check) -> None:
    """`docker compose up --wait` returns with a trained student."""
    stack = check.stack
    begun = time.monotonic()
    stack.compose("up", "--wait")
    stack.say(f"docker compose up --wait: {time.monotonic() - begun:.0f} s, models included")
    report_outcome(check)
    closed_to_strangers(check)


if __name__ == "__main__":
    sys.exit(main())
