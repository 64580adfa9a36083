"""The setup of a job: model, device, dtype, kernels, and what is to be pruned.

It is found from headers and configuration, before a text is read or anything is written; `plan` and the jobs use the
same code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamprune.calibration.statistics import StatisticsFile
from streamprune.disk.checkpoint import Checkpoint
from streamprune.errors import UnsupportedError, UsageError
from streamprune.model.device import compute_dtype, resolve_device
from streamprune.model.skeleton import Skeleton, build_skeleton, stored_dtype
from streamprune.model.tracing import traced
from streamprune.pruning.records import Resolved
from streamprune.pruning.spec import JobSpec
from streamprune.pruning.target import Target


@dataclass(frozen=True)
class Setup:
    """The setup of one job."""

    spec: JobSpec
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    """dtype of the computation."""
    backend: str
    skeleton: Skeleton
    target: Target | None
    """None for calibrate."""
    propagate: str

    @classmethod
    def of(cls, spec: JobSpec, checkpoint: Checkpoint, resolved: Resolved | None = None) -> Setup:
        """The setup of a new job, or of a resumed one, with the choices in `resolved`.

        Raises UsageError for settings that do not fit the model or the machine, UnsupportedError for the model.
        """
        device = resolve_device(resolved.device if resolved else spec.resources.device)
        backend = spec.resources.backend
        if backend == "auto":
            backend = "numba" if device.type == "cpu" else "torch"
        if backend == "numba" and device.type != "cpu":
            raise UsageError(f"--backend numba runs on the CPU only, not on {device}; leave it out or use torch")
        dtype = compute_dtype(resolved.dtype if resolved else spec.resources.dtype, stored_dtype(checkpoint), device)
        skeleton = build_skeleton(checkpoint, dtype, trust_remote_code=spec.trust_remote_code)
        try:
            skeleton = traced(checkpoint, skeleton, dtype)
        except UnsupportedError:
            if spec.calibration is not None:  # or there is no forward pass, and nothing that could not be streamed
                raise
        target = Target.of_job(spec, skeleton, backend)
        if target is not None and resolved and resolved.allocation:
            target = target.sharing(resolved.allocation)
        return cls(spec, checkpoint, device, dtype, backend, skeleton, target, propagated(spec.propagate, skeleton))


def propagated(propagate: str, skeleton: Skeleton) -> str:
    """`propagate` with "auto" replaced: by "asymmetric", or by "pruned" for mixtures of experts.

    Raises UnsupportedError for "asymmetric" with mixtures of experts.
    """
    if propagate == "auto":
        return "pruned" if skeleton.experts else "asymmetric"
    if propagate == "asymmetric" and skeleton.experts:
        raise UnsupportedError(
            "--propagate asymmetric compares inputs of the dense and the pruned model token by token, but their "
            "routers may choose different experts; pass --propagate pruned"
        )
    return propagate


def open_given(setup: Setup) -> StatisticsFile | None:
    """The statistics file given with --stats, or gathered for --allocate; None without either.

    Raises UsageError unless it belongs to this model and has every linear that is pruned.
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
