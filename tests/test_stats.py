"""Input statistics: sums that add up, whatever the chunks, the backend and the number of threads."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprune.kernels import cpu, torch_ops
from streamprune.methods.stats import InputStats

BACKENDS = [pytest.param(cpu, id="numba"), pytest.param(torch_ops, id="torch")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def activations(tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return (x * torch.linspace(0.01, 30, width) + 0.1).to(dtype)


def collect(kernels: ModuleType, x: torch.Tensor) -> InputStats:
    sums = [torch.zeros(x.shape[1], dtype=torch.float64) for _ in range(2)]
    kernels.accumulate(x, *sums)
    return InputStats(x.shape[0], sums[0].numpy(), sums[1].numpy())


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(0, 5), (1, 1), (255, 31), (257, 33), (700, 1100)])
def test_sums_match_the_reference(kernels: ModuleType, dtype: torch.dtype, tokens: int, width: int) -> None:
    x = activations(tokens, width, dtype)
    before = x.clone()
    stats = collect(kernels, x)
    assert torch.equal(x, before)
    total, squares = references.sums(x)
    scale = np.sqrt(squares * max(tokens, 1)) + 1e-30  # bounds the sum of |x|
    assert (np.abs(stats.sum - total) / scale).max() < 1e-6
    np.testing.assert_allclose(stats.sumsq, squares, rtol=5e-6)


@given(cuts=st.lists(st.integers(1, 600), max_size=4), dtype=st.sampled_from(DTYPES))
@settings(max_examples=20, deadline=None)
def test_statistics_add_up_over_chunks(cuts: list[int], dtype: torch.dtype) -> None:
    x = activations(601, 40, dtype)
    whole = collect(cpu, x)
    edges = [0, *sorted(set(cuts)), 601]
    merged = InputStats.zeros(40)
    for begin, end in pairwise(edges):
        merged = merged + collect(cpu, x[begin:end])
    assert merged.tokens == whole.tokens == 601
    np.testing.assert_allclose(merged.sumsq, whole.sumsq, rtol=1e-5)
    np.testing.assert_allclose(merged.sum, whole.sum, rtol=1e-4, atol=1e-3)


def test_chunks_of_whole_runs_add_up_bit_for_bit() -> None:
    """Cuts at multiples of 256 tokens do not move the float32 partial sums."""
    x = activations(1024, 40, torch.bfloat16)
    one = collect(cpu, x)
    total, squares = (torch.zeros(40, dtype=torch.float64) for _ in range(2))
    for chunk in (x[:256], x[256:768], x[768:]):
        cpu.accumulate(chunk, total, squares)
    assert (total.numpy() == one.sum).all() and (squares.numpy() == one.sumsq).all()


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_nan_and_inf_are_not_hidden(kernels: ModuleType, dtype: torch.dtype, value: float) -> None:
    x = activations(300, 40, dtype)
    x[270, 7] = value
    stats = collect(kernels, x)
    assert not np.isfinite(stats.sumsq[7]) and not np.isfinite(stats.sum[7])
    assert np.isfinite(stats.sumsq).sum() == 39


def test_means() -> None:
    stats = InputStats(4, np.array([4.0, -8.0]), np.array([8.0, 20.0]))
    assert stats.in_features == 2 and stats.mean_square.tolist() == [2, 5]
    assert InputStats.zeros(3).mean_square.tolist() == [0, 0, 0]


def test_addition_changes_neither_operand() -> None:
    one, two = (
        collect(cpu, activations(9, 4, torch.float32)),
        collect(cpu, activations(5, 4, torch.float32, 1)),
    )
    before = one.sum.copy(), two.sumsq.copy()
    both = one + two
    assert both.tokens == 14 and (both.sum == one.sum + two.sum).all()
    assert (one.sum == before[0]).all() and (two.sumsq == before[1]).all()


def test_wrong_statistics_are_refused() -> None:
    good = np.zeros(3)
    for tokens, total, squares in (
        (1, good.astype(np.float32), good),
        (1, torch.from_numpy(good), good),
        (1, good, good[:2]),
        (1, good[None], good[None]),
        (-1, good, good),
    ):
        with pytest.raises(ValueError):
            InputStats(tokens, total, squares)
    with pytest.raises(ValueError, match="3 and 2"):
        InputStats.zeros(3) + InputStats.zeros(2)
