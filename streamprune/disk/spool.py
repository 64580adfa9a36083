"""Shards of a model on the hub, fetched shortly before they are needed and dropped when they no longer are.

At most two are there at once, the one at work and the next, or as many as one stage needs. They are in unnamed files
in a folder, so that nothing is left of them whatever happens. A shard is whole and has the hub's hash before anything
of it is read. A download that breaks off goes on from where it was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from streamprune.disk import remote
from streamprune.disk.encoded import EncodedRef
from streamprune.disk.header import TensorRef
from streamprune.disk.remote import RemoteCheckpoint
from streamprune.disk.scratch import ScratchFile
from streamprune.errors import HubError
from streamprune.process.background import BackgroundWorker, Latch

AT_ONCE = 2
_SMALL = 1 << 20


def shards_of(refs: Iterable[TensorRef]) -> set[str]:
    """The shards that hold these tensors, or what they are decoded from."""
    return {part.shard for ref in refs for part in (ref.encoding.parts if isinstance(ref, EncodedRef) else (ref,))}


def at_once(stages: Sequence[Collection[str]], at_work: int = 1) -> list[str]:
    """The shards to have while the first `at_work` of `stages` are at work: those needed next. Stages are sets of
    shards."""
    order = dict.fromkeys(shard for stage in stages for shard in sorted(stage))
    return list(order)[: max(AT_ONCE, len(set[str]().union(*stages[:at_work])))]


def spooled_bytes(checkpoint: RemoteCheckpoint, stages: Sequence[Collection[str]], at_work: int = 1) -> int:
    """The most that shards take on the disk at any stage."""
    sizes = checkpoint.shard_stats
    return max((sum(sizes[shard][0] for shard in at_once(stages[i:], at_work)) for i in range(len(stages))), default=0)


@dataclass(eq=False)
class _Fetch:
    """A shard on its way. Once `done` is open, it has a file or an error."""

    shard: str
    done: Latch = field(default_factory=Latch)
    file: ScratchFile | None = None
    error: BaseException | None = None
    dropped: bool = False


class Spool:
    """The shards of one checkpoint in `folder`. A context manager; `file` may be called in threads."""

    def __init__(self, checkpoint: RemoteCheckpoint, folder: Path) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self._fetches: dict[str, _Fetch] = {}
        self._small: dict[tuple[str, int, int], bytes] = {}
        self._lock = threading.Lock()
        self._worker: BackgroundWorker[_Fetch] = BackgroundWorker(self._fetch)

    def __enter__(self) -> Spool:
        self._worker.__enter__()
        return self

    def close(self) -> None:
        """Ends downloads and drops all shards."""
        self.cancel()
        self._worker.drop()
        self._worker.__exit__(None, None, None)
        for shard in list(self._fetches):
            self._drop(shard)

    def cancel(self) -> None:
        """Ends downloads: whoever waits for one gets an error."""
        for fetch in list(self._fetches.values()):
            fetch.dropped = True

    def upcoming(self, stages: Sequence[Collection[str]], at_work: int = 1) -> list[str]:
        """Begins to fetch the shards that `stages` need first, and returns those that were dropped."""
        wanted = at_once(stages, at_work)
        gone = [shard for shard in self._fetches if shard not in wanted]
        for shard in gone:
            self._drop(shard)
        for shard in wanted:
            self._begun(shard)
        return gone

    def has(self, shard: str) -> bool:
        """Whether a shard is there."""
        fetch = self._fetches.get(shard)
        return fetch is not None and fetch.done.is_open and fetch.file is not None

    def aside(self, shard: str, begin: int, size: int) -> bytes | None:
        """A few bytes of a shard that nobody has asked for yet, read from the hub alone; None for others.

        The final norm is bound with the embedding, and would fetch the last shard before the first layer.
        """
        if size > _SMALL or shard in self._fetches:
            return None
        place = (shard, begin, size)
        if place not in self._small:
            with self._checkpoint.reading(shard) as read:
                self._small[place] = read(begin, size)
        return self._small[place]

    def file(self, shard: str) -> BinaryIO:
        """The file of a shard; waits for it, and fetches it if nobody has begun to.

        Raises HubError if the hub cannot be reached or sends something else, ResourceError for a full disk.
        """
        fetch = self._begun(shard)
        fetch.done.wait()
        _check(fetch)
        if fetch.error is not None:
            self._fetches.pop(shard, None)  # for another attempt
            raise fetch.error
        assert fetch.file is not None
        return fetch.file.file

    def _begun(self, shard: str) -> _Fetch:
        with self._lock:
            if shard not in self._fetches:
                self._fetches[shard] = fetch = _Fetch(shard)
                self._worker.put(fetch)
            return self._fetches[shard]

    def _drop(self, shard: str) -> None:
        fetch = self._fetches.pop(shard)
        fetch.dropped = True
        if fetch.done.is_open and fetch.file is not None:
            fetch.file.close()

    def _fetch(self, fetch: _Fetch) -> None:
        """Runs in the background thread; errors are kept for `file` to raise."""
        file: ScratchFile | None = None
        try:
            file = ScratchFile(self._folder)
            self._download(fetch, file)
            fetch.file = file
        except BaseException as e:  # noqa: BLE001 - raised by `file`
            fetch.error = e
        if file is not None and (fetch.error is not None or fetch.dropped):
            file.close()
        fetch.done.open()

    def _download(self, fetch: _Fetch, file: ScratchFile) -> None:
        checkpoint, shard = self._checkpoint, fetch.shard
        size, hasher = checkpoint.shard_stats[shard][0], checkpoint.hasher(shard)
        attempt = 0
        while file.size < size:
            _check(fetch)
            before = file.size
            try:
                for piece in checkpoint.pieces(shard, file.size):
                    _check(fetch)
                    hasher.update(piece)
                    file.append(piece)
            except HubError as e:
                attempt = 0 if file.size > before else attempt + 1
                if attempt >= len(remote.WAITS) or not remote.is_passing(e):
                    raise
                _wait(fetch, remote.WAITS[attempt])
            else:
                if file.size == before:
                    break  # the hub has no more of it
        if file.size != size or not hasher.fits:
            raise HubError(
                f"{checkpoint.repository}: {shard} is not what the hub says it holds (its hash differs); run the same "
                "command again"
            )


def _check(fetch: _Fetch) -> None:
    if fetch.dropped:
        raise HubError(f"{fetch.shard} is no longer needed")


def _wait(fetch: _Fetch, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        _check(fetch)
        time.sleep(min(0.1, seconds))
