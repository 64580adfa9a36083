"""Statistics of the inputs of a stage's linears: gathered in a forward pass, or given in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from streamprune.calibration.statistics import StatisticsFile, write_statistics
from streamprune.errors import UsageError
from streamprune.methods.stats import InputStats
from streamprune.model.experts import pool
from streamprune.model.stages import Stage
from streamprune.pruning.prepare import Prepared
from streamprune.pruning.records import StageRecord
from streamprune.pruning.shared import sum_uses

if TYPE_CHECKING:
    from streamprune.calibration.grams import LayerGrams
    from streamprune.pruning.forward import CalibrationPass


def gather(
    job: Prepared, forward: CalibrationPass, stage: Stage, record: StageRecord, grams: LayerGrams | None,
    *, write: bool, routed: bool,
) -> dict[str, InputStats]:  # fmt: skip
    """The forward pass through the embedding or a layer; returns the statistics of each linear's input.

    Writes the statistics of a layer to its file (rank 0), and fills in the `record`. `write` and `routed`: see
    CalibrationPass.layer.
    """
    persist = forward.persists()
    if stage.kind == "embed":
        forward.embed(persist)
        record.cache, record.batch = persist, forward.streamed.max_samples
        return {}
    collector = forward.layer(stage, write, persist, grams, routed=routed)
    record.cache, record.batch = write and persist, forward.streamed.max_samples
    found, setup, path = collector.finish(), job.setup, job.state.layer_stats
    if pooled := pool(stage.experts, found, collector.groups, setup.spec.expert_tokens):
        record.pooled = pooled
    shared = sum_uses(setup.model, stage, found, collector.groups, path, job.ranks)
    if grams is not None:
        grams.leave_out([*pooled, *shared])
    if not job.ranks.rank:
        record.statistics = write_statistics(
            path(stage.index), found.items(), collector.groups, {}, {}, {stage.prefix: collector.update}
        )
    return {name: found[leader] for name, leader in collector.groups.items()}


def known_of(given: StatisticsFile | None, gathered: Mapping[str, InputStats]) -> Callable[[str, int], InputStats]:
    """(linear, in_features) -> the statistics of its input, from the file that is `given` or those just `gathered`.

    Raises UsageError for a linear of which neither knows.
    """

    def known(name: str, in_features: int) -> InputStats:
        if given is not None:
            return given.load(name, in_features)
        if name not in gathered:
            raise UsageError(
                f"{name} was not called on this text, so there are no statistics for it; leave it out with --skip"
            )
        return gathered[name]

    return known
