"""The stages of a model, and which of its tensors are linears: all that pruning needs to know. Imports no torch.

A stage is the part of the model that is in memory at once:

    embed      everything before the decoder layers
    layer i    decoder layer i
    head       everything after them (final norm, lm_head), and tensors that the model does not use
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from streamprune.disk.header import TensorRef
from streamprune.model.experts import Experts

Uses = tuple[tuple[int, str], ...]
"""Earlier uses of a linear whose weight several layers share: (layer, what it is called there)."""

PRUNABLE = ("BF16", "F16", "F32")
"""Dtypes of weights that can be pruned."""


@dataclass(frozen=True)
class Stage:
    """A part of the model that is in memory at once, and one part of an output shard."""

    kind: str
    """"embed", "layer" or "head"."""
    index: int
    """Layer number; -1 for embed and head."""
    prefix: str
    """Module path of a layer, "model.layers.3"; empty for embed and head."""
    tensors: tuple[TensorRef, ...]
    """All tensors of the checkpoint that belong to the stage."""
    linears: Mapping[str, TensorRef]
    """Module path of each linear of a layer -> its weight, in the order of the module. Experts' linears come last;
    their weights may be slices of a tensor (model/experts.py)."""
    experts: tuple[Experts, ...] = ()
    """The layer's experts, whose weights are loaded one expert at a time."""
    unclaimed: frozenset[str] = frozenset()
    """Names of tensors that the model does not use; they are copied to the output."""
    tables: frozenset[str] = frozenset()
    """Names of embeddings beside the input embedding, of which only the rows that are looked up are loaded."""

    @property
    def name(self) -> str:
        return f"layer {self.index}" if self.kind == "layer" else self.kind

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def resident_tensors(self) -> list[TensorRef]:
        """The tensors that are loaded together: all but experts', tables and unclaimed ones."""
        of_experts = {self.linears[name].name for experts in self.experts for name in experts.linears}
        excluded = self.unclaimed | self.tables | of_experts
        return [t for t in self.tensors if t.name not in excluded]

    @functools.cached_property
    def expert_of(self) -> dict[str, str]:
        """Linear of an expert -> name of the expert."""
        return {
            name: f"{experts.path}.{number}"
            for experts in self.experts
            for number in range(len(experts.down))
            for name in experts.of([number])
        }

    @property
    def resident(self) -> int:
        """Bytes of weights in memory at once: resident_tensors, and two of the largest expert."""
        by_expert = [
            sum(self.linears[name].nbytes for name in (*up, down))
            for experts in self.experts
            for up, down in zip(experts.up, experts.down, strict=True)
        ]
        return sum(t.nbytes for t in self.resident_tensors) + 2 * max(by_expert, default=0)


@dataclass(frozen=True)
class Outline:
    """A model as pruning sees it: made from its modules (skeleton.py), or read from a statistics file (outline.py)."""

    stages: tuple[Stage, ...]
    used: frozenset[str]
    """Names of the stored tensors that the model's parameters and buffers are."""
    transposed: frozenset[str]
    """Linears whose weight is stored (in, out): transformers' Conv1D, and some experts."""
    modules: tuple[str, ...]
    """Paths of all modules that are linear maps, in the order of the model, those outside the layers included."""
    dense: Mapping[str, str]
    """Matrices of layers that cannot be pruned, by parameter name -> why (model/prunable.py)."""
    shared: Mapping[str, Uses]
    """Linear of the last layer that uses its weight -> its uses in earlier layers (model/shared.py)."""
    streams: int
    """How many hidden states of the configured size a token has between layers; more than 1 with hyper-connections."""

    @property
    def layer_stages(self) -> tuple[Stage, ...]:
        return self.stages[1:-1]

    def layer_after(self, stage: Stage) -> bool:
        """Whether another layer comes after the layer `stage`; False for other stages."""
        return stage.kind == "layer" and stage.index + 1 < len(self.layer_stages)

    @property
    def has_experts(self) -> bool:
        return any(stage.experts for stage in self.stages)
