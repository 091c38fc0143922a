"""The stack of docker-compose.yml, really run: to the end, and to the end while parts of it are killed.

python tests/compose/check_stack.py | tee tests/compose/last-run.txt

Needs root, a Docker engine with compose, and the images that docker-compose.yml names (or stand-ins for them
in PYTHON_IMAGE, VALKEY_IMAGE, TORCH_INDEX). Works in a compose project of its own, which it removes first.
Not part of `make test`. Ends with status 0 when everything held.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from stack import PROMPTS_PER_STEP, RUN, STEPS, Stack, run

REPLACEMENTS_FROM = 2**40  # student_trainer/pacing.py: what is dropped is replaced from a range of its own
SERVICES = ("queue", "teacher", "sampler", "trainer", "report")


class Check:
    """What was promised and what was found."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.failed: list[str] = []

    def that(self, holds: bool, what: str) -> None:
        self.stack.say(f"{'holds' if holds else 'FAILED'}  {what}")
        if not holds:
            self.failed.append(what)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the stack of docker-compose.yml and kill parts of it.")
    parser.add_argument("--keep", action="store_true", help="leave the stack of the last part running")
    arguments = parser.parse_args()
    stack = Stack()
    check = Check(stack)
    print_machine()
    stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")
    build(stack)
    finished_quickstart(check)
    closed_to_strangers(check)
    stack.compose("down", "--timeout", "40")
    for volume in ("runs", "queue"):  # the models stay
        run(["docker", "volume", "rm", f"{stack.project}_{volume}"])
    killed_in_turn(check)
    if not arguments.keep:
        stack.compose("down", "--volumes", "--timeout", "40")
    print(f"\n{len(check.failed)} failed" + "".join(f"\n  {what}" for what in check.failed))
    return 1 if check.failed else 0


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


def finished_quickstart(check: Check) -> None:
    """`docker compose up --wait` returns with a trained student."""
    stack = check.stack
    begun = time.monotonic()
    stack.compose("up", "--wait")
    stack.say(f"docker compose up --wait: {time.monotonic() - begun:.0f} s, models included")
    report_outcome(check)


def report_outcome(check: Check) -> None:
    """What the run ended with, and whether each group counts once."""
    stack = check.stack
    check.that(stack.progress("status") == "finished", "the run is finished")
    ledger, records = stack.ledger(), metrics(stack)
    steps = [record for record in records if "step" in record]
    check.that([int(r["step"]) for r in steps] == list(range(1, STEPS + 1)), f"{STEPS} steps, each once")
    applied, dropped = indices(ledger["applied"]), indices(ledger["dropped"])
    trained = sum(int(record["groups"]) for record in steps)
    expected = STEPS * PROMPTS_PER_STEP
    check.that(
        trained == len(applied) == expected and not applied & dropped,
        f"{expected} groups wanted, {trained} trained, {trained - len(applied)} of them twice",
    )
    ordered = {*range(expected), *range(REPLACEMENTS_FROM, REPLACEMENTS_FROM + ledger["replacements"])}
    lost = ordered - applied - dropped
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(ledger["drop_counts"].items())) or "none"
    check.that(not lost, f"{len(ordered)} groups ordered, {len(lost)} lost (dropped and replaced: {reasons})")
    left = {name: stack.queue("XLEN", f"tutelage:{name}") for name in ("dead:teacher", f"dead-orders:{RUN}")}
    check.that(set(left.values()) == {"0"}, f"dead letters: {left}")
    accuracy = [r["evaluation"] for r in records if "evaluation" in r]
    first, last = accuracy[0], accuracy[-1]
    stack.say(f"exact match, greedy: {share(first)} before, {share(last)} after")
    kl = statistics.fmean(record["kl"] for record in steps[-10:])
    stack.say(f"KL to the teacher, nats per token: {steps[0]['kl']:.3f} at first, {kl:.3f} at last")
    seconds = sum(float(r["seconds_wait"]) + float(r["seconds_train"]) for r in steps)
    stack.say(f"{int(steps[-1]['tokens_scored']):,} tokens scored, {seconds:.0f} s in steps")
    check.that(last["greedy"] > first["greedy"] + 0.4, "the student has learned")
    page = stack.file("report.html")
    check.that(page.lstrip().startswith("<!") and len(page) > 10_000, "the report is written")


def share(evaluation: dict[str, Any]) -> str:
    return f"{100 * evaluation['greedy']:.1f}%"


def metrics(stack: Stack) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stack.file("metrics.jsonl").splitlines()]


def indices(pairs: list[list[int]]) -> set[int]:
    return {index for start, end in pairs for index in range(start, end)}


def closed_to_strangers(check: Check) -> None:
    """Nobody is root, nothing is published beyond the loopback, and without a token there is no answer."""
    stack = check.stack
    for service in SERVICES:
        for name in stack.containers(service):
            found = stack.inspect(name)
            host = found["HostConfig"]
            check.that(
                found["Config"]["User"] == "10001:10001"
                and host["ReadonlyRootfs"]
                and host["CapDrop"] == ["ALL"]
                and not host["Privileged"],
                f"{name}: user 10001, read-only root, no capabilities",
            )
            addresses = {
                b["HostIp"] for some in found["NetworkSettings"]["Ports"].values() for b in some or ()
            }
            check.that(
                addresses <= {"127.0.0.1"}, f"{name}: published on {sorted(addresses) or 'no address'}"
            )
    address = stack.compose("port", "--index", "2", "teacher", "8081").strip()
    token = run(["docker", "exec", stack.container("teacher", 2), "cat", "/run/tutelage/token"]).strip()
    answers = [ask(f"http://{address}/v1/teacher", given) for given in (None, "guess", token)]
    check.that(answers == [401, 401, 200], f"a teacher without, with a wrong and with its token: {answers}")
    noauth = run(
        ["docker", "exec", stack.container("queue"), "valkey-cli", "PING"], check=False
    ).strip()  # fmt: skip
    check.that("NOAUTH" in noauth, f"the queue without a password: {noauth}")


def ask(url: str, token: str | None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def killed_in_turn(check: Check) -> None:
    """The same run again: more teachers on the way, and a replica, the queue and the trainer killed."""
    stack = check.stack
    begun = time.monotonic()
    stack.compose("up", "--detach")
    stack.say("docker compose up --detach")
    stack.wait_for(lambda: stack.step() >= 10, "step 10")
    stack.say(f"step {stack.step()}: docker compose up --scale teacher=4")
    stack.compose("up", "--detach", "--no-recreate", "--scale", "teacher=4")
    kill(check, "teacher", 1, at=20)
    kill(check, "queue", 1, at=40)
    took = stack.wait_for(lambda: stack.healthy("teacher") == 4, "four teachers")
    check.that(stack.step() < STEPS, f"four teachers are ready at step {stack.step()}, {took:.0f} s waited")
    kill(check, "trainer", 1, at=60)
    stack.wait_for(lambda: stack.healthy("report") == 1, "the end of the run")
    stack.say(f"finished {time.monotonic() - begun:.0f} s after its start")
    report_outcome(check)
    counts = {name: stack.inspect(name)["RestartCount"] for name in stack.containers("teacher")}
    check.that(len(counts) == 4 and not any(counts.values()), f"no process ended by itself: {counts}")


def kill(check: Check, service: str, number: int, *, at: int) -> None:
    """docker kill; a while later docker start, as somebody would; then until steps are done again."""
    stack = check.stack
    stack.wait_for(lambda: stack.step() >= at, f"step {at}")
    name, before = stack.container(service, number), stack.step()
    run(["docker", "kill", name])
    stack.say(f"step {before}: docker kill {name}")
    time.sleep(5.0)
    check.that(stack.progress("status") != "finished", f"without {service}: not called finished")
    run(["docker", "start", name])
    stack.say(f"docker start {name}")
    if service == "trainer":
        stack.wait_for(lambda: stack.progress("status") == "training" and stack.step() < before, "resumption")
        stack.say(f"the trainer went on from step {stack.step()}, its last checkpoint")
    after = stack.step()
    took = stack.wait_for(lambda: stack.step() > max(after, 0) + 1, "steps after the kill")
    check.that(True, f"{service} killed at step {before}: steps go on {took:.0f} s after its start")


if __name__ == "__main__":
    sys.exit(main())
