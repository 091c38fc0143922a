"""Trains every arm of the learning experiments, or what is left of them, and writes what came out.

    python -m benchmarks.learning                      everything, three seeds
    python -m benchmarks.learning --only a f           two experiments, printed and not recorded
    python -m benchmarks.learning --quick              a few steps of each, to see that it works
    python -m benchmarks.learning --report             only the page, of what is done

Models, data and results are kept in the work directory: a second call goes on where the first ended. An arm
that is done is not run again; --fresh runs all arms anew, with the models that are there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.learning import report
from benchmarks.learning.arms import Experiment, Sizes
from benchmarks.learning.crew import Crew
from benchmarks.learning.experiments import EXPERIMENTS, chosen
from benchmarks.learning.tasks import Task, costs_path, plan_tasks, read_result, result_path, source_version
from benchmarks.learning.verdicts import Findings

QUICK = Sizes(steps=5, responses=32, evaluation_prompts=50)
FEWEST_SEEDS = 3  # of figures that are kept


def main() -> int:
    options = _options()
    experiments = chosen(options.only)
    sizes = QUICK if options.quick else Sizes()
    seeds = range(options.seeds)
    if options.fresh:
        shutil.rmtree(options.directory / "results", ignore_errors=True)
    tasks = plan_tasks(experiments, seeds, options.directory, sizes)
    crew = Crew(options.directory, sizes, source_version(), options.workers)
    if not options.report:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            crew.do(tasks)
        except KeyboardInterrupt:
            print("interrupted; what is done is kept", file=sys.stderr)
    findings = [findings_of(experiment, seeds, options.directory, sizes) for experiment in experiments]
    whole = whole_of(tasks, tuple(seeds), sizes)
    kept = not options.quick and len(experiments) == len(EXPERIMENTS) and options.seeds >= FEWEST_SEEDS
    if kept:
        for path in report.write(findings, whole):
            print(path)
    else:
        print(report.page(findings, whole))
    for title, failure in crew.failures.items():
        print(f"\n{title} failed:\n{failure}", file=sys.stderr)
    print(json.dumps(report.summary(findings, whole)))
    return 1 if crew.failures else 0


def findings_of(experiment: Experiment, seeds: Sequence[int], directory: Path, sizes: Sizes) -> Findings:
    """What there is of an experiment."""
    results: dict[str, dict[int, dict[str, object]]] = {arm.name: {} for arm in experiment.arms}
    for arm in experiment.arms:
        for seed in seeds:
            path = result_path(directory, experiment, arm, seed, sizes)
            if path.exists():
                results[arm.name][seed] = read_result(path)
    return Findings(experiment, results, sizes.evaluation_prompts)


def whole_of(tasks: Sequence[Task], seeds: tuple[int, ...], sizes: Sizes) -> report.Whole:
    """How much is done, and what it took."""
    arms = [task for task in tasks if task.arm]
    results = [read_result(task.path) for task in arms if task.done]
    costs = [costs_path(task.path) for task in tasks if not task.arm]
    return report.Whole(
        seeds=seeds,
        sizes=sizes,
        arms=len(arms),
        done=len(results),
        seconds=_covered([(result["began"], result["ended"]) for result in results]),
        cpu_seconds=sum(result["cpu_seconds"] for result in results),
        sources=_sources(arms),
        model_cpu_seconds=sum(read_result(path)["cpu_seconds"] for path in costs if path.exists()),
        models_untimed=sum(not path.exists() for path in costs),
    )


def _sources(arms: Sequence[Task]) -> dict[str, list[str]]:
    """The code's versions, each with the letters of the experiments of which it made an arm."""
    made: dict[str, set[str]] = {}
    for task in arms:
        if task.done:
            made.setdefault(read_result(task.path)["source"], set()).add(task.experiment[0])
    return {source: sorted(made[source]) for source in sorted(made)}


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds in which at least one arm ran."""
    covered, end = 0.0, float("-inf")
    for began, ended in sorted(spans):
        covered += max(0.0, ended - max(began, end))
        end = max(end, ended)
    return covered


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", type=int, default=FEWEST_SEEDS)
    parser.add_argument("--quick", action="store_true", help="a few steps, nothing recorded")
    parser.add_argument("--report", action="store_true", help="run nothing; the page of what is done")
    parser.add_argument("--fresh", action="store_true", help="forget the results that are there")
    parser.add_argument("--workers", type=int, default=2, help="arms at a time")
    parser.add_argument("--directory", type=Path, default=Path("artifacts/learning"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
