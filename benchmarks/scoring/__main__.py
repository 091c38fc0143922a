"""Runs the scoring benchmark: for each model, start every peer, measure its workloads, end every peer.

Each peer has its own process group, all have the same two cores and the same number of threads per process,
and one works at a time. Prefix caches are on wherever a peer has one.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.scoring.measure import Announce, Measured, measure
from benchmarks.scoring.models import model_directory
from benchmarks.scoring.peers import FLAT, FLOOR, OURS, STOCK, TITLES, TRANSFORMERS, Peer
from benchmarks.scoring.replica import Replica
from benchmarks.scoring.report import print_table, record_machine, record_workload
from benchmarks.scoring.stock import StockServer
from benchmarks.scoring.worker_peer import Worker
from benchmarks.scoring.workloads import MODELS, WORKLOADS, Workload


def start(name: str, model: Path, directory: Path, threads: int) -> Peer:
    """The process of a peer; `connect` waits for it."""
    if name == STOCK:
        return StockServer(model, directory, threads)
    kind = Worker if name in (FLAT, FLOOR) else Replica
    return kind(name, model, directory, threads)


@contextmanager
def started(names: Sequence[str], model: Path, threads: int) -> Iterator[list[Peer]]:
    """Peers that can be asked, started together, ended at the end."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scoring-")))
        peers = []
        for name in names:
            peer = start(name, model, directory, threads)
            stack.callback(peer.close)
            peers.append(peer)
        for peer in peers:
            peer.connect()
        yield peers


def run(workloads: Sequence[Workload], names: Sequence[str], rounds: int, threads: int) -> list[Measured]:
    """Measure and record every workload."""
    results = []
    seeds = itertools.count()
    with progress(len(workloads) * len(names) * (rounds + 2)) as announce:
        for model in dict.fromkeys(workload.model for workload in workloads):
            announce(f"starting {len(names)} peers over the {model} model")
            with started(names, model_directory(MODELS[model]), threads) as peers:
                for workload in workloads:
                    if workload.model == model:
                        results.append(measure(workload, peers, rounds, seeds, announce))
                        record_workload(results[-1])
    return results


@contextmanager
def progress(steps: int) -> Iterator[Announce]:
    """A line on standard error that says what is being measured; single lines when that is a file."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(30), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=steps)

        def announce(what: str) -> None:
            bar.update(task, description=what, advance=0 if what.startswith("starting") else 1)
            if not console.is_terminal:
                print(what, file=sys.stderr, flush=True)

        yield announce


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.scoring", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=[name for name in TITLES if name != OURS],
        default=[STOCK, FLAT, TRANSFORMERS, FLOOR],
        metavar="NAME",
        help=", ".join(f"{name}: {title}" for name, title in TITLES.items() if name != OURS),
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    options = parser.parse_args()
    record_machine(options.threads)
    try:
        results = run(
            [WORKLOADS[name] for name in options.workloads],
            [OURS, *options.peers],
            options.rounds,
            options.threads,
        )
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print_table(results, options.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
