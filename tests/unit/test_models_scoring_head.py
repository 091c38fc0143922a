"""The scoring head: exact at any scale and temperature, never wider than a chunk."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from tutelage_client.types import PAD_ID

from services.models.head import Head
from services.teacher.engines import scoring_head
from services.teacher.engines.scoring_head import CACHED, RowSignal, ScoringHead, rows_for, score_logits

SIGNAL = RowSignal(top_k=4, candidates=3, entropy=True, temperature=1.0)


def score(logits: torch.Tensor, temperature: float = 1.0) -> dict[str, torch.Tensor]:
    targets = torch.arange(logits.shape[0]) % logits.shape[1]
    candidates = torch.tensor([[0, 2, PAD_ID]]).expand(logits.shape[0], -1)
    return score_logits(logits.clone(), targets, candidates, RowSignal(4, 3, True, temperature))


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_scores_are_exact_at_any_offset_and_temperature(offset: float, temperature: float) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 8 + offset
    expected = (logits.double() / temperature).log_softmax(-1)
    got = score(logits, temperature)
    assert (got["sampled"] - expected.diagonal()[:6]).abs().max() < 1e-4
    assert (got["top_logprobs"] - expected.topk(4).values).abs().max() < 1e-4
    assert (got["candidates"][:, :2] - expected[:, [0, 2]]).abs().max() < 1e-4
    assert got["candidates"][:, 2].isnan().all()
    assert (got["entropy"] + (expected.exp() * expected).sum(-1)).abs().max() < 1e-4
    assert got["valid"].all()


def test_an_impossible_token_elsewhere_in_the_vocabulary_is_no_fault() -> None:
    logits = torch.randn(3, 20)
    logits[:, 15] = -torch.inf
    got = score(logits)
    expected = logits.log_softmax(-1)
    assert got["valid"].all()
    entropy = torch.special.entr(expected.exp()).sum(-1)
    assert (got["entropy"] - entropy).abs().max() < 1e-5


@pytest.mark.parametrize(("column", "value"), [(9, torch.nan), (9, torch.inf), (0, -torch.inf)])
def test_rows_that_are_not_finite_are_masked_and_others_are_not(column: int, value: float) -> None:
    logits = torch.randn(3, 20)
    logits[0, column] = value
    got = score(logits)
    assert got["valid"].tolist() == [False, True, True]
    assert got["top_ids"][0].tolist() == [PAD_ID] * 4
    for name in ("sampled", "top_logprobs", "candidates", "entropy"):
        assert got[name][0].isnan().all()
        assert got[name][1:].isfinite().sum() == got[name][1:].numel() - (2 if name == "candidates" else 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_masked_when_only_the_sampled_token_is_asked(value: float) -> None:
    logits = torch.randn(3, 20)
    logits[1, 9] = value
    got = score_logits(logits, torch.tensor([0, 1, 2]), None, RowSignal(0, 0, False, 1.0))
    assert got["valid"].tolist() == [True, False, True]
    assert got["sampled"].isnan().tolist() == [False, True, False]


SIGNALS = st.builds(
    RowSignal,
    top_k=st.sampled_from([0, 1, 3, 8, 20]),
    candidates=st.integers(0, 3),
    entropy=st.booleans(),
    temperature=st.sampled_from([0.01, 0.5, 1.0, 2.0, 100.0]),
)


@settings(max_examples=150, deadline=None)
@given(
    signal=SIGNALS,
    seed=st.integers(0, 2**31),
    vocab=st.sampled_from([20, 57, 400, 1031]),
    cached=st.sampled_from([1, 1000, CACHED]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_signal_is_that_of_float64(
    signal: RowSignal, seed: int, vocab: int, cached: int, dtype: torch.dtype
) -> None:
    """Ties, impossible tokens, rows that are not finite; slices of one row, of some, of all."""
    random = torch.Generator().manual_seed(seed)
    logits = (torch.randn(7, vocab, generator=random) * 5).to(dtype)
    logits[:3] = logits[:3].round()
    logits[torch.rand(logits.shape, generator=random) < 0.1] = -torch.inf
    logits[5, 11], logits[6, 3] = torch.nan, torch.inf
    targets = torch.randint(vocab, (7,), generator=random)
    candidates = torch.randint(PAD_ID, vocab, (7, signal.candidates), generator=random)
    with patch.multiple(scoring_head, CACHED=cached, SHARED=cached):
        got = score_logits(logits.clone(), targets, candidates if signal.candidates else None, signal)

    expected = (logits.double() / signal.temperature).log_softmax(-1)
    sampled, found = expected.gather(1, targets[:, None])[:, 0], expected.gather(1, candidates.clamp(min=0))
    valid = sampled.isfinite() & (found.isfinite() | (candidates == PAD_ID)).all(-1)
    top = expected.topk(signal.top_k).values
    valid &= top.isfinite().all(-1)
    assert got["valid"].equal(valid)
    close = partial(torch.testing.assert_close, atol=2e-5, rtol=2e-6, equal_nan=True, check_dtype=False)
    close(got["sampled"], sampled.where(valid, torch.nan))
    if signal.candidates:
        close(got["candidates"], found.where(valid[:, None] & (candidates != PAD_ID), torch.nan))
    if signal.entropy:
        close(got["entropy"], torch.special.entr(expected.exp()).sum(-1).where(valid, torch.nan))
    if signal.top_k:
        close(got["top_logprobs"], top.where(valid[:, None], torch.nan))
        ids = got["top_ids"].long()
        assert (ids == PAD_ID).all(-1).equal(~valid)
        close(got["top_logprobs"][valid], expected.gather(1, ids.clamp(min=0))[valid])
        assert all(len(set(row.tolist())) == signal.top_k for row in ids[valid])


def test_sums_over_a_large_vocabulary_lose_nothing() -> None:
    """A plain running float32 sum of 151,936 weights is wrong by 1e-5 here."""
    logits = torch.randn(12, 151_936, generator=torch.Generator().manual_seed(0)) * 3
    got = score_logits(logits.clone(), torch.arange(12), None, RowSignal(0, 0, True, 1.0))
    expected = logits.double().log_softmax(-1)
    assert (got["sampled"] - expected.diagonal()).abs().max() < 2e-6
    assert (got["entropy"] - torch.special.entr(expected.exp()).sum(-1)).abs().max() < 4e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_scores_are_those_of_the_head_with_its_bias_scale_and_cap(bias: bool, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    weight, shift = torch.randn(50, 16, generator=random), torch.randn(50, generator=random)
    head = Head(weight, shift if bias else None, scale=0.5, softcap=3.0).cast(dtype)
    hidden = torch.randn(9, 16, generator=random).to(dtype)
    rows = torch.tensor([8, 0, 3, 3])
    with patch.object(scoring_head, "rows_for", lambda _vocab: 3):
        got = ScoringHead(head).score(hidden, rows, rows, None, RowSignal(0, 0, False, 1.0))
    logits = torch.nn.functional.linear(hidden, weight.to(dtype), shift.to(dtype) if bias else None)
    expected = (torch.tanh(logits.double() * 0.5 / 3.0) * 3.0).log_softmax(-1)[rows, rows]
    assert np.abs(got.sampled - expected.numpy()).max() < (1e-5 if dtype == torch.float32 else 0.05)


def test_no_rows_have_no_scores() -> None:
    none = torch.empty(0, dtype=torch.long)
    got = score_logits(torch.empty(0, 50), none, none[:, None].expand(-1, 3), SIGNAL)
    assert got["top_ids"].shape == (0, 4)
    rows = ScoringHead(Head(torch.randn(50, 16))).score(torch.randn(2, 16), none, none, None, SIGNAL)
    assert rows.sampled.shape == (0,)


def test_a_chunk_is_bounded_and_not_smaller_than_the_weight_is_worth() -> None:
    assert [rows_for(vocab) for vocab in (1, 512, 4096, 32_000, 151_936)] == [2**18, 512, 256, 256, 256]


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def score_rows(rows: int, vocab: int) -> None:
    head = ScoringHead(Head(torch.randn(vocab, 16)))
    hidden = torch.randn(64, 16)
    index = torch.arange(rows) % 64
    head.score(hidden, index, index, index[:, None].expand(-1, 3), SIGNAL)


def test_no_tensor_is_wider_than_a_chunk_of_rows_by_vocabulary() -> None:
    with Largest() as largest:
        score_rows(4 * rows_for(1000) + 3, 1000)
    assert largest.elements == rows_for(1000) * 1000


def test_peak_memory_does_not_grow_with_positions_times_vocabulary() -> None:
    vocab, rows = 8192, 16_384
    score_rows(rows_for(vocab), vocab)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    score_rows(rows, vocab)
    grown = resident_peak() - before
    print(
        f"peak grew by {grown / 2**20:.0f} MiB; [positions, vocabulary] is {rows * vocab * 4 / 2**20:.0f} MiB"
    )
    assert grown < rows * vocab * 4 / 8


def resident_peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
