"""ADMM: the reference, the gradual schedule, counts, invariances, dead features."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import refit_references as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import lowest
from test_sparsegpt import PATTERNS, correlated, counts, mask_only, normal

from streamprune.errors import UnsupportedError, UsageError
from streamprune.pruning import admm
from streamprune.pruning.admm import prepare, solve
from streamprune.pruning.inverse import Damping
from streamprune.pruning.selection import Pattern


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products of small matrices wait for a second thread, on a busy machine much longer than they take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("gradual", [15, 4, 0])
@pytest.mark.parametrize("amount", [0.5, 0.7, *PATTERNS], ids=str)
def test_equals_the_reference_with_three_variables(amount: float | Pattern, gradual: int) -> None:
    width = 60 if amount == Pattern(3, 5) else 64
    weight, gram = normal(20, width), correlated(width)
    amounts = {"pattern": amount} if isinstance(amount, Pattern) else {"sparsity": amount}
    fitted, keep = solve(weight, gram, prepare(gram, rho=0.7), gradual=gradual, **amounts)  # type: ignore[arg-type]
    expected, kept = reference.admm(
        weight.double().numpy(), gram.double().numpy(), rho=0.7, gradual=max(1, gradual), **amounts
    )
    np.testing.assert_array_equal(keep.numpy(), kept)
    np.testing.assert_allclose(fitted.numpy(), expected, atol=2e-4)


@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 40),
    sparsity=st.sampled_from([0.0, 0.01, 0.3, 1 / 3, 0.5, 0.7, 0.9, 0.99]),
)
@settings(max_examples=40, deadline=None)
def test_counts_and_support(rows: int, width: int, sparsity: float) -> None:
    weight, gram = normal(rows, width), correlated(width)
    before, seen = weight.clone(), gram.clone()
    fitted, keep = solve(weight, gram, prepare(gram), sparsity=sparsity)
    assert counts(keep) == [reference.floor(sparsity, width)]
    assert (fitted[~keep] == 0).all() and torch.isfinite(fitted).all()
    assert torch.equal(weight, before) and torch.equal(gram, seen)
    if reference.floor(sparsity, width) == 0:
        assert torch.equal(fitted, weight) and fitted.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_hold_in_every_group(pattern: Pattern, backend: str) -> None:
    gram = correlated(6 * pattern.m)
    fitted, keep = solve(normal(7, len(gram)), gram, prepare(gram), pattern=pattern, backend=backend)
    assert (keep.reshape(7, -1, pattern.m).sum(-1) == pattern.n).all()
    assert torch.equal(fitted != 0, keep)


@pytest.mark.parametrize("amount", [0.3, 0.5, 0.8, *PATTERNS], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_error_is_below_that_of_magnitude_pruning(amount: float | Pattern, seed: int) -> None:
    weight, gram = normal(16, 160, seed=seed), correlated(160, seed=seed)
    pattern = amount if isinstance(amount, Pattern) else None
    sparsity = None if isinstance(amount, Pattern) else amount
    fitted, keep = solve(weight, gram, prepare(gram), sparsity=sparsity, pattern=pattern)
    now = reference.error(weight.double().numpy(), fitted.double().numpy(), gram.double().numpy())
    assert now < 0.7 * mask_only(weight, gram, keep, pattern)


@pytest.mark.parametrize("amount", [{"sparsity": 0.7}, {"pattern": Pattern(4, 8)}], ids=str)
def test_the_gradual_schedule_is_used_and_helps(amount: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = normal(16, 160), correlated(160)
    seen = []
    choose = admm.select

    def watched(*args: object, **more: object) -> object:
        seen.append(more["sparsity"] if more["pattern"] is None else more["pattern"].n)  # type: ignore[attr-defined]
        return choose(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(admm, "select", watched)
    fitted, _ = solve(weight, gram, prepare(gram), **amount)  # type: ignore[arg-type]
    if "sparsity" in amount:
        assert seen == pytest.approx([0.7 * (1 - (1 - t / 15) ** 3) for t in range(1, 16)]) and seen[-1] == 0.7
    else:
        assert seen == [7, 7, 6, 6, 5, 5, 5, 4, 4, 4, 4, 4, 4, 4, 4]
    at_once, _ = solve(weight, gram, prepare(gram), gradual=0, **amount)  # type: ignore[arg-type]
    errors = [
        reference.error(weight.double().numpy(), result.double().numpy(), gram.double().numpy())
        for result in (fitted, at_once)
    ]
    assert errors[0] < errors[1]


def test_more_iterations_lead_to_the_least_squares_solution() -> None:
    """On a fixed mask: A_SS v_S = A_S: v₀ for the kept S of each row."""
    weight, gram = normal(3, 24), correlated(24)
    fitted, keep = solve(weight, gram, prepare(gram), sparsity=0.5, iterations=400, gradual=0)
    a, w = reference.damped(gram.double().numpy(), 0.1, True), weight.double().numpy()
    for row, kept in enumerate(keep.numpy()):
        expected = np.linalg.solve(a[np.ix_(kept, kept)], a[kept] @ w[row])
        np.testing.assert_allclose(fitted[row, keep[row]].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("iterations", [0, 20])
def test_uncorrelated_features_mean_magnitude_in_units_of_their_scale(iterations: int) -> None:
    """Without the gradual schedule: nothing can make up for a weight, so what stays is as it was."""
    weight, power = normal(9, 100), torch.exp(normal(100, seed=4))
    gram = power.diag()
    fitted, keep = solve(weight, gram, prepare(gram), sparsity=0.6, iterations=iterations, gradual=0)
    np.testing.assert_array_equal(~keep.numpy(), lowest((weight.abs() * power.sqrt()).numpy(), 60))
    torch.testing.assert_close(fitted, weight * keep)


@pytest.mark.parametrize("amount", [{"sparsity": 0.6}, {"pattern": Pattern(2, 4)}], ids=str)
def test_scales_of_features_do_not_matter(amount: dict[str, float]) -> None:
    weight, gram = normal(8, 96), correlated(96)
    c = torch.exp2(torch.randint(-12, 13, (96,), generator=torch.Generator().manual_seed(3)).float())
    fitted, keep = solve(weight, gram, prepare(gram), **amount)  # type: ignore[arg-type]
    gram = gram * c * c[:, None]
    scaled, kept = solve(weight / c, gram, prepare(gram), **amount)  # type: ignore[arg-type]
    assert torch.equal(keep, kept) and torch.equal(scaled * c, fitted)


@pytest.mark.parametrize("amount", [{"sparsity": 0.6}, {"pattern": Pattern(2, 4)}], ids=str)
def test_chunks_of_rows_give_the_same(amount: dict[str, float]) -> None:
    weight, gram = normal(50, 200), correlated(200)
    factor = prepare(gram)
    fitted, keep = solve(weight, gram, factor, **amount)  # type: ignore[arg-type]
    parts = [solve(weight[begin : begin + 9], gram, factor, **amount) for begin in range(0, 50, 9)]  # type: ignore[arg-type]
    assert torch.equal(torch.cat([part[1] for part in parts]), keep)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), fitted, rtol=1e-4, atol=1e-5)


def test_dead_features_are_pruned_first_and_otherwise_left() -> None:
    weight, gram = normal(6, 40), correlated(40)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[3, 4, 17, 39]] = True
    gram[dead] = 0
    gram[:, dead] = 0
    factor = prepare(gram)
    assert torch.isfinite(factor.matrix).all() and (factor.matrix[dead] == 0).all()
    fitted, keep = solve(weight, gram, factor, sparsity=0.5)
    assert not keep[:, dead].any() and torch.isfinite(fitted).all()
    expected, kept = reference.admm(weight.double().numpy(), gram.double().numpy(), sparsity=0.5)
    np.testing.assert_array_equal(keep.numpy(), kept)
    np.testing.assert_allclose(fitted.numpy(), expected, atol=2e-4)
    fitted, keep = solve(weight, gram, factor, sparsity=0.05)
    assert counts(keep) == [2] and not keep[:, [3, 4]].any()
    torch.testing.assert_close(fitted, weight * keep)
    assert torch.equal(fitted[:, [17, 39]], weight[:, [17, 39]])


def test_where_all_is_dead_weights_go_by_magnitude() -> None:
    weight, gram = normal(5, 30), torch.zeros(30, 30)
    fitted, keep = solve(weight, gram, prepare(gram), sparsity=0.5)
    np.testing.assert_array_equal(~keep.numpy(), lowest(np.abs(weight.numpy()), 15))
    assert torch.isfinite(fitted).all()


def test_fewer_tokens_than_features() -> None:
    weight, gram = normal(8, 120), correlated(120, tokens=30)
    factor = prepare(gram)
    assert factor.damping == 0.1
    fitted, keep = solve(weight, gram, factor, sparsity=0.5)
    now = reference.error(weight.double().numpy(), fitted.double().numpy(), gram.double().numpy())
    assert now < 0.2 * mask_only(weight, gram, keep, None)


def test_a_failed_factorisation_says_so() -> None:
    gram = torch.tensor([[1.0, 5.0], [5.0, 1.0]])  # with ρ = 1, positive definite from a damping of 3 on
    assert prepare(gram, Damping(0.1)).damping == pytest.approx(10)
    assert prepare(gram, Damping(4.0)).damping == 4
    with pytest.raises(UnsupportedError, match="not positive definite"):
        prepare(torch.tensor([[1.0, 1e9], [1e9, 1.0]]))


def test_what_cannot_be_is_refused() -> None:
    weight, gram = normal(2, 10), correlated(10)
    factor = prepare(gram)
    for amounts in ({}, {"sparsity": 0.5, "pattern": Pattern(2, 4)}, {"sparsity": 1.0}, {"pattern": Pattern(2, 4)}):
        with pytest.raises(UsageError):
            solve(weight, gram, factor, **amounts)  # type: ignore[arg-type]
    for wrong in (weight.double(), weight[:, :5]):
        with pytest.raises(ValueError, match="no float32 weight"):
            solve(wrong, gram, factor, sparsity=0.5)
    with pytest.raises(ValueError, match="gradual 21"):
        solve(weight, gram, factor, sparsity=0.5, gradual=21)
    with pytest.raises(ValueError, match="rho"):
        prepare(gram, rho=0.0)
