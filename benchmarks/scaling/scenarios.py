"""What is run: the day, and forty minutes of it for a test, under either rule."""

from __future__ import annotations

from benchmarks.scaling.load import BURSTS, DAY, HOUR, SHORT_BURSTS, SHORT_DAY, SPARSE_DAY, Load
from benchmarks.scaling.rules import HpaRule, KedaRule, read_hpa, read_keda
from benchmarks.scaling.simulation import Setup

RULES = ("hpa", "keda")
MOST = 64  # replicas; the deployed rules stop at 8
KILLS = (9.7 * HOUR, 15.3 * HOUR, 18.7 * HOUR)  # in the middle of bursts
CONCURRENCY = 1  # groups here are as large as the eight that a replica holds by default
DEFAULT_CONCURRENCY = 8  # which scaled-object.yaml's numbers of jobs are made for
QUICK_FACTOR = 240.0


def day_setup(rule: str, seconds: float, waiting: float = 1.0) -> Setup:
    """A day in so many real seconds; the average of what waits times `waiting`."""
    load = Load(DAY, BURSTS)
    return Setup(
        load, scaled_rule(rule, waiting), factor=load.seconds / seconds, kills=KILLS, concurrency=CONCURRENCY
    )


def quick_setup(rule: str) -> Setup:
    """The HPA's is a burst with a killed host in it; KEDA's begins and ends in silence."""
    hpa = rule == "hpa"
    load = Load(SHORT_DAY, SHORT_BURSTS) if hpa else Load(SPARSE_DAY)
    return Setup(
        load, scaled_rule(rule), factor=QUICK_FACTOR, kills=(0.25 * HOUR,) if hpa else (), hosts=2,
        concurrency=CONCURRENCY,
    )  # fmt: skip


def scaled_rule(rule: str, waiting: float = 1.0) -> HpaRule | KedaRule:
    """The deployed rule for a larger fleet; numbers of jobs for groups that are held one at a time."""
    if rule == "hpa":
        deployed = read_hpa()
        factors = {target.metric: 1.0 for target in deployed.targets}
        return deployed.scaled(MOST, factors | {deployed.targets[0].metric: waiting})
    share = CONCURRENCY / DEFAULT_CONCURRENCY
    return read_keda().scaled(MOST, {"lag": share * waiting, "pending": share})
