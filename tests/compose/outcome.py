"""What was promised of a run and what was found: the run's end, its ledger and its report."""

from __future__ import annotations

import json
import statistics
from typing import Any

from stack import Stack

REPLACEMENTS_FROM = 2**40  # student_trainer/pacing.py: what is dropped is replaced from a range of its own


class Check:
    """Counts what did not hold."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.failed: list[str] = []

    def that(self, holds: bool, what: str) -> None:
        self.stack.say(f"{'holds' if holds else 'FAILED'}  {what}")
        if not holds:
            self.failed.append(what)


def report_outcome(check: Check) -> None:
    """What the run ended with, and whether each group counts once."""
    stack, size = check.stack, check.stack.run
    check.that(stack.progress("status") == "finished", "the run is finished")
    ledger, records = stack.ledger(), metrics(stack)
    steps = [record for record in records if "step" in record]
    numbers = [int(record["step"]) for record in steps]
    check.that(numbers == list(range(1, size.steps + 1)), f"{size.steps} steps, each once")
    applied, dropped = indices(ledger["applied"]), indices(ledger["dropped"])
    trained = sum(int(record["groups"]) for record in steps)
    expected = size.steps * size.prompts_per_step
    check.that(
        trained == len(applied) == expected and not applied & dropped,
        f"{expected} groups wanted, {trained} trained, {trained - len(applied)} of them twice",
    )
    ordered = {*range(expected), *range(REPLACEMENTS_FROM, REPLACEMENTS_FROM + ledger["replacements"])}
    lost = ordered - applied - dropped
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(ledger["drop_counts"].items())) or "none"
    check.that(not lost, f"{len(ordered)} groups ordered, {len(lost)} lost (dropped and replaced: {reasons})")
    letters = ("dead:teacher", f"dead-orders:{size.name}")
    left = {name: stack.queue("XLEN", f"tutelage:{name}") for name in letters}
    check.that(set(left.values()) == {"0"}, f"dead letters: {left}")
    learned(check, records, steps)


def learned(check: Check, records: list[dict[str, Any]], steps: list[dict[str, Any]]) -> None:
    """The student is better than it was, and there is a page that says so."""
    stack = check.stack
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
