"""CPU kernel (Numba) of MXFP4: sixteen bytes, two E2M1 numbers in each, and an exponent for all of them.

E2M1 has one bit of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and these below 0. Times a power of two from 2**-127 on, every
one of them is a bf16 number, so nothing is rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprune.kernels.jit import jit

_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = np.array([*_SIZES, *(-size for size in _SIZES)], np.float32)


def unpack_pairs(blocks: Tensor, exponents: Tensor, out: Tensor) -> None:
    """out (n, 32) bf16 = the numbers of blocks (n, 16) uint8, the lower half of a byte first, x 2**(exponents - 127).

    exponents (n,) uint8, none of them 255. All are contiguous.
    """
    scales = np.ldexp(np.float32(1), exponents.numpy().astype(np.int32) - 127)
    _unpack(blocks.numpy(), scales, NUMBERS, out.view(torch.int16).numpy().view(np.uint16))


@jit(entry=True)
def _unpack(blocks: Any, scales: Any, numbers: Any, out: Any) -> None:
    products, table = np.empty(16, np.float32), np.empty(16, np.uint16)
    bits = products.view(np.uint32)
    for n in range(len(blocks)):
        for i in range(16):
            products[i] = numbers[i] * scales[n]
            table[i] = np.uint16(bits[i] >> np.uint32(16))
        for j in range(16):
            byte = blocks[n, j]
            out[n, 2 * j] = table[byte & 15]
            out[n, 2 * j + 1] = table[byte >> 4]
