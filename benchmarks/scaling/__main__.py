"""Runs a day under each of the two rules, prints what came of it, draws it and records its figures."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from dataclasses import replace

from benchmarks.scaling.figures import figures
from benchmarks.scaling.load import HOUR
from benchmarks.scaling.report import draw, print_day, record_day, say_what_is_real
from benchmarks.scaling.scenarios import RULES, day_setup, quick_setup
from benchmarks.scaling.simulation import Simulation


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seconds", type=float, default=480.0, help="real seconds that a day takes")
    parser.add_argument("--quick", action="store_true", help="forty minutes, nothing recorded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--waiting", type=float, default=1.0, metavar="FACTOR",
        help="try the rules with an average for what waits that is so much larger; nothing recorded",
    )  # fmt: skip
    options = parser.parse_args()
    trial = options.quick or options.waiting != 1.0
    done = []
    for name in options.rules:
        before = os.getloadavg()[0]
        setup = quick_setup(name) if options.quick else day_setup(name, options.seconds, options.waiting)
        hours, seconds = setup.load.seconds / HOUR, setup.load.seconds / setup.factor
        print(f"{name}: {hours:.1f} h in {seconds:.0f} s, load average {before:.2f} before", flush=True)
        day = asyncio.run(Simulation(replace(setup, seed=options.seed)).run())
        done.append((day, figures(day), before))
    say_what_is_real([day for day, _, _ in done])
    for day, result, before in done:
        print_day(day, result)
        if not trial:
            record_day(day, result, before)
            print(f"  {draw(day, result)}")
    return 0 if not any(result.lost or result.doubles or result.failed for _, result, _ in done) else 1


if __name__ == "__main__":
    sys.exit(main())
