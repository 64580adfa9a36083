"""Mixtures of experts: where each expert's weights are stored, and pooling of statistics over experts.

transformers keeps the experts of a layer in one module with weights of three dimensions, `gate_up_proj` (experts, 2 ·
intermediate, hidden) and `down_proj` (experts, hidden, intermediate); some have no gate, only `up_proj`, some are
transposed, and some have another form (expert_forms.py).
A checkpoint holds the same, or one matrix per expert and projection. Either way each matrix of an expert is a linear
here, called `….experts.3.gate_proj`, or `….experts.3.gate_up_proj` where both are one matrix.

The inputs of an expert's linears are the tokens routed to it, multiplied by their routing weights: an error in the
output for a token with routing weight r reaches the layer's output multiplied by r.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streamprune.disk.header import TensorRef
from streamprune.errors import CheckpointError, UnsupportedError
from streamprune.methods.stats import InputStats

if TYPE_CHECKING:
    from streamprune.model.expert_forms import Form

Pieces = list[tuple[str, int, TensorRef]]
"""The parts that transformers assembles a weight from: (stored name, position among the concatenated matrices, tensor).
Instead of a position, TRANSPOSED, or OTHER for an operation that is not supported."""

TRANSPOSED, OTHER = -1, -2

APART = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""What a matrix of an expert is stored as, one below the other, where a checkpoint has linears (out, in) for each
expert although transformers does not: as llm-compressor and `--quantize fp8` write experts of one tensor."""

_NUMBER = re.compile(r"\.(\d+)\.")
_POOLED = "pooled"


@dataclass(frozen=True)
class Experts:
    """The linears of the experts of one module, by expert. Outputs of an expert's `up` linears are concatenated."""

    path: str
    up: tuple[tuple[str, ...], ...]
    down: tuple[str, ...]
    transposed: frozenset[str] = frozenset()
    """Linears whose matrix is stored (in, out)."""

    @property
    def linears(self) -> list[str]:
        """All linears, expert after expert, in the order of use."""
        return self.of(range(len(self.down)))

    def of(self, numbers: Iterable[int]) -> list[str]:
        """The linears of some experts."""
        return [name for e in numbers for name in (*self.up[e], self.down[e])]


def find_experts(
    path: str, form: Form, stored: Mapping[str, TensorRef], pieces: Mapping[str, Pieces]
) -> tuple[Experts, dict[str, TensorRef]]:
    """The experts of the module called `path`, and parameter name -> tensor of each of their linears' matrices.

    `stored` has tensors by parameter name; `pieces` the parts of weights that transformers assembles, by parameter
    name. Raises CheckpointError when matrices are missing or of another shape than config.json says, UnsupportedError
    when they are stored in an unsupported form.
    """
    form.check(path)
    transposed: list[str] = []
    names: dict[str, list[tuple[str, ...]]] = {}
    refs: dict[str, TensorRef] = {}
    for leaf in form.leaves:
        whole, shape, turned = f"{path}.{leaf}", form.stored_shape(leaf), form.is_transposed(leaf)
        if whole in stored:
            found = _sliced(path, form.name(leaf), stored[whole], shape, form.shape(leaf))
        elif whole not in pieces and (apart := _apart(path, leaf, stored, form.count)):
            shape, turned = (shape[0], *shape[:0:-1]) if turned else shape, False
            found = _pieced(path, apart, shape, turned, form.count)
        elif whole not in pieces:
            raise CheckpointError(f"tensor {whole} is missing; is the download complete?")
        elif all(place == TRANSPOSED for _, place, _ in pieces[whole]):
            ref = pieces[whole][0][2]
            if ref.shape != shape:  # transformers transposes only if the shapes differ
                shape, turned = (shape[0], shape[2], shape[1]), not turned
            found = _sliced(path, form.name(leaf), ref, shape, shape)
        else:
            found = _pieced(path, pieces[whole], shape, turned, form.count)
        names[leaf] = [tuple(matrices) for matrices in found[: form.count]]
        for matrices in found[: form.count]:
            refs |= {f"{name}.weight": ref for name, ref in matrices.items()}
            transposed += matrices if turned else ()
    up = tuple(tuple(name for leaf in form.up for name in names[leaf][e]) for e in range(form.count))
    down = tuple(matrices[0] for matrices in names[form.down])
    return Experts(path, up, down, frozenset(transposed)), refs


def _apart(path: str, leaf: str, stored: Mapping[str, TensorRef], count: int) -> Pieces:
    """The tensors of a parameter of experts that are stored as linears of their own, see APART; or none."""
    names = [(f"{path}.{e}.{one}.weight", place) for e in range(count) for place, one in enumerate(APART.get(leaf, ()))]
    return [(name, place, stored[name]) for name, place in names if name in stored]


def _sliced(
    path: str, name: str, ref: TensorRef, stored: tuple[int, ...], shape: tuple[int, ...]
) -> list[dict[str, TensorRef]]:
    """Each expert's matrix as a slice of one tensor: linear -> slice.

    The tensor has the shape `stored`, which is read as `shape` (experts, rows, columns).
    """
    if ref.shape != stored:
        raise CheckpointError(
            f"{ref.shard}: tensor {ref.name} has shape {list(ref.shape)}, config.json says {list(stored)}"
        )
    size = ref.nbytes // shape[0]
    return [
        {f"{path}.{e}.{name}": replace(ref, shape=shape[1:], begin=begin, end=begin + size)}
        for e, begin in enumerate(range(ref.begin, ref.begin + shape[0] * size, size))
    ]


def _pieced(
    path: str, pieces: Pieces, shape: tuple[int, ...], turned: bool, count: int
) -> list[dict[str, TensorRef]]:  # fmt: skip
    """Each expert's matrices where these are separate tensors, in the order of concatenation: linear -> tensor.

    Only the first `count` experts compute with theirs.
    """
    found: list[dict[int, tuple[str, TensorRef]]] = [{} for _ in range(shape[0])]
    for name, place, ref in pieces:
        numbers = _NUMBER.findall(name.rpartition("experts")[2])
        if place < 0 or not numbers or turned:
            raise UnsupportedError(
                f"{ref.shard}: tensor {ref.name} has to be converted before experts can compute with it; such weights "
                "cannot be pruned yet"
            )
        expert = int(numbers[0])
        if not 0 <= expert < shape[0]:
            raise CheckpointError(f"{ref.shard}: tensor {ref.name} belongs to an expert that config.json does not have")
        leaf = ref.name.removesuffix(".weight").rpartition(".")[2]
        found[expert][place] = (f"{path}.{expert}.{leaf}", ref)
    leaves = {place: name.rpartition(".")[2] for matrices in found for place, (name, _) in matrices.items()}
    del found[count:]
    for expert, matrices in enumerate(found):
        if missing := [leaf for place, leaf in leaves.items() if place not in matrices]:
            raise CheckpointError(f"the weight of {path}.{expert}.{missing[0]} is missing; is the download complete?")
        for _, ref in matrices.values():
            if ref.shape != (shape[1] // len(leaves), shape[2]) or shape[1] % len(leaves):
                raise CheckpointError(
                    f"{ref.shard}: tensor {ref.name} has shape {list(ref.shape)}; {len(leaves)} such do not make the "
                    f"{list(shape[1:])} of config.json"
                )
    return [{matrices[place][0]: matrices[place][1] for place in sorted(matrices)} for matrices in found]


def pool(experts: Iterable[Experts], stats: dict[str, InputStats], groups: dict[str, str], least: int) -> list[str]:
    """Gives experts that saw fewer than `least` tokens the pooled statistics of their layer; returns their linears.

    Changes `stats` (group -> statistics) and `groups` (linear -> group): the sums over experts become groups like
    `….experts.pooled.gate_proj`. Where no expert of a layer saw a token, there is nothing to pool.
    """
    pooled_linears = []
    for mixture in experts:
        roles = [*zip(*mixture.up, strict=True), mixture.down]
        for names in roles:
            leaders = [groups.get(name) for name in names]
            seen = [stats[leader] for leader in leaders if leader is not None]
            few = [
                n for n, leader in zip(names, leaders, strict=True) if leader is None or stats[leader].tokens < least
            ]
            if not few or not seen:
                continue
            total = seen[0]
            for other in seen[1:]:
                total = total + other
            pooled = f"{mixture.path}.{_POOLED}.{names[0].rpartition('.')[2]}"
            stats[pooled] = total
            groups |= dict.fromkeys(few, pooled)
            pooled_linears += few
    for leader in stats.keys() - set(groups.values()):
        del stats[leader]
    return pooled_linears


def is_pooled(leader: str | None) -> bool:
    """Whether a group holds statistics pooled over the experts of a layer."""
    return leader is not None and leader.rpartition(".")[0].endswith(f".{_POOLED}")
