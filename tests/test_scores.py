"""Scores and selection: formulas, degenerate statistics, invariances, and what users may write."""

from __future__ import annotations

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprune.errors import UnsupportedError, UsageError
from streamprune.methods.recipes import SELECTORS
from streamprune.methods.scores import SCORES, WITHOUT_STATISTICS
from streamprune.methods.selection import (
    Pattern,
    check_pattern,
    parse_pattern,
    parse_sparsity,
    prune_count,
    select,
)
from streamprune.methods.stats import InputStats


def statistics(a: torch.Tensor, tokens: int = 16) -> InputStats:
    return InputStats(tokens, np.zeros(len(a)), (a.double() * tokens).numpy())


def powers(width: int, seed: int = 0) -> torch.Tensor:
    return torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(seed))).double()


def assert_proportional(feature: np.ndarray, expected: np.ndarray) -> None:
    assert feature.dtype == np.float32 and feature.max() == 1
    np.testing.assert_allclose(feature, expected / expected.max(), rtol=1e-6)


def test_features_follow_the_formulas() -> None:
    a = powers(50)
    stats, values = statistics(a), a.numpy()
    feature, power = SCORES["lscore"](stats)
    assert power == 2
    assert_proportional(feature, references.lscore_feature(values))
    feature, power = SCORES["wanda"](stats)
    assert power == 1
    assert_proportional(feature, np.sqrt(values))
    feature, power = SCORES["lscore-isotropic"](stats)
    assert power == 2
    assert_proportional(feature, 1 / (1 - values / values.sum()))
    feature, power = SCORES["magnitude"](InputStats.zeros(50))
    assert power == 1 and (feature == np.ones(50)).all()


def test_isotropic_score_is_the_limit_of_the_inverse_hessian() -> None:
    a = powers(40)
    feature, _ = SCORES["lscore-isotropic"](statistics(a))
    by_inverse = references.lscore_by_inverse(a.numpy(), 1e-9)
    np.testing.assert_allclose(feature, by_inverse / by_inverse.max(), rtol=1e-5)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(
    "a",
    [
        [0.0, 0.0, 0.0],
        [0.0, 5.0, 0.0],
        [3.0],
        [0.0],
        [1e-300, 1e-299],
        [1e300, 1e300, 0.0],
        [1e-30, 1e30],
        [],
    ],
    ids=str,
)
def test_degenerate_statistics_give_usable_features(name: str, a: list[float]) -> None:
    """Nothing seen, one feature that carries everything (H is singular), extreme scales, one input."""
    feature, _ = SCORES[name](statistics(torch.tensor(a, dtype=torch.float64), tokens=1))
    assert feature.dtype == np.float32 and feature.shape == (len(a),)
    assert np.isfinite(feature).all() and (feature >= 0).all()
    assert len(a) == 0 or feature.max() == 1
    if a == [0.0, 5.0, 0.0]:
        assert feature.argmax() == 1 or name == "magnitude"


@pytest.mark.parametrize("name", sorted(set(SCORES) - WITHOUT_STATISTICS))
def test_activations_that_overflow_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="feature 1 "):
        SCORES[name](statistics(torch.tensor([1.0, float("inf"), 1.0])))


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(("name", "survives"), [("lscore", True), ("wanda", True), ("lscore-isotropic", False)])
def test_invariance_to_the_scale_of_features(name: str, survives: bool, selector: str) -> None:
    """Divide a norm's gain by s and multiply the next linear's columns by s: the network is the same."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 512, generator=generator)
    s = torch.exp2(4 * torch.rand(512, generator=generator) - 2)
    a = powers(512)
    masks = []
    for w, mean_square in ((weight, a), (weight * s, a / s.double() ** 2)):
        feature, power = SCORES[name](statistics(mean_square))
        masks.append(select(w, torch.from_numpy(feature), power, selector=selector, sparsity=0.5, want_keep=True).keep)
    different = (masks[0] != masks[1]).float().mean()
    assert (different < 0.01) if survives else (different > 0.1)


@pytest.mark.parametrize("selector", SELECTORS)
def test_select_agrees_between_backends_and_chunks(selector: str) -> None:
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    found, power = SCORES["lscore"](statistics(powers(256)))
    feature = torch.from_numpy(found)
    whole = select(weight, feature, power, selector=selector, sparsity=0.6)
    for backend in ("numba", "torch"):
        out = torch.empty_like(weight)
        for begin in range(0, 40, 7):
            rows = slice(begin, begin + 7)
            select(weight[rows], feature, power, selector=selector, sparsity=0.6, out=out[rows], backend=backend)
        assert torch.equal(out, whole.weight)
    assert ((whole.weight == 0).sum(1) == 153).all()
    pattern = select(weight, feature, power, pattern=Pattern(2, 4))
    assert ((pattern.weight.reshape(40, 64, 4) == 0).sum(2) == 2).all()
    assert torch.equal(select(weight, feature, power, pattern=Pattern(2, 4), backend="torch").weight, pattern.weight)


def test_select_refuses_what_cannot_be() -> None:
    weight, feature = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(UsageError, match="either"):
        select(weight, feature, 2)
    with pytest.raises(UsageError, match="either"):
        select(weight, feature, 2, sparsity=0.5, pattern=Pattern(2, 4))
    with pytest.raises(UsageError, match="ewma, exact"):
        select(weight, feature, 2, sparsity=0.5, selector="best")
    with pytest.raises(UsageError, match="backend"):
        select(weight, feature, 2, sparsity=0.5, backend="cuda")
    with pytest.raises(UsageError, match="multiple of 3 inputs, not 8"):
        select(weight, feature, 2, pattern=Pattern(2, 3))
    check_pattern(Pattern(2, 4), 8)


@given(numerator=st.integers(0, 999), in_features=st.integers(1, 100_000))
@settings(max_examples=200, deadline=None)
def test_prune_count_is_exact_for_decimals(numerator: int, in_features: int) -> None:
    assert prune_count(numerator / 1000, in_features) == numerator * in_features // 1000


def test_prune_count_examples() -> None:
    assert prune_count(0.7, 10) == 7  # 0.7 * 10 is 7.000000000000001 or 6.999999999999999, as it happens
    assert prune_count(0.29, 100) == 29  # 0.29 * 100 == 28.999999999999996
    assert prune_count(0.5, 33) == 16
    assert prune_count(0.0, 33) == 0
    assert prune_count(0.999999, 1000) == 999
    assert prune_count(1e-9, 4096) == 0


@pytest.mark.parametrize(("text", "pattern"), [("2:4", (2, 4)), (" 1:2 ", (1, 2)), ("31:32", (31, 32))])
def test_patterns_are_parsed(text: str, pattern: tuple[int, int]) -> None:
    assert parse_pattern(text) == pattern
    assert str(parse_pattern(text)) == text.strip()
    assert parse_pattern(text).sparsity == 1 - pattern[0] / pattern[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:2", "did you mean 2:4"),
        ("4:4", "N < M"),
        ("0:4", "at least 1"),
        ("2:64", "at most 32"),
        ("a:b", "for example --pattern 2:4"),
        ("2", "for example"),
        ("", "for example"),
        ("2:4:8", "for example"),
        ("-2:4", "for example"),
        ("²:4", "for example"),
    ],
)
def test_wrong_patterns_get_one_helpful_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse_pattern(text)
    assert "\n" not in str(error.value) and repr(text) in str(error.value)


@pytest.mark.parametrize(("text", "sparsity"), [("0.5", 0.5), ("0", 0.0), (0.25, 0.25), ("1e-3", 0.001)])
def test_sparsities_are_parsed(text: str | float, sparsity: float) -> None:
    assert parse_sparsity(text) == sparsity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1", "0 <= S < 1"),
        ("50", "did you mean 0.5"),
        ("-0.1", "0 <= S"),
        ("nan", "not a number"),
        ("x", "number"),
    ],
)
def test_wrong_sparsities_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_sparsity(text)
