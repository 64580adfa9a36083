"""Both kernels against float64 references, and the properties that hold for every input."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import references
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamprune.kernels import Selection, cpu, torch_ops

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
@pytest.mark.parametrize(("width", "block"), [(1, 32), (31, 32), (33, 32), (1000, 32), (1024, 64), (97, 12), (50, 7)])
def test_ewma_matches_the_reference(kernels: ModuleType, dtype: torch.dtype, width: int, block: int) -> None:
    weight, feature = linear(6, width, dtype), features(width)
    score = references.scores(weight, feature, 2)
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
    weight, feature = linear(5, 400), features(400)
    score = references.scores(weight, feature, 2)
    selection = kernels.prune_ewma(weight, feature, 2, 200, block=1, alpha=alpha, want_keep=True)
    assert selection.keep is not None
    for row, keep in zip(score, selection.keep.numpy(), strict=True):
        z = references.ewma(row, 1, alpha).z
        low, high = z[~keep].max(), z[keep].min()
        assert low < high + 1e-4
        pruned = references.published_recurrence(row, alpha, (low + high) / 2)
        assert (pruned != ~keep).sum() <= 1, "at most a near-tie at the threshold"


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("m", [2, 3, 4, 5, 8, 16, 31, 32])
def test_n_of_m_matches_the_reference(kernels: ModuleType, m: int) -> None:
    for n in {1, m // 2, m - 1} - {0}:
        for dtype in DTYPES:
            weight = linear(5, 7 * m, dtype)
            keep = groups(kernels, weight, n, m)
            expected = references.lowest_of_groups(references.scores(weight, features(7 * m), 2), n, m)
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
    monkeypatch.setattr(cpu, "_PART", 2000)
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


PROBE = "import torch; from streamprune.kernels import cpu; print(cpu.first_nonfinite(torch.ones(5).log()))"


def probe(cwd: Path, **environment: str) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA", "PYTHON", "XDG"))}
    return subprocess.Popen(
        [sys.executable, "-c", PROBE], cwd=cwd, env=clean | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.strip()) == (0, "None"), err


def test_compiles_without_any_place_for_a_cache(tmp_path: Path) -> None:
    """Neither package nor home can be written: a file sits where numba wants a folder, even for root."""
    package = tmp_path / "streamprune"
    shutil.copytree(Path(cpu.__file__).parent, package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").touch()
    (package / "kernels" / "__pycache__").touch()
    finish(probe(tmp_path, HOME="/dev/null", XDG_CACHE_HOME="/dev/null", PYTHONDONTWRITEBYTECODE="1"))
    assert (package / "kernels" / "__pycache__").is_file()


def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    root = Path(cpu.__file__).parent.parent.parent
    for process in [probe(root, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]:
        finish(process)
    assert list(tmp_path.rglob("*.nbi"))
