"""Reads mapped tensors ahead of their use, in a thread: asking for it may take as long as reading."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Self

from streamprune.disk.header import TensorRef
from streamprune.disk.mapped import MappedFiles
from streamprune.process.background import BackgroundWorker


class ReadAhead:
    """As model/loader.WeightLoader on the CPU, without torch: a context manager."""

    copies = False

    def __init__(self, maps: MappedFiles) -> None:
        self.maps = maps
        self._background: BackgroundWorker[list[TensorRef]] = BackgroundWorker(self._read)

    def __enter__(self) -> Self:
        self._background.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.drop()
        self._background.__exit__(kind, error, trace)

    def expect(self, refs: Iterable[TensorRef]) -> None:
        """Asks the system to read tensors; returns at once."""
        self._background.put(list(refs))

    def release(self, refs: Iterable[TensorRef]) -> None:
        """Gives back the memory of tensors."""
        self.maps.release(refs)

    def _read(self, refs: list[TensorRef]) -> None:
        try:
            self.maps.prefetch(refs)
        except Exception:  # noqa: BLE001 - only a hint: using the tensor will raise the same error
            return
