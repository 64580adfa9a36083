"""Sparsity shared out: the asked mean, bounds, and the best sum of errors against all that could be chosen."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamprune.methods.allocation import REACH, SPREAD, STEPS, Curve, by_error, levels_around, owl

sparsities = st.floats(0, 0.99)
sizes = st.integers(1, 10**9)


def mean(levels: list[float], weights: list[int]) -> float:
    return float(np.average(levels, weights=weights))


def at(curve: Curve, level: float) -> float:
    """The error between two levels, by a straight line."""
    return float(np.interp(level, curve.levels, curve.errors))


def total(curves: dict[str, Curve], found: dict[str, float]) -> float:
    return sum(at(curve, found[name]) for name, curve in curves.items())


def convex(rng: np.random.Generator, size: int, levels: list[float]) -> Curve:
    slopes = np.sort(rng.exponential(size=len(levels) - 1)) * rng.uniform(0.1, 5)
    errors = rng.uniform(0, 0.1) + np.concatenate([[0.0], np.cumsum(slopes * np.diff(levels))])
    return Curve(size, levels, errors.tolist())


@given(sparsities)
@example(0.0)
@example(0.98)
@example(0.99)
@example(1 - 2**-53)
@example(0.05)
def test_levels_enclose_the_asked_one(sparsity: float) -> None:
    levels = levels_around(sparsity)
    assert len(levels) == STEPS and levels[0] <= sparsity <= levels[-1]
    assert all(a < b for a, b in pairwise(levels))
    assert levels[0] >= max(0.0, sparsity - REACH) and levels[-1] <= max(0.98, sparsity)
    assert levels[-1] - sparsity <= REACH + 1e-12


@given(layers=st.lists(st.tuples(st.floats(0, 1), sizes), min_size=1, max_size=40), sparsity=sparsities)
@example(layers=[(0.1, 5), (0.2, 5)], sparsity=0.0)
@example(layers=[(0.1, 5), (0.2, 5)], sparsity=0.99)
@example(layers=[(0.0, 1), (5e-324, 1)], sparsity=0.5)
@settings(deadline=None)
def test_owl_by_layer(layers: list[tuple[float, int]], sparsity: float) -> None:
    outliers, weights = [layer[0] for layer in layers], [layer[1] for layer in layers]
    found = owl(outliers, weights, sparsity)
    assert mean(found, weights) == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= level <= max(0.98, sparsity) for level in found)
    assert max(found) - min(found) <= 2 * SPREAD + 1e-12
    ordered = [level for _, level in sorted(zip(outliers, found, strict=True), key=lambda pair: (pair[0], -pair[1]))]
    assert all(b <= a + 1e-12 for a, b in pairwise(ordered)), "the more outliers, the less is pruned"


def test_owl_is_the_published_formula_where_nothing_is_held() -> None:
    """LOD scaled to 0..2λ, less its mean, plus what is kept; here of layers of one size."""
    outliers = np.array([0.011, 0.02, 0.004, 0.035])
    scaled = (outliers - outliers.min()) * (1 / (outliers.max() - outliers.min()) * SPREAD * 2)
    expected = 1 - (scaled - scaled.mean() + (1 - 0.7))
    np.testing.assert_allclose(owl(outliers.tolist(), [64] * 4, 0.7), expected, atol=1e-12)
    by_weights = 1 - (scaled - np.average(scaled, weights=[1, 2, 3, 4]) + (1 - 0.7))
    np.testing.assert_allclose(owl(outliers.tolist(), [1, 2, 3, 4], 0.7), by_weights, atol=1e-12)


def test_owl_holds_what_would_leave_the_bounds_and_the_others_make_up_for_it() -> None:
    low = owl([0.0, 0.5, 1.0], [1, 1, 1], 0.02)
    assert low[2] == 0 and low[0] > low[1] >= 0 and sum(low) == pytest.approx(0.06)
    high = owl([0.0, 0.5, 1.0], [1, 1, 1], 0.95)
    assert high[0] == 0.98 and 0.98 > high[1] > high[2] and sum(high) == pytest.approx(2.85)
    assert high[1] - high[2] == pytest.approx(SPREAD)


@given(sparsity=sparsities, weights=st.lists(sizes, min_size=1, max_size=9), share=st.floats(0, 1))
@example(sparsity=0.7, weights=[3, 7, 11], share=0.1)
@settings(deadline=None)
def test_owl_without_differences_is_exactly_uniform(sparsity: float, weights: list[int], share: float) -> None:
    assert owl([share] * len(weights), weights, sparsity) == [sparsity] * len(weights)


@given(data=st.data(), sparsity=sparsities, count=st.integers(1, 8))
@settings(deadline=None)
def test_the_mean_by_error_is_the_asked_one(data: st.DataObject, sparsity: float, count: int) -> None:
    """Of any rising curves, convex or not."""
    levels = levels_around(sparsity)
    errors = st.lists(st.floats(0, 1), min_size=STEPS, max_size=STEPS).map(sorted)
    curves = {f"linear {i}": Curve(data.draw(sizes), levels, data.draw(errors)) for i in range(count)}
    found = by_error(curves, sparsity)
    assert list(found) == list(curves)
    assert mean([*found.values()], [c.size for c in curves.values()]) == pytest.approx(sparsity, abs=1e-9)
    assert all(levels[0] <= level <= levels[-1] for level in found.values())


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_errs_less_where_curves_are_convex(seed: int) -> None:
    """All combinations of a fine grid for all linears but the last, which takes what is left."""
    rng = np.random.default_rng(seed)
    sparsity = float(rng.choice([0.1, 0.5, 0.77, 0.9]))
    levels = levels_around(sparsity)
    curves = {name: convex(rng, int(rng.integers(1, 9)), levels) for name in "abc"}
    a, b, c = curves.values()
    best, whole = np.inf, sparsity * (a.size + b.size + c.size)
    for x, y in product(np.linspace(levels[0], levels[-1], 65), repeat=2):
        z = (whole - x * a.size - y * b.size) / c.size
        if levels[0] <= z <= levels[-1]:
            best = min(best, at(a, x) + at(b, y) + at(c, z))
    found = total(curves, by_error(curves, sparsity))
    assert found <= best + 1e-12
    assert found >= best - 0.2 * max(a.errors[-1], b.errors[-1], c.errors[-1]), "not below what is possible"


@pytest.mark.parametrize("seed", range(20))
def test_curves_that_are_not_convex_are_replaced_by_their_hulls(seed: int) -> None:
    """No choice of levels sums to less than the hulls do at what was found; one linear at most is off a corner."""
    rng = np.random.default_rng(seed)
    levels = [0.3, 0.4, 0.5, 0.6, 0.7]
    curves = {name: Curve(int(rng.integers(1, 5)), levels, np.sort(rng.random(5)).tolist()) for name in "abc"}
    hulls = {name: Curve(c.size, levels, [hull_at(c, x) for x in levels]) for name, c in curves.items()}
    found = by_error(curves, 0.5)
    assert total(hulls, found) == pytest.approx(total(hulls, by_error(hulls, 0.5)), abs=1e-9)
    weights = [c.size for c in curves.values()]
    for chosen in product(levels, repeat=3):
        if mean([*chosen], weights) >= 0.5 - 1e-12:
            assert total(hulls, found) <= total(curves, dict(zip(curves, chosen, strict=True))) + 1e-12
    off = [name for name, x in found.items() if abs(at(curves[name], x) - hull_at(curves[name], x)) > 1e-9]
    assert len(off) <= 1


def hull_at(curve: Curve, level: float) -> float:
    """The lowest of all straight lines between two points of the curve."""
    points = list(zip(curve.levels, curve.errors, strict=True))
    lines = [y0 + (y1 - y0) * (level - x0) / (x1 - x0) for x0, y0 in points for x1, y1 in points if x0 <= level < x1]
    return min([*lines, *(y for x, y in points if x == level)])


def test_a_hump_is_passed_as_a_whole() -> None:
    """Half of `step` costs 1, all of it no more: rather all."""
    levels = [0.0, 0.5, 1.0]
    step, smooth = Curve(10, levels, [0.0, 1.0, 1.0]), Curve(10, levels, [0.0, 0.6, 1.3])
    assert by_error({"step": step, "smooth": smooth}, 0.5) == {"step": 1.0, "smooth": 0.0}


def test_what_costs_less_gives_more() -> None:
    levels = levels_around(0.5)
    cheap = Curve(100, levels, [0.1 * x**2 for x in levels])
    dear = Curve(100, levels, [x**2 for x in levels])
    assert by_error({"dear": dear, "cheap": cheap}, 0.5) == pytest.approx({"dear": levels[0], "cheap": levels[-1]})
    rather = Curve(100, levels, [0.8 * x**2 for x in levels])  # 2·0.8·x = 2·(1 − x) at 0.556
    found = by_error({"dear": dear, "rather": rather}, 0.5)
    assert found == pytest.approx({"dear": 0.444, "rather": 0.556}, abs=0.026)


@given(sparsity=sparsities, count=st.integers(1, 6), data=st.data())
@example(sparsity=0.05, count=3, data=None)
@example(sparsity=0.7, count=3, data=None)
@settings(deadline=None)
def test_equal_curves_mean_exactly_uniform(sparsity: float, count: int, data: st.DataObject | None) -> None:
    levels = levels_around(sparsity)
    errors = [x**1.7 for x in levels]
    if data is not None:
        errors = data.draw(st.lists(st.floats(0, 1), min_size=STEPS, max_size=STEPS).map(sorted))
    curves = {str(i): Curve(4096, levels, errors) for i in range(count)}
    assert by_error(curves, sparsity) == dict.fromkeys(curves, sparsity)


@given(sparsity=sparsities, weights=st.lists(sizes, min_size=1, max_size=9), error=st.sampled_from([0.0, 0.25]))
@settings(deadline=None)
def test_where_nothing_costs_anything_all_give_the_same(sparsity: float, weights: list[int], error: float) -> None:
    """Also of different sizes: errors that are 0 everywhere, or never change."""
    levels = levels_around(sparsity)
    curves = {str(i): Curve(size, levels, [error] * STEPS) for i, size in enumerate(weights)}
    assert by_error(curves, sparsity) == dict.fromkeys(curves, sparsity)


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 1 / 3, 0.7, 0.98, 0.99])
def test_a_single_linear_gets_what_was_asked(sparsity: float) -> None:
    levels = levels_around(sparsity)
    assert by_error({"only": Curve(77, levels, [x * x for x in levels])}, sparsity) == {"only": sparsity}
    assert owl([0.3], [77], sparsity) == [sparsity]


@pytest.mark.parametrize("sparsity", [0.0, 0.99])
def test_at_the_ends_there_is_no_choice(sparsity: float) -> None:
    levels = levels_around(sparsity)
    curves = {name: convex(np.random.default_rng(i), 10 + i, levels) for i, name in enumerate("abcd")}
    assert by_error(curves, sparsity) == dict.fromkeys(curves, sparsity)
    assert owl([0.1, 0.9, 0.4], [5, 6, 7], sparsity) == [sparsity] * 3


def test_the_names_do_not_matter() -> None:
    levels = levels_around(0.6)
    given_ = [convex(np.random.default_rng(i), 10 + i, levels) for i in range(5)]
    found = by_error(dict(zip("abcde", given_, strict=True)), 0.6)
    renamed = by_error(dict(zip("edcba", given_, strict=True)), 0.6)
    assert [*found.values()] == pytest.approx([*renamed.values()], abs=1e-12)


@pytest.mark.parametrize("sparsity", [0.1, 0.9])
def test_levels_that_do_not_reach_the_asked_sparsity_are_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match="do not reach"):
        by_error({"a": Curve(5, [0.2, 0.5], [0.0, 1.0]), "b": Curve(5, [0.3, 0.6], [0.0, 1.0])}, sparsity)
    with pytest.raises(ValueError):
        by_error({"a": Curve(5, [0.2, 0.5], [0.0])}, 0.3)


def test_no_linears_share_nothing_out() -> None:
    assert by_error({}, 0.5) == {}
