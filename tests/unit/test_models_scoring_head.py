"""The scoring head: exact at any scale and temperature, never wider than a chunk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tutelage_client.types import PAD_ID

from services.models.head import Head
from services.teacher.engines.scoring_head import ROWS, RowSignal, ScoringHead, score_logits

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
        score_rows(4 * ROWS + 3, 1000)
    assert largest.elements == ROWS * 1000


def test_peak_memory_does_not_grow_with_positions_times_vocabulary() -> None:
    vocab, rows = 8192, 16_384
    score_rows(ROWS, vocab)
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
