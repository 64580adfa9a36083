"""FP8 rounding that is part of the refit: against a slow float64 version, and what must hold whatever the inputs."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamprune.kernels import cpu_arrays
from streamprune.methods.conjugate import Metric, descend
from streamprune.methods.fp8 import compensate, quantise
from streamprune.methods.gram import Gram, Mapped
from streamprune.methods.inverse import Damping

BACKENDS = ("numba", "torch")
TOKENS = 400


class Case(NamedTuple):
    """One linear, pruned 2:4 and refitted for correlated inputs."""

    exact: Tensor
    fitted: Tensor
    keep: Tensor
    gram: Gram
    scale: Tensor

    def codes(self, sweeps: int = 2, backend: str = "numba", damping: Damping | None = None) -> Tensor:
        return compensate(*self, sweeps, backend, damping)

    def plain(self) -> Tensor:
        return rounded(self.fitted, self.scale)

    def error(self, codes: Tensor, extra: Tensor | float = 0.0) -> Tensor:
        """(n,) float64: of each row, (w - s q) (G + extra) (w - s q)."""
        rest = self.exact.double() - codes.double() * self.scale.double()
        return ((rest @ self.gram.matrix.double() + rest * extra) * rest).sum(1)


def rounded(values: Tensor, scale: Tensor) -> Tensor:
    codes = (values / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(codes == 0x80, 0, codes).view(torch.float8_e4m3fn)


def same(a: Tensor, b: Tensor) -> Tensor:
    return a.view(torch.uint8) == b.view(torch.uint8)


def inputs(width: int, made: torch.Generator, tokens: int = TOKENS) -> Tensor:
    """Neighbours correlated by 0.9, features of uneven size."""
    noise = torch.randn(tokens, width, generator=made)
    x = noise.clone()
    for j in range(1, width):
        x[:, j] = 0.9 * x[:, j - 1] + 0.19**0.5 * noise[:, j]
    return x * torch.randn(width, generator=made).exp()


def case(n: int = 37, width: int = 200, seed: int = 0, refit: bool = True) -> Case:
    made = torch.Generator().manual_seed(seed)
    x = inputs(width, made)
    gram = Gram(x.T @ x, x[:0], len(x))
    exact = torch.randn(n, width, generator=made) * 0.02
    score = (exact * gram.diagonal.sqrt()).abs().view(n, -1, 4)
    keep = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(2, -1).indices, True).view(n, width)
    fitted = torch.where(keep, exact, 0.0)
    if refit:
        fitted = descend(exact, fitted, keep, Metric.of(gram, Damping(0.0)), 10)
    return Case(exact, fitted, keep, gram, quantise(fitted, torch.bfloat16).scale)


def reference(found: Case, sweeps: int, damping: float) -> Tensor:
    """Coordinate descent from its definition, float64, a column and its whole gradient at a time; damping relative."""
    exact, scale = found.exact.double().numpy(), found.scale.double().numpy()
    gram = found.gram.matrix.double().numpy()
    gram = gram + damping * np.diag(np.diag(gram))
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    numbers = np.concatenate((-numbers[::-1], numbers))
    value = found.fitted.double().numpy().copy()
    for _ in range(sweeps):
        for j in range(value.shape[1]):
            slope = (exact - value) @ gram[:, j]
            wanted = (value[:, j] + slope / gram[j, j])[:, None]
            best = np.abs(wanted / scale - numbers[None]).argmin(1)
            value[:, j] = np.where(found.keep[:, j].numpy(), scale[:, 0] * numbers[best], 0.0)
    codes, plain = rounded(torch.from_numpy(value).float(), found.scale), found.plain()
    extra = damping * found.gram.diagonal
    better = found.error(codes, extra) < found.error(plain, extra)
    return torch.where(better[:, None], codes.float(), plain.float()).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("damping", (0.0, 0.1))
@pytest.mark.parametrize("backend", BACKENDS)
def test_reference(backend: str, damping: float) -> None:
    for seed in range(3):  # with a row that does not get better than rounded
        found = case(n=12, width=36, seed=seed)
        for sweeps in (1, 3):
            codes = found.codes(sweeps, backend, Damping(damping))
            assert torch.equal(codes.float(), reference(found, sweeps, damping).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_most_of_the_loss_by_rounding_is_made_up_for(backend: str) -> None:
    found = case()
    fitted = ((found.exact - found.fitted).double() @ found.gram.matrix.double() * (found.exact - found.fitted)).sum()
    plain, one, two, five = (
        found.error(codes).sum() - fitted
        for codes in (found.plain(), *(found.codes(sweeps, backend) for sweeps in (1, 2, 5)))
    )
    assert plain > 0 and one < 0.5 * plain and two < 0.3 * plain and five <= two


@pytest.mark.parametrize("width", (4, 128, 132, 300))
def test_backends_agree(width: int) -> None:
    """Blocks of 128 columns and vectors of 16 rows, whole and not. Rounding differs, and with it a few codes."""
    for n in (1, 16, 45):
        found = case(n, width, seed=width)
        one, other = (found.codes(backend=backend) for backend in BACKENDS)
        assert same(one, other).float().mean() > 0.98
        assert float(found.error(one).sum()) == pytest.approx(float(found.error(other).sum()), rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(BACKENDS), st.integers(1, 3), st.booleans(), st.sampled_from((0.0, 0.05)))
def test_properties(seed: int, backend: str, sweeps: int, refit: bool, damping: float) -> None:
    """No row is worse than rounded, what is pruned stays so, and the caller's arrays stay as they are."""
    found = case(9, 40, seed, refit)
    before = [found.exact.clone(), found.fitted.clone(), found.gram.matrix.clone()]
    codes = found.codes(sweeps, backend, Damping(damping))
    extra = damping * found.gram.diagonal
    plain = found.error(found.plain(), extra)
    assert (found.error(codes, extra) <= plain * (1 + 1e-9)).all()
    assert (codes.view(torch.uint8)[~found.keep] == 0).all()
    assert codes.is_contiguous() and codes.dtype == torch.float8_e4m3fn
    assert not (codes.view(torch.uint8) == 0x80).any() and codes.float().isfinite().all()
    for old, new in zip(before, (found.exact, found.fitted, found.gram.matrix), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_sweeps_never_hurt(backend: str) -> None:
    """After the first, which rounds, every step takes the error down."""
    found = case(seed=5)
    errors = [found.error(found.codes(sweeps, backend)) for sweeps in (1, 2, 3, 4)]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-6)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_uncorrelated_inputs_leave_plain_rounding(backend: str) -> None:
    found = case(refit=False)
    gram = Gram(torch.diag(found.gram.diagonal), torch.zeros(0, 200), TOKENS)
    codes = compensate(found.exact, found.fitted, found.keep, gram, found.scale, backend=backend)
    assert same(codes, found.plain()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_cannot_gain_stay_plain(backend: str) -> None:
    """Rows that E4M3 holds exactly, beside one that it does not."""
    found = case(refit=False)
    exact = found.plain().float() * found.scale.float()
    exact[3] = found.exact[3]
    codes = compensate(exact, exact, None, found.gram, found.scale, backend=backend)
    assert same(codes, rounded(exact, found.scale)).all(1).sum() == len(exact) - 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_features_are_just_rounded(backend: str) -> None:
    found = case()
    matrix = found.gram.matrix.clone()
    dead = torch.arange(0, 200, 7)
    matrix[dead], matrix[:, dead] = 0.0, 0.0
    gram = Gram(matrix, torch.zeros(0, 200), TOKENS)
    codes = compensate(found.exact, found.fitted, found.keep, gram, found.scale, backend=backend)
    assert same(codes, found.plain())[:, dead].all()
    assert not same(codes, found.plain()).all()
    nothing = Gram(torch.zeros_like(matrix), torch.zeros(0, 200), TOKENS)
    codes = compensate(found.exact, found.fitted, found.keep, nothing, found.scale, backend=backend)
    assert same(codes, found.plain()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_mask_means_that_all_may_change(backend: str) -> None:
    found = case()
    everything = torch.ones_like(found.keep)
    one, other = (
        compensate(found.exact, found.exact, keep, found.gram, found.scale, backend=backend)
        for keep in (None, everything)
    )
    assert same(one, other).all() and (one.float() != 0).float().mean() > 0.9


def test_targets_beyond_the_largest_code_are_clipped() -> None:
    """Two inputs that are nearly one: what the first one lacks, the second cannot hold."""
    matrix = torch.tensor([[1.0, 0.999], [0.999, 1.0]])
    exact, fitted, scale = torch.tensor([[900.0, 0.0]]), torch.tensor([[448.0, 440.0]]), torch.ones(1, 1)
    gram = Gram(matrix, torch.zeros(0, 2), 2)
    for backend in BACKENDS:
        assert compensate(exact, fitted, None, gram, scale, backend=backend).float().tolist() == [[448.0, 448.0]]


def test_a_gram_in_a_file() -> None:
    """Its rows are read a block at a time and given back, each as often as it is read."""
    found, given_back = case(), []
    mapped = Gram(found.gram.matrix, torch.zeros(0, 200), TOKENS, Mapped(lambda *rows: given_back.append(rows)))
    given_back.clear()
    codes = compensate(found.exact, found.fitted, found.keep, mapped, found.scale)
    assert given_back == [(0, 128), (128, 200)] * 2 + [(0, 200)]
    assert same(codes, found.codes()).all()


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_arrays, "PART", 5000)
    found, threads = case(n=300, width=140), torch.get_num_threads()
    one = found.codes()
    torch.set_num_threads(2)
    try:
        assert same(one, found.codes()).float().mean() > 0.98  # the products are shared out otherwise
    finally:
        torch.set_num_threads(threads)


def test_damping_helps_on_inputs_not_seen() -> None:
    """With fewer inputs than twice the features, the Gram's small directions are not to be trusted."""
    made = torch.Generator().manual_seed(1)
    x = inputs(200, made, 4 * TOKENS)
    seen, unseen = x[:260], x[260:]
    damping = Damping(0.05)
    gram = Gram(seen.T @ seen, seen[:0], len(seen))
    exact = torch.randn(64, 200, generator=made) * 0.02
    fitted = descend(exact, exact, torch.ones_like(exact, dtype=torch.bool), Metric.of(gram, damping), 1)
    scale = quantise(fitted, torch.bfloat16).scale

    def lost(codes: Tensor) -> float:
        return float(((exact - codes.float() * scale.float()) @ unseen.T).square().sum())

    with_it, without = (compensate(exact, fitted, None, gram, scale, damping=d) for d in (damping, None))
    assert lost(with_it) < lost(without)
    assert lost(with_it) < lost(rounded(fitted, scale))


def test_refusals() -> None:
    found = case(4, 8)
    with pytest.raises(ValueError, match="do not fit"):
        compensate(found.exact, found.fitted[:3], None, found.gram, found.scale)
    with pytest.raises(ValueError, match="do not fit"):
        compensate(found.exact, found.fitted, None, found.gram, found.scale[:, 0])
