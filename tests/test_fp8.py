"""FP8: codes against Torch's own conversion, scales against their rules, both kernels against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamprune.errors import UsageError
from streamprune.kernels import cpu_arrays
from streamprune.methods.fp8 import FP8_MAX, Quantised, dequantise, quantise
from streamprune.methods.recipes import FP8_SCALES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKENDS = ("numba", "torch")


def codes_of(weight: Tensor, scale: Tensor) -> Tensor:
    """By Torch, as bytes; -0.0 is +0.0."""
    codes = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(codes == 0x80, 0, codes)


def bits(found: Quantised) -> Tensor:
    return found.codes.view(torch.uint8)


def rows(count: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows of very different size, one of zeros of either sign."""
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, width, generator=made) * torch.logspace(-6, 3, count)[:, None]
    weight[count // 2] = torch.where(torch.arange(width) % 2 == 0, 0.0, -0.0)
    return weight.to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_every_bit_pattern(dtype: torch.dtype, backend: str) -> None:
    """A 448 in each row makes the scale 1, so the codes are those of the numbers themselves."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite() & (every.abs() <= 448)]
    weight = torch.cat((every, torch.zeros(-len(every) % 255))).to(dtype).reshape(-1, 255)
    weight = torch.cat((torch.full((len(weight), 1), 448.0, dtype=dtype), weight), 1)
    found = quantise(weight, torch.float32, backend=backend)
    assert (found.scale == 1).all()
    assert torch.equal(bits(found), codes_of(weight, found.scale))
    assert not (bits(found) == 0x80).any() and len(bits(found).unique()) == 2 * 127 - 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_their_neighbours(backend: str) -> None:
    """Halfway between any two E4M3 numbers, and the float32 next to that on either side."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    up, down = (ties.nextafter(torch.tensor(to)) for to in (1e9, -1e9))
    weight = torch.cat((numbers, ties, up, down, torch.full((1,), 2.0**-140)))
    found = quantise(torch.stack((weight, -weight)), torch.float32, backend=backend)
    assert torch.equal(bits(found), codes_of(torch.stack((weight, -weight)), found.scale))
    q = found.codes[0].float()
    count = len(ties)
    assert torch.equal(q[127 : 127 + count], torch.where(torch.arange(count) % 2 == 0, numbers[:-1], numbers[1:]))
    assert torch.equal(q[127 + count : 127 + 2 * count], numbers[1:])
    assert torch.equal(q[127 + 2 * count : -1], numbers[:-1])


@pytest.mark.parametrize("width", (1, 15, 16, 300, 1040, 2500))
@pytest.mark.parametrize("how", FP8_SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree_bit_for_bit(dtype: torch.dtype, how: str, width: int) -> None:
    weight = rows(9, width, dtype)
    before = weight.clone()
    for scale_dtype in DTYPES:
        for power in (None, torch.rand(width)):
            one, other = (quantise(weight, scale_dtype, how, power, backend) for backend in BACKENDS)
            assert torch.equal(bits(one), bits(other)) and torch.equal(one.scale, other.scale)
            assert (one.error, one.total) == (other.error, other.total)
            assert torch.equal(bits(one), codes_of(weight, one.scale))
            assert one.scale.dtype == scale_dtype and one.scale.shape == (9, 1)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_chunks_change_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_arrays, "PART", 5000)
    weight, power, threads = rows(70, 1100, torch.bfloat16), torch.rand(1100), torch.get_num_threads()
    whole = quantise(weight, torch.bfloat16, "mse", power, backend)
    torch.set_num_threads(2)
    try:
        parts = [quantise(part, torch.bfloat16, "mse", power, backend) for part in weight.split(17)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(bits(whole), torch.cat([bits(part) for part in parts]))
    assert sum(part.error for part in parts) == pytest.approx(whole.error, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_is_amax_rounded_up(dtype: torch.dtype, backend: str) -> None:
    weight = rows(200, 64)
    exact = weight.abs().amax(1, keepdim=True).double() / 448
    scale = quantise(weight, dtype, backend=backend).scale
    known = (exact[:, 0] > torch.finfo(dtype).tiny) & (exact[:, 0] > 0)
    exact, found = exact[known], scale[known]
    if dtype == torch.float32:
        assert torch.equal(found, exact.float())
        return
    assert (found.double() >= exact).all()
    below = (found.view(torch.int16) - 1).view(dtype)
    assert (below.double() < exact).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_at_its_limits(backend: str) -> None:
    nothing = quantise(torch.tensor([[0.0, -0.0]]), torch.bfloat16, "mse", backend=backend)
    assert nothing.scale.item() == 1.0 and bits(nothing).tolist() == [[0, 0]]
    assert (nothing.error, nothing.total) == (0.0, 0.0)
    small = quantise(torch.tensor([[1e-3, 1e-6]]), torch.float16, "mse", backend=backend)
    assert small.scale.item() == 2.0**-14
    assert dequantise(small.codes, small.scale, torch.float32)[0] == pytest.approx([1e-3, 1e-6], rel=1 / 16)
    for dtype in (torch.bfloat16, torch.float32):
        tiny = quantise(torch.tensor([[2.0**-130]]), dtype, "mse", backend=backend)
        assert tiny.scale.item() == 2.0**-126 and tiny.codes.float().item() == 2.0**-4
    assert quantise(torch.tensor([[60000.0]]), torch.float16, backend=backend).scale.item() >= 60000 / 448
    with pytest.raises(UsageError, match="--skip"):
        quantise(torch.tensor([[1e9]]), torch.float16, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_those_of_float64(backend: str) -> None:
    weight, power = rows(20, 700, torch.bfloat16), torch.rand(700)
    found = quantise(weight, torch.bfloat16, "mse", power, backend)
    exact = weight.double()
    rest = exact - found.codes.double() * found.scale.double()
    assert found.total == pytest.approx(float((exact.square() * power).sum()), rel=1e-6)
    assert found.error == pytest.approx(float((rest.square() * power).sum()), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mse_finds_the_better_scale(backend: str) -> None:
    """All but one weight are 17/16: halfway between E4M3 numbers for amax, exact for a scale of 17/16."""
    weight = torch.full((1, 64), 17 / 16)
    weight[0, 0] = 448.0
    power = torch.ones(64)
    power[0] = 0.0
    plain, better = (quantise(weight, torch.float32, how, power, backend) for how in FP8_SCALES)
    assert plain.scale.item() == 1.0 and plain.error == pytest.approx(63 / 256)
    assert better.scale.item() == 17 / 16 and better.error == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_mse_takes_the_larger_of_equals(backend: str) -> None:
    assert quantise(torch.ones(1, 4), torch.float32, "mse", torch.zeros(4), backend).scale.item() > 1.9 / 448


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.floats(-3, 3))
def test_properties(seed: int, dtype: torch.dtype, scale_dtype: torch.dtype, size: float) -> None:
    """Half a unit of the last place at most; zeros stay; mse is never worse than amax."""
    made = torch.Generator().manual_seed(seed)
    weight = (torch.randn(4, 40, generator=made).pow(3) * 10**size).to(dtype)
    pruned = torch.rand(4, 10, 4, generator=made).argsort(-1).reshape(4, 40) < 2
    weight.masked_fill_(pruned, 0.0)
    power = torch.rand(40, generator=made)
    plain, better = (quantise(weight, scale_dtype, how, power) for how in FP8_SCALES)
    assert better.error <= plain.error
    for found in (plain, better):
        scale, exact = found.scale.double(), weight.double()
        rest = (exact - found.codes.double() * scale).abs()
        assert (rest <= torch.maximum(exact.abs() / 16, scale * 2.0**-10) * (1 + 1e-6)).all()
        assert (bits(found)[pruned] == 0).all() and not ((bits(found) & 0x7F) == 0x7F).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantise(dtype: torch.dtype, backend: str) -> None:
    """Every code, NaN too, at any shape of the scale."""
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).repeat(3, 3)[:, :700].contiguous()
    scale = torch.tensor([0.37, 1.0, 5e-4]).to(torch.bfloat16)
    wanted = (codes.float() * scale.float()[:, None]).to(dtype)
    for given_scale in (scale, scale[:, None], scale[:, None].float()):
        found = dequantise(codes, given_scale, dtype, backend)
        assert found.dtype == dtype
        assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.nan_to_num(), wanted.nan_to_num())
    single = dequantise(codes, scale[0], dtype, backend)
    assert torch.equal(single.nan_to_num(), (codes.float() * scale[0].float()).to(dtype).nan_to_num())


def test_what_is_stored_is_read_back_exactly() -> None:
    """Quantising again what was dequantised changes no code: the largest one is 448 in every row."""
    weight = rows(8, 200, torch.bfloat16)
    found = quantise(weight, torch.float32)
    again = quantise(dequantise(found.codes, found.scale, torch.float32), torch.float32)
    assert torch.equal(bits(found), bits(again))
    assert again.error <= 1e-12 * again.total


def test_refusals() -> None:
    weight = torch.ones(2, 4)
    for mistake in ({"how": "max"}, {"backend": "jax"}):
        with pytest.raises(UsageError, match=r"not one of|neither"):
            quantise(weight, torch.float32, **mistake)  # type: ignore[arg-type]
    for wrong in (weight[0], weight.double(), weight.to(torch.int32)):
        with pytest.raises(ValueError, match="expected"):
            quantise(wrong, torch.float32)
    with pytest.raises(ValueError, match="power"):
        quantise(weight, torch.float32, power=torch.ones(3))
    with pytest.raises(ValueError, match="scale"):
        dequantise(torch.zeros(2, 4).to(torch.float8_e4m3fn), torch.ones(3), torch.float32)
    with pytest.raises(ValueError, match="expected"):
        dequantise(weight, torch.ones(2), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_at_all(backend: str) -> None:
    for shape in ((0, 4), (3, 0)):
        found = quantise(torch.ones(shape), torch.bfloat16, "mse", backend=backend)
        assert found.codes.shape == shape and (found.error, found.total) == (0.0, 0.0)
        assert dequantise(found.codes, found.scale, torch.float16, backend).shape == shape


def test_largest_number() -> None:
    assert torch.finfo(torch.float8_e4m3fn).max == FP8_MAX
