"""What a layer is given and what is wanted of it, for every window of the calibration: what tuning learns from.

Windows are taken in any order, so they are kept apart from the activation cache: in two files without a name, or on the
device where hidden states stay there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from streamprune.disk.scratch import ScratchMatrix
from streamprune.methods.tuning import token_weights


class Pairs:
    """Room for `samples` windows of `seqlen` tokens of `hidden` features, in `dtype`. Put in order, taken in any."""

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
        """The next windows (batch, seqlen, hidden): the layer's input and its target."""
        begin, end = self._at, self._at + len(given)
        self._given[begin:end].copy_(given)
        self._wanted[begin:end].copy_(wanted)
        self._weights[begin:end] = token_weights(wanted).to(self._device)
        self._forget(range(begin, end))
        self._at = end

    def of(self, windows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs in `dtype`, targets (n, seqlen, hidden), and tokens' weights (n, seqlen), on the device."""
        at = windows.to(self._given.device)
        given, wanted = self._given[at].to(self._device, dtype), self._wanted[at].to(self._device)
        self._forget(windows.tolist())
        return given, wanted, self._weights[windows.to(self._device)]

    def _forget(self, windows: list[int] | range) -> None:
        for file in self._files:
            for window in windows:
                file.forget(window * self.seqlen, (window + 1) * self.seqlen)
