"""What several ranks share of one job: its settings, whether they see the same OUT, and what has been written there.

Rank 0 writes OUT, except that without a forward pass all ranks that see OUT take turns with its shards. Otherwise the
other ranks read the pruned layers there if they see the same folder, which a file with a random
token shows. A rank on another machine, without a shared file system, is sent the bytes of each layer; it keeps them in
a folder of its own under the name OUT.partial, as long as it needs them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from streamprune.disk import durable
from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.durable import FilePart
from streamprune.disk.room import SLACK_BYTES, check_room
from streamprune.model.stages import Stage
from streamprune.process.memory import format_bytes, peak_resident_bytes
from streamprune.pruning.output import Output
from streamprune.pruning.prepare import Prepared
from streamprune.pruning.records import StageRecord
from streamprune.pruning.target import Target

if TYPE_CHECKING:
    from streamprune.pruning.forward import CalibrationPass

_PIECE = 32 << 20
"""Bytes that are sent at once."""


class Sharing:
    """What the ranks of a job share. Created by all of them together, once the job has begun."""

    def __init__(self, prepared: Prepared) -> None:
        self._ranks, self._state, self._cache = prepared.ranks, prepared.state, prepared.cache
        self._sees = True
        """Whether this rank sees the OUT of rank 0."""
        self._stages = 0
        """How many this rank writes, where ranks take turns."""
        if self._ranks.size > 1:
            path = self._state.folder / "token"
            mine = os.urandom(16)
            if not self._ranks.rank:
                durable.replace_file(path, mine)
            token = self._ranks.broadcast(mine)
            self._sees = path.is_file() and path.read_bytes() == token
        self._seeing = [rank for rank, sees in enumerate(self._ranks.gather(self._sees)) if sees]
        self._all_see = len(self._seeing) == self._ranks.size

    def records(self, records: Sequence[StageRecord]) -> list[StageRecord]:
        """The records of finished stages; a cache that is not there for this number of ranks is none."""
        newest = max((n for n, record in enumerate(records) if record.cache), default=-1)
        if newest >= 0:
            from streamprune.disk.cache import has_cache

            size = self._ranks.size
            mine = (records[newest].ranks or 1) == size and (size == 1 or has_cache(self._cache, newest))
            if not all(self._ranks.gather(mine)):
                for record in records:
                    record.cache = False
        return list(records)

    def turns(self, shards: Sequence[list[Stage]]) -> list[list[Stage]]:
        """The stages that this rank writes in each round, in which each rank that sees OUT writes one of the shards.

        Rank 0 has the first one of a round, so that it can commit its own stages, and then those of the others.
        """
        step = len(self._seeing)
        rounds = [list(shards[first : first + step]) for first in range(0, len(shards), step)]
        at = self._seeing.index(self._ranks.rank) if self._sees else step
        own = [shards[at] if at < len(shards) else [] for shards in rounds]
        self._stages = sum(map(len, own))
        return own

    def others(self, records: Sequence[StageRecord]) -> list[StageRecord]:
        """Of the stages that ranks have just written, `records` on each, those of the others: on rank 0, in order."""
        return list(chain(*self._ranks.collect(list(records))[1:]))

    def written(self, output: Output, stage: Stage) -> Checkpoint:
        """A stage that rank 0 has written, for reading it again, on all ranks."""
        if not self._all_see:
            self._send(output, stage)
        self._ranks.barrier()
        return output.written(stage)

    def _send(self, output: Output, stage: Stage) -> None:
        import torch

        part = output.part(stage)
        path = self._state.partial / part.name
        file = None
        if not self._sees:
            durable.make_folder(path.parent)
            durable.remove(path)  # with the stage before
            file = FilePart(path, part.begin, None)
        for begin in range(part.begin, part.end, _PIECE):
            size = min(_PIECE, part.end - begin)
            piece = torch.empty(size, dtype=torch.uint8)
            if not self._ranks.rank:
                with path.open("rb") as f:
                    f.seek(begin)
                    piece = torch.frombuffer(bytearray(f.read(size)), dtype=torch.uint8)
            self._ranks.broadcast_(piece, 0)
            if file is not None:
                file.write(piece.numpy().data)
        if file is not None:
            file.commit()

    def end(self, forward: CalibrationPass | None) -> list[dict[str, Any]]:
        """Removes what this rank has written outside of OUT; returns what each rank did, if there are several."""
        if self._ranks.size == 1:
            return []
        self._ranks.barrier()  # a folder for --work may be shared where OUT is not
        durable.clear(self._cache)
        if not self._sees:
            durable.clear(self._state.cache)
            durable.clear(self._state.partial)
        return self._ranks.gather({
            "rank": self._ranks.rank, "host": platform.node(),
            **({"windows": forward.share.own_windows} if forward else {"stages": self._stages}),
            "waited_seconds": round(self._ranks.waited, 3), "peak_rss_bytes": peak_resident_bytes(),
        })  # fmt: skip


def check_disk(job: Prepared, target: Target | None, forward: CalibrationPass | None, newest: int, spool: int) -> None:
    """Raises ResourceError unless the disks have room for what is still to be written: cache `newest` is there.

    `spool` bytes are for shards that are fetched from the hub, beside the output.
    """
    setup, layout, records = job.setup, job.layout, job.records
    written = sum(r.shard["bytes"] for r in records if r.shard)
    output = target.output_bytes - written if target and not job.ranks.rank else 0
    cache = 0
    if forward is not None and len(records) < len(setup.model.stages) - 1:
        # An older durable cache may have to be kept beside the two in use.
        behind = -1 < newest < len(records) - 1
        cache = (3 if behind and not layout.resident else 2) * forward.cache_bytes
        from streamprune.pruning.memory import largest_refitted, scratch_bytes

        windows, length = forward.share.own_windows, forward.windows.shape[1]
        if job.ranks.size > 1 and (setup.skeleton.experts or (layout.windows and not job.ranks.rank)):
            # each rank also gets the inputs of experts that others have recorded, and rank 0 what layers are tuned on
            windows += len(forward.windows)
        cache += scratch_bytes(setup, layout, windows, length)
        if job.ranks.size > 1 and target and setup.propagate != "asymmetric":  # where a single process keeps none aside
            cache += largest_refitted(setup.skeleton.layer_stages, target.refitted)
    check_room(
        [(job.state.partial, output + spool + SLACK_BYTES), (job.state.cache, cache)],
        "free some space, choose another OUT, or put the activations elsewhere with --work DIR",
        detail=f" ({format_bytes(output)} for the output, {format_bytes(cache)} for activations"
        + (f", {format_bytes(spool)} for shards from the hub)" if spool else ")"),
    )
