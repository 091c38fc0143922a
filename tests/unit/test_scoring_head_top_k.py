"""The largest k of rows, by block maxima and by numpy's partition, are exactly those of torch.topk."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.teacher.engines import top_k as module
from services.teacher.engines.top_k import BLOCK, WORTHWHILE, top_k


@pytest.fixture(autouse=True, scope="module", params=["numpy", "torch"])
def short_rows(request: pytest.FixtureRequest) -> Iterator[None]:
    """Short rows go to one or the other, however few and whatever the number of threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MANY", 1)
        patch.setattr(module, "FEW_THREADS", 10**6 if request.param == "numpy" else 0)
        yield


def assert_largest(x: torch.Tensor, k: int) -> None:
    values, places = top_k(x, k)
    torch.testing.assert_close(values, x.topk(k, dim=-1).values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x.gather(1, places), values, rtol=0, atol=0, equal_nan=True)
    assert all(len(set(row.tolist())) == k for row in places)


def rows(width: int, seed: int, decimals: int | None = None) -> torch.Tensor:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed)) * 3
    return x if decimals is None else x.round(decimals=decimals)


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 5000),
    part=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    decimals=st.sampled_from([None, 2, 0]),
)
@example(width=1, part=0.0, seed=0, decimals=None)
@example(width=WORTHWHILE, part=0.0, seed=0, decimals=None)
def test_any_width_k_and_ties(width: int, part: float, seed: int, decimals: int | None) -> None:
    k = max(1, round(width**part))
    assert_largest(rows(width, seed, decimals), k)


@pytest.mark.parametrize("k", [1, 2, 5, 64])
@pytest.mark.parametrize("extra", range(-1, BLOCK + 1))
def test_widths_around_the_rule_and_around_whole_blocks(k: int, extra: int) -> None:
    for levels in (1, 2, 3):
        assert_largest(rows(max(k, WORTHWHILE * k * BLOCK ** (levels - 1) + extra), seed=levels), k)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_largest_may_be_all_in_one_block_or_after_the_last(k: int) -> None:
    width = 1003
    count = width // BLOCK
    together = rows(width, seed=1)
    together[:, 5 : 5 + k * count : count] = 100.0 + torch.arange(k)
    assert_largest(together, k)
    last = rows(width, seed=2)
    last[:, -min(k, width % BLOCK) :] = 100.0
    assert_largest(last, k)


@pytest.mark.parametrize("possible", [0, 1, 3, 64, 500])
def test_rows_with_fewer_possible_tokens_than_k(possible: int) -> None:
    x = torch.full((3, 2000), -torch.inf)
    x[:, torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:possible]] = 1.0
    assert_largest(x, 64)


def test_nan_comes_first_wherever_it_is() -> None:
    for column in (0, 700, 1999):
        x = rows(2000, seed=0)
        x[1, column] = torch.nan
        values, _ = top_k(x, 5)
        assert values.isnan().tolist() == [[False] * 5, [True] + [False] * 4, [False] * 5]
        assert_largest(x[[0, 2]], 5)


def test_columns_of_a_wider_array() -> None:
    assert_largest(rows(3000, seed=0)[:, 11:2500], 9)


@pytest.mark.parametrize("ordered", [True, False])
def test_numpy_answers_rows_with_a_border_and_no_others(ordered: bool) -> None:
    x = rows(512, seed=0)
    assert module._partitioned(x, 64, ordered=ordered) is not None
    tied, infinite, not_a_number = x.clone(), x.clone(), x.clone()
    tied[1] = 1.0
    infinite[2] = -torch.inf
    infinite[2, :3] = 1.0
    not_a_number[0, 7] = torch.nan
    for unsuitable in (tied, infinite, not_a_number):
        assert module._partitioned(unsuitable, 64, ordered=ordered) is None


def test_a_tie_in_one_row_and_a_missing_place_in_another_do_not_cancel() -> None:
    x = torch.tensor([[3.0, 2.0, 2.0, 1.0], [4.0, 3.0, torch.nan, 1.0]])
    assert_largest(x[:1], 2)
    values, _ = top_k(x, 2)
    assert values[1].isnan().any()
