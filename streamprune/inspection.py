"""What a checkpoint's linears hold: zeros, N:M patterns, and what must not be there (-0.0, NaN, Inf).

Reads headers and bytes only: no model is built, so any safetensors checkpoint can be inspected, also those of
unknown architectures and quantised ones. A *linear* is here a 2-D tensor `NAME.weight` of a floating dtype
whose name lies in a numbered list of layers (`layers.7.`, `h.7.`, `blocks.7.`), except norms, embeddings,
routers of experts, and the layers of vision and audio towers. Fused experts (3-D tensors) are not counted.

A row is an output, along it lie the inputs. transformers' Conv1D stores (in, out): there, a row is a column
on disk. Tensors go through in chunks of rows: some 20 MiB of memory, whatever their size.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.header import TensorRef, show
from streamprune.disk.hub import resolve_model
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import UnsupportedError, UsageError
from streamprune.pruning.counting import FLOATS, MatrixCount
from streamprune.pruning.selection import Pattern, parse_pattern, parse_sparsity, prune_count

_CHUNK_BYTES = 16 * 2**20  # what is mapped at a time
_BLOCK_BYTES = 2**18  # what is counted at a time: it stays in the cache
_LAYER = re.compile(r"(^|\.)(layers|h|blocks|block|layer)\.\d+\.")
_NO_LINEAR = re.compile(
    r"(^|\.)(vision|visual|audio)[^.]*\.|router|(^|[._])(gate|wg|norm|layernorm|ln|emb|embed|embedding|embeddings|"
    r"embed_tokens|relative_attention_bias)(_?\d+)?$"
)
_NUMBER = re.compile(r"[0-9]{1,18}")
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


@dataclass(frozen=True)
class LinearReport:
    """One linear: `shape` as stored; zeros include -0.0; rows are outputs.

    `pattern` is the tightest N:M, M of 4, 8, 16 or 32, that every group holds and that groups fill to nine
    tenths on average; None when there is none, as for a dense or an unstructured matrix.
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
        return self.zeros / self.weights


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

    `only` and `skip` are regular expressions searched for in the name of the linear. `expect` is "N:M" (at
    most N nonzeros in every M inputs) or a sparsity such as "0.5" (floor(0.5 · in) zeros in every row); NaN,
    Inf and -0.0 fail it too. `on_linear` is called after each linear.

    Raises:
        UsageError: `expect`, `only` or `skip` is malformed, or they leave no linear.
        UnsupportedError: the checkpoint has no linears by the rule above.
        CheckpointError: it cannot be read.
    """
    expected = None if expect is None else parse_expectation(expect)
    keep, drop = _regex("only", only), _regex("skip", skip)
    checkpoint = open_checkpoint(resolve_model(model, revision=revision, quiet=quiet))
    found = find_linears(checkpoint)
    if not found:
        raise UnsupportedError(
            f"{checkpoint.path}: no tensor looks like a layer's linear (2-D, floating, `layers.N.….weight`); "
            "a packed checkpoint is inspected after `unpack`"
        )
    names = [n for n in found if (not keep or keep.search(n)) and not (drop and drop.search(n))]
    if not names:
        raise UsageError(
            f"--only and --skip leave none of {len(found)} linears; the first is {show(next(iter(found)))}"
        )
    reports: list[LinearReport] = []
    failures: list[str] = []
    with ShardMaps(checkpoint) as maps:
        for name in names:
            transposed = _is_conv1d(checkpoint, name)
            report, amiss = _count(maps, found[name], name, transposed, expected)
            reports.append(report)
            failures += amiss
            if on_linear:
                on_linear(report)
    ok = None if expected is None else not failures
    return Inspection(checkpoint.path, tuple(reports), _total(reports), expect, ok, tuple(failures))


def find_linears(checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """The linears of a checkpoint by module name, layer 2 before layer 10; the rule is at the top."""
    found = {}
    for name, ref in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(ref.shape) != 2 or ref.nbytes == 0 or ref.dtype not in FLOATS:
            continue
        if _LAYER.search(name) and not _NO_LINEAR.search(module):
            found[module] = ref
    return dict(sorted(found.items(), key=lambda item: _by_number(item[0])))


def _by_number(name: str) -> tuple[tuple[bool, int, str], ...]:
    return tuple(
        (False, 0, part) if not _NUMBER.fullmatch(part) else (True, int(part), part) for part in name.split(".")
    )


def _is_conv1d(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.config.get("model_type") in _CONV1D_MODELS and name.rpartition(".")[2] in _CONV1D_NAMES


def _regex(flag: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise UsageError(f"--{flag} {show(text)}: no regular expression: {error}") from None


def parse_expectation(text: str) -> Pattern | float:
    """A pattern such as "2:4", or a sparsity such as "0.5". Raises UsageError."""
    if ":" in text:
        return parse_pattern(text)
    sparsity = parse_sparsity(text)
    if not sparsity:
        raise UsageError("--expect 0 holds for any checkpoint; give a pattern such as 2:4 or a sparsity")
    return sparsity


def _count(
    maps: ShardMaps, ref: TensorRef, name: str, transposed: bool, expected: Pattern | float | None
) -> tuple[LinearReport, list[str]]:
    """Count one linear; returns its report, and in which ways it is not what is expected."""
    shape = (ref.shape[1], ref.shape[0]) if transposed else (ref.shape[0], ref.shape[1])
    limit = expected if isinstance(expected, Pattern) and shape[1] % expected.m == 0 else None
    count = MatrixCount(ref.dtype, shape, limit)
    for at, block in _blocks(maps, ref, math.lcm(32, limit.m if limit else 1) if transposed else 1):
        if transposed:
            count.add(0, at, block.T)
        else:
            count.add(at, 0, block)
    zeros = count.row_zeros
    report = LinearReport(
        name=name,
        shard=ref.shard,
        dtype=ref.dtype,
        shape=(ref.shape[0], ref.shape[1]),
        transposed=transposed,
        zeros=int(zeros.sum()),
        min_row_zeros=int(zeros.min()),
        max_row_zeros=int(zeros.max()),
        pattern=str(Pattern(*count.pattern)) if count.pattern else None,
        negative_zeros=count.found["-0.0"],
        nans=count.found["NaN"],
        infs=count.found["Inf"],
    )
    if expected is None:
        return report, []
    return report, [f"{show(name)}: {why}" for why in _amiss(count, expected)]


def _amiss(count: MatrixCount, expected: Pattern | float) -> Iterator[str]:
    inputs = count.shape[1]
    if isinstance(expected, float):
        least = prune_count(expected, inputs)
        short = np.flatnonzero(count.row_zeros < least)
        if len(short):
            row = int(short[0])
            yield (
                f"row {row} has {count.row_zeros[row]} zeros, a sparsity of {expected:g} asks for {least} of "
                f"{inputs} ({len(short)} such rows)"
            )
    elif inputs % expected.m:
        yield f"has {inputs} inputs, which do not divide into groups of {expected.m}"
    elif count.overfull:
        row, column = count.first["group"]
        yield (
            f"row {row}, inputs {column} to {column + expected.m - 1}: {count.first_overfull} nonzeros, "
            f"{expected} allows {expected.n} ({count.overfull} such groups)"
        )
    for kind, number in count.found.items():
        if number:
            row, column = count.first[kind]
            yield f"row {row}, input {column}: {kind} ({number} in all)"


def _blocks(maps: ShardMaps, ref: TensorRef, multiple: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Blocks of stored rows as (first row, bits), in multiples of `multiple` rows but for the last.

    The pages of a chunk of blocks are given back when the next chunk is asked for.
    """
    rows, width = ref.shape
    row_bytes = ref.nbytes // rows
    block = -(-max(1, _BLOCK_BYTES // row_bytes) // multiple) * multiple
    step = max(1, _CHUNK_BYTES // (block * row_bytes)) * block
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        chunk = replace(ref, begin=ref.begin + top * row_bytes, end=ref.begin + bottom * row_bytes)
        maps.prefetch([chunk])
        bits = np.frombuffer(maps.raw(chunk), dtype=FLOATS[ref.dtype].view).reshape(bottom - top, width)
        for start in range(0, bottom - top, block):
            yield top + start, bits[start : start + block]
        maps.release([chunk])


def _total(reports: Sequence[LinearReport]) -> Totals:
    weights = sum(report.weights for report in reports)
    zeros = sum(report.zeros for report in reports)
    return Totals(
        linears=len(reports),
        weights=weights,
        zeros=zeros,
        sparsity=zeros / weights,
        patterns=dict(Counter(report.pattern or "none" for report in reports)),
        negative_zeros=sum(report.negative_zeros for report in reports),
        nans=sum(report.nans for report in reports),
        infs=sum(report.infs for report in reports),
    )
