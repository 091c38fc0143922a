"""The chunked loss against plain full logits: peak extra memory and time of forward + backward.

Full-vocabulary KL(student‖teacher) in float32, one thread. Each measurement runs in its own process
(`--variant`), the variants take turns, medians are compared. Extra memory is the peak resident size while
forward and backward run, less the resident size just before, with inputs and heads loaded and one small
step done; it includes the gradient of the head.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import record

VARIANTS = ("plain", "chunked")
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Resident set of this process, now."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * PAGE


class PeakMemory:
    """Samples the resident size in a thread between start and stop."""

    def __init__(self, every_seconds: float = 0.002) -> None:
        self._every = every_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before = self.peak = 0

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = resident_bytes()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def extra(self) -> int:
        """Bytes above the start."""
        return self.peak - self.before

    def _watch(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, resident_bytes())
            self._done.wait(self._every)


def plain_step(problem: dict[str, Any]) -> Any:
    """What a trainer writes first: full logits of both, log_softmax, sum, backward."""
    import torch

    with torch.no_grad():
        log_q = (problem["teacher_hidden"] @ problem["teacher_weight"].t()).log_softmax(-1)
    log_p = (problem["hidden"] @ problem["weight"].t()).log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss.backward()
    return loss.detach()


def chunked_step(problem: dict[str, Any], chunk_rows: int = 256) -> Any:
    """The same through objective_loss."""
    import torch

    from student_trainer.objective.compile import compile_plan
    from student_trainer.objective.loss import Head, TokenBatch, objective_loss
    from student_trainer.objective.settings import ObjectiveSettings

    rows = len(problem["hidden"])
    plan = compile_plan(ObjectiveSettings(estimator="pathwise", support="full"), student_temperature=1.0)
    batch = TokenBatch(
        sampled_ids=torch.zeros(rows, dtype=torch.int64),
        behaviour_logprobs=torch.zeros(rows),
        mask=torch.ones(rows, dtype=torch.bool),
        weight=torch.full((rows,), 1 / rows),
    )
    out = objective_loss(
        problem["hidden"],
        problem["weight"],
        None,
        batch,
        plan,
        teacher_hidden=problem["teacher_hidden"],
        teacher_head=Head(problem["teacher_weight"]),
        chunk_rows=chunk_rows,
    )
    out.loss.backward()
    return out.loss.detach()


STEPS: dict[str, Callable[[dict[str, Any]], Any]] = {"plain": plain_step, "chunked": chunked_step}


def measure(variant: str, tokens: int, hidden: int, vocabulary: int) -> dict[str, float]:
    """One measurement in this process: seconds, extra bytes, the loss and two gradient norms."""
    import torch

    torch.set_num_threads(1)
    STEPS[variant](_problem(8, 16, 1000))  # imports, thread pools and allocators are warm
    problem = _problem(tokens, hidden, vocabulary)
    with PeakMemory() as memory:
        started, worked = time.perf_counter(), time.process_time()
        loss = STEPS[variant](problem)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    norms = [float(problem[name].grad.double().norm()) for name in ("hidden", "weight")]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "bytes": memory.extra,
        "loss": float(loss),
        "hidden_gradient": norms[0],
        "head_gradient": norms[1],
    }


def _problem(tokens: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Any:
        return torch.randn(*size, generator=generator)

    scale = 1.5 / hidden**0.5
    return {
        "hidden": normal(tokens, hidden).requires_grad_(),
        "weight": (normal(vocabulary, hidden) * scale).requires_grad_(),
        "teacher_hidden": normal(tokens, hidden),
        "teacher_weight": normal(vocabulary, hidden) * scale,
    }


def run_variant(variant: str, arguments: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own."""
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("tokens", "hidden", "vocabulary")]
    done = subprocess.run(
        [sys.executable, __file__, f"--variant={variant}", *sizes],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(runs: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    """Print the table and record the two ratios."""
    from rich.console import Console
    from rich.table import Table

    seconds, cpu, peaks = (
        {name: statistics.median(run[figure] for run in runs[name]) for name in VARIANTS}
        for figure in ("seconds", "cpu_seconds", "bytes")
    )
    table = Table(
        title=f"full-vocabulary KL, float32, {arguments.tokens} tokens, hidden {arguments.hidden}, "
        f"vocabulary {arguments.vocabulary}, one thread, median of {arguments.runs}"
    )
    for column in ("variant", "seconds", "CPU seconds", "peak extra memory", "loss"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name in VARIANTS:
        table.add_row(
            name,
            f"{seconds[name]:.2f}",
            f"{cpu[name]:.2f}",
            f"{peaks[name] / 2**20:,.0f} MiB",
            f"{runs[name][0]['loss']:.6f}",
        )
    ratios = {
        name: medians["chunked"] / medians["plain"]
        for name, medians in (("time", seconds), ("cpu", cpu), ("memory", peaks))
    }
    table.add_row("chunked / plain", *(f"{ratios[name]:.3f}" for name in ("time", "cpu", "memory")), "")
    Console().print(table)
    for name, medians, unit in (("time", seconds, "seconds"), ("memory", peaks, "bytes")):
        record(
            f"loss.{name}_ratio",
            ratios[name],
            unit="ratio",
            ours=medians["chunked"],
            peer=medians["plain"],
            peer_name="plain full-logits autograd",
            runs=[{"variant": key, unit: run[unit]} for key in VARIANTS for run in runs[key]],
        )


def check_agreement(runs: dict[str, list[dict[str, float]]]) -> None:
    """Both variants must have computed the same thing, or the figures mean nothing."""
    for name in ("loss", "hidden_gradient", "head_gradient"):
        plain, chunked = (runs[variant][0][name] for variant in VARIANTS)
        if abs(plain - chunked) > 1e-3 * abs(plain):
            raise SystemExit(f"the variants disagree on {name}: plain {plain}, chunked {chunked}")


def main() -> None:
    """Parse, take turns, compare, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help="measure one variant here, print JSON")
    arguments = parser.parse_args()
    if arguments.variant:
        print(
            json.dumps(measure(arguments.variant, arguments.tokens, arguments.hidden, arguments.vocabulary))
        )
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.runs):
        for name in VARIANTS:
            runs[name].append(run_variant(name, arguments))
    check_agreement(runs)
    report(runs, arguments)


if __name__ == "__main__":
    main()
