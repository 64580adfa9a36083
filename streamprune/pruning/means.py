"""What a run reads, computes and writes with. torch is imported only for jobs that need it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamprune.disk.mapped import MappedFiles
from streamprune.disk.read_ahead import ReadAhead
from streamprune.errors import ResourceError
from streamprune.model.stages import Stage
from streamprune.process.imports import many_imports
from streamprune.process.share import Share
from streamprune.pruning.prepare import Prepared
from streamprune.pruning.records import StageRecord
from streamprune.pruning.target import Target

if TYPE_CHECKING:
    from streamprune.model.loader import WeightLoader
    from streamprune.pruning.array_shard import ArrayWriter
    from streamprune.pruning.forward import CalibrationPass
    from streamprune.pruning.shard import ShardWriter


@dataclass(frozen=True)
class Means:
    """The means of one run; the checkpoint is mapped for as long as the stack that they were opened in lasts."""

    job: Prepared
    maps: MappedFiles
    loader: WeightLoader | ReadAhead
    forward: CalibrationPass | None
    """None without calibration."""

    @classmethod
    def of(cls, job: Prepared, records: Sequence[StageRecord], stack: ExitStack) -> Means:
        """The means of a run that continues after `records`."""
        setup = job.setup
        if setup.needs_no_torch:
            maps = stack.enter_context(MappedFiles(setup.checkpoint))
            return cls(job, maps, stack.enter_context(ReadAhead(maps)), None)
        with many_imports():
            from streamprune.model.decoded import maps_of
            from streamprune.model.loader import WeightLoader

        tensors = stack.enter_context(maps_of(setup.checkpoint, setup.spec.out.absolute().parent))
        drop_cache = setup.spec.verb == "prune"
        loader = stack.enter_context(WeightLoader(tensors, setup.device, drop_cache=drop_cache))
        return cls(job, tensors, loader, _pass(job, records, loader))

    def stages_at_work(self) -> tuple[int, int]:
        """See memory.stages_at_work."""
        if isinstance(self.loader, ReadAhead):
            return 1, 0
        from streamprune.pruning.memory import stages_at_work

        return stages_at_work(self.job.setup, self.job.layout)

    def expect(self, stages: Sequence[Stage], target: Target | None) -> None:
        """Starts prefetching the weights of a stage and the next, of which `target` is pruned.

        To a device, only those of layers.
        """
        copies = self.loader.copies
        for stage in stages[: self.job.layout.layers] if copies else stages:
            if not copies or (stage.kind == "layer" and self.forward is not None):
                self.loader.expect(stage.tensors if self.forward is None else stage.resident_tensors)
            elif target is not None and stage.kind == "layer":
                self.loader.expect(stage.linears[n] for n in target.linears_of(stage) if n not in stage.expert_of)

    def spool_bytes(self, done: Sequence[StageRecord]) -> int:
        """See memory.spool_bytes."""
        if isinstance(self.loader, ReadAhead):
            return 0
        from streamprune.pruning.memory import spool_bytes

        return spool_bytes(self.job.setup, self.job.layout, done)

    @property
    def tensors(self) -> WeightLoader:
        """The loader of a job that needs torch."""
        if isinstance(self.loader, ReadAhead):
            raise TypeError("this job has no tensors")
        return self.loader

    def writer(self, target: Target) -> ShardWriter | ArrayWriter:
        """Writes the stages of the output."""
        allow_zeros = self.job.setup.spec.allow_zeros
        if isinstance(self.loader, ReadAhead):
            from streamprune.pruning.array_shard import ArrayWriter

            return ArrayWriter(target, self.maps, allow_zeros=allow_zeros)
        return self.tensor_writer(target)

    def tensor_writer(self, target: Target) -> ShardWriter:
        """As `writer`, for a job that needs torch."""
        from streamprune.pruning.shard import ShardWriter

        return ShardWriter(target, self.tensors, self.job.ranks, allow_zeros=self.job.setup.spec.allow_zeros)

    def refuse_empty(self) -> None:
        """Raises CheckpointError for linears of zeros, see model/damage.py."""
        linears = [ref for stage in self.job.setup.model.stages for ref in stage.linears.values()]
        if isinstance(self.loader, ReadAhead):
            from streamprune.model.array_checks import refuse_empty_bits

            return refuse_empty_bits(self.maps, linears)
        from streamprune.model.zeros import refuse_empty

        return refuse_empty(self.loader.maps, linears)

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Within it, products have full precision, see model/device.exact_products."""
        if isinstance(self.loader, ReadAhead):
            yield
            return
        from streamprune.model.device import exact_products

        with exact_products():
            yield

    @contextmanager
    def out_of_memory_named(self) -> Iterator[None]:
        """Raises ResourceError where memory runs out within it."""
        if isinstance(self.loader, ReadAhead):
            try:
                yield
            except MemoryError as e:
                raise ResourceError("cpu ran out of memory; free some and run the same command again") from e
            return
        from streamprune.model.passes import out_of_memory_named

        with out_of_memory_named(self.job.setup.device):
            yield


def _pass(job: Prepared, records: Sequence[StageRecord], loader: WeightLoader) -> CalibrationPass | None:
    windows, setup, layout = job.windows, job.setup, job.layout
    if windows is None:
        return None
    with many_imports():
        from streamprune.kernels import cpu, torch_ops
        from streamprune.model.activations import Activations
        from streamprune.model.streamed import StreamedModel
        from streamprune.pruning.forward import CalibrationPass
        from streamprune.pruning.paired import PairedPass

    share = Share(job.ranks, len(windows), job.resolved.batch, layout.group)
    smallest = min([layout.batch, *(r.batch for r in records if r.batch)])
    streamed = StreamedModel(
        setup.skeleton, loader, setup.dtype, max_samples=smallest if smallest < share.batch else None,
        weighted=setup.spec.expert_stats == "weighted", group=layout.group,
    )  # fmt: skip
    activations = Activations(job.cache, streamed.cache_dtype, setup.device, resident=layout.resident)
    kind = PairedPass if setup.propagate == "asymmetric" else CalibrationPass
    return kind(streamed, windows, share, activations, (cpu if setup.backend == "numba" else torch_ops).accumulate)
