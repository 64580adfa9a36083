"""Quantised weights in the formats of compressed-tensors: which tensors belong together, and how they encode a weight.

The `config_groups` of a configuration say how the linears of a group are quantised. To which group a linear belongs is
derived from the shapes of its codes and scales, not from `targets`. Formats: see quantised.py. Imports neither torch
nor numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.encoded import (
    FLOAT,
    INTEGER,
    PACKED,
    Encoding,
    damaged_tensor,
    fits,
    missing_tensor,
    wrong_scales,
)
from streamprune.disk.header import TensorRef, show
from streamprune.errors import CheckpointError, UnsupportedError

_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_STRATEGIES = ("tensor", "channel", "group", "block")
_SCALES = ("BF16", "F16", "F32")
_WORD = 32
"""Bits of a word of packed codes."""


@dataclass(frozen=True)
class Scheme:
    """How the weights of a group are quantised."""

    packed: bool
    kind: str
    bits: int
    strategy: str
    group_size: int
    block: tuple[int, int]
    has_zeros: bool
    """Whether codes have zero points, which a floating-point code never has."""

    def block_of(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of a matrix that share a scale."""
        sizes = {"tensor": (rows, columns), "channel": (1, columns), "group": (1, self.group_size)}
        return sizes.get(self.strategy, self.block)


def read_schemes(description: Mapping[str, Any], refuse: Callable[[str], UnsupportedError]) -> list[Scheme]:
    """The schemes of a `quantization_config`. Raises what `refuse` makes of a reason for which it is not supported."""
    groups = description.get("config_groups")
    if not isinstance(groups, dict) or not groups or description.get("kv_cache_scheme"):
        raise refuse("it has no config_groups, or a kv_cache_scheme")
    if description.get("transform_config"):
        raise refuse("its weights are rotated (transform_config)")
    found = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise refuse(f"weights as {weights}")
        form = group.get("format") or description.get("format")
        if form not in _FORMATS:
            raise refuse(f"weights in the format {form}")
        found.append(_scheme(form == "pack-quantized", weights, refuse))
    if len({scheme.has_zeros for scheme in found if scheme.kind != FLOAT}) > 1:
        raise refuse("config_groups with zero points and without")  # shapes do not tell which is which
    return found


def _scheme(packed: bool, weights: Mapping[str, Any], refuse: Callable[[str], UnsupportedError]) -> Scheme:
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    size, block = weights.get("group_size"), weights.get("block_structure") or [0, 0]
    if strategy is None:  # as compressed-tensors fills it in
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    known = bits in (4, 8) if packed else bits == 8
    if not known or kind not in ("int", "float") or (packed and kind == "float"):
        raise refuse(f"weights of num_bits {bits}, type {kind}")
    if strategy not in _STRATEGIES or weights.get("dynamic"):
        raise refuse(f"the weights' strategy is {strategy}")
    if strategy == "group" and not (type(size) is int and size > 0):
        raise refuse(f"groups of {size}")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int for n in block):
        raise refuse(f"the block_structure is {block}")
    if strategy == "block" and min(block) < 1:
        raise refuse(f"the block_structure is {block}")
    has_zeros = weights.get("symmetric", True) is False and kind == "int"
    if packed and has_zeros and strategy not in ("group", "channel"):
        raise refuse(f"zero points of the strategy {strategy}")
    form = PACKED if packed else INTEGER if kind == "int" else FLOAT
    return Scheme(
        packed, form, int(str(bits)), strategy, size if type(size) is int else 0, (block[0], block[1]), has_zeros
    )


def find_compressed(checkpoint: Checkpoint, schemes: Sequence[Scheme]) -> dict[str, Encoding]:
    """How the quantised weights are stored, by name. Raises CheckpointError for tensors that do not fit each other."""
    tensors = checkpoint.tensors
    shapes = _read_shapes(checkpoint) if any(s.packed for s in schemes) else {}
    found = {}
    for name, ref in tensors.items():
        module, _, leaf = name.rpartition(".")
        packed = leaf == "weight_packed" and ref.dtype == "I32"
        if not packed and not (leaf == "weight" and ref.dtype in ("F8_E4M3", "I8")):
            continue
        scale = tensors.get(f"{module}.weight_scale")
        if scale is None:
            raise missing_tensor(checkpoint, ref, f"{module}.weight_scale")
        if f"{module}.weight_g_idx" in tensors:
            raise UnsupportedError(
                f"{checkpoint.path / ref.shard}: {show(module)}.weight_g_idx gives columns an order of their own "
                "(actorder), which cannot be read yet; pass the unquantised checkpoint"
            )
        shape = ref.shape
        if packed:
            if module not in shapes:
                raise missing_tensor(checkpoint, ref, f"{module}.weight_shape")
            shape = shapes[module]
        if len(ref.shape) != 2 or len(shape) != 2:
            raise damaged_tensor(checkpoint, ref, f"has {len(ref.shape)} dimensions, where quantised weights have two")
        tried = [_encoding(tensors, ref, scale, shape, s) for s in schemes if s.packed == packed]
        fitting = [encoding for encoding in tried if encoding is not None]
        if all(s.has_zeros for s in schemes) and f"{module}.weight_zero_point" not in tensors:
            raise missing_tensor(checkpoint, ref, f"{module}.weight_zero_point")
        right = [e for e in fitting if fits(scale, e.scales) and scale.dtype in _SCALES and _zero_fits(e)]
        if not right:
            raise _why_not(checkpoint, ref, scale, shape, fitting)
        found[f"{module}.weight"] = right[0]
    return found


def _encoding(
    tensors: Mapping[str, TensorRef], ref: TensorRef, scale: TensorRef, shape: tuple[int, ...], scheme: Scheme
) -> Encoding | None:
    """The encoding by a scheme; None if the codes do not fit it."""
    rows, columns = shape
    if scheme.packed:
        if ref.shape != (rows, -(-columns * scheme.bits // _WORD)):
            return None
    elif ref.dtype != ("F8_E4M3" if scheme.kind == FLOAT else "I8"):
        return None
    zero = None if not scheme.has_zeros else tensors.get(f"{ref.name.rpartition('.')[0]}.weight_zero_point")
    return Encoding(
        scheme.kind, shape, scheme.block_of(rows, columns), ref, scale, zero, scheme.bits,
        scale.dtype if scale.dtype in _SCALES else "F32",
    )  # fmt: skip


def _zero_fits(encoding: Encoding) -> bool:
    zero, (_, rows, columns) = encoding.zero, encoding.scales
    if zero is None:
        return True
    if encoding.kind == PACKED:
        return zero.dtype == "I32" and fits(zero, (-(-rows * encoding.bits // _WORD), columns))
    return zero.dtype == "I8" and fits(zero, (rows, columns))


def _why_not(
    checkpoint: Checkpoint, ref: TensorRef, scale: TensorRef, shape: tuple[int, ...], fitting: Sequence[Encoding]
) -> CheckpointError:
    """The error for codes and scales that fit no scheme."""
    if not fitting:
        what = f"is {ref.dtype} {list(ref.shape)} for a weight {list(shape)}, as no config_group has it"
        return damaged_tensor(checkpoint, ref, what)
    wrong = next((e for e in fitting if fits(scale, e.scales)), None)
    if wrong is None or wrong.zero is None or scale.dtype not in _SCALES:
        return wrong_scales(checkpoint, fitting[0])
    zero = wrong.zero
    return damaged_tensor(
        checkpoint,
        zero,
        f"is {zero.dtype} {list(zero.shape)}, which are no zero points of {show(ref.name)} {list(shape)}",
    )


def _read_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of packed weights, by module. Raises CheckpointError for what is no shape."""
    return {module: shape for shard in checkpoint.shards for module, shape in _shapes_in(checkpoint, shard)}


def _shapes_in(checkpoint: Checkpoint, shard: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    refs = [r for r in checkpoint.tensors.values() if r.shard == shard and r.name.endswith(".weight_shape")]
    if not refs:
        return
    with checkpoint.reading(shard) as read:
        for ref in refs:
            if ref.dtype not in ("I64", "I32") or math.prod(ref.shape) != 2:
                raise damaged_tensor(checkpoint, ref, f"is {ref.dtype} {list(ref.shape)}, which is no shape")
            data, width = read(ref.begin, ref.nbytes), ref.nbytes // 2
            shape = tuple(int.from_bytes(data[i : i + width], "little", signed=True) for i in (0, width))
            if min(shape) < 1:
                raise damaged_tensor(checkpoint, ref, f"says {list(shape)}, which is no shape")
            yield ref.name.removesuffix(".weight_shape"), shape
