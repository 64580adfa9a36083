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

import math
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass
from operator import add

from streamprune.model.shapes import attention_width, linear_shape, routed_share, uncached_experts
from streamprune.model.skeleton import Skeleton
from streamprune.model.stages import Stage
from streamprune.planning.refit_cost import NO_REFIT, RefitWork

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


@dataclass(frozen=True)
class Speeds:
    """What a machine does per second. Operations are floating-point operations; a multiply-add counts as two."""

    products: float
    """Operations in the linears of a layer."""
    float32: float
    """Operations of float32 products, such as rows with a Gram; unused without a refit."""
    attention: float
    """Operations of causal attention (half of those of the full matrix)."""
    elementwise: float
    """Bytes of `StageWork.traffic` in the rest of a layer: norms, rotary embedding, activation function, sums."""
    embedding: float
    """Bytes of `embedding_bytes` before the first layer."""
    statistics: float
    """Bytes of `StageWork.inputs`."""
    selection: float
    """Bytes of weights pruned."""
    scanning: float
    """Bytes of mapped weights checked for NaN and Inf by the CPU, page faults included."""
    hashing: float
    """Bytes hashed and copied into the write buffer by one thread."""
    reading: float
    """Bytes from the disk that the checkpoint is on."""
    writing: float
    """Bytes to the disk that the output is on; the same disk."""
    link: float
    """Bytes copied from the host to the device; unused on the CPU."""
    loading: float
    """Not a speed: one-off seconds to load kernels and modules on their first use."""


@dataclass(frozen=True)
class StageWork:
    """The work of one stage: weights in stored bytes; operations and bytes of activations per token."""

    kind: str
    nbytes: int
    pruned: int
    """Bytes of the linears that are pruned."""
    products: int
    attention: int
    traffic: int
    """Bytes moved besides products: 32 hidden states and 4 times each linear's output, as in a Llama layer."""
    inputs: int
    """Bytes of the inputs of all linears; an input that linears share counts for each."""
    again: int = 0
    """Bytes of experts that do not stay in memory: read for each group of batches, and again for pruning."""
    tuned: float = 1.0
    """How long a pass of tuning takes, in passes: experts take part twice, when they are tuned and with the rest of the
    layer, which is run once, where other passes run it twice."""
    learnt: int = 0
    """Weights that tuning changes, but for those of experts."""
    learnt_apart: int = 0
    """Weights of experts that tuning changes."""
    experts: int = 0
    """Experts that are tuned, each by itself."""
    last: bool = False
    """Whether this is the last layer, whose outputs are not needed: a pass for its statistics suffices."""
    refit: RefitWork = NO_REFIT


def paired_forwards(refits: bool, on_device: bool, tunes: bool = False) -> int:
    """Passes of asymmetric calibration through a layer, roughly: both models run once (2), and the pruned one once more
    for the next cache (1). For a refit both run again up to each input that linears share, in total one and a half
    times (3), or a third of that where attention does not run again (1; see model/ends.py). For tuning, the dense layer
    runs once more on the pruned model's states (1)."""
    return 3 + ((3 if on_device else 1) if refits else 0) + tunes


@dataclass(frozen=True)
class RunShape:
    """What the time of a run depends on. `layers` (on the device at once) and `resident`: see model/budget.py."""

    tokens: int
    """All calibration tokens; 0 without a pass."""
    batches: int
    groups: int
    """Groups of batches; experts process a group at once."""
    forwards: int
    """Passes of all tokens through a layer: 2 with --propagate pruned, paired_forwards with asymmetric."""
    state_bytes: int
    """Bytes of one token's hidden state in the activation cache."""
    threads: int
    """Cores that the kernels use."""
    on_device: bool = False
    layers: int = 1
    resident: bool = False
    tuning: int = 0
    """Of the passes, those that tuning takes."""
    parts: int = 0
    """Parts of batches that tuning processes, in all epochs."""
    steps: int = 0
    """Steps of tuning, in all epochs."""
    steps_apart: int = 0
    """Steps of each expert."""

    @property
    def cached(self) -> int:
        """Bytes of activations that each layer writes to disk; 0 if they stay on the device."""
        return 0 if self.resident else self.tokens * self.state_bytes

    def passes(self, work: StageWork) -> float:
        """How often all tokens go through a stage."""
        plain = self.forwards - self.tuning
        return (max(plain - 1, 1) if work.last else plain) + self.tuning * work.tuned


@dataclass(frozen=True)
class Split:
    """Seconds of a stage or a run, by kind of work. `disk` does not include time that overlaps with the rest."""

    forward: float = 0.0
    statistics: float = 0.0
    selection: float = 0.0
    disk: float = 0.0
    refit: float = 0.0
    tuning: float = 0.0

    @property
    def total(self) -> float:
        """Their sum, the time of the stage."""
        return math.fsum(astuple(self))

    def __add__(self, other: Split) -> Split:
        return Split(*map(add, astuple(self), astuple(other)))


def work_of(skeleton: Skeleton, stage: Stage, chosen: Collection[str], seqlen: int, itemsize: int) -> StageWork:
    """The work of a stage, with windows of `seqlen` tokens and activations of `itemsize` bytes. Prunes `chosen`."""
    pruned = sum(ref.nbytes for name, ref in stage.linears.items() if name in chosen)
    if stage.kind != "layer":
        return StageWork(stage.kind, stage.nbytes, pruned, 0, 0, 0, 0)
    share, times = routed_share(skeleton), 1 + len(stage.experts)
    routed = {name for experts in stage.experts for name in experts.linears}
    shapes = [(name in routed, *linear_shape(skeleton, name, stage)) for name in stage.linears]
    computed = [(share if apart else times, rows, width) for apart, rows, width in shapes]
    states = 32 * times * skeleton.between.hidden
    inside = sum(share * rows * width for apart, rows, width in shapes if apart)
    products = sum(part * rows * width for part, rows, width in computed)
    return StageWork(
        kind=stage.kind, nbytes=stage.nbytes, pruned=pruned,
        products=int(2 * products), tuned=((products - inside) / times + 2 * inside) / max(products, 1),
        attention=2 * seqlen * attention_width(skeleton) * times,
        traffic=int(itemsize * (states + 4 * sum(part * rows for part, rows, _ in computed))),
        inputs=int(itemsize * sum((share if apart else 1) * width for apart, _, width in shapes)),
        again=uncached_experts(stage), last=stage.index == len(skeleton.layers) - 1,
    )  # fmt: skip


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
