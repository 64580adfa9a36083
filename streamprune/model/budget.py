"""Estimates the memory of a pass, and chooses batch sizes and device layouts that fit.

peak = base + reserve + grams + max(stage + batch · seqlen · (per_token + (group - 1) · waiting), working)

base       resident memory of this process once everything is imported and the skeleton is built
reserve    compiling kernels, row chunks of weights, workspaces of the matrix library
stage      bytes of the largest stage: its weights are mapped, and resident while it computes
per_token  peak activations of a layer's forward pass (pass_memory.token_bytes)
group      batches whose tokens a layer's experts process together (model/routed.py)
waiting    for a token of a waiting batch (pass_memory.waiting_bytes)
grams      for a refit: the Gram matrices that are held at once, and the inputs held out of them
working    for a refit: its arrays, once the forward pass is over; for tuning: a layer's weights, gradients and moments,
           and what autograd keeps for a microbatch
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streamprune.errors import ResourceError, UsageError
from streamprune.model.extra_memory import RefitNeeds, TuneNeeds, extra_choices
from streamprune.model.pass_memory import memory_of, token_bytes, waiting_bytes
from streamprune.model.shapes import routed_share, uncached_experts
from streamprune.process.memory import available_bytes, format_bytes, resident_bytes

if TYPE_CHECKING:
    import torch

    from streamprune.model.skeleton import Skeleton

BATCH_TOKENS = 2048
"""Tokens in a batch when memory allows; more do not make matrix products any faster."""

RESERVE = 208 << 20
"""See `reserve` above."""

GROUP_BYTES = 512 << 20
"""Memory for batches that wait for a layer's experts, unless --max-ram allows more: the page cache needs some, too."""

WITHOUT_TORCH = 96 << 20
"""`base` of a process that prunes through Numba alone: 38 MiB as it begins; Numba and its kernels come later."""

EXPERT_TOKENS = 4096
"""Tokens per expert beyond which larger groups gain nothing, if the page cache holds a layer's experts."""

DEVICE_BATCH_TOKENS = 8192
"""Tokens in a batch on a device when its memory allows; with fewer, launching kernels dominates."""

DRIVER_RAM = 1 << 30
"""RAM that a device's driver, its libraries and pinned buffers take in this process."""


@dataclass(frozen=True)
class Budget:
    """The estimate for one job, in bytes; see the formula in the module's docstring."""

    base: int
    reserve: int
    stage: int
    per_sample: int
    grams: int = 0
    working: int = 0
    waiting: int = 0
    """For each sample that waits for experts."""
    enough: int | None = None
    """Samples in a group beyond which nothing is gained; None: the more the better."""

    def peak(self, batch: int, group: int = 1) -> int:
        """Estimated peak resident bytes with batches of `batch` samples, in groups of `group` if there are experts."""
        activations = batch * (self.per_sample + (group - 1) * self.waiting)
        return self.base + self.reserve + self.grams + max(self.stage + activations, self.working)

    def refitting(self, needs: RefitNeeds | None, room: int) -> Budget:
        """The same with a refit that has `room` bytes for Grams."""
        return self if needs is None else replace(self, grams=room + needs.held, working=needs.working)

    def tuning(self, needs: TuneNeeds | None, windows: int) -> Budget:
        """The same with tuning in microbatches of `windows` windows."""
        return self if needs is None else replace(self, working=max(self.working, needs.working(windows)))


def estimate(
    skeleton: Skeleton, seqlen: int, dtype: torch.dtype, base: int | None = None, *, on_device: bool = False
) -> Budget:
    """The RAM budget of a pass with windows of `seqlen` tokens, computed in `dtype` on the CPU or `on_device`.

    `base` defaults to the present resident memory. With a device, RAM holds only pieces of weights in flight and three
    chunks of hidden states.
    """
    if on_device:
        states = 3 * seqlen * skeleton.between.most(seqlen) * dtype.itemsize
        return Budget(base if base is not None else resident_bytes(), RESERVE + DRIVER_RAM, 0, states)
    largest = max(s.resident for s in skeleton.stages)
    return Budget(
        base if base is not None else resident_bytes(),
        RESERVE,
        largest,
        seqlen * token_bytes(skeleton, seqlen, dtype),
        waiting=seqlen * waiting_bytes(skeleton, dtype),
        enough=None if any(map(uncached_experts, skeleton.layer_stages)) else _enough(skeleton, seqlen),
    )


def _enough(skeleton: Skeleton, seqlen: int) -> int:
    """Samples that give each expert EXPERT_TOKENS tokens on average."""
    return -(-int(EXPERT_TOKENS / routed_share(skeleton)) // seqlen)


def choose_batch(budget: Budget, samples: int, seqlen: int, max_ram: int | None) -> int:
    """Samples in a batch. Raises ResourceError when not even one fits into `max_ram` bytes, or into free memory."""
    batch = max(1, min(samples, BATCH_TOKENS // seqlen))
    limit, whose = max_ram, "--max-ram"
    if limit is None:
        free = available_bytes()
        if free is None:
            return batch
        limit, whose = resident_bytes() + free, "this machine's free memory of"
    if budget.peak(1) > limit:
        least = -(-budget.peak(1) >> 20) + 1
        raise ResourceError(
            f"{whose} {format_bytes(limit)} is not enough: this job needs --max-ram {least}MiB "
            f"({format_bytes(budget.stage)} for the largest stage, {format_bytes(budget.per_sample)} for one sample, "
            f"the rest for the program itself)"
        )
    left = limit - budget.base - budget.reserve - budget.grams - budget.stage
    return min(batch, left // budget.per_sample) if budget.per_sample else batch


def group_of(budget: Budget, batch: int, samples: int, max_ram: int | None) -> int:
    """How many batches experts process together; 1 where there are no experts."""
    if not budget.waiting:
        return 1
    if max_ram is not None:
        left = max_ram - budget.peak(batch)
    else:
        free = available_bytes()
        left = GROUP_BYTES if free is None else min(GROUP_BYTES, (resident_bytes() + free - budget.peak(batch)) // 2)
    useful = samples if budget.enough is None else min(samples, budget.enough)
    return _group_within(left, batch * budget.waiting, batch, useful)


def _group_within(left: int, each: int, batch: int, samples: int) -> int:
    """Batches in a group: enough for `samples`, or one and as many more of `each` bytes as fit into `left`."""
    return max(1, min(-(-samples // batch), 1 + left // each))


@dataclass(frozen=True)
class Layout:
    """How a job uses the memory of its device. On the CPU, `layers`, `resident` and `nbytes` mean nothing."""

    batch: int
    """Samples in a batch."""
    layers: int
    """Layers on the device at once: 1, the one that computes; 2, with the next being prefetched; 3, with the previous
    one being pruned and written."""
    resident: bool
    """Whether the hidden states of all samples stay on the device between layers."""
    nbytes: int
    """Estimated peak device memory."""
    room: int = 0
    """Bytes for Gram matrices, on the device or in RAM."""
    group: int = 1
    """Batches that a layer's experts process together."""
    windows: int = 0
    """Windows in a microbatch of tuning."""


def device_layout(
    skeleton: Skeleton, seqlen: int, samples: int, dtype: torch.dtype, device: torch.device, limit: int | None,
    *, head: bool = False, extra: int = 0, pairs: int = 0,
) -> Layout:  # fmt: skip
    """The fastest layout of a pass within `limit` bytes of the device, by default what is free; samples = 0: no pass.

    With `head`, the LM head runs on the device after the layers. `extra` bytes are reserved for other things, and
    `pairs` more if hidden states are resident.

    Given up in this order: pruning a layer during the next one's pass, resident hidden states, prefetching layers,
    batch size. Raises ResourceError with the smallest sufficient value.
    """
    from streamprune.model.device import free_on

    least = extra + memory_of(skeleton, seqlen, samples, dtype, 1, False, min(samples, 1), head=head)
    whose = "--max-vram"
    if limit is None:
        whose, limit = f"{device}'s free memory of", free_on(device)
    if limit is None:
        return Layout(batch_within(seqlen, samples), 2, False, least)
    if least > limit:
        raise ResourceError(
            f"{whose} {format_bytes(limit)} is not enough: this job needs --max-vram {-(-least >> 20) + 1}MiB"
        )
    wanted, enough = batch_within(seqlen, samples), max(1, min(samples, BATCH_TOKENS // seqlen))
    for layers, resident, fewest in (
        (3, True, enough), (2, True, enough), (2, False, enough), (1, False, enough), (1, False, 1),
    ):  # fmt: skip
        reserved = extra + (pairs if resident else 0)
        fixed = reserved + memory_of(skeleton, seqlen, samples, dtype, layers, resident, 0, head=head)
        each = reserved + memory_of(skeleton, seqlen, samples, dtype, layers, resident, 1, head=head) - fixed
        batch = min(wanted, (limit - fixed) // each) if samples and limit >= fixed else 0
        if batch >= fewest or (not samples and limit >= fixed):
            batch, nbytes = max(batch, 1), fixed + batch * each
            waiting = batch * seqlen * waiting_bytes(skeleton, dtype)
            group = _group_within((limit - nbytes) // 2, waiting, batch, samples) if waiting and samples else 1
            return Layout(batch, layers, resident and samples > 0, nbytes + (group - 1) * waiting, group=group)
    raise AssertionError("the least layout fits")


def layout_for(
    skeleton: Skeleton, seqlen: int, samples: int, dtype: torch.dtype, device: torch.device,
    max_ram: int | None, max_vram: int | None, *, head: bool = False, refit: RefitNeeds | None = None,
    tune: TuneNeeds | None = None,
) -> Layout:  # fmt: skip
    """The layout of a job: a pass over `samples` windows (0: pruning without one), with a refit and tuning if given.

    Raises ResourceError when `max_ram`, `max_vram` or the free memory is not enough, UsageError for `max_vram` on the
    CPU.
    """
    from streamprune.model.device import limit_memory

    on_device = device.type != "cpu"
    if not samples and not on_device:
        return streaming_layout(max_ram, max_vram)
    if not on_device:
        _refuse_vram(max_vram)
    budget = estimate(skeleton, seqlen, dtype, on_device=on_device)
    if not on_device:
        room = _room(budget, refit, max_ram, tune)
        budget = budget.refitting(refit, room).tuning(tune, 1)
        batch = choose_batch(budget, max(1, samples), seqlen, max_ram)
        windows = _windows_within(budget, tune, max_ram)
        return Layout(batch, 1, False, 0, room, group_of(budget, batch, samples, max_ram), windows)
    choose_batch(budget, max(1, samples), seqlen, max_ram)
    limit_memory(max_vram, device)
    if refit is None and tune is None:
        return device_layout(skeleton, seqlen, samples, dtype, device, max_vram, head=head)
    choices = list(extra_choices(refit, tune))
    for room, windows, extra in choices:
        pairs = tune.pairs if tune else 0
        try:
            found = device_layout(
                skeleton, seqlen, samples, dtype, device, max_vram, head=head, extra=extra, pairs=pairs
            )
        except ResourceError:
            if (room, windows, extra) == choices[-1]:
                raise
        else:
            return replace(found, room=room, windows=windows)
    raise AssertionError("the loop returns or raises")


def streaming_layout(max_ram: int | None, max_vram: int | None, base: int | None = None) -> Layout:
    """The layout of a CPU job that only streams weights; `base` as in streaming_bytes. Raises as layout_for."""
    _refuse_vram(max_vram)
    choose_batch(Budget(streaming_bytes(base) - RESERVE, RESERVE, 0, 0), 1, 1, max_ram)
    return Layout(1, 1, False, 0)


def streaming_bytes(base: int | None = None) -> int:
    """Estimated peak resident bytes of such a job; `base` defaults to what this process has, or soon will."""
    return (max(resident_bytes(), WITHOUT_TORCH) if base is None else base) + RESERVE


def _refuse_vram(max_vram: int | None) -> None:
    if max_vram is not None:
        raise UsageError("--max-vram is for a GPU, and this job runs on the CPU; leave it out, or see --device")


def _limit(max_ram: int | None) -> int | None:
    """Resident bytes not to exceed: `max_ram`, or what this process has and the machine has free; None if unknown."""
    free = available_bytes()
    return max_ram if max_ram is not None else None if free is None else resident_bytes() + free


def _windows_within(budget: Budget, needs: TuneNeeds | None, max_ram: int | None) -> int:
    """Windows in a microbatch of tuning: as many as memory allows, at most those of an optimizer step."""
    limit = _limit(max_ram)
    if needs is None or limit is None:
        return needs.most if needs else 0
    left = limit - budget.base - budget.reserve - budget.grams - needs.fixed
    return max(1, min(needs.most, left // max(1, needs.per_window)))


def _room(budget: Budget, needs: RefitNeeds | None, max_ram: int | None, tune: TuneNeeds | None = None) -> int:
    """Bytes for Gram matrices: enough for all of a layer, or what a pass with batches of one sample leaves."""
    limit = _limit(max_ram)
    if needs is None or limit is None:
        return needs.most if needs else 0
    return max(needs.least, min(needs.most, limit - budget.refitting(needs, 0).tuning(tune, 1).peak(1)))


def batch_within(seqlen: int, samples: int) -> int:
    """Samples in a batch on a device with ample memory."""
    return max(1, min(samples, DEVICE_BATCH_TOKENS // seqlen))
