"""SparseGPT and the inverse it needs: the reference, counts, invariances, features that are dead, Grams that fail."""

from __future__ import annotations

import numpy as np
import pytest
import refit_references as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import lowest

from streamprune.errors import UnsupportedError, UsageError
from streamprune.methods.inverse import Damping, normalised_inverse, upper_factor
from streamprune.methods.selection import Pattern
from streamprune.methods.sparsegpt import prepare, solve

ABSOLUTE = Damping(0.01, relative=False)
PATTERNS = [Pattern(1, 2), Pattern(2, 4), Pattern(4, 8), Pattern(3, 5), Pattern(16, 32)]

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, tokens: int = 0, seed: int = 1) -> torch.Tensor:
    """XᵀX / T of features that are mixed and differ in scale; exactly symmetric."""
    tokens = tokens or 4 * width
    x = normal(tokens, width, seed=seed) @ (torch.eye(width) + normal(width, width, seed=seed + 1) / width**0.5)
    x *= torch.exp(normal(width, seed=seed + 2))
    gram = x.T @ x / tokens
    return (gram + gram.T) / 2


def counts(keep: torch.Tensor) -> list[int]:
    return sorted({int(n) for n in (~keep).sum(1)})


def mask_only(weight: torch.Tensor, gram: torch.Tensor, keep: torch.Tensor, pattern: Pattern | None) -> float:
    """The error of magnitude pruning without a refit, to the same counts."""
    values = np.abs(weight.double().numpy())
    if pattern:
        gone = reference.lowest_of_groups(values, *pattern)
    else:
        gone = lowest(values, counts(keep)[0])
    return reference.error(weight.double().numpy(), np.where(gone, 0, weight.double().numpy()), gram.double().numpy())


def test_upper_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    for damping in (Damping(0.01), ABSOLUTE):
        gram = correlated(300)  # wider than a leaf of the triangular inverse
        factor = upper_factor(gram, damping)
        expected = np.linalg.cholesky(np.linalg.inv(reference.damped(gram.double().numpy(), *damping))).T
        assert factor.damping == 0.01
        assert torch.equal(factor.matrix, factor.matrix.triu())
        scale = np.sqrt(gram.double().diagonal().numpy())
        np.testing.assert_allclose(factor.matrix.numpy() * scale, expected * scale, atol=1e-4, rtol=0)


def test_normalised_inverse() -> None:
    gram = correlated(40)
    d = np.sqrt(gram.double().diagonal().numpy())
    expected = np.linalg.inv(gram.double().numpy() / np.outer(d, d) + 1.1 * np.eye(40))
    factor = normalised_inverse(gram, Damping(0.1), 1.0)
    np.testing.assert_allclose(factor.matrix.numpy(), expected, atol=1e-6)
    assert factor.damping == 0.1
    added = 0.3 * (d**2).mean() / d**2
    expected = np.linalg.inv(gram.double().numpy() / np.outer(d, d) + np.diag(1.0 + added))
    factor = normalised_inverse(gram, Damping(0.3, relative=False), 1.0)
    np.testing.assert_allclose(factor.matrix.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("damping", [Damping(0.01), ABSOLUTE], ids=["relative", "absolute"])
@pytest.mark.parametrize("amount", [0.5, 0.7, *PATTERNS], ids=str)
def test_equals_the_column_by_column_reference(amount: float | Pattern, damping: Damping, backend: str) -> None:
    """Two blocks, of 72 columns or a little less, in leaves of 32 or of a group, and halves that are not equal."""
    width = 95 if amount == Pattern(3, 5) else 96
    weight, gram = normal(20, width), correlated(width)
    amounts = {"pattern": amount} if isinstance(amount, Pattern) else {"sparsity": amount}
    fitted, keep = solve(weight, prepare(gram, damping), block=72, backend=backend, **amounts)
    expected, kept = reference.sparsegpt(
        weight.double().numpy(), gram.double().numpy(), block=72, damping=0.01, relative=damping.relative, **amounts
    )
    np.testing.assert_array_equal(keep.numpy(), kept)
    np.testing.assert_allclose(fitted.numpy(), expected, atol=2e-4)


@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 40),
    block=st.integers(1, 50),
    sparsity=st.sampled_from([0.0, 0.01, 0.3, 1 / 3, 0.5, 0.7, 0.9, 0.99]),
)
@settings(max_examples=40, deadline=None)
def test_counts_and_support(rows: int, width: int, block: int, sparsity: float) -> None:
    weight, gram = normal(rows, width), correlated(width)
    before, seen = weight.clone(), gram.clone()
    fitted, keep = solve(weight, prepare(gram), sparsity=sparsity, block=block)
    assert counts(keep) == [reference.floor(sparsity, width)]
    assert (fitted[~keep] == 0).all() and torch.isfinite(fitted).all()
    assert torch.equal(weight, before) and torch.equal(gram, seen)
    if reference.floor(sparsity, width) == 0:
        assert torch.equal(fitted, weight) and fitted.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("width", "block"), [(1, 1), (2, 128), (3, 2), (4, 1), (5, 2), (33, 40), (67, 64), (70, 7)])
def test_odd_shapes_equal_the_reference(width: int, block: int, rows: int, backend: str) -> None:
    """Blocks of which all goes, or nothing; halves that are no multiple of a leaf."""
    weight, gram = normal(rows, width), correlated(width)
    fitted, keep = solve(weight, prepare(gram), sparsity=0.7, block=block, backend=backend)
    expected, kept = reference.sparsegpt(weight.double().numpy(), gram.double().numpy(), sparsity=0.7, block=block)
    np.testing.assert_array_equal(keep.numpy(), kept)
    np.testing.assert_allclose(fitted.numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_hold_in_every_group(pattern: Pattern, backend: str) -> None:
    width = 6 * pattern.m
    fitted, keep = solve(normal(7, width), prepare(correlated(width)), pattern=pattern, block=20, backend=backend)
    assert (keep.reshape(7, -1, pattern.m).sum(-1) == pattern.n).all()
    assert torch.equal(fitted != 0, keep)


@pytest.mark.parametrize("amount", [0.3, 0.5, 0.8, *PATTERNS], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_error_is_below_that_of_magnitude_pruning(amount: float | Pattern, seed: int) -> None:
    width = 160
    weight, gram = normal(16, width, seed=seed), correlated(width, seed=seed)
    pattern = amount if isinstance(amount, Pattern) else None
    fitted, keep = solve(weight, prepare(gram), sparsity=None if pattern else float(amount), pattern=pattern)  # type: ignore[arg-type]
    now = reference.error(weight.double().numpy(), fitted.double().numpy(), gram.double().numpy())
    assert now < 0.7 * mask_only(weight, gram, keep, pattern)


def test_uncorrelated_features_of_one_scale_mean_magnitude_within_a_block() -> None:
    """Nothing can make up for a weight: what stays is as it was."""
    weight = normal(9, 300)
    fitted, keep = solve(weight, prepare(3.0 * torch.eye(300)), sparsity=0.6)
    for begin in range(0, 300, 128):
        part = slice(begin, min(begin + 128, 300))
        count = reference.floor(0.6, part.stop) - reference.floor(0.6, begin)
        np.testing.assert_array_equal(~keep[:, part].numpy(), lowest(np.abs(weight[:, part].numpy()), count))
    assert torch.equal(fitted, weight * keep)


@pytest.mark.parametrize("amount", [{"sparsity": 0.6}, {"pattern": Pattern(2, 4)}], ids=str)
def test_scales_of_features_do_not_matter(amount: dict[str, float]) -> None:
    """G_jk c_j c_k and w_j / c_j are the same linear; with powers of two, bit by bit."""
    weight, gram = normal(8, 96), correlated(96)
    c = torch.exp2(torch.randint(-12, 13, (96,), generator=torch.Generator().manual_seed(3)).float())
    fitted, keep = solve(weight, prepare(gram), **amount)  # type: ignore[arg-type]
    scaled, kept = solve(weight / c, prepare(gram * c * c[:, None]), **amount)  # type: ignore[arg-type]
    assert torch.equal(keep, kept)
    assert torch.equal(scaled * c, fitted)
    _, kept = solve(weight / c, prepare(gram * c * c[:, None], ABSOLUTE), **amount)  # type: ignore[arg-type]
    assert (keep != kept).float().mean() > 0.01, "an absolute damping does depend on them"


@pytest.mark.parametrize("amount", [{"sparsity": 0.6}, {"pattern": Pattern(2, 4)}], ids=str)
def test_chunks_of_rows_give_the_same(amount: dict[str, float]) -> None:
    weight, factor = normal(50, 200), prepare(correlated(200))
    fitted, keep = solve(weight, factor, **amount)  # type: ignore[arg-type]
    parts = [solve(weight[begin : begin + 9], factor, **amount) for begin in range(0, 50, 9)]  # type: ignore[arg-type]
    assert torch.equal(torch.cat([part[1] for part in parts]), keep)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), fitted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damping", [Damping(0.01), ABSOLUTE], ids=["relative", "absolute"])
def test_dead_features_are_pruned_first_and_otherwise_left(damping: Damping) -> None:
    weight, gram = normal(6, 40), correlated(40)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[3, 4, 17, 39]] = True
    gram[dead] = 0
    gram[:, dead] = 0
    factor = prepare(gram, damping)
    assert torch.isfinite(factor.matrix).all() and (factor.matrix[dead] == 0).all()
    fitted, keep = solve(weight, factor, sparsity=0.5)
    assert not keep[:, dead].any() and torch.isfinite(fitted).all()
    fitted, keep = solve(weight, factor, sparsity=0.05)
    assert counts(keep) == [2] and torch.equal(fitted, weight * keep), "nothing is lost, nothing to make up for"
    few, kept = solve(weight, factor, pattern=Pattern(1, 2))  # 39 stays nowhere, 3 and 4 nowhere: each has a partner
    assert not kept[:, dead].any() and torch.isfinite(few).all()


def test_where_all_is_dead_weights_go_by_magnitude() -> None:
    weight = normal(5, 30)
    fitted, keep = solve(weight, prepare(torch.zeros(30, 30)), sparsity=0.5)
    np.testing.assert_array_equal(~keep.numpy(), lowest(np.abs(weight.numpy()), 15))
    assert torch.equal(fitted, weight * keep)


def test_fewer_tokens_than_features() -> None:
    weight, gram = normal(8, 120), correlated(120, tokens=30)
    factor = prepare(gram)
    assert factor.damping == 0.01
    fitted, keep = solve(weight, factor, sparsity=0.5)
    now = reference.error(weight.double().numpy(), fitted.double().numpy(), gram.double().numpy())
    assert now < 0.2 * mask_only(weight, gram, keep, None)


def test_a_failed_factorisation_says_so() -> None:
    factor = prepare(correlated(120, tokens=30), Damping(0.0))
    assert 0 < factor.damping < 1e-3 and torch.isfinite(factor.matrix).all()
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])  # positive definite from a damping of 1 on
    assert prepare(gram, Damping(2.0)).damping == 2
    for damping in (Damping(0.01), ABSOLUTE):
        factor = prepare(gram, damping)
        assert factor.damping == 10
        expected = np.linalg.inv([[11.0, 2.0], [2.0, 11.0]])
        np.testing.assert_allclose(factor.matrix.T @ factor.matrix, expected, rtol=1e-5)
    for bad in ([[1.0, 1e9], [1e9, 1.0]], [[-1.0, 0.0], [0.0, 1.0]]):
        with pytest.raises(UnsupportedError, match="not positive definite") as raised:
            prepare(torch.tensor(bad))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_that_is_not_finite_is_refused(value: float) -> None:
    gram = correlated(12)
    gram[5, 5] = value
    gram[2, 5] = gram[5, 2] = value
    with pytest.raises(UnsupportedError, match="feature 5 "):
        prepare(gram)
    with pytest.raises(UnsupportedError, match="feature 5 "):
        normalised_inverse(gram, Damping(0.1), 1.0)
    gram[5, 5] = 1.0
    with pytest.raises(UnsupportedError, match="feature 2 "):
        prepare(gram)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e30])
def test_extreme_scales(scale: float) -> None:
    weight, gram = normal(4, 20), correlated(20)
    fitted, keep = solve(weight, prepare(gram * scale), sparsity=0.5)
    expected, kept = solve(weight, prepare(gram), sparsity=0.5)
    assert torch.equal(keep, kept)
    torch.testing.assert_close(fitted, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused() -> None:
    weight, factor = normal(2, 10), prepare(correlated(10))
    for amounts in ({}, {"sparsity": 0.5, "pattern": Pattern(2, 4)}, {"sparsity": 1.0}, {"pattern": Pattern(2, 4)}):
        with pytest.raises(UsageError):
            solve(weight, factor, **amounts)  # type: ignore[arg-type]
    for wrong in (weight.double(), weight[:, :5]):
        with pytest.raises(ValueError, match="expected a float32 weight"):
            solve(wrong, factor, sparsity=0.5)
    for gram in (torch.eye(3).double(), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="square float32"):
            prepare(gram)
    for value in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="damping"):
            prepare(torch.eye(3), Damping(value))


@pytest.mark.parametrize("width", [100, 256, 700])
def test_factors_do_not_depend_on_threads(width: int) -> None:
    """Several blocks, and a part of one: the same bits on one thread and on two, and what float64 gives."""
    x = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(width)) * torch.linspace(0.1, 10, width)
    gram, threads = x.T @ x / len(x), torch.get_num_threads()
    made = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            factors = upper_factor(gram, Damping(0.01)), normalised_inverse(gram, Damping(0.05), 0.5)
            assert torch.get_num_threads() == count
            made.append([factor.matrix for factor in factors])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*made, strict=True))
    factor, inverse = (matrix.double() for matrix in made[0])
    exact, scale = gram.double(), gram.double().diagonal().sqrt()
    damped = exact + 0.01 * torch.diag(exact.diagonal())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-3, atol=1e-4)
    normal = exact / (scale * scale[:, None]) + 0.55 * torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(inverse, torch.linalg.inv(normal), rtol=1e-3, atol=1e-5)
    assert torch.equal(factor, factor.triu())
