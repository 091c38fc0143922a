"""A vocabulary split over ranks: every rank gets the scores of the whole, by the same collective calls."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tutelage_client.types import PAD_ID

from services.teacher.engines.scoring_head import RowSignal, score_logits

Scores = dict[str, torch.Tensor]


class Ranks:
    """Ranks in threads: a call is made by all of them, of one kind and shape, or the test fails."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count, timeout=20)
        self.slots: list[tuple[str, torch.Tensor]] = [("", torch.empty(0))] * count

    def exchange(self, rank: int, call: str, x: torch.Tensor) -> list[torch.Tensor]:
        self.slots[rank] = (call, x.clone())
        self.barrier.wait()
        calls = {(name, tensor.shape, tensor.dtype) for name, tensor in self.slots}
        tensors = [tensor for _, tensor in self.slots]
        self.barrier.wait()
        assert len(calls) == 1, calls
        return tensors


@dataclass
class ThreadShard:
    """One rank's side. A maximum loses NaN here, as some collectives do."""

    ranks: Ranks
    rank: int
    start: int
    calls: list[str] = field(default_factory=list)

    def _exchange(self, call: str, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(f"{call} {tuple(x.shape)}")
        return torch.stack(self.ranks.exchange(self.rank, call, x))

    def reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        parts = self._exchange("max", x)
        return parts.masked_fill(parts.isnan(), -torch.inf).amax(0)

    def reduce_sum(self, x: torch.Tensor) -> torch.Tensor:
        return self._exchange("sum", x).sum(0)

    def gather_last(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(self._exchange("gather", x)), dim=-1)


def score_sharded(
    logits: torch.Tensor,
    widths: list[int],
    targets: torch.Tensor,
    candidates: torch.Tensor | None,
    signal: RowSignal,
) -> tuple[Scores, list[list[str]]]:
    """The scores, which are the same on every rank, and each rank's collective calls."""
    assert sum(widths) == logits.shape[1]
    ranks = Ranks(len(widths))
    starts = np.cumsum([0, *widths]).tolist()
    shards = [ThreadShard(ranks, rank, starts[rank]) for rank in range(len(widths))]

    def run(rank: int) -> Scores:
        own = logits[:, starts[rank] : starts[rank + 1]].clone()
        try:
            return score_logits(own, targets, candidates, signal, shards[rank])
        except BaseException:
            ranks.barrier.abort()  # the others would wait for a rank that is gone
            raise

    with ThreadPoolExecutor(len(widths)) as pool:
        results = list(pool.map(run, range(len(widths))))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, tensor in other.items():
            assert tensor.numpy().tobytes() == results[0][name].numpy().tobytes(), name
    return results[0], [shard.calls for shard in shards]


def assert_same(got: Scores, expected: Scores, logits: torch.Tensor) -> None:
    """Equal up to rounding, top ids up to the order of equal logits."""
    assert got.keys() == expected.keys()
    assert got["valid"].equal(expected["valid"])
    for name in got.keys() - {"valid", "top_ids"}:
        torch.testing.assert_close(got[name], expected[name], atol=2e-5, rtol=2e-6, equal_nan=True)
    if "top_ids" in got:
        ids = got["top_ids"].long()
        assert (ids == PAD_ID).all(-1).equal(~got["valid"])
        found = logits.gather(1, ids.clamp(min=0))[got["valid"]]
        assert found.equal(logits.gather(1, expected["top_ids"].long().clamp(min=0))[got["valid"]])
        assert all(len(set(row.tolist())) == ids.shape[1] for row in ids[got["valid"]])


def random_case(seed: int, rows: int, vocab: int, signal: RowSignal) -> tuple[torch.Tensor, ...]:
    """Logits with ties, impossible tokens, rows that are not finite; targets; candidates with pads."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=random) * 6
    logits[: rows // 2] = logits[: rows // 2].round()
    logits[torch.rand(logits.shape, generator=random) < 0.1] = -torch.inf
    for value in (torch.nan, torch.inf):
        row, column = (int(torch.randint(n, (), generator=random)) for n in (rows, vocab))
        if torch.rand((), generator=random) < 0.5:
            logits[row, column] = value
    targets = torch.randint(vocab, (rows,), generator=random)
    candidates = torch.randint(PAD_ID, vocab, (rows, signal.candidates), generator=random)
    return logits, targets, candidates


SPLITS: list[list[int]] = [[30, 7], [7, 30], [18, 19], [1, 35, 1], [12, 12, 13], [37, 0], [0, 20, 17]]
SIGNALS = st.builds(
    RowSignal,
    top_k=st.sampled_from([0, 1, 5, 20, 37]),
    candidates=st.integers(0, 3),
    entropy=st.booleans(),
    temperature=st.sampled_from([0.01, 0.5, 1.0, 2.0, 100.0]),
)


@pytest.mark.parametrize("widths", SPLITS, ids=str)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), signal=SIGNALS)
def test_split_over_ranks_scores_are_those_of_the_whole(
    widths: list[int], seed: int, signal: RowSignal
) -> None:
    logits, targets, ids = random_case(seed, 6, sum(widths), signal)
    wanted = ids if signal.candidates else None
    expected = score_logits(logits.clone(), targets, wanted, signal)
    got, _ = score_sharded(logits, widths, targets, wanted, signal)
    assert_same(got, expected, logits)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
def test_a_rank_without_a_possible_token_adds_nothing(
    value: float, offset: float, temperature: float
) -> None:
    """Models that forbid tokens write −inf, or the least float, over their logits."""
    signal = RowSignal(4, 1, True, temperature)
    logits = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)) * 4 + offset
    logits[:, 12:] = value
    targets, candidates = torch.arange(5), torch.arange(5)[:, None] + 3
    got, _ = score_sharded(logits, [12, 12], targets, candidates, signal)
    expected = (logits[:, :12].double() / temperature).log_softmax(-1)
    assert got["valid"].all()
    assert (got["sampled"] - expected[torch.arange(5), targets]).abs().max() < 1e-4
    assert (got["top_logprobs"] - expected.topk(4).values).abs().max() < 1e-4
    assert (got["entropy"] + (expected.exp() * expected).sum(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_on_one_rank_invalidates_the_row_on_all(rank: int, value: float) -> None:
    logits = torch.randn(3, 20)
    logits[1, 10 * rank + 9] = value
    for signal in (RowSignal(0, 0, False, 1.0), RowSignal(4, 0, True, 0.5)):
        got, _ = score_sharded(logits, [10, 10], torch.tensor([0, 1, 12]), None, signal)
        assert got["valid"].tolist() == [True, False, True]


def test_an_id_that_no_rank_holds_invalidates_its_row() -> None:
    got, _ = score_sharded(
        torch.randn(2, 20), [10, 10], torch.tensor([5, 20]), None, RowSignal(0, 0, False, 1.0)
    )
    assert got["valid"].tolist() == [True, False]


def test_collective_calls_are_few_and_do_not_depend_on_the_logits() -> None:
    signal = RowSignal(8, 2, True, 1.0)
    seen = set()
    for seed in range(8):
        logits, targets, candidates = random_case(seed, 4, 16, signal)
        for calls in score_sharded(logits, [3, 13], targets, candidates, signal)[1]:
            seen.add(tuple(calls))
    assert seen == {("max (4, 4)", "sum (4, 2)", "gather (4, 16)")}
