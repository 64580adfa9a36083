"""What a layer's experts are given, recorded in files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from streamprune.disk.scratch import ScratchMatrix
from streamprune.errors import UnsupportedError
from streamprune.process.ranks import Ranks

_GATHERED_ROWS = 256
"""Rows that are read from a file at once: if they are far apart, each maps 64 KiB."""

_SCANNED_TOKENS = 1 << 16
"""Tokens that are searched at once for those of an expert."""


class RoutedInputs:
    """Records the inputs of a layer's experts, for `tokens` tokens in all, in unnamed temporary files in `folder`.

    Raises ResourceError when the disk is too small for them.
    """

    def __init__(self, folder: Path, tokens: int) -> None:
        self._folder, self._tokens = folder, tokens
        self._files: dict[str, tuple[ScratchMatrix, ScratchMatrix, ScratchMatrix]] = {}
        self._used: dict[str, int] = {}
        self._groups: dict[str, list[int]] = {}
        """Where each group of batches that was added ends."""

    def add(self, path: str, *parts: Tensor) -> None:
        """Adds the inputs (states, chosen, shares) of the module of experts `path`; shapes as for Forward."""
        hidden, chosen, shares = parts
        parts = (hidden, chosen.to(torch.int32), shares)
        if path not in self._files:
            first, second, third = (ScratchMatrix(self._folder, self._tokens, p.shape[1], p.dtype) for p in parts)
            self._files[path] = (first, second, third)
        begin = self._used.get(path, 0)
        end = self._used[path] = begin + len(hidden)
        self._groups.setdefault(path, []).append(end)
        if end > self._tokens:
            raise UnsupportedError(f"{path} is given more rows than there are tokens; its experts cannot be refitted")
        for file, part in zip(self._files[path], parts, strict=True):
            file.tensor[begin:end] = part.cpu()
            file.forget(begin, end)

    def gathered(self, ranks: Ranks, tokens: int) -> RoutedInputs:
        """The inputs recorded on all ranks, `tokens` in all, in the order of the groups, which ranks take in turn."""
        whole = RoutedInputs(self._folder, tokens)
        for path, files in self._files.items():
            told = ranks.gather([0, *self._groups[path]])
            for group in range(max(map(len, told)) - 1):
                for source, ends in enumerate(told):
                    if group + 1 == len(ends):
                        continue
                    here = slice(ends[group], ends[group + 1])
                    parts = []
                    for file in files:
                        own = source == ranks.rank
                        shape = here.stop - here.start, file.tensor.shape[1]
                        part = file.tensor[here].clone() if own else file.tensor.new_empty(shape)
                        ranks.broadcast_(part.view(-1).view(torch.uint8), source)
                        parts.append(part)
                    whole.add(path, *parts)
        return whole

    def inputs(self, path: str, expert: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """States (≤ rows, hidden) and routing weights (≤ rows, 1) of the tokens routed to an expert, in order."""
        tokens, share = self.routed_to(path, expert)
        for part, weights in zip(torch.split(tokens, rows), torch.split(share, rows), strict=True):
            yield self.states(path, part), weights

    def check(self, path: str, tokens: int) -> None:
        """Raises UnsupportedError unless the module of experts `path` was given a row for each of `tokens` tokens."""
        if self._used.get(path, 0) != tokens:
            raise UnsupportedError(
                f"{path} is given {self._used.get(path, 0)} rows for {tokens} tokens, so that it cannot be said which "
                "windows they belong to, and its experts cannot be tuned; leave out --tune"
            )

    def routed_to(self, path: str, expert: int) -> tuple[Tensor, Tensor]:
        """The numbers (n,) of the tokens routed to an expert, in order, and their routing weights (n, 1)."""
        _, chosen, shares = self._files[path]
        used = self._used[path]
        found = []
        for begin in range(0, used, _SCANNED_TOKENS):
            token, place = torch.where(chosen.tensor[begin : min(begin + _SCANNED_TOKENS, used)] == expert)
            found.append((token + begin, shares.tensor[token + begin, place, None]))
        for file in (chosen, shares):
            file.forget(0, self._tokens)
        tokens, share = (torch.cat(parts) for parts in zip(*found, strict=True))
        return tokens, share

    def states(self, path: str, tokens: Tensor) -> Tensor:
        """What the module of experts was given of these tokens (n,): (n, hidden)."""
        hidden = self._files[path][0]
        x = hidden.tensor.new_empty(len(tokens), hidden.tensor.shape[1])
        for begin in range(0, len(tokens), _GATHERED_ROWS):
            x[begin : begin + _GATHERED_ROWS] = hidden.tensor[tokens[begin : begin + _GATHERED_ROWS]]
            hidden.forget(0, self._tokens)
        return x
