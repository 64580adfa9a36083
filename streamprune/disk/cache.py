"""The activation cache: hidden states of one stage on disk, (samples, seqlen, hidden), in fixed-size chunks.

`0007.bin` holds the chunks one after the other, raw and without a header; `0007.json` is the manifest: shape,
dtype, samples per chunk, and the xxh3_64 of each chunk. The manifest is written last, so that a cache is complete if
its manifest exists. A chunk is one batch of the forward pass; the last one may hold fewer samples.

Chunks are not mapped, but read into a new buffer and verified, so that only the chunks in use are resident.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
import xxhash
from torch import Tensor

from streamprune.disk import durable, journal
from streamprune.errors import CorruptStateError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class CacheWriter:
    """Writes one stage's cache, chunk by chunk; durable and complete when the context is left normally."""

    def __init__(self, folder: Path, stage: int, dtype: torch.dtype) -> None:
        self._path = folder / f"{stage:04d}.bin"
        self._dtype = dtype
        self._shape: list[int] = []
        self._chunk_samples = 0
        self._samples = 0
        self._digests: list[str] = []
        self._file = durable.AtomicFile(self._path, reread=True)

    def append(self, states: Tensor) -> None:
        """Adds one chunk: states (batch, seqlen, hidden) of any dtype and device, stored in the cache's dtype."""
        states = states.detach().to("cpu", self._dtype).contiguous()
        self._shape = self._shape or list(states.shape[1:])
        self._chunk_samples = self._chunk_samples or states.shape[0]
        data = states.view(torch.uint8).numpy().reshape(-1).data
        self._digests.append(xxhash.xxh3_64_hexdigest(data))
        self._samples += states.shape[0]
        self._file.write(data)

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)
        if kind is None:
            manifest = {
                "dtype": str(self._dtype).removeprefix("torch."),
                "shape": [self._samples, *self._shape],
                "chunk_samples": self._chunk_samples,
                "chunks": self._digests,
            }
            journal.write_json(self._path.with_suffix(".json"), "cache", manifest)


class CacheReader:
    """Reads one stage's cache. `len()` is the number of chunks; indexing returns (batch, seqlen, hidden)."""

    def __init__(self, folder: Path, stage: int) -> None:
        self._path = folder / f"{stage:04d}.bin"
        manifest = journal.read_json(self._path.with_suffix(".json"), "cache")
        try:
            self._dtype = _DTYPES[manifest["dtype"]]
            self.samples, *self._shape = (int(n) for n in manifest["shape"])
            self._chunk_samples = int(manifest["chunk_samples"])
            self._digests: list[str] = list(manifest["chunks"])
            chunks = -(-self.samples // self._chunk_samples)
            if min(self.samples, self._chunk_samples, *self._shape) < 1 or len(self._digests) != chunks:
                raise ValueError("inconsistent sizes")
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
            raise CorruptStateError(f"{self._path.with_suffix('.json')} is damaged; start again with --restart") from e
        self._sample_bytes = self._dtype.itemsize
        for n in self._shape:
            self._sample_bytes *= n
        expected = self.samples * self._sample_bytes
        size = self._path.stat().st_size if self._path.exists() else -1
        if size != expected:
            raise CorruptStateError(f"{self._path} has {size} bytes, not {expected}; start again with --restart")

    def __len__(self) -> int:
        return len(self._digests)

    def __getitem__(self, chunk: int) -> Tensor:
        """Chunk (batch, seqlen, hidden), in the cache's dtype. Raises CorruptStateError when its hash differs."""
        if not 0 <= chunk < len(self):
            raise IndexError(chunk)
        first = chunk * self._chunk_samples
        samples = min(self._chunk_samples, self.samples - first)
        data = torch.empty(
            samples * self._sample_bytes, dtype=torch.uint8
        )  # a bytearray would be zeroed while holding the GIL
        whole = view = data.numpy().data
        try:
            with self._path.open("rb", buffering=0) as f:
                f.seek(first * self._sample_bytes)
                while view and (got := f.readinto(view)):
                    view = view[got:]
        except OSError as e:
            raise CorruptStateError(
                f"{self._path} cannot be read ({e.strerror}); start again with --restart, and check the disk"
            ) from e
        if view or xxhash.xxh3_64_hexdigest(whole) != self._digests[chunk]:
            raise CorruptStateError(
                f"{self._path}: chunk {chunk} (byte {first * self._sample_bytes}) is not what was written; "
                "start again with --restart, and check the disk"
            )
        return data.view(self._dtype).view(samples, *self._shape)


def remove_cache(folder: Path, stage: int) -> None:
    """Removes one stage's cache, manifest first; nothing happens if it is not there."""
    durable.remove(folder / f"{stage:04d}.json")
    durable.remove(folder / f"{stage:04d}.bin")


def has_cache(folder: Path, stage: int) -> bool:
    """Whether one stage's cache is there, and complete."""
    return (folder / f"{stage:04d}.json").is_file()
