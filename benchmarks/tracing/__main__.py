"""What tracing costs; or, with a command, what its traces look like.

    python -m benchmarks.tracing
    python -m benchmarks.tracing --seconds 60 -- tutelage up recipes/quickstart.toml

Cost: jobs of the fake engine from a real queue, pulled by one process with tracing off, on and off again, in
turns. On means that every span is recorded and sent to a collector in another process.

With a command: runs it with its traces sent here, interrupts it after `--seconds`, and prints the trace of
one trained group and the trace of the step that trained it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.tracing.collector import Collector, Span
from benchmarks.tracing.tree import render


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tracing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="interrupt the command after so long")
    parser.add_argument("--rounds", type=int, default=7, help="times that off, on and off are measured")
    parser.add_argument("command", nargs="*", help="what to run")
    options = parser.parse_args()
    if options.command:
        return look_at(options.command, options.seconds)
    from benchmarks.tracing.cost import measure

    measure(options.rounds)
    return 0


def look_at(command: Sequence[str], seconds: float) -> int:
    """Run a command and print two of its traces; 1 when it trained no group."""
    with Collector() as collector:
        environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
        process = subprocess.Popen(command, env=environment)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
        traces = collector.traces()
        whole = [spans for spans in traces.values() if _is_trained(spans)]
    if not whole:
        print(f"{len(traces)} traces, and no group among them that was sampled, scored and trained")
        return 1
    group = whole[len(whole) // 2]
    print(render(group), end="\n\n")
    step = next(link for span in group if span.name == "train" for link in span.links)
    print(render(traces[step]))
    return 0


def _is_trained(spans: Sequence[Span]) -> bool:
    return {"rollout", "queue.wait", "score", "train"} <= {span.name for span in spans}


if __name__ == "__main__":
    sys.exit(main())
