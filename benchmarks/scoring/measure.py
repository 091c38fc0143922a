"""Taking turns: every peer scores fresh batches of a workload while the others rest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.scoring.peers import OURS, Peer, Reply, differs_most
from benchmarks.scoring.workloads import Workload

TURN_SECONDS = 0.6  # a turn is as many calls as begin within this time
TOLERANCE_NATS = 1e-3
BUSY_SHARE = 0.05  # of a core; peers that rest must stay below it

Announce = Callable[[str], None]


@dataclass(slots=True)
class Contestant:
    """What was measured of one peer on one workload."""

    rates: list[float] = field(default_factory=list)  # positions/s of each round
    cpu_seconds: float = 0.0  # of its processes, in all rounds; an asking client's are not among them
    parse_share: float = 0.0  # of the time, spent by the client on turning the answer into arrays
    positions: int = 0  # of all rounds
    request_bytes: int = 0
    answer_bytes: int = 0
    tokens_computed: int = 0
    tokens_reused: int = 0
    memory_growth: int = 0  # highest resident size during the workload, less that before it

    @property
    def rate(self) -> float:
        """Median positions/s."""
        return statistics.median(self.rates)

    @property
    def reuse(self) -> float:
        """Share of the tokens that were not computed because an equal prefix had been."""
        return self.tokens_reused / max(1, self.tokens_computed + self.tokens_reused)


@dataclass(frozen=True, slots=True)
class Measured:
    """One workload, every peer."""

    workload: Workload
    contestants: dict[str, Contestant]
    disagreement: float  # largest difference from us in a sampled token's log-probability, nats
    resting_share: float  # processor time of peers that were not asked, in cores, median over turns


def measure(
    workload: Workload, peers: Sequence[Peer], rounds: int, seeds: Iterator[int], announce: Announce
) -> Measured:
    """Warm up, check that all peers compute the same, then take turns.

    Raises:
        RuntimeError: two peers disagree about a sampled token, or one failed.
    """
    contestants = {peer.name: Contestant() for peer in peers}
    before = {}
    for peer in peers:
        peer.process.reset_peak()
        before[peer.name] = peer.process.resident_bytes()
    disagreement = _warm_up(workload, peers, seeds, announce)
    shares = []
    for number in range(rounds):
        for peer in peers:
            announce(f"{workload.name}  round {number + 1}/{rounds}  {peer.name}")
            resting = [other for other in peers if other is not peer]
            rested, began = sum(other.process.cpu_seconds() for other in resting), time.perf_counter()
            worked = peer.process.cpu_seconds()
            _take_turn(workload, peer, contestants[peer.name], seeds)
            contestants[peer.name].cpu_seconds += peer.process.cpu_seconds() - worked
            spent = sum(other.process.cpu_seconds() for other in resting) - rested
            shares.append(spent / (time.perf_counter() - began))
    for peer in peers:
        growth = peer.process.peak_bytes() - before[peer.name]
        contestants[peer.name].memory_growth = max(0, growth)
    return Measured(workload, contestants, disagreement, statistics.median(shares))


def _warm_up(workload: Workload, peers: Sequence[Peer], seeds: Iterator[int], announce: Announce) -> float:
    """The same batch for all, compared, and then a turn that does not count."""
    batch = workload.batch(next(seeds))
    replies: dict[str, Reply] = {}
    for peer in peers:
        announce(f"{workload.name}  warm-up  {peer.name}")
        replies[peer.name] = peer.ask(batch)
    ours = replies.get(OURS) or replies[peers[0].name]
    differences = {name: differs_most(ours.scores, reply.scores) for name, reply in replies.items()}
    name = max(differences, key=lambda name: differences[name])
    if not differences[name] <= TOLERANCE_NATS:
        raise RuntimeError(f"{workload.name}: {name} differs from us by {differences[name]:.2g} nats")
    for peer in peers:
        announce(f"{workload.name}  warm-up  {peer.name}")
        _take_turn(workload, peer, Contestant(), seeds)
    return differences[name]


def _take_turn(workload: Workload, peer: Peer, contestant: Contestant, seeds: Iterator[int]) -> None:
    seconds = parsing = 0.0
    positions = 0
    while seconds < TURN_SECONDS:
        batch = workload.batch(next(seeds))
        reply = peer.ask(batch)
        seconds += reply.seconds
        parsing += reply.parse_seconds
        positions += batch.positions
        contestant.positions += batch.positions
        contestant.request_bytes, contestant.answer_bytes = reply.request_bytes, reply.answer_bytes
        contestant.tokens_computed += reply.tokens_computed
        contestant.tokens_reused += reply.tokens_reused
    rounds = len(contestant.rates)
    contestant.parse_share = (contestant.parse_share * rounds + parsing / seconds) / (rounds + 1)
    contestant.rates.append(positions / seconds)
