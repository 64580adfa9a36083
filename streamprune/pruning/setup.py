"""What a job works on and with: model, device, dtype, kernels, and what is to be pruned.

Known from headers and configuration before a text is read or a byte written; `plan` and the jobs settle it alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamprune.calibration.statistics import StatisticsFile
from streamprune.disk.checkpoint import Checkpoint
from streamprune.errors import UnsupportedError, UsageError
from streamprune.model.device import compute_dtype, resolve_device
from streamprune.model.skeleton import Skeleton, build_skeleton, stored_dtype
from streamprune.pruning.records import Resolved
from streamprune.pruning.spec import JobSpec
from streamprune.pruning.target import Target


@dataclass(frozen=True)
class Setup:
    """One job's, see the module."""

    spec: JobSpec
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    """What is computed in."""
    backend: str
    skeleton: Skeleton
    target: Target | None
    """None for calibrate."""
    propagate: str

    @classmethod
    def of(cls, spec: JobSpec, checkpoint: Checkpoint, resolved: Resolved | None = None) -> Setup:
        """For a new job, or as `resolved` when it began. Raises UsageError and UnsupportedError for what cannot be."""
        device = resolve_device(resolved.device if resolved else spec.resources.device)
        backend = spec.resources.backend
        if backend == "auto":
            backend = "numba" if device.type == "cpu" else "torch"
        if backend == "numba" and device.type != "cpu":
            raise UsageError(f"--backend numba runs on the CPU only, not on {device}; leave it out or use torch")
        dtype = compute_dtype(resolved.dtype if resolved else spec.resources.dtype, stored_dtype(checkpoint), device)
        skeleton = build_skeleton(checkpoint, dtype, trust_remote_code=spec.trust_remote_code)
        target = Target.of_job(spec, skeleton, backend)
        if target is not None and resolved and resolved.allocation:
            target = target.sharing(resolved.allocation)
        return cls(spec, checkpoint, device, dtype, backend, skeleton, target, propagated(spec.propagate, skeleton))


def propagated(propagate: str, skeleton: Skeleton) -> str:
    """What "auto" comes to for a refit: "asymmetric", or "pruned" for mixtures of experts.

    Raises UnsupportedError where it is asked for and cannot be.
    """
    if propagate == "auto":
        return "pruned" if skeleton.experts else "asymmetric"
    if propagate == "asymmetric" and skeleton.experts:
        raise UnsupportedError(
            "--propagate asymmetric needs the same tokens in the dense and in the pruned model, and routing sends them "
            "to other experts; pass --propagate pruned"
        )
    return propagate


def open_given(setup: Setup) -> StatisticsFile | None:
    """The file given with --stats, or what --allocate goes by.

    Raises UsageError unless it is this model's and has every linear that is pruned.
    """
    spec, target, skeleton = setup.spec, setup.target, setup.skeleton
    if spec.stats_path is None:
        return None
    given = StatisticsFile(spec.stats_path)
    if target is None or not (target.recipe.needs_statistics or target.recipe.allocate):
        return given
    if given.model != setup.checkpoint.identity():
        raise UsageError(f"--stats {given.path} belongs to another model; make it with `calibrate {spec.source}`")
    for stage in skeleton.layer_stages:
        for name, width in target.linears_of(stage).items():
            given.load(name, width)
    return given
