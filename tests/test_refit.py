"""Refits by conjugate gradients: float64 solutions, monotony, invariances, schedules, and how a damping is chosen."""

from __future__ import annotations

import errno
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refit_references as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sparsegpt import correlated, normal

from streamprune.disk import scratch
from streamprune.disk.scratch import ScratchMatrix
from streamprune.errors import ResourceError
from streamprune.methods import conjugate as refit
from streamprune.methods import gram as gram_module
from streamprune.methods.conjugate import Metric, descend, gradually
from streamprune.methods.gram import Gram, Mapped
from streamprune.methods.inverse import Damping
from streamprune.methods.refits import METHODS, Choice, Method, Prepared, RefitRequest, Sample, choose
from streamprune.methods.selection import Amount, Pattern, prune_count, select
from streamprune.process.memory import resident_bytes
from streamprune.process.ranks import ALONE

RELATIVE, ABSOLUTE = Damping(0.05), Damping(0.05, relative=False)
PATTERNS = [Pattern(1, 2), Pattern(2, 4), Pattern(4, 8), Pattern(3, 5)]

pytestmark = pytest.mark.usefixtures("one_thread")


def gram_of(matrix: torch.Tensor, held: torch.Tensor | None = None, tokens: int = 100) -> Gram:
    return Gram(matrix, torch.empty(0, len(matrix)) if held is None else held, tokens)


def half(rows: int, width: int, seed: int = 5) -> torch.Tensor:
    """A support: about half of each row."""
    return normal(rows, width, seed=seed) > 0


def solution(weight: torch.Tensor, keep: torch.Tensor, a: Any) -> torch.Tensor:
    """A_SS ŵ_S = A_S: w on the support S of every row, float64."""
    found = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(keep.numpy()):
        w = weight[row].double().numpy()
        found[row, keep[row]] = torch.from_numpy(np.linalg.solve(a[np.ix_(kept, kept)], a[kept] @ w))
    return found


def damped(matrix: torch.Tensor, damping: Damping) -> Any:
    return reference.damped(matrix.double().numpy(), *damping)


def errors(weight: torch.Tensor, fitted: torch.Tensor, a: Any) -> Any:
    """(w − ŵ)ᵀ A (w − ŵ) of each row, float64."""
    change = (weight.double() - fitted.double()).numpy()
    return np.einsum("ri,ij,rj->r", change, a, change)


# ---- conjugate gradients


@pytest.mark.parametrize("damping", [RELATIVE, ABSOLUTE, Damping(1.0), Damping(1e-3)], ids=str)
@pytest.mark.parametrize("begin", ["mask", "zero", "elsewhere"])
def test_descend_arrives_at_the_dense_solution(damping: Damping, begin: str) -> None:
    weight, matrix, keep = normal(9, 48), correlated(48), half(9, 48)
    keep[0], keep[1] = True, False  # a row with nothing to do, and one with nothing to do it with
    start = {"mask": weight * keep, "zero": torch.zeros(9, 48), "elsewhere": 3 * normal(9, 48, seed=8) * keep}[begin]
    seen = [t.clone() for t in (weight, matrix, keep, start)]
    fitted = descend(weight, start, keep, Metric.of(gram_of(matrix), damping), 150)
    assert all(torch.equal(t, s) for t, s in zip((weight, matrix, keep, start), seen, strict=True))
    assert fitted.dtype == torch.float32 and (fitted[~keep] == 0).all()
    wanted = solution(weight, keep, damped(matrix, damping))
    scale = matrix.diagonal().sqrt()
    torch.testing.assert_close(fitted * scale, (wanted * scale).float(), rtol=0, atol=2e-3)
    torch.testing.assert_close(fitted[0], weight[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("damping", [RELATIVE, ABSOLUTE, Damping(1e-6)], ids=str)
@pytest.mark.parametrize("tokens", [400, 12])
@pytest.mark.parametrize("seed", range(3))
def test_the_damped_error_never_rises(damping: Damping, tokens: int, seed: int) -> None:
    """Of no row, from one iteration to the next; and the first iterations do take it down."""
    weight, matrix, keep = normal(12, 64, seed=seed), correlated(64, tokens, seed=seed), half(12, 64, seed=seed + 40)
    a, metric = damped(matrix, damping), Metric.of(gram_of(matrix), damping)
    for start in (weight * keep, normal(12, 64, seed=9) * keep):
        history = [errors(weight, start, a)]
        history += [errors(weight, descend(weight, start, keep, metric, n), a) for n in range(1, 16)]
        slack = 1e-5 * history[0]
        assert all((after <= before * (1 + 1e-4) + slack).all() for before, after in itertools.pairwise(history))
        assert (history[2] < 0.9 * history[0]).all()


def test_rows_are_independent() -> None:
    weight, matrix, keep = normal(50, 96), correlated(96), half(50, 96)
    metric = Metric.of(gram_of(matrix), RELATIVE)
    whole = descend(weight, weight * keep, keep, metric, 10)
    for step in (1, 7, 49):
        parts = [
            descend(weight[i : i + step], (weight * keep)[i : i + step], keep[i : i + step], metric, 10)
            for i in range(0, 50, step)
        ]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damping", [RELATIVE, ABSOLUTE], ids=str)
def test_uncorrelated_features_leave_kept_weights_as_they_are(damping: Damping) -> None:
    """Nothing can make up for what is gone; bit by bit."""
    weight, keep = normal(9, 40), half(9, 40)
    for matrix in (3.0 * torch.eye(40), torch.exp(normal(40)).diag()):
        fitted = descend(weight, weight * keep, keep, Metric.of(gram_of(matrix), damping), 10)
        assert torch.equal(fitted, weight * keep)


@pytest.mark.parametrize("damping", [RELATIVE, ABSOLUTE], ids=str)
@pytest.mark.parametrize("power", [0.0, 1e-42])
def test_dead_features(damping: Damping, power: float) -> None:
    """What was never seen, or as good as never, stays as it is and harms nobody."""
    weight, matrix, keep = normal(8, 40), correlated(40), half(8, 40)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[0, 7, 8, 39]] = True
    matrix[dead] = 0
    matrix[:, dead] = 0
    matrix[dead, dead] = power
    fitted = descend(weight, weight * keep, keep, Metric.of(gram_of(matrix), damping), 100)
    assert torch.isfinite(fitted).all()
    torch.testing.assert_close(fitted[:, dead], (weight * keep)[:, dead])
    without = descend(
        weight[:, ~dead], (weight * keep)[:, ~dead], keep[:, ~dead],
        Metric.of(gram_of(matrix[~dead][:, ~dead]), damping._replace(value=0.05 if damping.relative else 0.045)), 100,
    )  # fmt: skip
    torch.testing.assert_close(fitted[:, ~dead], without, rtol=0, atol=5e-3)


def test_where_all_is_dead_nothing_happens() -> None:
    weight, keep = normal(5, 30), half(5, 30)
    for damping in (RELATIVE, ABSOLUTE):
        metric = Metric.of(gram_of(torch.zeros(30, 30)), damping)
        assert torch.equal(descend(weight, weight * keep, keep, metric, 5), weight * keep)


@pytest.mark.parametrize("value", [0.05, 1e-6])
def test_fewer_tokens_than_features(value: float) -> None:
    weight, matrix, keep = normal(8, 120), correlated(120, tokens=20), half(8, 120)
    fitted = descend(weight, weight * keep, keep, Metric.of(gram_of(matrix), Damping(value)), 100)
    assert torch.isfinite(fitted).all() and float(fitted.abs().max()) < 100
    plain = matrix.double().numpy()
    assert (errors(weight, fitted, plain) < 0.2 * errors(weight, weight * keep, plain)).all()


def test_scales_of_features_matter_to_absolute_damping_only() -> None:
    weight, matrix, keep = normal(8, 96), correlated(96), half(8, 96)
    c = torch.exp2(torch.randint(-6, 7, (96,), generator=torch.Generator().manual_seed(3)).float())

    def both(damping: Damping) -> tuple[torch.Tensor, torch.Tensor]:
        plain = descend(weight, weight * keep, keep, Metric.of(gram_of(matrix), damping), 10)
        scaled = Metric.of(gram_of(matrix * c * c[:, None]), damping)
        return plain, descend(weight / c, weight / c * keep, keep, scaled, 10) * c

    assert torch.equal(*both(RELATIVE))
    plain, scaled = both(ABSOLUTE)
    assert float((plain - scaled).abs().max()) > 0.01


# ---- pruning in steps


def chooser(feature: torch.Tensor, amount: Amount, selector: str = "exact") -> Callable[..., torch.Tensor]:
    def keep(weight: torch.Tensor, share: float) -> torch.Tensor:
        found = select(weight, feature, 2, selector=selector, want_keep=True, **amount.at(share)._asdict()).keep
        assert found is not None
        return found

    return keep


AMOUNTS = [Amount(0.5), Amount(0.7), Amount(0.01), *(Amount(pattern=p) for p in PATTERNS)]


@pytest.mark.parametrize("selector", ["exact", "ewma"])
@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_gradual_pruning(amount: Amount, selector: str) -> None:
    """Counts are exact, what is gone stays gone, and the error is less than with the mask, and with a refit of it."""
    width = 120
    weight, matrix = normal(16, width), correlated(width)
    before = weight.clone()
    choose_by_score, metric = chooser(matrix.diagonal(), amount, selector), Metric.of(gram_of(matrix), RELATIVE)
    shares: list[float] = []
    kept: list[torch.Tensor] = []

    def watched(rows: torch.Tensor, share: float) -> torch.Tensor:
        shares.append(share)
        kept.append(choose_by_score(rows, share))
        return kept[-1]

    fitted = gradually(weight, watched, metric, steps=16, iterations=5, last=10)
    assert torch.equal(weight, before)
    assert len(shares) == 16 and shares[-1] == 1.0
    assert shares == sorted(shares) and shares == pytest.approx([1 - (1 - t / 16) ** 3 for t in range(1, 17)])
    assert torch.equal(fitted != 0, kept[-1])
    if amount.pattern:
        assert (kept[-1].view(16, -1, amount.pattern.m).sum(-1) == amount.pattern.n).all()
    else:
        assert ((~kept[-1]).sum(1) == prune_count(amount.sparsity or 0.0, width)).all()
    if selector == "exact":
        assert not any(bool((after & ~earlier).any()) for earlier, after in itertools.pairwise(kept))
    mask = choose_by_score(weight, 1.0)
    at_once = descend(weight, weight * mask, mask, metric, 60)
    masked, refitted, gradual = (
        errors(weight, result, matrix.double().numpy()).sum() for result in (weight * mask, at_once, fitted)
    )
    assert gradual < masked
    if (amount.sparsity or 0.5) >= 0.5 and selector == "exact":
        assert refitted < 0.7 * masked
        if amount.pattern == Pattern(1, 2):  # which has no steps in between: both end in the same place
            assert gradual == pytest.approx(refitted, rel=1e-5)
        else:
            assert gradual < 0.999 * refitted


def test_iterations_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counting(weight: Any, start: Any, keep: Any, metric: Any, iterations: int) -> torch.Tensor:
        seen.append(iterations)
        return descend(weight, start, keep, metric, iterations)

    monkeypatch.setattr(refit, "descend", counting)
    matrix = correlated(20)
    select_rows = chooser(matrix.diagonal(), Amount(0.5))
    metric = Metric.of(gram_of(matrix), RELATIVE)
    gradually(normal(2, 20), select_rows, metric, steps=4, iterations=3, last=7)
    gradually(normal(2, 20), select_rows, metric, steps=1, iterations=3, last=7)
    assert seen == [3, 3, 3, 7, 7]


@given(m=st.integers(2, 32), part=st.integers(1, 31), shares=st.lists(st.floats(0, 1), min_size=2, max_size=6))
@settings(max_examples=80, deadline=None)
def test_amounts_on_the_way(m: int, part: int, shares: list[float]) -> None:
    n = 1 + part % (m - 1)
    pattern = Pattern(n, m)
    assert Amount(pattern=pattern).at(1.0) == Amount(pattern=pattern)
    assert Amount(pattern=pattern).at(0.0) == Amount(0.0)
    assert Amount(n / m).at(1.0) == Amount(n / m) and Amount(n / m).at(0.0).sparsity == 0
    reached = []
    for share in sorted(shares):
        here = Amount(pattern=pattern).at(share)
        assert (here.sparsity is None) != (here.pattern is None) and here.sparsity in (None, 0.0)
        reached.append(here.pattern.n if here.pattern else m)
        assert n <= reached[-1] <= m and abs(reached[-1] - (m - share * (m - n))) <= 0.5 + 1e-9
        assert here.pattern is None or (here.pattern.m == m and here.pattern.n < m)
    assert reached == sorted(reached, reverse=True)


# ---- which damping


def mixed(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Inputs whose features are mixed in a way that the seed decides."""
    mixing = torch.eye(width) + 2 * normal(width, width, seed=seed + 1) / width**0.5
    return normal(tokens, width, seed=seed + 100) @ mixing


def case(tokens: int, held: torch.Tensor, width: int = 48) -> tuple[dict[str, Sample], Gram, dict[str, RefitRequest]]:
    """Two linears that share an input and prune different parts."""
    x = mixed(tokens, width, 1)
    gram = Gram(x.T @ x, held, tokens)
    samples, asks = {}, {}
    for name, seed, sparsity in (("k", 11, 0.5), ("q", 12, 0.25)):
        weight = normal(20, width, seed=seed)
        asks[name] = RefitRequest(sparsity, None, chooser(gram.diagonal, Amount(sparsity)))
        samples[name] = Sample(weight, weight * asks[name].select(weight, 1.0))
    return samples, gram, asks


def same_distribution(tokens: int, width: int = 48) -> torch.Tensor:
    return mixed(tokens + 3000, width, 1)[3000:]


def judged(weight: torch.Tensor, fitted: torch.Tensor, held: torch.Tensor) -> float:
    x, change = held.double(), weight.double() - fitted.double()
    return float((x @ change.T).square().sum() / (x @ weight.double().T).square().sum())


def by_stretch(weight: torch.Tensor, fitted: torch.Tensor, held: torch.Tensor) -> np.ndarray:
    """Relative errors on eight stretches of the held inputs; their sum is `judged`."""
    x = held.double()
    by_token = (x @ (weight.double() - fitted.double()).T).square().sum(1)
    parts = [float(part.sum()) for part in by_token.chunk(8)]
    return np.array(parts) / float((x @ weight.double().T).square().sum())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tokens", [12, 40, 2000])
@pytest.mark.parametrize("other", [False, True], ids=["same text", "other text"])
def test_the_best_on_held_out_inputs_is_chosen(name: str, tokens: int, other: bool) -> None:
    """Compared with judging every candidate in float64, by the rule of one standard error."""
    method, held = METHODS[name], mixed(300, 48, 77) if other else same_distribution(300)
    samples, gram, asks = case(tokens, held)
    matrix = gram.matrix.clone()
    dampings = [Damping(v) for v in (method.damping, *method.others)]
    found = choose(method, samples, gram, asks, dampings)
    assert found.keys() == samples.keys() and torch.equal(gram.matrix, matrix) and len(gram.held) == 300
    climbed: list[Damping] = []
    before = dict.fromkeys(samples, math.inf)
    for damping in sorted(dampings, key=lambda d: d.value):
        state = method.prepare(gram, damping, ALONE).state
        now = {n: judged(s.weight, method.solve(*s[:2], gram, state, asks[n]), held) for n, s in samples.items()}
        climbed.append(damping)
        if all(now[n] >= before[n] for n in samples):
            break
        before = now
    for linear, sample in samples.items():
        strongest_first = sorted(climbed, key=lambda d: -d.value)
        fits = [
            method.solve(*sample[:2], gram, method.prepare(gram, d, ALONE).state, asks[linear]) for d in strongest_first
        ]
        tried = [by_stretch(sample.weight, fitted, held) for fitted in (sample.masked, *fits)]
        best = min(tried, key=np.sum)
        more = [errors - best for errors in tried]
        taken = next(i for i, m in enumerate(more) if m.sum() <= m.std(ddof=1) * 8**0.5)
        choice = found[linear]
        assert choice.mask == pytest.approx(judged(sample.weight, sample.masked, held), rel=1e-4)
        assert choice.damping == (strongest_first[taken - 1] if taken else None)
        assert choice.refit == pytest.approx(tried[taken].sum() if taken else min(e.sum() for e in tried[1:]), rel=1e-3)


def test_every_outcome_does_occur() -> None:
    """The test above would not notice a choice that never changes."""
    method = METHODS["cg"]
    dampings = [Damping(v) for v in (0.05, 1.0, 10.0)]

    def chosen(tokens: int, held: torch.Tensor) -> set[Damping | None]:
        return {c.damping for c in choose(method, *case(tokens, held), dampings).values()}

    assert chosen(2000, same_distribution(300)) == {Damping(0.05)}
    assert chosen(24, same_distribution(300)) <= {Damping(1.0), Damping(10.0)}
    assert chosen(12, mixed(300, 48, 77)) == {None}


def test_a_worse_refit_than_none_is_reported() -> None:
    for choice in choose(METHODS["cg"], *case(12, mixed(300, 48, 77)), [Damping(1e-4)]).values():
        assert choice.damping is None and choice.mask is not None and choice.refit is not None
        assert choice.refit > choice.mask


@pytest.mark.parametrize("name", METHODS)
def test_without_judges_the_first_is_taken(name: str) -> None:
    for dampings in ([RELATIVE, Damping(0.2)], [ABSOLUTE]):
        found = choose(METHODS[name], *case(40, torch.empty(0, 48)), dampings)
        assert found == dict.fromkeys(("k", "q"), Choice(dampings[0], None, None))


def test_judges_that_are_all_zero() -> None:
    for choice in choose(METHODS["cg"], *case(40, torch.zeros(10, 48)), [RELATIVE]).values():
        assert choice == Choice(None, 0.0, 0.0)


@pytest.mark.parametrize("order", [(math.nan, 0.0), (0.0, math.nan), (math.inf, 0.0)], ids=str)
def test_a_refit_that_fails_does_not_hide_a_good_one(order: tuple[float, float]) -> None:
    """A damping with which weights are not finite is no candidate; the other one is perfect."""

    def solve(weight: torch.Tensor, masked: torch.Tensor, gram: Gram, state: float, ask: RefitRequest) -> torch.Tensor:
        return weight + state

    method = Method(1.0, (), lambda gram, damping, ranks: Prepared(order[int(damping.value)], damping), solve, 0, False)
    for choice in choose(method, *case(40, same_distribution(100)), [Damping(0.0), Damping(1.0)]).values():
        assert choice.damping == Damping(float(order.index(0.0))) and choice.refit == 0.0


# ---- Grams, in memory and in a file


def filed(folder: Path, matrix: torch.Tensor, held: torch.Tensor, tokens: int) -> Gram:
    there = ScratchMatrix(folder, *matrix.shape)
    there.tensor.copy_(matrix)
    return Gram(there.tensor, held, tokens, Mapped(there.forget))


@pytest.fixture(params=["memory", "file", "file in panels"])
def make_gram(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Gram]:
    if request.param == "memory":
        return Gram
    if request.param == "file in panels":
        monkeypatch.setattr(gram_module, "_PANEL", 9 * 1100 * 4 + 3)
    return lambda matrix, held, tokens: filed(tmp_path, matrix, held, tokens)


@pytest.mark.parametrize("width", [1, 37, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_and_energies(make_gram: Callable[..., Gram], width: int, dtype: torch.dtype) -> None:
    """Against float64; a width of 1100 is several panels of nine rows and half a page."""
    x, held = normal(60, width), normal(11, width, seed=3).to(dtype)
    exact = x.double().T @ x.double()
    gram, rows = make_gram(exact.float(), held, 60), normal(5, width, seed=4)

    def check(wanted: torch.Tensor) -> None:
        scale = float(wanted.abs().max()) * width**0.5
        assert float((gram.times(rows) - rows.double() @ wanted).abs().max()) < 1e-5 * scale
        energy = torch.einsum("ri,ij,rj->r", rows.double(), wanted, rows.double())
        torch.testing.assert_close(gram.energy(rows), energy, rtol=1e-4, atol=1e-5 * scale)
        assert gram.energy(rows).dtype == torch.float64 and gram.diagonal.dtype == torch.float32
        torch.testing.assert_close(gram.diagonal, wanted.diagonal().float())
        torch.testing.assert_close(gram.matrix, wanted.float(), rtol=1e-5, atol=1e-5)

    check(exact)
    seen = (rows.double() @ held.double().T).square().sum(0)
    torch.testing.assert_close(gram.held_by_token(rows), seen, rtol=1e-4, atol=1e-4)
    gram.absorb_held_()
    check(exact + held.double().T @ held.double())
    assert gram.tokens == 71 and gram.held.shape == (0, width) and gram.held_by_token(rows).shape == (0,)
    before = gram.matrix.clone()
    gram.absorb_held_()
    assert gram.tokens == 71 and torch.equal(gram.matrix, before)


def test_energies_are_never_negative() -> None:
    """Rounding may make a product so; the change is in a direction that no token has."""
    x = torch.ones(4, 64) * 1e3
    gram = gram_of(x.T @ x)
    rows = normal(200, 64)
    rows -= rows.mean(1, keepdim=True)
    assert (gram.energy(rows) >= 0).all()


def test_the_same_refit_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "_PANEL", 5 * 64 * 4)
    weight, matrix, keep = normal(10, 64), correlated(64), half(10, 64)
    forgotten: list[tuple[int, int]] = []
    there = ScratchMatrix(tmp_path, 64, 64)
    there.tensor.copy_(matrix)
    mapped = Gram(there.tensor, torch.empty(0, 64), 9, Mapped(lambda b, e: forgotten.append((b, e))))
    for damping in (RELATIVE, ABSOLUTE):
        found = descend(weight, weight * keep, keep, Metric.of(mapped, damping), 10)
        wanted = descend(weight, weight * keep, keep, Metric.of(gram_of(matrix), damping), 10)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert max(e - b for b, e in forgotten) <= 5 and {b for b, _ in forgotten} == set(range(0, 64, 5))


def test_a_scratch_matrix_keeps_what_it_forgets_and_shows_nothing(tmp_path: Path) -> None:
    there = ScratchMatrix(tmp_path, 300, 117)
    assert there.tensor.shape == (300, 117) and there.tensor.dtype == torch.float32 and not there.tensor.any()
    assert not list(tmp_path.iterdir())
    wanted = normal(300, 117)
    for begin in range(0, 300, 13):
        there.tensor[begin : begin + 13] = wanted[begin : begin + 13]
        there.forget(begin, min(begin + 13, 300))
    assert torch.equal(there.tensor, wanted)
    there.forget(0, 300)
    there.forget(5, 5)
    assert torch.equal(there.tensor, wanted)
    tensor = there.tensor
    del there
    assert torch.equal(tensor, wanted), "a view keeps the file"


def test_what_is_forgotten_takes_no_memory(tmp_path: Path) -> None:
    there = ScratchMatrix(tmp_path, 4096, 1023)
    before = resident_bytes()
    there.tensor.fill_(1.0)
    touched = resident_bytes() - before
    for begin in range(0, 4096, 64):
        there.forget(begin, begin + 64)
    left = resident_bytes() - before
    assert touched > 15 << 20 and left < 1 << 20
    assert float(there.tensor[4095, 1022]) == 1.0
    there.forget(4095, 4096)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scratch.os, "posix_fallocate", full)
    with pytest.raises(ResourceError):
        ScratchMatrix(tmp_path, 10, 10)
    assert not list(tmp_path.iterdir())
