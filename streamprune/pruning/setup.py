"""The setup of a job: model, device, dtype, kernels, and what is to be pruned.

It is found from headers and configuration, before a text is read or anything is written; `plan` and the jobs use the
same code.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamprune.calibration.statistics import StatisticsFile
from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.header import show
from streamprune.disk.quantised import PlainView
from streamprune.errors import CorruptStateError, UnsupportedError, UsageError
from streamprune.model.arithmetic import COMPUTED, compute_name, is_cpu, stored_name
from streamprune.model.further import with_further
from streamprune.model.outline import from_json
from streamprune.model.stages import Outline
from streamprune.process.imports import many_imports
from streamprune.pruning.records import Resolved
from streamprune.pruning.shared import check_shared
from streamprune.pruning.spec import JobSpec
from streamprune.pruning.target import Target
from streamprune.pruning.windows import calibration_for_pass

if TYPE_CHECKING:
    import torch

    from streamprune.model.skeleton import Skeleton


@dataclass(frozen=True)
class Setup:
    """The setup of one job."""

    spec: JobSpec
    checkpoint: Checkpoint
    device_name: str
    dtype_name: str
    """dtype of the computation, such as "bfloat16"."""
    backend: str
    model: Outline
    """A Skeleton, unless the job computes with no layer and its statistics have an outline of the model."""
    target: Target | None
    """None for calibrate."""
    propagate: str

    @classmethod
    def of(
        cls, spec: JobSpec, checkpoint: Checkpoint, resolved: Resolved | None = None, known: Outline | None = None
    ) -> Setup:
        """The setup of a new job, or of a resumed one, with the choices in `resolved`.

        `known` is the outline of the model, if statistics have it. Raises UsageError for settings that do not fit the
        model or the machine, UnsupportedError for the model.
        """
        asked = resolved.device if resolved else spec.resources.device
        if is_cpu(asked):
            device = "cpu"
        else:
            from streamprune.model.device import resolve_device

            device = str(resolve_device(asked))
        on_cpu, backend = device == "cpu", spec.resources.backend
        if backend == "auto":
            backend = "numba" if on_cpu else "torch"
        if backend == "numba" and not on_cpu:
            raise UsageError(f"--backend numba runs on the CPU only, not on {device}; leave it out or use torch")
        dtype = resolved.dtype if resolved else spec.resources.dtype
        dtype = compute_name(dtype, COMPUTED[stored_name(checkpoint)], on_cpu)
        if known is not None and on_cpu and calibration_for_pass(spec) is None:
            model = known
        else:
            model = _built(spec, checkpoint, dtype)
        if spec.recipe is not None and spec.recipe.mtp:
            model = with_further(model)
        check_shared(spec, model)
        target = Target.of_job(spec, checkpoint, model, backend)
        if target is not None and resolved and resolved.allocation:
            target = target.sharing(resolved.allocation)
        propagate = propagated(spec.propagate, model)
        if propagate != "dense" and target is not None and target.kept:
            raise UsageError("--quantize keep is for --propagate dense; leave out --propagate")
        return cls(spec, checkpoint, device, dtype, backend, model, target, propagate)

    @functools.cached_property
    def device(self) -> torch.device:
        """Where the job computes."""
        import torch

        return torch.device(self.device_name)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """dtype of the computation."""
        import torch

        found: torch.dtype = getattr(torch, self.dtype_name)
        return found

    @property
    def skeleton(self) -> Skeleton:
        """The model that the job computes with."""
        from streamprune.model.skeleton import Skeleton

        assert isinstance(self.model, Skeleton)
        return self.model

    @property
    def needs_no_torch(self) -> bool:
        """Whether weights go from file to file through Numba alone, without a tensor of torch."""
        spec, plain = self.spec, not isinstance(self.checkpoint, PlainView) and not self.checkpoint.streamed
        masks = spec.recipe is not None and spec.recipe.quantize is None and spec.recipe.allocate is None
        return masks and plain and self.backend == "numba" and calibration_for_pass(spec) is None


def _built(spec: JobSpec, checkpoint: Checkpoint, dtype: str) -> Skeleton:
    with many_imports():
        import torch

        from streamprune.model.skeleton import build_skeleton
        from streamprune.model.tracing import traced

    skeleton = build_skeleton(checkpoint, getattr(torch, dtype), trust_remote_code=spec.trust_remote_code)
    try:
        return traced(checkpoint, skeleton, getattr(torch, dtype))
    except UnsupportedError:
        if spec.calibration is not None:  # or there is no forward pass, and nothing that could not be streamed
            raise
        return skeleton


def propagated(propagate: str, model: Outline) -> str:
    """`propagate` with "auto" replaced: by "asymmetric", or by "pruned" for mixtures of experts, or by "dense" where
    layers share weights.

    Raises UnsupportedError for "asymmetric" with mixtures of experts.
    """
    if propagate == "auto":
        return "dense" if model.shared else "pruned" if model.has_experts else "asymmetric"
    if propagate == "asymmetric" and model.has_experts:
        raise UnsupportedError(
            "--propagate asymmetric compares inputs of the dense and the pruned model token by token, but their "
            "routers may choose different experts; pass --propagate pruned"
        )
    return propagate


def open_given(spec: JobSpec, checkpoint: Checkpoint) -> tuple[StatisticsFile | None, Outline | None]:
    """The statistics file given with --stats, or gathered for --allocate, and the outline of the model in it.

    None without either; an earlier file has no outline. Raises UsageError if the file is needed and belongs to another
    model, CorruptStateError if the outline is not that of this model.
    """
    if spec.stats_path is None:
        return None, None
    given = StatisticsFile(spec.stats_path)
    if given.model != checkpoint.identity():
        if _needs_given(spec):
            raise UsageError(f"--stats {given.path} belongs to another model; make it with `calibrate {spec.source}`")
        return given, None
    found = given.outline()
    try:
        return given, None if found is None else from_json(found, checkpoint)
    except ValueError as e:
        raise given.damaged_outline(e) from e


def check_given(given: StatisticsFile | None, setup: Setup) -> None:
    """Raises as StatisticsFile.load unless the file has every linear that is pruned, and CorruptStateError if in place
    of one it names what this model does not have."""
    if given is None or setup.target is None or not _needs_given(setup.spec):
        return
    known = {*setup.model.modules, *(name for stage in setup.model.layer_stages for name in stage.linears)}
    strange = sorted(given.groups.keys() - known)
    for stage in setup.model.layer_stages:
        for name, width in setup.target.linears_of(stage).items():
            if strange and name not in given.groups:
                raise CorruptStateError(
                    f"{given.path} is damaged: it was made from this model, and has statistics of {show(strange[0])}, "
                    f"which is no linear of it, and none of {name}; make it again with `calibrate`"
                )
            given.load(name, width)


def _needs_given(spec: JobSpec) -> bool:
    return spec.recipe is not None and (spec.recipe.needs_statistics or spec.recipe.allocate is not None)
