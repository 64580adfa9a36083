"""The quantities that a run's time is estimated from: the work of its stages, its shape, and the machine's speeds."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import astuple, dataclass
from operator import add

from streamprune.model.shapes import attention_width, linear_shape, routed_share, uncached_experts
from streamprune.model.skeleton import Skeleton
from streamprune.model.stages import Stage
from streamprune.planning.refit_cost import NO_REFIT, RefitWork


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
