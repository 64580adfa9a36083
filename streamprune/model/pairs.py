"""The training data of tuning: a layer's input and its target output for every calibration window.

Windows are read in random order, so they are kept separately from the activation cache: in two unnamed temporary files
or, where hidden states are resident, on the device.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from streamprune.disk.scratch import ScratchMatrix
from streamprune.methods.tuning import token_weights


class Pairs:
    """Inputs (samples, seqlen, width) and targets (samples, seqlen, hidden) in `dtype`, of windows in `shape` (samples,
    seqlen). Windows are put in order and read in any.
    """

    def __init__(
        self, folder: Path, shape: tuple[int, int], width: int, hidden: int, dtype: torch.dtype, device: torch.device,
        *, resident: bool,
    ) -> None:  # fmt: skip
        self.samples, self.seqlen = shape
        self._device = device
        self._files: list[ScratchMatrix] = []
        if resident:
            made = [torch.empty(*shape, size, dtype=dtype, device=device) for size in (width, hidden)]
        else:
            self._files = [ScratchMatrix(folder, math.prod(shape), size, dtype) for size in (width, hidden)]
            made = [file.tensor.view(*shape, -1) for file in self._files]
        self._given, self._wanted = made
        self._weights = torch.zeros(shape, device=device)
        self._at = 0

    def put(self, given: Tensor, wanted: Tensor) -> None:
        """Stores the next windows: the layer's input `given` and its target `wanted`."""
        begin, end = self._at, self._at + len(given)
        self._given[begin:end].copy_(given)
        self._wanted[begin:end].copy_(wanted)
        self._weights[begin:end] = token_weights(wanted).to(self._device)
        self._forget(range(begin, end))
        self._at = end

    def of(self, windows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Of windows (n,) int64: inputs (n, seqlen, width) in `dtype`, targets, and weights of tokens (n, seqlen).

        All on the device.
        """
        at = windows.to(self._given.device)
        given, wanted = self._given[at].to(self._device, dtype), self._wanted[at].to(self._device)
        self._forget(windows.tolist())
        return given, wanted, self._weights[windows.to(self._device)]

    @property
    def token_weights(self) -> Tensor:
        """What an error of each token counts (tuning.token_weights): (samples · seqlen,) float32, on the device."""
        return self._weights.flatten()

    def _forget(self, windows: list[int] | range) -> None:
        for file in self._files:
            for window in windows:
                file.forget(window * self.seqlen, (window + 1) * self.seqlen)
