"""ADMM in both variants: the reference, the gradual schedule, counts, invariances, dead features."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import pytest
import refit_references as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import lowest, lowest_of_groups
from test_sparsegpt import PATTERNS, correlated, counts, mask_only, normal

from streamprune.errors import UnsupportedError, UsageError
from streamprune.kernels.cpu import Alternation
from streamprune.methods import admm
from streamprune.methods.admm import OBS, PUBLISHED, Variant, prepare, solve
from streamprune.methods.inverse import Damping
from streamprune.methods.selection import Pattern

DAMPING = {PUBLISHED: Damping(0.1), OBS: Damping(0.05)}
AMOUNTS = [0.3, 0.5, 0.8, *PATTERNS]
variants = pytest.mark.parametrize("variant", [PUBLISHED, OBS], ids=["published", "obs"])
backends = pytest.mark.parametrize("backend", ["numba", "torch"])


class Amounts(TypedDict):
    sparsity: float | None
    pattern: Pattern | None


def of(amount: float | Pattern) -> Amounts:
    if isinstance(amount, Pattern):
        return {"sparsity": None, "pattern": amount}
    return {"sparsity": amount, "pattern": None}


def fit(
    weight: torch.Tensor, gram: torch.Tensor, amount: float | Pattern, variant: Variant, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """With the damping of OBS or of PUBLISHED."""
    operator = prepare(gram, DAMPING[OBS if variant.saliency else PUBLISHED], variant)
    return solve(weight, operator, variant=variant, backend=backend, **of(amount))


def error(weight: torch.Tensor, fitted: torch.Tensor, gram: torch.Tensor) -> float:
    return reference.error(weight.double().numpy(), fitted.double().numpy(), gram.double().numpy())


pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_variants_are_those_that_are_documented() -> None:
    assert Variant(iterations=20, gradual=15, rho=1.0, relax=1.0, saliency=False) == PUBLISHED
    assert Variant(iterations=20, gradual=18, rho=0.55, relax=1.5, saliency=True, follow=1.0) == OBS
    gram = correlated(12)
    assert prepare(gram).damping == 0.1
    assert torch.equal(prepare(gram).matrix, prepare(gram, Damping(0.1), PUBLISHED).matrix)


@backends
@pytest.mark.parametrize("gradual", [None, 4, 0])
@pytest.mark.parametrize("amount", [0.5, 0.7, *PATTERNS], ids=str)
@pytest.mark.parametrize(
    "variant", [PUBLISHED, OBS, Variant(rho=0.7, relax=0.8, saliency=True)], ids=["published", "obs", "under"]
)
def test_equals_the_reference_with_three_variables(
    variant: Variant, amount: float | Pattern, gradual: int | None, backend: str
) -> None:
    if gradual is not None:
        variant = variant._replace(gradual=gradual)
    width = 60 if amount == Pattern(3, 5) else 64
    weight, gram = normal(20, width), correlated(width)
    operator = prepare(gram, Damping(0.05), variant)
    fitted, keep = solve(weight, operator, variant=variant, backend=backend, **of(amount))
    expected, kept = reference.admm(
        weight.double().numpy(),
        gram.double().numpy(),
        damping=0.05,
        **{**variant._asdict(), "gradual": max(1, variant.gradual)},
        **of(amount),
    )
    np.testing.assert_array_equal(keep.numpy(), kept)
    np.testing.assert_allclose(fitted.numpy(), expected, atol=2e-4)


@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 40),
    sparsity=st.sampled_from([0.0, 0.01, 0.3, 1 / 3, 0.5, 0.7, 0.9, 0.99]),
    variant=st.sampled_from([PUBLISHED, OBS]),
)
@settings(max_examples=60, deadline=None)
def test_counts_and_support(rows: int, width: int, sparsity: float, variant: Variant) -> None:
    weight, gram = normal(rows, width), correlated(width)
    before, seen = weight.clone(), gram.clone()
    operator = prepare(gram, variant=variant)
    parts = [part.clone() for part in operator[:3]]
    fitted, keep = solve(weight, operator, sparsity=sparsity, variant=variant)
    assert counts(keep) == [reference.floor(sparsity, width)]
    assert (fitted[~keep] == 0).all() and torch.isfinite(fitted).all()
    assert torch.equal(weight, before) and torch.equal(gram, seen)
    assert all(map(torch.equal, parts, operator[:3])), "an operator serves any number of linears"
    if reference.floor(sparsity, width) == 0:
        assert torch.equal(fitted, weight) and fitted.data_ptr() != weight.data_ptr()


@backends
@variants
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_hold_in_every_group(pattern: Pattern, variant: Variant, backend: str) -> None:
    gram = correlated(6 * pattern.m)
    fitted, keep = fit(normal(7, len(gram)), gram, pattern, variant, backend)
    assert (keep.reshape(7, -1, pattern.m).sum(-1) == pattern.n).all()
    assert torch.equal(fitted != 0, keep)


@backends
@pytest.mark.parametrize("pattern", [Pattern(4, 5), Pattern(5, 6), Pattern(1, 12)], ids=str)
def test_patterns_whose_sparsity_no_float_is(pattern: Pattern, backend: str) -> None:
    """1 - 4/5 is a little less than 1/5, which is 16 of 80 weights, not 15."""
    gram = correlated(16 * pattern.m)
    fitted, keep = fit(normal(5, len(gram)), gram, pattern, OBS, backend)
    assert (keep.reshape(5, -1, pattern.m).sum(-1) == pattern.n).all() and torch.equal(fitted != 0, keep)


@variants
@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_error_is_below_that_of_magnitude_pruning(amount: float | Pattern, variant: Variant, seed: int) -> None:
    weight, gram = normal(16, 160, seed=seed), correlated(160, seed=seed)
    fitted, keep = fit(weight, gram, amount, variant)
    only = mask_only(weight, gram, keep, of(amount)["pattern"])
    assert error(weight, fitted, gram) < 0.7 * only
    assert error(weight, fitted, gram) < error(weight, weight * keep, gram), "the refit, on the mask it found"


@pytest.mark.parametrize("amount", [0.3, 0.5, 0.7, *PATTERNS], ids=str)
def test_the_saliency_does_not_err_more_than_the_published_score(amount: float | Pattern) -> None:
    """In the mean over inputs; each is better somewhere."""
    total = {PUBLISHED: 0.0, OBS: 0.0}
    for seed in range(8):
        weight, gram = normal(12, 160, seed=seed), correlated(160, seed=100 + 3 * seed)
        for variant in total:
            whole = error(weight, torch.zeros_like(weight), gram)
            total[variant] += error(weight, fit(weight, gram, amount, variant)[0], gram) / whole
    assert total[OBS] <= total[PUBLISHED]


@variants
@pytest.mark.parametrize("amount", [0.7, Pattern(4, 8), Pattern(3, 5)], ids=str)
def test_the_gradual_schedule_is_used(
    amount: float | Pattern, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of N:M, two selections a step: the N best of every M, then so much of the others; in the last step the first."""
    weight, gram = normal(16, 160), correlated(160)
    sparsities: list[float] = []
    patterns: list[Pattern] = []
    pruned: list[int] = []
    choose, select = admm._choose, admm.select

    def watched(*args: object, **more: object) -> object:
        if more["pattern"] is None:
            sparsities.append(more["sparsity"])  # type: ignore[arg-type]
        else:
            patterns.append(more["pattern"])  # type: ignore[arg-type]
        return select(*args, **more)  # type: ignore[arg-type]

    def counted(*args: object) -> torch.Tensor:
        keep = choose(*args)  # type: ignore[arg-type]
        pruned.extend(counts(keep))
        return keep

    monkeypatch.setattr(admm, "select", watched)
    monkeypatch.setattr(admm, "_choose", counted)
    fit(weight, gram, amount, variant, "torch")
    shares = [1 - (1 - t / variant.gradual) ** 3 for t in range(1, variant.gradual + 1)]
    if isinstance(amount, Pattern):
        assert patterns == [amount] * variant.gradual
        assert sparsities == pytest.approx([amount.sparsity * share for share in shares[:-1]])
        final = 160 * (amount.m - amount.n) // amount.m
    else:
        assert patterns == [] and sparsities == pytest.approx([amount * share for share in shares])
        assert sparsities[-1] == amount
        final = 112
    for share, count in zip(shares, pruned, strict=True):
        assert final * share - 1 - 1e-9 <= count <= final * share + 1e-9
    assert pruned[-1] == final


@pytest.mark.parametrize("steps", [1, 2, 17])
@pytest.mark.parametrize("amount", [0.1, 0.5, 0.7, *PATTERNS], ids=str)
def test_compiled_iterations_choose_the_same_masks(amount: float | Pattern, steps: int) -> None:
    """Also halfway: in each iteration's mask is what the schedule asks for. 3:5 of rows that are not whole lanes."""
    width = 96 if amount != Pattern(3, 5) else 80
    weight, gram = normal(24, width), correlated(width)
    operator = prepare(gram, Damping(0.05), OBS)
    variant = OBS._replace(iterations=steps, gradual=steps)
    (fitted, keep), (expected, chosen) = (
        solve(weight, operator, variant=variant, backend=backend, **of(amount)) for backend in (None, "torch")
    )
    assert torch.equal(keep, chosen)
    torch.testing.assert_close(fitted, expected, rtol=1e-4, atol=1e-6)


@backends
def test_of_equal_weights_the_lowest_columns_are_pruned_first(backend: str) -> None:
    weight, variant = torch.ones(3, 32), Variant(iterations=1, gradual=0)
    operator = prepare(torch.eye(32), Damping(0.1), variant)
    for amount, expected in ((0.5, 16 * [False] + 16 * [True]), (Pattern(2, 4), 8 * [False, False, True, True])):
        _, keep = solve(weight, operator, variant=variant, backend=backend, **of(amount))
        assert keep.tolist() == 3 * [expected]


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_compiled_steps(products: torch.dtype, pattern: Pattern | None) -> None:
    """What is multiplied is 2z − x − start, rounded to nearest even; the same for any number of threads."""
    start, score = normal(1200, 48), torch.linspace(0.5, 2, 48)
    made, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            work = Alternation(start, score, 1.5, products)
            first = work.step(None, 7, *(pattern or ())).clone()
            chosen, second = work.keep.clone(), work.step(normal(1200, 48).to(products), -1).clone()
            made.append((first, chosen, second, work.x.clone()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*made, strict=True))
    first, chosen, second, x = made[0]
    z = start.where(chosen, 0.0)
    assert counts(chosen) == [7]
    assert torch.equal(first, (2 * z - start - start).to(products))
    expected = start - z * 1.5 + start * 1.5 + normal(1200, 48).to(products).float() * 1.5
    assert torch.equal(x, expected)
    assert torch.equal(second, (2 * x.where(chosen, 0.0) - x - start).to(products))


@backends
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_a_nan_of_any_bits_survives_products_in_bf16(bits: int, backend: str) -> None:
    """Rounded as if it were a number, one whose bits are all ones would become zero."""
    weight = normal(3, 64)
    weight.view(torch.int32)[1, 5] = bits
    operator = prepare(correlated(64), Damping(0.05), OBS, torch.bfloat16)
    fitted, keep = solve(weight, operator, sparsity=0.5, variant=OBS, backend=backend)
    assert bool(fitted[1][keep[1]].isnan().all())
    assert bool(fitted[[0, 2]].isfinite().all())


@variants
@pytest.mark.parametrize("amount", [0.7, Pattern(2, 4), Pattern(4, 8)], ids=str)
def test_the_gradual_schedule_helps(amount: float | Pattern, variant: Variant) -> None:
    weight, gram = normal(16, 160), correlated(160)
    slow, at_once = (fit(weight, gram, amount, v)[0] for v in (variant, variant._replace(gradual=0)))
    assert error(weight, slow, gram) < error(weight, at_once, gram)


@backends
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("share", [1e-9, 0.2, 0.5, 0.9, 1 - 1e-9, 1.0])
def test_on_the_way_to_a_pattern_the_best_of_each_group_stay(pattern: Pattern, share: float, backend: str) -> None:
    x, score = normal(9, 8 * pattern.m), torch.exp(normal(8 * pattern.m, seed=4))
    keep = admm._choose(x, score, share, admm.Amount(pattern=pattern), backend).numpy()
    ranking = np.abs(x.double().numpy()) * score.double().numpy()
    best = ~lowest_of_groups(ranking, *pattern)
    assert keep[best].all()
    assert (keep.sum(1) == 8 * pattern.m - reference.floor(share * pattern.sparsity, 8 * pattern.m)).all()
    for row, kept, safe in zip(ranking, keep, best, strict=True):
        assert row[~kept].max(initial=-1) <= row[kept & ~safe].min(initial=np.inf)


@pytest.mark.parametrize("relax", [1.0, 1.5])
def test_more_iterations_lead_to_the_least_squares_solution(relax: float) -> None:
    """On a fixed mask: A_SS v_S = A_S: v₀ for the kept S of each row."""
    weight, gram = normal(3, 24), correlated(24)
    variant = Variant(iterations=400, gradual=0, relax=relax)
    fitted, keep = solve(weight, prepare(gram, variant=variant), sparsity=0.5, variant=variant)
    a, w = reference.damped(gram.double().numpy(), 0.1, True), weight.double().numpy()
    for row, kept in enumerate(keep.numpy()):
        expected = np.linalg.solve(a[np.ix_(kept, kept)], a[kept] @ w[row])
        np.testing.assert_allclose(fitted[row, keep[row]].numpy(), expected, atol=1e-4)


def test_the_saliency_is_what_removing_a_weight_costs() -> None:
    """X² / [A⁻¹]_jj: the least error of a row without w_j, all others free; so the first weight that goes is the
    one that least squares over all single removals would take."""
    weight, gram = normal(5, 20), correlated(20)
    variant = OBS._replace(gradual=0)
    _, keep = solve(weight, prepare(gram, Damping(0.05), variant), sparsity=0.05, variant=variant)
    a, w = reference.damped(gram.double().numpy(), 0.05, True), weight.double().numpy()
    cost = np.empty(w.shape)
    for row in range(len(w)):
        for j in range(20):
            others = np.arange(20) != j
            fitted = np.zeros(20)
            fitted[others] = np.linalg.solve(a[np.ix_(others, others)], a[others] @ w[row])
            cost[row, j] = (w[row] - fitted) @ a @ (w[row] - fitted)
    np.testing.assert_array_equal(~keep.numpy(), lowest(cost, 1))


@variants
@pytest.mark.parametrize("iterations", [0, 20])
def test_uncorrelated_features_mean_magnitude_in_units_of_their_scale(iterations: int, variant: Variant) -> None:
    """Without the gradual schedule: nothing can make up for a weight, so what stays is as it was."""
    weight, power = normal(9, 100), torch.exp(normal(100, seed=4))
    fitted, keep = fit(weight, power.diag(), 0.6, variant._replace(iterations=iterations, gradual=0))
    np.testing.assert_array_equal(~keep.numpy(), lowest((weight.abs() * power.sqrt()).numpy(), 60))
    torch.testing.assert_close(fitted, weight * keep)


@variants
@pytest.mark.parametrize("amount", [0.6, Pattern(2, 4)], ids=str)
def test_scales_of_features_do_not_matter(amount: float | Pattern, variant: Variant) -> None:
    weight, gram = normal(8, 96), correlated(96)
    c = torch.exp2(torch.randint(-12, 13, (96,), generator=torch.Generator().manual_seed(3)).float())
    fitted, keep = fit(weight, gram, amount, variant)
    scaled, kept = fit(weight / c, gram * c * c[:, None], amount, variant)
    assert torch.equal(keep, kept) and torch.equal(scaled * c, fitted)


@backends
@variants
@pytest.mark.parametrize("amount", [0.5, Pattern(2, 4)], ids=str)
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-60, 2.0**60, 2.0**100])
def test_extreme_scales(scale: float, amount: float | Pattern, variant: Variant, backend: str) -> None:
    weight, gram = normal(4, 64), correlated(64)
    fitted, keep = fit(weight, gram * scale, amount, variant, backend)
    expected, kept = fit(weight, gram, amount, variant, backend)
    assert torch.equal(keep, kept) and torch.equal(fitted, expected)
    small, kept = fit(weight * 2.0**-40, gram * scale, amount, variant, backend)
    assert torch.equal(keep, kept) and torch.equal(small * 2.0**40, expected)


@variants
@pytest.mark.parametrize("amount", [0.6, Pattern(2, 4)], ids=str)
def test_chunks_of_rows_give_the_same(amount: float | Pattern, variant: Variant) -> None:
    weight, gram = normal(50, 200), correlated(200)
    operator = prepare(gram, variant=variant)
    fitted, keep = solve(weight, operator, variant=variant, **of(amount))
    parts = [solve(weight[at : at + 9], operator, variant=variant, **of(amount)) for at in range(0, 50, 9)]
    assert torch.equal(torch.cat([part[1] for part in parts]), keep)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), fitted, rtol=1e-4, atol=1e-5)


@variants
def test_dead_features_are_pruned_first_and_otherwise_left(variant: Variant) -> None:
    weight, gram = normal(6, 40), correlated(40)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[3, 4, 17, 39]] = True
    gram[dead] = 0
    gram[:, dead] = 0
    operator = prepare(gram, Damping(0.1), variant)
    assert torch.isfinite(operator.matrix).all() and (operator.matrix[dead] == 0).all()
    assert torch.isfinite(operator.score).all() and (operator.scale[dead] == 0).all()
    for amount in (0.5, Pattern(4, 8)):
        fitted, keep = solve(weight, operator, variant=variant, **of(amount))
        assert not keep[:, dead].any() and torch.isfinite(fitted).all()
        expected, kept = reference.admm(
            weight.double().numpy(), gram.double().numpy(), **of(amount), **variant._asdict()
        )
        np.testing.assert_array_equal(keep.numpy(), kept)
        np.testing.assert_allclose(fitted.numpy(), expected, atol=2e-4)
    fitted, keep = solve(weight, operator, sparsity=0.05, variant=variant)
    assert counts(keep) == [2] and not keep[:, [3, 4]].any()
    torch.testing.assert_close(fitted, weight * keep)
    assert torch.equal(fitted[:, [17, 39]], weight[:, [17, 39]])


@variants
@pytest.mark.parametrize("amount", [0.5, Pattern(2, 5)], ids=str)
def test_where_all_is_dead_weights_go_by_magnitude(amount: float | Pattern, variant: Variant) -> None:
    weight, gram = normal(5, 30), torch.zeros(30, 30)
    fitted, keep = solve(weight, prepare(gram, variant=variant), variant=variant, **of(amount))
    magnitude = np.abs(weight.numpy())
    gone = lowest_of_groups(magnitude, *amount) if isinstance(amount, Pattern) else lowest(magnitude, 15)
    np.testing.assert_array_equal(~keep.numpy(), gone)
    torch.testing.assert_close(fitted, weight * keep)


@variants
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_do_not_pass_for_good_ones(value: float, variant: Variant) -> None:
    weight, gram = normal(4, 40), correlated(40)
    operator = prepare(gram, variant=variant)
    for amount in (0.5, Pattern(2, 4)):
        good, kept = solve(weight, operator, variant=variant, **of(amount))
        bad = weight.clone()
        bad[2, 7] = value
        fitted, keep = solve(bad, operator, variant=variant, **of(amount))
        assert counts(keep) == counts(kept) and (fitted[~keep] == 0).all()
        assert not torch.isfinite(fitted[2][keep[2]]).any()
        others = torch.tensor([0, 1, 3])
        assert torch.equal(fitted[others], good[others])


@variants
def test_fewer_tokens_than_features(variant: Variant) -> None:
    weight, gram = normal(8, 120), correlated(120, tokens=30)
    operator = prepare(gram, DAMPING[variant], variant)
    assert operator.damping == DAMPING[variant].value
    fitted, keep = solve(weight, operator, sparsity=0.5, variant=variant)
    assert error(weight, fitted, gram) < 0.2 * mask_only(weight, gram, keep, None)


def test_a_failed_factorisation_says_so() -> None:
    gram = torch.tensor([[1.0, 5.0], [5.0, 1.0]])  # positive definite from a damping of 4 on, with ρ = 1 of 3
    assert prepare(gram, Damping(0.1)).damping == pytest.approx(10)
    assert prepare(gram, Damping(3.5)).damping == 3.5
    assert prepare(gram, Damping(3.5), OBS).damping == pytest.approx(35), "the saliency needs A itself"
    assert prepare(gram, Damping(0.1), OBS).damping == pytest.approx(10)
    assert prepare(gram, Damping(4.5), OBS).damping == 4.5
    operator = prepare(gram, Damping(3.5), OBS)
    a = gram.double().numpy() + 35 * np.eye(2)
    np.testing.assert_allclose(operator.matrix, 35.55 * np.linalg.inv(a + 35.55 * np.eye(2)), rtol=1e-5)
    for variant in (PUBLISHED, OBS):
        with pytest.raises(UnsupportedError, match="not positive definite"):
            prepare(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), variant=variant)


@variants
def test_a_gram_without_damping_that_is_rank_deficient_is_damped(variant: Variant) -> None:
    operator = prepare(correlated(120, tokens=30), Damping(0.0), variant)
    assert (0 < operator.damping < 1e-3) if variant.saliency else operator.damping == 0
    fitted, _ = solve(normal(4, 120), operator, sparsity=0.5, variant=variant)
    assert torch.isfinite(fitted).all() and torch.isfinite(operator.score).all()


def test_what_cannot_be_is_refused() -> None:
    weight, operator = normal(2, 10), prepare(correlated(10))
    for amounts in ({}, {"sparsity": 0.5, "pattern": Pattern(2, 4)}, {"sparsity": 1.0}, {"pattern": Pattern(2, 4)}):
        with pytest.raises(UsageError):
            solve(weight, operator, **amounts)  # type: ignore[arg-type]
    for wrong in (weight.double(), weight[:, :5]):
        with pytest.raises(ValueError, match="expected a float32 weight"):
            solve(wrong, operator, sparsity=0.5)
    for gradual in (21, -1):
        with pytest.raises(ValueError, match=f"gradual {gradual}"):
            solve(weight, operator, sparsity=0.5, variant=Variant(gradual=gradual))
    for rho in (0.0, float("nan")):
        with pytest.raises(ValueError, match="rho"):
            prepare(correlated(10), variant=Variant(rho=rho))
