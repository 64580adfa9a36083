"""The training data of tuning: a layer's input and its target output for every calibration window.

Windows are read in random order, so they are kept separately from the activation cache: in two unnamed temporary files
or, where hidden states are resident, on the device.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from streamprune.disk.scratch import ScratchMatrix
from streamprune.methods.tuning import token_weights


class Pairs:
    """Inputs and targets (samples, seqlen, hidden) in `dtype`. Windows are put in order and read in any."""

    def __init__(
        self, folder: Path, samples: int, seqlen: int, hidden: int, dtype: torch.dtype, device: torch.device,
        *, resident: bool,
    ) -> None:  # fmt: skip
        self.samples, self.seqlen, self._device = samples, seqlen, device
        self._files: list[ScratchMatrix] = []
        if resident:
            shape = (samples, seqlen, hidden)
            self._given, self._wanted = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        else:
            self._files = [ScratchMatrix(folder, samples * seqlen, hidden, dtype) for _ in range(2)]
            self._given, self._wanted = (file.tensor.view(samples, seqlen, hidden) for file in self._files)
        self._weights = torch.zeros(samples, seqlen, device=device)
        self._at = 0

    def put(self, given: Tensor, wanted: Tensor) -> None:
        """Stores the next windows: the layer's input `given` and its target `wanted`, both (batch, seqlen, hidden)."""
        begin, end = self._at, self._at + len(given)
        self._given[begin:end].copy_(given)
        self._wanted[begin:end].copy_(wanted)
        self._weights[begin:end] = token_weights(wanted).to(self._device)
        self._forget(range(begin, end))
        self._at = end

    def of(self, windows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Of windows (n,) int64: inputs (n, seqlen, hidden) in `dtype`, targets, and weights of tokens (n, seqlen).

        All on the device.
        """
        at = windows.to(self._given.device)
        given, wanted = self._given[at].to(self._device, dtype), self._wanted[at].to(self._device)
        self._forget(windows.tolist())
        return given, wanted, self._weights[windows.to(self._device)]

    def _forget(self, windows: list[int] | range) -> None:
        for file in self._files:
            for window in windows:
                file.forget(window * self.seqlen, (window + 1) * self.seqlen)
