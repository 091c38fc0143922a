"""Each component of the stack killed in turn: the others say so in time, and nobody says "finished"."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from outcome import Check, report_outcome
from stack import Stack, run

REPORTED_WITHIN = 30.0  # seconds
SCRAPE = """
import urllib.request as web
token = open("/run/tutelage/token").read().split()[0]
asked = web.Request("http://127.0.0.1:9465/metrics", headers={"Authorization": "Bearer " + token})
print(web.urlopen(asked, timeout=10).read().decode())
"""


def killed_in_turn(check: Check) -> None:
    """A run whose teachers, sampler, queue and trainer are killed, one kind after the other."""
    stack = check.stack
    begun = time.monotonic()
    stack.compose("up", "--detach")
    stack.compose("up", "--detach", "exporter")
    stack.say("docker compose up --detach, and exporter")
    stack.wait_for(lambda: stack.step() >= 5, "step 5")
    stack.say(f"step {stack.step()}: docker compose up --scale teacher=4")
    stack.compose("up", "--detach", "--no-recreate", "--scale", "teacher=4")
    kill(check, "teacher", at=15, told=lambda _: said_by_trainer(stack, "no teacher:teacher", "replicas"))
    kill(check, "sampler", at=30, told=lambda _: said_by_trainer(stack, "no sampler:", "samplers"))
    kill(check, "queue", at=45, told=lambda since: said_by_all(stack, since))
    kill(check, "trainer", at=60, told=lambda _: said_by_health(stack))
    stack.wait_for(lambda: stack.healthy("report") == 1, "the end of the run")
    stack.say(f"finished {time.monotonic() - begun:.0f} s after its start")
    report_outcome(check)
    counts = {name: stack.inspect(name)["RestartCount"] for name in stack.containers("teacher")}
    check.that(len(counts) == 4 and not any(counts.values()), f"no process ended by itself: {counts}")


def kill(check: Check, service: str, *, at: int, told: Callable[[float], str | None]) -> None:
    """docker kill of every container of a service; once that is reported, docker start; then steps again.

    Args:
        told: who reports it, given the unix time of the kill; None while nobody does.
    """
    stack = check.stack
    stack.wait_for(lambda: stack.step() >= at, f"step {at}")
    names, before, killed = stack.containers(service), stack.step(), time.time()
    if before > stack.run.steps - 5:
        raise SystemExit(
            f"FAILED: step {before} of {stack.run.steps}: too late to kill {service} in the middle of the run"
        )
    run(["docker", "kill", *names])
    stack.say(f"step {before}: docker kill {' '.join(names)}")
    report = wait_for_report(lambda: told(killed), killed)
    check.that(
        report is not None,
        f"{service} killed: told within {REPORTED_WITHIN:.0f} s"
        + (f", {report}" if report else ": by nobody"),
    )
    status = stack.progress("status")
    check.that(status != "finished", f"without {service}: status {status!r}")
    run(["docker", "start", *names])
    stack.say(f"docker start {' '.join(names)}")
    if service == "trainer":
        stack.wait_for(lambda: resumed_from(stack, killed) is not None, "resumption")
        stack.say(f"the trainer goes on from step {resumed_from(stack, killed)}, its last checkpoint")
    stack.wait_for(lambda: stack.progress("step") is not None, "the queue's answer", 60.0)
    after = stack.step()
    enough = min(after + 2, stack.run.steps)
    took = stack.wait_for(lambda: stack.step() >= enough, "steps after the kill")
    stack.say(f"{service} killed at step {before}: steps go on {took:.0f} s after its start")


def resumed_from(stack: Stack, since: float) -> int | None:
    """The step of the checkpoint that the trainer logs it has gone on from; None while it has not."""
    found = re.search(r"resumed .*step=(\d+)", stack.log(stack.container("trainer"), since))
    return int(found[1]) if found else None


def wait_for_report(told: Callable[[], str | None], since: float) -> str | None:
    """What was told, and when; None when it took too long."""
    while time.time() - since < REPORTED_WITHIN:
        if report := told():
            return f"after {time.time() - since:.0f} s: {report}"
        time.sleep(0.5)
    return None


def said_by_trainer(stack: Stack, words: str, counted: str) -> str | None:
    """The trainer's status has the words, and the exporter counts none of them."""
    status, count = str(stack.progress("status")), exported(stack, counted)
    if words not in status or count != 0:
        return None
    return f"the trainer's status is {status!r}, the exporter counts {count:.0f} {counted}"


def said_by_all(stack: Stack, since: float) -> str | None:
    """Trainer, sampler and every teacher log that the queue is away, and the exporter is not up on it."""
    names = [name for service in ("trainer", "sampler", "teacher") for name in stack.containers(service)]
    silent = [name for name in names if "queue unreachable" not in stack.log(name, since)]
    if silent or exported(stack, "up") != 0:
        return None
    return f"{len(names)} containers log 'queue unreachable', the exporter says tutelage_queue_up 0"


def said_by_health(stack: Stack) -> str | None:
    """The trainer's own health check, asked of another container, and the exporter."""
    ask = ["python", "-m", "launcher.health", stack.run.file, "--trainer"]
    done = stack.execute("report", *ask)
    text, count = done.stderr.strip(), exported(stack, "trainers")
    if done.returncode != 1 or "not present" not in text or count != 0:
        return None
    return f"its health check says {text!r}, the exporter counts {count:.0f} trainers"


def exported(stack: Stack, name: str) -> float | None:
    """The exporter's tutelage_queue_NAME of this run or its teacher; None when it does not say."""
    text = stack.execute("exporter", "python", "-c", SCRAPE).stdout
    labels = (f'{{run="{stack.run.name}"}}', '{teacher="teacher"}', "")
    wanted = tuple(f"tutelage_queue_{name}{label} " for label in labels)
    values = [float(line.split()[-1]) for line in text.splitlines() if line.startswith(wanted)]
    return values[0] if values else None
