"""The chunked training loss on a GPU, against plain autograd over full logits on the CPU."""

import pytest
import torch
from support.objective_cases import FIXED, ROWS, Case, make_case, to_device, to_dtype

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]


def assert_close(case: Case, *, rtol: float, atol: float, dtype: torch.dtype) -> None:
    """Of a case in float64 on the CPU: the loss and every gradient of its copy on the GPU."""
    loss, _, gradients = to_device(to_dtype(case, dtype), "cuda").fused()
    expected, expected_gradients = case.plain()
    assert loss.is_cuda
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=rtol, atol=atol)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        if wanted is None:
            assert gradient is None
        else:
            assert gradient is not None
            torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=10 * rtol, atol=10 * atol)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(x) for x in row.values()))
def test_every_combination_agrees_with_plain_autograd(row: dict[str, object]) -> None:
    assert_close(make_case(1, row, FIXED), rtol=1e-9, atol=1e-11, dtype=torch.float64)


@pytest.mark.parametrize("row", ROWS[:: max(1, len(ROWS) // 24)], ids=str)
def test_float32_agrees_with_float64(row: dict[str, object]) -> None:
    case = make_case(2, row, {**FIXED, "V": 300, "H": 16, "kept": 1.0})
    assert_close(case, rtol=1e-4, atol=1e-5, dtype=torch.float32)


@pytest.mark.parametrize("row", [ROWS[0], ROWS[-20]], ids=str)
def test_memory_does_not_grow_to_full_logits(row: dict[str, object]) -> None:
    rows, vocabulary = 2048, 20_000
    shape = {**FIXED, "T": rows, "H": 64, "V": vocabulary, "K": 16, "chunk": 64, "kept": 1.0, "bias": False}
    case = to_device(to_dtype(make_case(3, row, shape), torch.float32), "cuda")
    case.fused()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case.fused()
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < rows * vocabulary * 4 / 4
