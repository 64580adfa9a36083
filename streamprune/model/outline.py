"""The outline of a model as JSON values, for statistics files: a prune from one then builds no model.

    stages      [kind, path of the layer, names of its tensors without linears, linears, experts] for each, in order
    linears     module -> null for the tensor MODULE.weight; another tensor; or, where the weight is a part of one as
                of experts, [tensor, first byte in it, rows, columns]
    experts     [path of the module, linears of each expert that come first, the last one of each], by their numbers
                among the linears
    unused      tensors that the model does not use
    transposed  linears whose weight is stored (in, out)
    modules     all linear modules, in the order of the model
    dense       matrices of layers that cannot be pruned -> why
    tables      tensors of embeddings beside the input embedding
    streams     how many hidden states a token has between layers
    shared      linear -> [[layer, linear], …], its uses in earlier layers; left out where layers share no weights

Tensors themselves come from the headers of the checkpoint, against which everything is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.header import DTYPE_BITS, TensorRef
from streamprune.model.experts import Experts
from streamprune.model.stages import Outline, Stage


def to_json(outline: Outline) -> dict[str, Any]:
    """The outline as JSON values."""
    return {
        "stages": [_stage_to_json(stage) for stage in outline.stages],
        "unused": sorted(ref.name for s in outline.stages for ref in s.tensors if ref.name not in outline.used),
        "transposed": sorted(name for s in outline.stages for name in s.linears if name in outline.transposed),
        "modules": list(outline.modules),
        "dense": dict(outline.dense),
        "streams": outline.streams,
        "tables": sorted(name for s in outline.stages for name in s.tables),
        **({"shared": dict(outline.shared)} if outline.shared else {}),
    }


def _stage_to_json(stage: Stage) -> list[Any]:
    whole = {ref.name: ref for ref in stage.tensors}
    inside = {ref.name for ref in stage.linears.values()}
    linears: dict[str, Any] = {}
    for name, ref in stage.linears.items():
        tensor = whole[ref.name]
        if ref != tensor:
            linears[name] = [ref.name, ref.begin - tensor.begin, *ref.shape]
        else:
            linears[name] = None if ref.name == f"{name}.weight" else ref.name
    number = {name: i for i, name in enumerate(linears)}
    experts = [
        [e.path, [[number[name] for name in up] for up in e.up], [number[name] for name in e.down]]
        for e in stage.experts
    ]
    return [stage.kind, stage.prefix, [ref.name for ref in stage.tensors if ref.name not in inside], linears, experts]


def from_json(found: Any, checkpoint: Checkpoint) -> Outline:
    """The outline of a checkpoint. Raises ValueError unless `found` describes exactly the tensors that it has."""
    try:
        transposed = _texts(found["transposed"])
        unused, tables = _texts(found["unused"]), _texts(found["tables"])
        stages = [
            _stage(value, checkpoint.tensors, transposed, unused, i - 1) for i, value in enumerate(found["stages"])
        ]
        stages = [replace(stage, tables=tables & {ref.name for ref in stage.tensors}) for stage in stages]
        modules, dense = tuple(map(str, found["modules"])), {str(k): str(v) for k, v in found["dense"].items()}
        used, streams = frozenset(checkpoint.tensors.keys() - unused), int(found["streams"])
        shared = {str(k): tuple((int(i), str(n)) for i, n in uses) for k, uses in found.get("shared", {}).items()}
        outline = Outline(tuple(stages), used, transposed, modules, dense, shared, streams)
    except (KeyError, TypeError, IndexError, AttributeError) as e:
        raise ValueError(f"{type(e).__name__} {e}") from e
    held = [ref.name for stage in stages for ref in stage.tensors]
    if len(held) != len(set(held)) or set(held) != checkpoint.tensors.keys() or not unused <= set(held):
        raise ValueError("its stages do not hold each tensor of the checkpoint once")
    kinds = [stage.kind for stage in stages]
    if kinds != ["embed", *["layer"] * (len(kinds) - 2), "head"]:
        raise ValueError("its stages are out of order")
    linears = [name for stage in stages for name in stage.linears]
    if len(linears) != len(set(linears)) or not transposed <= set(linears):
        raise ValueError("its linears are not those of its stages")
    return outline


def _stage(
    value: Any, tensors: Mapping[str, TensorRef], transposed: frozenset[str], unused: frozenset[str], index: int
) -> Stage:
    kind, prefix, names, linears, experts = value
    places = {str(name): f"{name}.weight" if place is None else place for name, place in linears.items()}
    inside = {*_texts(names), *(place if isinstance(place, str) else place[0] for place in places.values())}
    held = tuple(ref for ref in tensors.values() if ref.name in inside)
    if len(held) != len(inside):
        raise ValueError(f"tensors of {kind} {prefix} are not in the checkpoint")
    whole = {ref.name: ref for ref in held}
    refs = {name: _linear(place, whole) for name, place in places.items()}
    mixtures = tuple(_experts(e, list(refs), transposed) for e in experts)
    if kind == "layer":
        return Stage(kind, index, str(prefix), held, refs, mixtures)
    if refs:
        raise ValueError(f"{kind} has linears")
    return Stage(str(kind), -1, "", held, {}, unclaimed=unused & whole.keys() if kind == "head" else frozenset())


def _linear(place: Any, tensors: Mapping[str, TensorRef]) -> TensorRef:
    """The tensor of a linear, or the part of a tensor that it is."""
    if isinstance(place, str):
        ref = tensors[place]
    else:
        name, begin, rows, columns = place
        whole = tensors[name]
        size = rows * columns * DTYPE_BITS[whole.dtype] // 8
        if not all(type(n) is int and n >= 0 for n in (begin, rows, columns)) or begin + size > whole.nbytes:
            raise ValueError(f"{name} has no such part")
        ref = replace(whole, shape=(rows, columns), begin=whole.begin + begin, end=whole.begin + begin + size)
    if len(ref.shape) != 2:
        raise ValueError(f"{ref.name} is no matrix")
    return ref


def _experts(value: Any, linears: Sequence[str], transposed: frozenset[str]) -> Experts:
    path, ups, downs = value
    if len(ups) != len(downs) or not all(type(n) is int and n >= 0 for up in (*ups, downs) for n in up):
        raise ValueError(f"the experts of {path} are not linears of their layer")
    found = Experts(str(path), tuple(tuple(linears[n] for n in up) for up in ups), tuple(linears[n] for n in downs))
    return replace(found, transposed=transposed & set(found.linears))


def _texts(values: Any) -> frozenset[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("names are no texts")
    return frozenset(values)
