"""What the scaling benchmark tells: a page of text, a picture, lines in benchmarks/results/latest.jsonl."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import LATEST, record
from benchmarks.scaling.figures import HOUR, Figures, rule_name
from benchmarks.scaling.rules import KedaRule
from benchmarks.scaling.scenarios import MOST
from benchmarks.scaling.simulation import Day

PICTURES = LATEST.parent
BLOCKS = " ▁▂▃▄▅▆▇█"
COLUMNS = 96
TITLES = {"hpa": "HPA: tokens waiting and in flight", "keda": "KEDA: entries waiting and pending, to zero"}
HEADING = {
    "hpa": "deploy/kubernetes/components/hpa/hpa.yaml",
    "keda": "deploy/kubernetes/components/keda/scaled-object.yaml",
}


def say_what_is_real(days: Sequence[Day]) -> None:
    """What ran and what only pretended."""
    setup = days[0].setup
    heartbeat = setup.heartbeat * setup.factor
    told = {
        "run": "a Valkey server; Queue, JobWorker and Puller with their leases; the scoring core; the fake "
        "engine at its own tokens_per_second; drains with their grace period; kill -9 of hosts; a reader "
        f"as a trainer's. Replicas are tasks in {setup.hosts} processes. Groups are counted out and in.",
        "simulated": f"time, {setup.factor:.0f} seconds in a real one; sizes, a token in the queue is "
        f"{setup.unit:,.0f}; the load; the autoscalers, by their documented arithmetic on the rules as "
        f"deployed but with up to {MOST} replicas, the HPA on figures {setup.metric_age:.0f} s old; "
        f"loading a model, {setup.model_load_seconds:.0f} s of sleep. No Kubernetes, GPU or model.",
        "too slow": f"heartbeats, which cannot be compressed: one takes {heartbeat:.0f} simulated seconds "
        "instead of 5, so the work of killed replicas waits longer than it would.",
    }
    print()
    for name, text in told.items():
        print(textwrap.fill(text, 108, initial_indent=f"  {name:12} ", subsequent_indent=15 * " "))


def print_day(day: Day, figures: Figures) -> None:
    """The figures of a day, with its load and its replicas as lines of blocks."""
    setup, f = day.setup, figures
    rule = setup.rule.hpa if isinstance(setup.rule, KedaRule) else setup.rule
    least = 0 if isinstance(setup.rule, KedaRule) else rule.minimum
    targets = ", ".join(f"{t.metric.removeprefix('tutelage_queue_')} {t.average:,.0f}" for t in rule.targets)
    wanted = {"load": [s.demand for s in day.samples], "ready": [float(s.ready) for s in day.samples]}
    top = max(max(values) for values in wanted.values())
    lines = {
        "rule": f"{HEADING[rule_name(day)]}: per replica {targets}; {least} to {rule.maximum} replicas",
        **{name: f"{sparkline(day, values, top)} to {max(values):.0f}" for name, values in wanted.items()},
        "groups": f"{f.groups:,}, lost {f.lost}, read twice {f.doubles}, with a score missing {f.failed}",
        "wait": f"p50 {f.p50_wait:.0f} s, p99 {f.p99_wait:.0f} s, longest {f.worst_wait:.0f} s",
        "replicas": f"{f.fewest_ready} to {f.most_ready} ready, {f.mean_replicas:.1f} on average; "
        f"{f.starts} started, {f.killed} killed -9 with {len(day.killed_replicas)} hosts",
        "utilisation": f"{100 * f.utilisation:.0f}% of what the ready replicas could score",
        "cost": f"{f.replica_hours:.0f} replica hours; a fixed fleet of {f.fixed_replicas} has the same p99 "
        f"wait for {f.fixed_hours:.0f} (computed), one of {f.most_ready} costs {f.peak_hours:.0f}",
        "drains": f"{f.handed_back} jobs handed back; {f.second} answers came second and were left out",
        "machine": f"{f.real_seconds:.0f} real s; {f.mean_cores:.2f} cores, {f.busiest_cores:.2f} in the "
        f"busiest 5 s; load average of the machine {f.mean_load:.1f}; submissions up to "
        f"{f.latest_submission:.0f} simulated s late",
    }
    print(f"\n{TITLES[rule_name(day)]}")
    for name, text in lines.items():
        print(f"  {name:12} {text}")


def sparkline(day: Day, values: Sequence[float], top: float) -> str:
    """One character per slice of the day: the mean over it, or what it was before when nobody looked."""
    at = np.array([s.at for s in day.samples]) / day.setup.load.seconds * COLUMNS
    line, mean = "", 0.0
    for column in range(COLUMNS):
        inside = np.array(values)[(at >= column) & (at < column + 1)]
        mean = float(inside.mean()) if len(inside) else mean
        line += BLOCKS[0 if mean <= 0 else max(1, min(8, round(8 * mean / top)))]
    return line


def record_day(day: Day, figures: Figures, load_before: float) -> None:
    """The lines scaling.hpa.… or scaling.keda.…"""
    area = f"scaling.{rule_name(day)}"
    extra: dict[str, Any] = {
        "figures": asdict(figures), "factor": day.setup.factor, "cores": len(os.sched_getaffinity(0)),
        "load_average_before": load_before, "killed": day.killed_replicas, "queue_at_the_end": day.left,
    }  # fmt: skip
    record(f"{area}.lost", figures.lost, unit="groups", ours=figures.lost, extra=extra)
    record(f"{area}.doubles", figures.doubles, unit="groups", ours=figures.doubles)
    record(f"{area}.utilisation", figures.utilisation, unit="ratio", ours=figures.utilisation)
    record(f"{area}.p50_wait", figures.p50_wait, unit="simulated s", ours=figures.p50_wait)
    record(f"{area}.p99_wait", figures.p99_wait, unit="simulated s", ours=figures.p99_wait)
    record(
        f"{area}.cost", figures.replica_hours / figures.fixed_hours, unit="ratio", ours=figures.replica_hours,
        peer=figures.fixed_hours, peer_name="fixed fleet with the same p99 wait, computed",
    )  # fmt: skip


def draw(day: Day, figures: Figures, directory: Path = PICTURES) -> Path:
    """Replicas over the day above, waits below; in scaling-hpa.png or scaling-keda.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(11, 4.2))
    hours = [s.at / HOUR for s in day.samples]
    ready, wanted = [s.ready for s in day.samples], [s.wanted for s in day.samples]
    above.fill_between(
        hours, [s.demand for s in day.samples], color="#c9d6ea", label="load, in busy replicas"
    )
    above.step(hours, ready, where="post", color="#1f4e9c", lw=1.2, label="ready")
    above.step(hours, wanted, where="post", color="#d9822b", lw=0.7, label="wanted")
    for at, count in day.killed_replicas:
        above.axvline(at / HOUR, color="#b22222", lw=0.8, ls=":")
        top = (at / HOUR, above.get_ylim()[1])
        above.annotate(f"{count} killed", top, color="#b22222", fontsize=7, va="top")
    above.set_ylabel("replicas")
    above.set_title(
        f"{TITLES[rule_name(day)]}. {figures.groups:,} groups, {figures.lost} lost, "
        f"{figures.doubles} twice; utilisation {100 * figures.utilisation:.0f}%", fontsize=10,
    )  # fmt: skip
    above.legend(loc="upper left", fontsize=8, frameon=False)
    _draw_waits(below, day)
    for axis in (above, below):
        axis.set_xlim(0, day.setup.load.seconds / HOUR)
        axis.spines[["top", "right"]].set_visible(False)
    below.set_xlabel("hour of the simulated day")
    figure.tight_layout()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"scaling-{rule_name(day)}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _draw_waits(axis: Any, day: Day) -> None:
    """Wait of the groups submitted in each quarter of an hour; nothing where there were none."""
    at = np.array([s.submitted for s in day.scored])
    waits = np.array([max(0.0, s.read - s.submitted - s.tokens / day.setup.rate) for s in day.scored]) / 60
    width = day.setup.load.seconds / COLUMNS
    rows = [(c * width, waits[(at >= c * width) & (at < (c + 1) * width)]) for c in range(COLUMNS)]
    hours = [(start + width / 2) / HOUR for start, inside in rows if len(inside)]
    for share, colour in ((99, "#b0413e"), (50, "#3b7d4f")):
        values = [float(np.percentile(inside, share)) for _, inside in rows if len(inside)]
        axis.plot(hours, values, color=colour, lw=1.2, label=f"p{share}")
    axis.set_ylabel("wait, minutes")
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper left", fontsize=8, frameon=False)
