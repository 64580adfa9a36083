"""2:4 against dense on a GPU, linear by linear: in bf16 as tools/run_24.py, and in FP8 where this Torch has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from bench_rig import Row
from run_24 import random_24, tokens_per_second
from run_24_convert import find_gpu, to_sparse
from torch import Tensor
from torch.nn.functional import linear

_BATCHES = (1, 16, 64, 256, 1024, 4096)
_SHAPES = ((4096, 4096), (11008, 4096), (8192, 28672))  # (out, in)
_SECONDS = 0.1

Work = Callable[[], Tensor]


def two_four(device: torch.device, small: bool) -> Iterator[Row]:
    """A row for each dtype, shape and batch: tokens a second of both, and how many times as fast 2:4 is."""
    for rows, columns in ((64, 128),) if small else _SHAPES:
        dense = random_24(rows, columns).to(device, torch.bfloat16)
        for dtype, prepare in (("bf16", _bf16), ("fp8", _fp8)):
            on = {"dtype": dtype, "shape": f"{rows}x{columns}"}
            try:
                make = prepare(dense)
                for tokens in _BATCHES[:2] if small else _BATCHES:
                    yield on | {"tokens": tokens} | _compared(*make(tokens), tokens, device)
            except Exception as e:  # noqa: BLE001 - whatever this Torch or GPU cannot do
                yield on | {"not possible here": " ".join(str(e).split())[:160]}


def _bf16(dense: Tensor) -> Callable[[int], tuple[Work, Work]]:
    if dense.device.type == "cuda":
        sparse = to_sparse(dense, find_gpu(str(dense.device)))
    else:
        sparse = dense

    def make(tokens: int) -> tuple[Work, Work]:
        x = torch.randn(tokens, dense.shape[1]).to(dense.device, dense.dtype)
        return lambda: linear(x, dense), lambda: linear(x, sparse)

    return make


def _fp8(dense: Tensor) -> Callable[[int], tuple[Work, Work]]:
    """Both kernels without scales that differ by row: what is asked is their speed. Tokens are padded to 16."""
    codes = dense.to(torch.float8_e4m3fn)
    packed = torch._cslt_compress(codes)
    one = torch.ones((), device=dense.device)

    def make(tokens: int) -> tuple[Work, Work]:
        x = torch.randn(-(-tokens // 16) * 16, dense.shape[1]).to(dense.device).to(torch.float8_e4m3fn)
        return (
            lambda: torch._scaled_mm(x, codes.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16),
            lambda: torch._cslt_sparse_mm(packed, x.t(), out_dtype=torch.bfloat16).t(),
        )

    return make


def _compared(dense: Work, sparse: Work, tokens: int, device: torch.device) -> Row:
    """Raises RuntimeError where the two do not compute the same."""
    wanted, found = dense().float(), sparse().float()
    apart = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not apart < 0.1:
        raise RuntimeError(f"2:4 outputs differ from dense ones by {100 * apart:.3g} %")
    rates = [[tokens_per_second(work, tokens, device, _SECONDS) for work in (dense, sparse)] for _ in range(3)]
    ratios = sorted(fast / base for base, fast in rates)
    base, fast = (sorted(column)[1] for column in zip(*rates, strict=True))
    return {"dense, tokens/s": base, "2:4, tokens/s": fast, "2:4 ÷ dense": ratios[1], "least": ratios[0],
            "greatest": ratios[2]}  # fmt: skip
