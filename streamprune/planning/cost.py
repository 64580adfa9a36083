"""Estimates the time of a run: the work of each stage, divided by the speeds of the machine.

Arithmetic only; the speeds are measured in planning/speeds.py. For a layer, with `forwards` passes over all tokens:

    forward     forwards · (tokens · (products + attention + everything else) + batches · 0.5 ms)
    statistics  tokens · inputs of the linears
    selection   weights checked for NaN and Inf (before the pass, and when they are written), and pruned
    tuning      three passes an epoch; and for each step 3 ms and what Adam moves
    refit       Gram matrices, and new values for the kept weights: see planning/refit_cost.py
    disk        reading, activations, hashing, writing and fsyncs, as far as they do not overlap with the above

A layer with experts is computed twice, except for the experts themselves (model/routed.py), whose weights are read
meanwhile.

On the CPU the next stage is read during the pass. While a shard is written, one thread prunes and another one hashes
and writes. As the kernels use all cores, the times of pruning and hashing add up:

    shard       max(prune and refit + hash / cores, hash, written ÷ writing speed)

Without a pass (statistics are given) reading overlaps as well, but reading and writing share one disk. On a device,
weights are copied during the previous layer's pass if two layers fit there, and shards are written during the next
layer's pass if three do; a stage then takes as long as the slowest of computing, copying, hashing and the disk.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamprune.planning.work import RunShape, Speeds, Split, StageWork

PER_BATCH = 0.5e-3
"""Fixed overhead of a batch in a layer, seconds: threads of the activation cache, hooks."""

PER_STEP = 3e-3
"""Fixed overhead of a step of tuning, seconds: gradients of a layer's operations, and its tensors one by one."""

PER_LEARNT = 110
"""Bytes moved for a weight that a step of tuning changes: the index of its place, gradient, master, two moments."""

PER_COLUMN = 1.5e-5
"""Overhead of the calls for one column in refits that work column by column, seconds."""

PER_FLUSH = 2.5e-3
"""Seconds of one fsync with nothing to write."""

FLUSHES = {"embed": 10, "layer": 12, "head": 10}
"""fsyncs of a stage with a pass: cache, manifest, statistics, shard, journal and their folders. The head's include side
files, the index and the report."""

FLUSHES_WITHOUT_PASS = 3
"""fsyncs of a stage without a pass: shard, its folder, journal."""


def embedding_bytes(states: int, layers: int) -> int:
    """Bytes moved to compute the `states` (bytes) before layer 0; a recorder at each layer reads them as well."""
    return states * (4 + 2 * layers)


def stage_seconds(works: Sequence[StageWork], run: RunShape, speeds: Speeds) -> list[Split]:
    """Seconds of each stage: embed, layers, head, in this order. The first one includes one-off loading."""
    found: list[Split] = []
    room = 0.0  # seconds of the previous stage that reading this stage's weights overlaps with
    for work in works:
        if work.kind == "embed" and run.tokens:
            split = _embed(works, run, speeds)
        elif run.on_device and work.kind == "layer":
            split = _layer_on_device(work, run, speeds)
        elif not run.tokens:
            split = _copied(work, run, speeds)
        else:
            split = _layer(work, run, speeds, room)
        room = split.total - split.disk
        found.append(split + Split(forward=speeds.loading) if run.tokens and not found else split)
    if not run.tokens and found:
        found[0] += Split(selection=speeds.loading)
        found[-1] += Split(disk=PER_FLUSH * FLUSHES["head"])
    return found


def _forward(work: StageWork, run: RunShape, s: Speeds) -> Split:
    """The passes through a layer, statistics during the first pass, the refit and tuning."""
    a_token = work.products / s.products + work.attention / s.attention + work.traffic / s.elementwise
    a_pass = run.tokens * a_token + run.batches * PER_BATCH
    r = work.refit
    refit = r.float32 / s.float32 + r.native / s.products + r.traffic / s.elementwise + r.selected / s.selection
    tuned = run.tuning * work.tuned
    steps = run.steps + run.steps_apart * work.experts
    learnt = run.steps * work.learnt + run.steps_apart * work.learnt_apart
    return Split(
        forward=(run.passes(work) - tuned) * a_pass, statistics=run.tokens * work.inputs / s.statistics,
        refit=refit + r.columns * PER_COLUMN + r.passes * a_pass,
        tuning=tuned * a_pass + steps * PER_STEP + learnt * PER_LEARNT / s.elementwise,
    )  # fmt: skip


def _layer(work: StageWork, run: RunShape, s: Speeds, room: float) -> Split:
    """A layer, or the head, on the CPU; reading it overlaps with `room` seconds of the stage before."""
    look = work.nbytes / s.scanning
    prune = look + work.pruned / s.selection
    waited = max(0.0, (work.nbytes - work.again) / s.reading - room) + _flushes(work, run)
    forward = _forward(work, run, s) if work.kind == "layer" else Split()
    reads = run.groups * (run.forwards - run.tuning) + 2 * run.parts
    waited += max(0.0, reads * work.again / s.reading - forward.forward - forward.tuning)
    waited += work.again / s.reading  # experts, for pruning
    fill = prune + forward.refit
    waited += _shard(work, run, s, fill, work.nbytes / s.writing) - fill
    if work.kind != "layer":
        return Split(selection=prune, disk=waited)
    waited += 0.0 if work.last else _cache(run, s)
    if run.passes(work) > 1:
        waited += work.nbytes / s.reading  # the weights just written are read back for the second pass
    return forward + Split(selection=look + prune, disk=waited)


def _embed(works: Sequence[StageWork], run: RunShape, s: Speeds) -> Split:
    """The embedding stage: weights outside the layers are read and checked, states computed, the shard written."""
    work, both = works[0], works[0].nbytes + works[-1].nbytes
    look, again = both / s.scanning, work.nbytes / s.scanning
    waited = max(0.0, both / s.reading - look) + _cache(run, s) + _flushes(work, run)
    waited += _shard(work, run, s, again, work.nbytes / s.reading + work.nbytes / s.writing) - again
    states = run.tokens * run.state_bytes
    return Split(embedding_bytes(states, len(works) - 2) / s.embedding, 0.0, look + again, waited)


def _copied(work: StageWork, run: RunShape, s: Speeds) -> Split:
    """A stage without a pass: read, pruned and written at once; reading and writing share the disk."""
    prune = work.nbytes / s.scanning + work.pruned / s.selection
    filled = _shard(work, run, s, prune, work.nbytes / s.reading + work.nbytes / s.writing)
    return Split(selection=prune, disk=max(filled, PER_FLUSH * FLUSHES_WITHOUT_PASS) - prune)


def _layer_on_device(work: StageWork, run: RunShape, s: Speeds) -> Split:
    """A layer on a device: what overlaps depends on how many layers fit there."""
    look = 3 * work.nbytes / s.elementwise
    forward = _forward(work, run, s) if run.tokens else Split()
    prune = look + work.pruned / s.selection
    computed = forward + Split(selection=prune + (look if run.tokens else 0.0))
    fill = prune + forward.refit
    arrives = max(work.nbytes / s.link, work.nbytes / s.reading)
    leaves = max(work.pruned / s.link, work.nbytes / s.hashing, work.nbytes / s.writing)
    states = 0.0 if run.resident else 2 * run.passes(work) * run.tokens * run.state_bytes / s.link
    waited = _flushes(work, run) + (0.0 if work.last else _cache(run, s))
    if run.passes(work) > 1:
        waited += arrives + leaves
    if run.layers > 2 or not run.tokens:
        disk = work.nbytes / s.reading + work.nbytes / s.writing
        whole = max(computed.total, arrives + states, leaves, disk)
    elif run.layers == 2:
        whole = max(computed.total - fill, arrives + states) + max(fill, leaves)
    else:
        whole = arrives + max(computed.total - fill, states) + max(fill, leaves)
    return computed + Split(disk=whole - computed.total + waited)


def _shard(work: StageWork, run: RunShape, s: Speeds, prune: float, disk: float) -> float:
    """Seconds to fill a shard, with `prune` seconds of kernels on all cores and `disk` seconds of disk."""
    follow = work.nbytes / s.hashing
    return max(prune + follow / run.threads, follow, disk)


def _cache(run: RunShape, s: Speeds) -> float:
    """Activations of one stage: hashed, copied and made durable, then read and checked beside the next pass."""
    return run.cached / s.writing + 2 * run.cached / s.hashing / run.threads


def _flushes(work: StageWork, run: RunShape) -> float:
    return PER_FLUSH * (FLUSHES[work.kind] if run.tokens else FLUSHES_WITHOUT_PASS)
