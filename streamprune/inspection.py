"""What a checkpoint's linears hold: zeros, N:M patterns, and what must not be there (-0.0, NaN, Inf).

Reads headers and bytes only: no model is built, so any safetensors checkpoint can be inspected, also quantised
ones and those of unknown architectures. A *linear* is here a 2-D tensor `NAME.weight` of a floating dtype whose
name lies in a numbered list of layers (`layers.7.`, `h.7.`, `blocks.7.`), except norms, embeddings, routers of
experts, and the layers of vision and audio towers. Fused experts (3-D tensors) are not counted.

A row is an output, along it lie the inputs. transformers' Conv1D stores (in, out); its rows are columns on disk.
Tensors go through in row chunks: memory stays at some 20 MiB whatever their size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.header import DTYPE_BITS, TensorRef, show
from streamprune.disk.hub import resolve_model
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import UnsupportedError, UsageError
from streamprune.pruning.selection import parse_pattern

GROUPS = (4, 8, 16, 32)
"""The M of the N:M patterns that are looked for."""

_CHUNK_BYTES = 16 * 2**20  # what is mapped at a time
_BLOCK_BYTES = 2**20  # what is counted at a time: fits the cache
_LAYER = re.compile(r"(^|\.)(layers|h|blocks|block|layer)\.\d+\.")
_NO_LINEAR = re.compile(
    r"(^|\.)(vision|visual|audio)[^.]*\.|router|(^|[._])(gate|wg|norm|layernorm|ln|emb|embed|embedding|embeddings|"
    r"embed_tokens|relative_attention_bias)(_?\d+)?$"
)
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


@dataclass(frozen=True)
class _Float:
    """The bits of a floating dtype: magnitudes from `nan` on are NaN, the one equal to `inf` is Inf."""

    view: type[np.unsignedinteger[Any]]
    sign: int
    nan: int
    inf: int | None


_FLOATS: Mapping[str, _Float] = {
    "F64": _Float(np.uint64, 1 << 63, 0x7FF0000000000001, 0x7FF0000000000000),
    "F32": _Float(np.uint32, 1 << 31, 0x7F800001, 0x7F800000),
    "F16": _Float(np.uint16, 1 << 15, 0x7C01, 0x7C00),
    "BF16": _Float(np.uint16, 1 << 15, 0x7F81, 0x7F80),
    "F8_E5M2": _Float(np.uint8, 1 << 7, 0x7D, 0x7C),
    "F8_E4M3": _Float(np.uint8, 1 << 7, 0x7F, None),
}


@dataclass(frozen=True)
class LinearReport:
    """One linear: `shape` as stored; zeros include -0.0; rows are outputs.

    `pattern` is the tightest N:M with M of GROUPS that every group holds and that groups fill to nine tenths on
    average; None when there is none, as for a dense or an unstructured matrix.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, int]
    transposed: bool
    zeros: int
    min_row_zeros: int
    max_row_zeros: int
    pattern: str | None
    negative_zeros: int
    nans: int
    infs: int

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        return self.zeros / max(self.weights, 1)


@dataclass(frozen=True)
class Totals:
    """Sums over linears; `patterns` counts linears by pattern ("none" for those without)."""

    linears: int
    weights: int
    zeros: int
    sparsity: float
    patterns: Mapping[str, int]
    negative_zeros: int
    nans: int
    infs: int


@dataclass(frozen=True)
class Inspection:
    """`ok` is None unless something was expected; `failures` has one line for each thing amiss."""

    model: Path
    linears: tuple[LinearReport, ...]
    totals: Totals
    expect: str | None
    ok: bool | None
    failures: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, with a format name and version."""
        linears = [{**asdict(linear), "sparsity": linear.sparsity} for linear in self.linears]
        return {
            "format": "streamprune-inspection",
            "version": 1,
            "model": str(self.model),
            "expect": self.expect,
            "ok": self.ok,
            "failures": list(self.failures),
            "totals": asdict(self.totals),
            "linears": linears,
        }


@dataclass(frozen=True)
class _Expected:
    """Either at most n nonzeros in m inputs, or at least floor(sparsity · in) zeros in each row."""

    text: str
    n: int = 0
    m: int = 0
    sparsity: float = 0.0


def inspect(
    model: str | Path,
    *,
    expect: str | None = None,
    only: str | None = None,
    skip: str | None = None,
    revision: str | None = None,
    quiet: bool = False,
    on_linear: Callable[[LinearReport], None] | None = None,
) -> Inspection:
    """Count the zeros of every linear of `model`, a folder or a hub name.

    `only` and `skip` are regular expressions searched for in the name of the linear. `expect` is "N:M" (at most
    N nonzeros in every M inputs) or a sparsity such as "0.5" (floor(0.5 · in) zeros in every row); NaN, Inf and
    -0.0 fail it too. `on_linear` is called after each linear.

    Raises:
        UsageError: `expect`, `only` or `skip` is malformed, or they leave no linear.
        UnsupportedError: the checkpoint has no linears by the rule above.
        CheckpointError: it cannot be read.
    """
    expected = None if expect is None else _parse_expected(expect)
    keep, drop = _regex("only", only), _regex("skip", skip)
    checkpoint = open_checkpoint(resolve_model(model, revision=revision, quiet=quiet))
    found = find_linears(checkpoint)
    if not found:
        raise UnsupportedError(
            f"{checkpoint.path}: no tensor looks like a layer's linear (2-D, floating, `layers.N.….weight`); a "
            "packed checkpoint is inspected after `unpack`"
        )
    names = [n for n in found if (not keep or keep.search(n)) and not (drop and drop.search(n))]
    if not names:
        raise UsageError(f"--only and --skip leave none of the {len(found)} linears, such as {show(next(iter(found)))}")
    reports: list[LinearReport] = []
    failures: list[str] = []
    with ShardMaps(checkpoint) as maps:
        for name in names:
            transposed = _is_conv1d(checkpoint, name)
            count = _Count(found[name], transposed, expected)
            for at, chunk in _chunks(maps, found[name], transposed):
                count.add(at, chunk)
            report = count.report(name)
            reports.append(report)
            failures += [f"{show(name)}: {failure}" for failure in count.failures()]
            if on_linear:
                on_linear(report)
    ok = None if expected is None else not failures
    return Inspection(checkpoint.path, tuple(reports), _total(reports), expect, ok, tuple(failures))


def find_linears(checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """The linears of a checkpoint by module name, in file order; see the top of this file for the rule."""
    found = {}
    for name, ref in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(ref.shape) != 2 or ref.nbytes == 0 or ref.dtype not in _FLOATS:
            continue
        if _LAYER.search(name) and not _NO_LINEAR.search(module):
            found[module] = ref
    return found


def _is_conv1d(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.config.get("model_type") in _CONV1D_MODELS and name.rpartition(".")[2] in _CONV1D_NAMES


def _regex(flag: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise UsageError(f"--{flag} {show(text)}: no regular expression: {error}") from None


def _parse_expected(text: str) -> _Expected:
    if ":" in text:
        pattern = parse_pattern(text)
        return _Expected(text, n=pattern.n, m=pattern.m)
    try:
        sparsity = float(text)
    except ValueError:
        sparsity = -1.0
    if not 0 < sparsity < 1:
        raise UsageError(f"--expect {show(text)}: give a pattern such as 2:4 or a sparsity between 0 and 1 such as 0.5")
    return _Expected(text, sparsity=sparsity)


def _chunks(maps: ShardMaps, ref: TensorRef, transposed: bool) -> Iterator[tuple[int, NDArray[Any]]]:
    """Blocks of stored rows as (first row, bits), each given back once the next is asked for.

    A transposed tensor comes in multiples of 32 rows, so that no group of inputs is split; a group of other
    sizes is seen to by the caller.
    """
    rows, width = ref.shape
    kind = _FLOATS[ref.dtype].view
    row_bytes = width * DTYPE_BITS[ref.dtype] // 8
    block = max(1, _BLOCK_BYTES // row_bytes)
    if transposed:
        block = -(-block // _TRANSPOSED_STEP) * _TRANSPOSED_STEP
    step = max(1, _CHUNK_BYTES // (block * row_bytes)) * block
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        part = replace(ref, begin=ref.begin + top * row_bytes, end=ref.begin + bottom * row_bytes)
        maps.prefetch([part])
        bits = np.frombuffer(maps.raw(part), dtype=kind).reshape(bottom - top, width)
        for start in range(0, bottom - top, block):
            yield top + start, bits[start : start + block]
        maps.release([part])
