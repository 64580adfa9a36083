"""Maps a model's parameters to the tensors of a checkpoint, by name, as transformers does.

Names in old checkpoints differ from today's modules; transformers' own tables translate them. Tied weights may be
stored once, FP8 weights come with a scale, and experts' weights are mapped matrix by matrix.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.float_quantized import SCALE
from streamprune.disk.header import TensorRef
from streamprune.errors import CheckpointError, UnsupportedError
from streamprune.model.expert_forms import form_of
from streamprune.model.experts import OTHER, TRANSPOSED, Experts, Pieces, find_experts

_INTEGERS = frozenset({"I64", "I32", "I16", "I8", "U8", "BOOL"})
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def match_tensors(
    checkpoint: Checkpoint, model: nn.Module, quantised: bool
) -> tuple[dict[str, TensorRef], dict[str, Experts]]:
    """(name of parameter or persistent buffer -> stored tensor, path of a module of experts -> its experts).

    Of a parameter whose rows are stored apart, the pieces are called `name[0]`, `name[1]` and so on (pieces_of).
    In a `quantised` checkpoint linears may be FP8; their scales are included as `….weight_scale`. Raises
    CheckpointError for tensors that are missing or of a wrong shape, UnsupportedError for dtypes and forms that cannot
    be pruned.
    """
    stored, converted = _module_names(checkpoint, model)
    owners: dict[int, str] = {}
    found: dict[str, TensorRef] = {}
    missing: list[tuple[str, nn.Parameter]] = []
    experts: dict[str, Experts] = {}
    of_experts: set[str] = set()
    for path, module in model.named_modules():
        if (form := form_of(model, path, module)) is not None:
            experts[path], refs = find_experts(path, form, stored, converted)
            of_experts |= {f"{path}.{leaf}" for leaf in form.leaves}
            found |= refs
            for weight, matrix in refs.items():
                if quantised and matrix.dtype == "F8_E4M3":
                    scale = checkpoint.tensors.get(matrix.name + SCALE)
                    found[weight + SCALE] = _scale_of(checkpoint, matrix, scale)
                else:
                    _check_dtype(matrix)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in of_experts:
            continue
        ref = stored.get(name)
        if ref is None:
            missing.append((name, parameter))
            continue
        if ref.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{ref.shard}: tensor {ref.name} has shape {list(ref.shape)}, config.json says {list(parameter.shape)}"
            )
        if quantised and ref.dtype == "F8_E4M3" and _is_linear_weight(model, name):
            found[name + SCALE] = _scale_of(checkpoint, ref, stored.get(name + SCALE))
        else:
            _check_dtype(ref)
        found[name] = ref
        owners.setdefault(id(parameter), name)
    for name, parameter in missing:
        if (owner := owners.get(id(parameter))) is not None:
            found |= {name + end: found[owner + end] for end in ("", SCALE) if owner + end in found}
        elif name in converted:
            found |= _joined(model, name, parameter, converted[name])
        else:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing; {_why_missing(checkpoint, name)}")
    persistent = set(model.state_dict())
    for name, buffer in model.named_buffers():
        ref = stored.get(name) if name in persistent else None
        usable = TORCH_DTYPES if buffer.is_floating_point() else _INTEGERS
        if ref is not None and ref.shape == tuple(buffer.shape) and ref.dtype in usable:
            found[name] = ref
    return found, experts


def _joined(model: nn.Module, name: str, parameter: nn.Parameter, pieces: Pieces) -> dict[str, TensorRef]:
    """The pieces of a parameter that is no linear's, whose rows are stored apart.

    Raises UnsupportedError where more would have to be done than to put rows below one another.
    """
    refs = [ref for _, _, ref in sorted(pieces, key=lambda piece: piece[1])]
    rows, shape = sum(ref.shape[0] for ref in refs if ref.shape), tuple(parameter.shape)
    plain = [place for _, place, _ in sorted(pieces, key=lambda piece: piece[1])] == list(range(len(pieces)))
    if not plain or (rows, *refs[0].shape[1:]) != shape or any(ref.shape[1:] != shape[1:] for ref in refs) or (
        _is_linear_weight(model, name)
    ):  # fmt: skip
        config: Any = model.config
        raise UnsupportedError(
            f"{config.model_type}: {name} is stored in pieces ({pieces[0][2].name}, …) that would have to be put "
            "together; such weights cannot be pruned yet"
        )
    for ref in refs:
        _check_dtype(ref)
    return {f"{name}[{i}]": ref for i, ref in enumerate(refs)}


def pieces_of(sources: Mapping[str, TensorRef], name: str) -> list[TensorRef]:
    """The tensors that a parameter is stored as, if its rows are stored apart, else none."""
    names = itertools.takewhile(sources.__contains__, (f"{name}[{i}]" for i in itertools.count()))
    return [sources[piece] for piece in names]


_WRAPPERS = {
    "_orig_mod.": "of torch.compile",
    "module.": "of DistributedDataParallel",
    "base_model.model.": "of peft, whose adapters have to be merged (merge_and_unload)",
    "_fsdp_wrapped_module.": "of FSDP",
    "_forward_module.": "of Lightning",
}


def _why_missing(checkpoint: Checkpoint, name: str) -> str:
    """The likely cause of a missing tensor, and what mends it."""
    for beside in checkpoint.beside:
        if beside.startswith(f"{name} in "):
            return f"the index does not name {beside}: add it there"
    for prefix, whose in _WRAPPERS.items():
        wrapped = next((n for n in checkpoint.tensors if n.startswith(prefix) or f".{prefix}" in n), None)
        if wrapped is not None and not name.startswith(prefix):
            return f"names begin with {prefix!r} ({wrapped}), the wrapper {whose}: save the model within it, or rename"
    return "is the download complete?"


def _check_dtype(ref: TensorRef) -> None:
    if ref.dtype not in TORCH_DTYPES:
        raise UnsupportedError(
            f"{ref.shard}: tensor {ref.name} is {ref.dtype}; only BF16, F16 and F32 weights can be pruned"
        )


def _is_linear_weight(model: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of an nn.Linear or a subclass."""
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(path), nn.Linear)


def _scale_of(checkpoint: Checkpoint, weight: TensorRef, scale: TensorRef | None) -> TensorRef:
    """Checks the scale of an FP8 weight. Raises CheckpointError when it is missing or of a wrong dtype or shape."""
    if scale is None:
        raise CheckpointError(f"{checkpoint.path}: tensor {weight.name}{SCALE} is missing; is the download complete?")
    if scale.dtype not in TORCH_DTYPES or scale.shape not in (
        (weight.shape[0], 1),
        (weight.shape[0],),
        (1, 1),
        (1,),
        (),
    ):
        raise CheckpointError(
            f"{scale.shard}: tensor {scale.name} is {scale.dtype} {list(scale.shape)}, which is no scale of "
            f"{weight.name} {list(weight.shape)}"
        )
    return scale


def _module_names(checkpoint: Checkpoint, model: nn.Module) -> tuple[dict[str, TensorRef], dict[str, Pieces]]:
    """(parameter name -> stored tensor, parameter name -> the pieces that transformers assembles it from).

    Names are translated by transformers' tables of old names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    prefix, state = getattr(model, "base_model_prefix", ""), model.state_dict()
    stored: dict[str, TensorRef] = {}
    converted: dict[str, Pieces] = {}
    places = {p: _place(t, i) for t in converters for i, p in enumerate(t.source_patterns)}
    for name in sorted(checkpoint.tensors):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:  # it is called as in the model already
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        if pattern is None:
            stored[renamed] = checkpoint.tensors[name]
        elif name.removesuffix(SCALE) not in checkpoint.tensors or not name.endswith(SCALE):
            converted.setdefault(renamed, []).append((name, places[pattern], checkpoint.tensors[name]))
    return stored, converted


def _place(converter: Any, place: int) -> int:
    """The position, in Pieces, of a conversion's source number `place`; TRANSPOSED or OTHER if it is more than that."""
    names = [type(operation).__name__ for operation in converter.operations]
    if set(names) <= {"MergeModulelist", "Concatenate"}:
        return place
    operation = converter.operations[0]
    supported = names == ["Transpose"] and (operation.dim0, operation.dim1) == (1, 2) and operation.check_dims
    return TRANSPOSED if supported else OTHER


def layer_numbers(
    checkpoint: Checkpoint, model: nn.Module, prefix: str, count: int, sources: Mapping[str, TensorRef]
) -> dict[str, int]:
    """Name of every stored tensor that belongs to one of the `count` layers at `prefix` -> the layer's number.

    Parameters of a layer belong to it, whatever they are called on disk. Other tensors are assigned by the path of the
    layer list as the checkpoint spells it, such as "h" for "transformer.h". Raises CheckpointError for tensors of
    layers beyond `count`, unless transformers ignores them on purpose; those belong to no layer.
    """
    inside = {name: name.removeprefix(f"{prefix}.") for name in sources if name.startswith(f"{prefix}.")}
    example = next((name for name, inner in inside.items() if sources[name].name.endswith(f".{inner}")), None)
    stem = prefix if example is None else sources[example].name.removesuffix(f".{inside[example]}")
    found: dict[str, int] = {}
    for name, inner in inside.items():  # what layers share belongs to the last of them
        found[sources[name].name] = max(int(inner.partition(".")[0]), found.get(sources[name].name, 0))
    by_name = re.compile(re.escape(stem) + r"\.(\d+)\.")
    for name, ref in checkpoint.tensors.items():
        if name in found or (match := by_name.match(name)) is None:
            continue
        if int(match[1]) < count:
            found[name] = int(match[1])
        elif not _is_ignored(model, name, int(match[1])):
            raise CheckpointError(f"{ref.shard}: tensor {name} belongs to a layer that config.json does not have")
    return found


def _is_ignored(model: nn.Module, name: str, layer: int) -> bool:
    """Whether transformers ignores a layer's tensor on purpose, as those of multi-token prediction layers."""
    config: Any = model.config
    text = config.get_text_config()
    more = getattr(text, "num_nextn_predict_layers", 0) or 0
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return layer < text.num_hidden_layers + more or any(re.search(pattern, name) for pattern in patterns)
