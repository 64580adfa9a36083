"""Both kernels against float64 references, and the properties that hold for every input."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest
import references
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamprune.kernels import Selection, cpu, cpu_arrays, cpu_select, cpu_tiles, lanes, torch_ops

BACKENDS = [pytest.param(cpu, id="numba"), pytest.param(torch_ops, id="torch")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
few = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads, and cut work into small parts so that small tensors use all of them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def linear(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def features(width: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(seed)) + 0.01


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def check(selection: Selection, weight: torch.Tensor, feature: torch.Tensor, power: int) -> torch.Tensor:
    """What every selection promises; returns the keep mask."""
    keep = selection.keep
    assert keep is not None and keep.dtype == torch.bool and keep.shape == weight.shape
    assert selection.weight.dtype == weight.dtype
    stays = keep & (weight != 0)
    assert torch.equal(bits(selection.weight)[stays], bits(weight)[stays]), "kept weights change no bit"
    assert not bits(selection.weight)[~stays].any(), "every zero is +0.0"
    assert selection.finite
    score = references.scores(weight, feature, power)
    assert selection.total == pytest.approx(score.sum(), rel=1e-5, abs=1e-30)
    assert selection.removed == pytest.approx(score[~keep.numpy()].sum(), rel=1e-5, abs=1e-30)
    return keep


def select(kernels: ModuleType, name: str, weight: torch.Tensor, count: int, power: int = 2) -> torch.Tensor:
    feature = features(weight.shape[1])
    before = weight.clone()
    selection = getattr(kernels, f"prune_{name}")(weight, feature, power, count, want_keep=True)
    assert torch.equal(bits(weight), bits(before)), "the input is not changed"
    keep = check(selection, weight, feature, power)
    assert (keep.sum(1) == weight.shape[1] - count).all()
    return keep


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("width", "power"), [(1, 2), (2, 1), (31, 2), (32, 1), (33, 2), (64, 1), (1000, 2), (1000, 1), (4096, 2)]
)
def test_exact_selection_matches_the_reference(kernels: ModuleType, dtype: torch.dtype, width: int, power: int) -> None:
    weight = linear(6, width, dtype)
    score = references.scores(weight, features(width), power)
    for count in {0, 1, width // 3, width // 2, width - 1, width}:
        keep = select(kernels, "exact", weight, count, power).numpy()
        assert_lowest(~keep, score, count, 1e-6 * score)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("width", "block"),
    [(1, 32), (31, 32), (33, 32), (48, 32), (1000, 32), (1040, 32), (4096, 32), (1024, 64), (97, 12), (50, 7)],
)
def test_ewma_matches_the_reference(kernels: ModuleType, dtype: torch.dtype, width: int, block: int) -> None:
    weight, feature = linear(6, width, dtype), features(width)
    score = np.sqrt(references.scores(weight, feature, 2))
    rows = [references.ewma(row, block, 1 / 8) for row in score]
    z = np.stack([row.z for row in rows])
    rounding = np.stack([4e-6 * (s + row.est) / row.dev for s, row in zip(score, rows, strict=True)])
    for count in {width // 3, width // 2, width - width // 5}:
        selection = kernels.prune_ewma(weight, feature, 2, count, block=block, alpha=1 / 8, want_keep=True)
        keep = check(selection, weight, feature, 2).numpy()
        assert_lowest(~keep, z, count, rounding)


def assert_lowest(pruned: np.ndarray, values: np.ndarray, count: int, rounding: np.ndarray) -> None:
    """`count` per row, and none of them above a kept one by more than rounding explains."""
    assert (pruned.sum(1) == count).all()
    for gone, value, error in zip(pruned, values, rounding, strict=True):
        if 0 < count < len(value):
            highest = np.max((value - error)[gone])
            assert highest <= np.min((value + error)[~gone])


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("alpha", [1 / 8, 1 / 256])
def test_blocks_of_one_are_the_published_recurrence(kernels: ModuleType, alpha: float) -> None:
    """Of scores within a factor of three, of which none is held down."""
    weight = torch.rand(5, 400, generator=torch.Generator().manual_seed(0)) + 0.5
    feature = torch.ones(400)
    score = np.sqrt(references.scores(weight, feature, 2))
    selection = kernels.prune_ewma(weight, feature, 2, 200, block=1, alpha=alpha, want_keep=True)
    assert selection.keep is not None
    for row, keep in zip(score, selection.keep.numpy(), strict=True):
        z = references.ewma(row, 1, alpha).z
        low, high = z[~keep].max(), z[keep].min()
        assert low < high + 1e-4
        pruned = references.published_recurrence(row, alpha, (low + high) / 2)
        assert (pruned != ~keep).sum() <= 1, "at most a near-tie at the threshold"


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("width", [96, 576, 4096, 11009])
def test_an_outlier_does_not_hide_its_neighbours(kernels: ModuleType, power: int, width: int) -> None:
    """One score a million times the others, wherever it stands: of what they keep, nothing but a trace is lost."""
    weight, feature, count = linear(7, width), features(width), width // 2
    places = [0, 5, 31, 32, width // 3, width // 2, width - 1]
    for row, place in enumerate(places):
        weight[row, place] = 1e6 ** (1 / power)
        feature[place] = 1.0
    kept = {}
    for name in ("ewma", "exact"):
        keep = getattr(kernels, f"prune_{name}")(weight, feature, power, count, want_keep=True).keep
        score = torch.from_numpy(references.scores(weight, feature, power)) * keep
        assert all(keep[row, place] for row, place in enumerate(places))
        for row, place in enumerate(places):
            score[row, place] = 0
        kept[name] = score.sum(1)
    assert (kept["ewma"] >= 0.99 * kept["exact"]).all()


@pytest.mark.parametrize("kernels", BACKENDS)
def test_heavy_tails_of_features_cost_little(kernels: ModuleType) -> None:
    """Features that differ as those of a pretrained model do: a few carry nearly everything."""
    width = 4096
    generator = torch.Generator().manual_seed(2)
    feature = torch.exp(1.5 * torch.randn(width, generator=generator))
    feature[torch.randperm(width, generator=generator)[:12]] *= 1e6
    weight = linear(16, width)
    kept = {}
    for name in ("ewma", "exact"):
        keep = getattr(kernels, f"prune_{name}")(weight, feature, 2, width // 2, want_keep=True).keep
        score = torch.from_numpy(references.scores(weight, feature.clamp_max(1e3), 2))
        kept[name] = (score * keep).sum(1)
    assert (kept["ewma"] >= 0.99 * kept["exact"]).all()


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("m", range(2, 33))
def test_n_of_m_matches_the_reference(kernels: ModuleType, m: int) -> None:
    """Groups that fill no vector, rows of more than one chunk; ties, zeros and constant rows among them."""
    for n in {1, m // 2, m - 1} - {0}:
        for dtype, width in (
            (DTYPES[0], 7 * m),
            (DTYPES[1], 16 * m),
            (DTYPES[2], 3 * m),
            (DTYPES[m % 3], 4500 // m * m),
        ):
            weight = linear(5, width, dtype)
            weight[1] = (weight[1] * 100).round()
            weight[2] = -1e-3
            weight[3, ::2] = 0
            keep = groups(kernels, weight, n, m)
            expected = references.lowest_of_groups(references.scores(weight, features(width), 2), n, m)
            assert (expected != ~keep.numpy()).sum() == 0


def groups(kernels: ModuleType, weight: torch.Tensor, n: int, m: int) -> torch.Tensor:
    feature = features(weight.shape[1])
    keep = check(kernels.prune_n_of_m(weight, feature, 2, n, m, want_keep=True), weight, feature, 2)
    assert (keep.reshape(-1, m).sum(1) == n).all()
    return keep


@given(data=st.data())
@few
def test_counts_are_exact_under_heavy_ties(data: st.DataObject) -> None:
    """Few distinct values, zeros of both signs, whole rows of one value; every mask is the reference's."""
    width = data.draw(st.integers(1, 150))
    values = data.draw(st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 2.0]), min_size=1, max_size=4))
    picks = data.draw(st.lists(st.integers(0, 3), min_size=3 * width, max_size=3 * width))
    dtype = data.draw(st.sampled_from(DTYPES))
    weight = torch.tensor([values[i % len(values)] for i in picks]).reshape(3, width).to(dtype)
    count = data.draw(st.integers(0, width))
    ones = torch.ones(width)
    for kernels in (cpu, torch_ops):
        exact = check(kernels.prune_exact(weight, ones, 1, count, want_keep=True), weight, ones, 1)
        expected = references.lowest(references.scores(weight, ones, 1), count)
        assert (exact.numpy() == ~expected).all()
        ewma = check(kernels.prune_ewma(weight, ones, 1, count, want_keep=True), weight, ones, 1)
        assert (ewma.sum(1) == width - count).all()
        m = data.draw(st.integers(2, 32).filter(lambda m: width >= m)) if width >= 2 else 0
        if m:
            n, part = data.draw(st.integers(1, m - 1)), weight[:, : width // m * m].contiguous()
            few_ones = torch.ones(part.shape[1])
            keep = check(kernels.prune_n_of_m(part, few_ones, 1, n, m, want_keep=True), part, few_ones, 1)
            expected = references.lowest_of_groups(references.scores(part, few_ones, 1), n, m)
            assert (keep.numpy() == ~expected).all()


@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 700),
    part=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    power=st.sampled_from([1, 2]),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
)
@few
def test_both_kernels_choose_the_same(
    seed: int, width: int, part: float, dtype: torch.dtype, power: int, spread: float
) -> None:
    """Equal masks but for near-ties, also with features that differ by many orders of magnitude."""
    weight = linear(4, width, dtype, seed)
    feature = torch.exp(spread * torch.randn(width, generator=torch.Generator().manual_seed(seed)))
    count = int(part * width)
    for name in ("ewma", "exact"):
        ours = getattr(cpu, f"prune_{name}")(weight, feature, power, count, want_keep=True)
        theirs = getattr(torch_ops, f"prune_{name}")(weight, feature, power, count, want_keep=True)
        different = (ours.keep != theirs.keep).sum(1)
        assert different.max() <= (0 if name == "exact" else 2), "only a near-tie may swap"
        assert ours.removed == pytest.approx(theirs.removed, rel=1e-5, abs=1e-30)
        assert ours.total == pytest.approx(theirs.total, rel=1e-5)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("name", ["ewma", "exact"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1 / 3, -7e-5])
@pytest.mark.parametrize("width", [1, 37, 320])
def test_constant_rows_lose_their_first_columns(kernels: ModuleType, name: str, value: float, width: int) -> None:
    """dev = 0, every z equal: the ties go by column."""
    weight, ones, count = torch.full((3, width), value), torch.ones(width), width // 2
    selection = getattr(kernels, f"prune_{name}")(weight, ones, 2, count, want_keep=True)
    keep = check(selection, weight, ones, 2)
    assert not keep[:, :count].any() and keep[:, count:].all()


@pytest.mark.parametrize("kernels", BACKENDS)
def test_a_dead_first_block_gives_no_nan(kernels: ModuleType) -> None:
    weight = linear(4, 200)
    weight[:, :32] = 0
    select(kernels, "ewma", weight, 100)
    select(kernels, "ewma", weight * 1e19, 100)
    select(kernels, "ewma", weight * 1e-19, 100)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("name", ["ewma", "exact"])
def test_sparsity_zero_changes_nothing_but_the_sign_of_zero(kernels: ModuleType, name: str) -> None:
    weight = linear(3, 70, torch.bfloat16)
    weight[0, :4] = torch.tensor([0.0, -0.0, 1e-40, -1e-40])
    expected = bits(weight).clone()
    expected[0, 1] = 0
    selection = getattr(kernels, f"prune_{name}")(weight, features(70), 2, 0)
    assert torch.equal(bits(selection.weight), expected)
    assert selection.keep is None and selection.removed == 0


@pytest.mark.parametrize("kernels", BACKENDS)
def test_permuting_columns_permutes_the_exact_mask(kernels: ModuleType) -> None:
    weight, feature = linear(8, 501), features(501)
    order = torch.randperm(501, generator=torch.Generator().manual_seed(3))
    keep = kernels.prune_exact(weight, feature, 2, 250, want_keep=True).keep
    moved = kernels.prune_exact(weight[:, order], feature[order], 2, 250, want_keep=True).keep
    assert torch.equal(moved, keep[:, order])


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_finite_value_is_decoded(kernels: ModuleType, dtype: torch.dtype) -> None:
    """All bit patterns of the 16-bit types, subnormals too, seen by a selection and by the statistics."""
    patterns = torch.arange(2**16, dtype=torch.int32)
    weight = patterns.to(torch.int16).view(dtype) if dtype != torch.float32 else (patterns << 16).view(dtype)
    weight = weight[torch.isfinite(weight)][torch.randperm(int(torch.isfinite(weight).sum()))][None, :]
    feature = torch.ones(weight.shape[1])
    selection = kernels.prune_exact(weight, feature, 1, weight.shape[1] // 2, want_keep=True)
    expected = references.lowest(references.scores(weight, feature, 1), weight.shape[1] // 2)
    assert (selection.keep.numpy() == ~expected).all()
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    kernels.accumulate(weight, total, torch.zeros_like(total))
    assert torch.equal(total, weight[0].double())


@pytest.mark.parametrize("kernels", BACKENDS)
def test_out_and_strides_and_read_only_memory(kernels: ModuleType, tmp_path: Path) -> None:
    weight, feature = linear(9, 96, torch.bfloat16), features(96)
    expected = kernels.prune_ewma(weight, feature, 2, 40).weight
    transposed = weight.T.contiguous().T
    assert not transposed.is_contiguous()
    assert torch.equal(kernels.prune_ewma(transposed, feature, 2, 40).weight, expected)
    out = torch.full((20, 96), 7.0, dtype=torch.bfloat16)
    got = kernels.prune_ewma(weight, feature, 2, 40, out=out[3:12])
    assert got.weight.data_ptr() == out[3:12].data_ptr() and torch.equal(out[3:12], expected)
    assert (out[:3] == 7).all() and (out[12:] == 7).all()
    (tmp_path / "weight").write_bytes(bytes(2) + bits(weight).numpy().tobytes())
    mapped = np.memmap(tmp_path / "weight", np.uint8, "r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "The given NumPy array is not writable": a write would be a fault
        view = torch.from_numpy(mapped)[2:].view(torch.bfloat16).reshape(9, 96)
    assert torch.equal(kernels.prune_ewma(view, feature, 2, 40).weight, expected)
    assert torch.equal(
        kernels.prune_n_of_m(view, feature, 2, 2, 4).weight,
        kernels.prune_n_of_m(weight, feature, 2, 2, 4).weight,
    )


@pytest.mark.parametrize("name", ["ewma", "exact"])
@pytest.mark.parametrize("width", [512, 500])
def test_what_rows_before_teach_changes_no_mask(name: str, width: int) -> None:
    """Thresholds jump by orders of magnitude, stay, vanish: the mask of a row is that of the row alone."""
    weight = linear(120, width, torch.bfloat16) * torch.exp(3 * features(120, 5)).to(torch.bfloat16)[:, None]
    weight[40:44] *= 1e6
    weight[60:64] = 0
    weight[80:84] = weight[80:84].sign()
    weight[100] *= 1e-15
    together = select(cpu, name, weight, width // 3)
    alone = torch.cat([select(cpu, name, row[None].clone(), width // 3) for row in weight])
    assert torch.equal(together, alone)
    if name == "exact":
        expected = references.lowest(references.scores(weight, features(width), 2), width // 3)
        assert (together.numpy() == ~expected).mean() > 0.9999  # float32 rounding may make ties


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [96, 90])
def test_in_place(kernels: ModuleType, dtype: torch.dtype, width: int) -> None:
    feature = features(width)
    for prune in (
        lambda weight, out: kernels.prune_ewma(weight, feature, 2, 40, out=out, want_keep=True),
        lambda weight, out: kernels.prune_exact(weight, feature, 1, 40, out=out, want_keep=True),
        lambda weight, out: kernels.prune_n_of_m(weight, feature, 2, 1, 2, out=out, want_keep=True),
        lambda weight, out: kernels.prune_n_of_m(weight, feature, 2, 2, 3, out=out, want_keep=True),
    ):
        weight = linear(20, width, dtype)
        expected = prune(weight, None)
        got = prune(weight, weight)
        assert got.weight is weight and torch.equal(bits(weight), bits(expected.weight))
        assert torch.equal(got.keep, expected.keep) and got[2:] == expected[2:]


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [96, 90])
def test_weights_that_are_not_finite_are_noticed(kernels: ModuleType, dtype: torch.dtype, width: int) -> None:
    for value in (float("nan"), float("inf"), float("-inf"), torch.finfo(dtype).max, -torch.finfo(dtype).max):
        for column in (0, 17, width - 1):
            weight, feature = linear(20, width, dtype), features(width) * 1e6
            weight[13, column] = value
            feature[column] = 0  # Inf x 0 in fp32, and a score that hides the value in others
            ewma = kernels.prune_ewma(weight, feature, 2, 40)
            exact = kernels.prune_exact(weight, feature + 1, 2, 40, want_keep=True)
            pairs = kernels.prune_n_of_m(weight, feature, 2, 1, 2)
            triples = kernels.prune_n_of_m(weight, feature, 1, 1, 3)
            finite = abs(value) <= torch.finfo(dtype).max
            assert {s.finite for s in (ewma, exact, pairs, triples)} == {finite}
            if finite:
                assert ((~exact.keep).sum(1) == 40).all(), "a score may overflow, its weight is the largest"
                assert exact.keep[13, column]


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 17), (257, 64), (700, 1000), (2, 2100), (0, 5)])
def test_accumulate_matches_the_reference(kernels: ModuleType, dtype: torch.dtype, tokens: int, width: int) -> None:
    x, totals = linear(tokens, width, dtype), torch.ones(2, width, dtype=torch.float64)
    kernels.accumulate(x, totals[0], totals[1])
    for total, expected in zip(totals, references.sums(x), strict=True):
        np.testing.assert_allclose(total.numpy() - 1, expected, rtol=3e-5, atol=3e-6)


def test_accumulate_passes_on_what_is_not_finite() -> None:
    for dtype in DTYPES:
        x, totals = torch.ones(5, 20, dtype=dtype), torch.zeros(2, 20, dtype=torch.float64)
        x[3, 0], x[3, 18], x[2, 19] = float("inf"), float("nan"), float("-inf")
        cpu.accumulate(x, totals[0], totals[1])
        assert totals[0, 0] == float("inf") and totals[0, 18].isnan() and totals[0, 19] == float("-inf")
        assert (totals[:, 1:18] == 5).all()


@pytest.mark.parametrize("kernels", BACKENDS)
def test_wrong_arguments_are_refused(kernels: ModuleType) -> None:
    weight, feature = linear(2, 8), features(8)
    for wrong in (
        lambda: kernels.prune_exact(weight, feature, 2, 9),
        lambda: kernels.prune_exact(weight, feature, 3, 1),
        lambda: kernels.prune_exact(weight, feature[:7], 2, 1),
        lambda: kernels.prune_exact(weight, feature.double(), 2, 1),
        lambda: kernels.prune_exact(weight.double(), feature, 2, 1),
        lambda: kernels.prune_exact(weight, feature, 2, 1, out=torch.empty(2, 7)),
        lambda: kernels.prune_exact(weight, feature, 2, 1, out=torch.empty(2, 8, dtype=torch.bfloat16)),
        lambda: kernels.prune_ewma(weight, feature, 2, 1, block=0),
        lambda: kernels.prune_ewma(weight, feature, 2, 1, alpha=1.5),
        lambda: kernels.prune_n_of_m(weight, feature, 2, 2, 3),
        lambda: kernels.prune_n_of_m(weight, feature, 2, 4, 4),
        lambda: kernels.accumulate(weight, torch.zeros(8), torch.zeros(8)),
        lambda: kernels.first_nonfinite(weight.double()),
    ):
        with pytest.raises(ValueError):
            wrong()


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_nonfinite(kernels: ModuleType, dtype: torch.dtype) -> None:
    weight = linear(130, 1000, dtype)
    assert kernels.first_nonfinite(weight) is None
    assert kernels.first_nonfinite(torch.empty(0, 3, dtype=dtype)) is None
    for index, value in (
        (129_999, float("inf")),
        (70_003, float("nan")),
        (8192, float("-inf")),
        (0, float("nan")),
    ):
        weight.view(-1)[index] = value
        assert kernels.first_nonfinite(weight) == index


def test_the_number_of_threads_changes_no_bit(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_arrays, "PART", 2000)
    weight, feature, x = linear(40, 300, torch.bfloat16), features(300), linear(700, 300, torch.float16)
    weight.view(-1)[11_111] = 0.01
    seen = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        ewma = cpu.prune_ewma(weight, feature, 2, 150)
        pairs = cpu.prune_n_of_m(weight, feature, 2, 2, 4)
        total = torch.zeros(2, 300, dtype=torch.float64)
        cpu.accumulate(x, total[0], total[1])
        seen.append((ewma.weight, pairs.weight, total, (ewma.removed, ewma.total, pairs.removed, pairs.total)))
        weight.view(-1)[11_111] = float("nan")
        assert cpu.first_nonfinite(weight) == 11_111
        weight.view(-1)[11_111] = 0.01
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0][:3], other[:3], strict=True))
        assert seen[0][3] == other[3]


FORKING = """
import os, torch
from streamprune.kernels import cpu, cpu_arrays
cpu_arrays.PART = 500
torch.set_num_threads(3)
weight = torch.randn(40, 64)
expected = cpu.prune_exact(weight, torch.ones(64), 1, 20).weight
child = os.fork()
same = torch.equal(cpu.prune_exact(weight, torch.ones(64), 1, 20).weight, expected)
if not child:
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0 and same
torch.set_num_threads(2)
print(cpu.first_nonfinite(weight))
"""


def test_threads_survive_a_fork() -> None:
    finish(probe(Path(cpu.__file__).parent.parent.parent, FORKING))


OTHER = """
import sys, torch
sys.path.insert(0, "tests")
from test_kernels import linear, features, fingerprint
print(fingerprint())
"""


def fingerprint() -> str:
    """Of masks and sums of rows that use every path of the row kernels."""
    weight, feature = linear(60, 512, torch.float16), features(512)
    weight[7], weight[9] = 0, weight[9].sign()
    ewma = cpu.prune_ewma(weight, feature, 2, 200)
    exact = cpu.prune_exact(weight, feature, 1, 200)
    groups = cpu.prune_n_of_m(weight, feature, 2, 3, 8)
    numbers = [int(bits(s.weight).long().mul(torch.arange(512)).sum()) for s in (ewma, exact, groups)]
    return f"{numbers} {[(s.removed, s.total) for s in (ewma, exact, groups)]}"


def test_every_processor_computes_the_same_bits() -> None:
    """Here, one without AVX-512."""
    here = Path(__file__).parent.parent
    process = probe(here, OTHER, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", NUMBA_DISABLE_CACHING="1")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out.strip()) == (0, fingerprint()), err


PROBE = "import torch; from streamprune.kernels import cpu; print(cpu.first_nonfinite(torch.ones(5).log()))"


def probe(cwd: Path, script: str = PROBE, **environment: str) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA", "PYTHON", "XDG"))}
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=cwd, env=clean | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.strip()) == (0, "None"), err


@pytest.mark.parametrize("place", [None, "/dev/null/cache"], ids=["default", "NUMBA_CACHE_DIR"])
def test_compiles_without_any_place_for_a_cache(tmp_path: Path, place: str | None) -> None:
    """Neither package nor home can be written: a file sits where numba wants a folder, even for root."""
    package = tmp_path / "streamprune"
    shutil.copytree(Path(cpu.__file__).parent, package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").touch()
    (package / "kernels" / "__pycache__").touch()
    given = {} if place is None else {"NUMBA_CACHE_DIR": place}
    finish(probe(tmp_path, HOME="/dev/null", XDG_CACHE_HOME="/dev/null", PYTHONDONTWRITEBYTECODE="1", **given))
    assert (package / "kernels" / "__pycache__").is_file()


def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    root = Path(cpu.__file__).parent.parent.parent
    for process in [probe(root, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]:
        finish(process)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    assert written
    for folder in (tmp_path, *tmp_path.iterdir()):
        folder.chmod(0o555)
    finish(probe(root, NUMBA_CACHE_DIR=str(tmp_path), HOME="/dev/null", XDG_CACHE_HOME="/dev/null"))
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    for folder in (tmp_path, *tmp_path.iterdir()):
        folder.chmod(0o755)


def test_lanes() -> None:
    """What sixteen numbers at once do, against numpy."""

    def loop(a: Any, b: Any, chosen: Any, packed: Any, numbers: Any, bytes: Any) -> Any:
        x, y = lanes.load(a, 0), lanes.load(b, 0)
        lanes.pack(packed, 3, x, y < x)
        sums = lanes.as_float(lanes.as_int(lanes.load(numbers, 0) * lanes.fill(np.float32(0.5))))
        lanes.store(bytes, 0, lanes.invert(y < x))
        lanes.store(chosen, 0, lanes.select(x <= y, (x + 1) & 6, lanes.largest(x, y) >> lanes.columns()))
        return lanes.count(y < x), lanes.total(sums), lanes.top(x)

    random = np.random.default_rng(0)
    a, b = random.integers(0, 100, (2, 16)).astype(np.int32)
    chosen, packed, bytes = np.zeros(16, np.int32), np.zeros(40, np.int32), np.zeros(16, bool)
    numbers = random.random(16).astype(np.float32)
    count, total, top = numba.njit(loop)(a, b, chosen, packed, numbers, bytes)
    assert (bytes == ~(b < a)).all()
    assert (chosen == np.where(a <= b, (a + 1) & 6, np.maximum(a, b) >> np.arange(16))).all()
    assert count == (b < a).sum() and (packed[3 : 3 + count] == a[b < a]).all() and not packed[:3].any()
    assert total == pytest.approx(numbers.sum() / 2, rel=1e-6) and top == a.max()


def test_distances_order_like_keys() -> None:
    """Wherever `as_distance` says so; zeros have two keys, and the selections of nothing and of all are no numbers."""
    tiny = np.float32(1e-45)
    numbers = [np.float32(x) for x in (-np.inf, -1.5, -tiny, -0.0, 0.0, tiny, 1.5, np.inf)]
    keys = [int(cpu_select.ordered(z)) for z in numbers]
    assert keys == sorted(keys) and keys[3:5] == [-1, 0]
    for threshold in {key + step for key in keys for step in (-1, 0, 1)}:
        ordinary, limit, behind = cpu_select.as_distance(threshold)
        for z, key in zip(numbers, keys, strict=True):
            if ordinary:
                assert (z <= limit, z <= behind) == (key <= threshold, key < threshold)
        assert ordinary or not keys[0] <= threshold <= keys[-1] or threshold in (-1, 0)
    for beyond in (cpu_select.LOWEST, cpu_select.HIGHEST - 1):
        assert not cpu_select.as_distance(beyond)[0]


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32])
def test_networks_sort_and_tiles_are_turned(size: int) -> None:
    """A network sorts if it sorts zeros and ones; all of them up to 16 numbers, and random ones beyond."""
    bits = np.arange(2**size) if size <= 16 else np.random.default_rng(0).integers(0, 2**32, 20_000)
    columns = [bits >> i & 1 for i in range(size)]
    for i, j in cpu_tiles.comparators(size):
        assert i < j
        columns[i], columns[j] = np.minimum(columns[i], columns[j]), np.maximum(columns[i], columns[j])
    assert all((low <= high).all() for low, high in itertools.pairwise(columns))
    words = np.arange(8 * size).reshape(size, 8)
    planes = cpu_tiles.separated(pick, list(words))
    assert all((plane % size == i).all() for i, plane in enumerate(planes))
    groups = {tuple(plane // size) for plane in planes}
    assert len(groups) == 1 and sorted(*groups) == list(range(8)), "groups have the same order in each plane"
    assert (np.stack(cpu_tiles.merged(pick, planes)) == words).all()


def pick(a: np.ndarray, b: np.ndarray, picks: tuple[int, ...]) -> np.ndarray:
    return np.concatenate((a, b))[list(picks)]
