"""Straight-line vector code for N:M: eight groups of 2, 4, 8, 16 or 32 consecutive weights, a tile, in one go.

The weights of a tile are transposed into planes: plane i holds column i of the eight groups, so that one instruction
serves all of them. What is moved are words of 32 bits, each of which holds two 16-bit weights. The scores of a group
are sorted by a network, which swaps without branches; the last of those to be pruned is the group's threshold. Only
if the next score equals it, columns are visited in turn. Everything between loading and storing is in registers, as
far as the processor has enough; the code is generated for a size of groups and a format of weights, which are given
by the lengths of tuples, because Numba compiles a function for each type.

Planes keep their groups in an order that is cheap to shuffle: within 128 bits wherever that is possible.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types

from streamprune.kernels import lanes

EIGHT = 8
_I8, _I16, _I32 = (ir.IntType(bits) for bits in (8, 16, 32))
_HALVES = ir.VectorType(_I16, 2 * EIGHT)
_WORDS, _NUMBERS = ir.VectorType(_I32, EIGHT), ir.VectorType(ir.FloatType(), EIGHT)
_AHEAD = 2048  # bytes that are prefetched ahead of what is read

# Which of the 16 elements of two vectors are taken, in steps that separate columns: (these to the front, those behind).
# A step that merges takes `back` of what it separated.
_EVEN, _ODD = (0, 2, 8, 10, 4, 6, 12, 14), (1, 3, 9, 11, 5, 7, 13, 15)
_LOW, _HIGH = (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)
_BACK = (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)
_STEPS = ((_EVEN, _ODD, _BACK), (_EVEN, _ODD, _BACK), (_LOW, _HIGH, (_LOW, _HIGH)))


def comparators(size: int) -> list[tuple[int, int]]:
    """Batcher's network: pairs (i, j), i < j; if each in turn has its smaller number moved to i, `size` numbers are
    sorted. `size` is a power of two."""

    def merge(begin: int, size: int, step: int) -> Iterator[tuple[int, int]]:
        if 2 * step < size:
            yield from merge(begin, size, 2 * step)
            yield from merge(begin + step, size, 2 * step)
            yield from ((i, i + step) for i in range(begin + step, begin + size - step, 2 * step))
        else:
            yield begin, begin + step

    def sort(begin: int, size: int) -> Iterator[tuple[int, int]]:
        if size > 1:
            yield from sort(begin, size // 2)
            yield from sort(begin + size // 2, size // 2)
            yield from merge(begin, size, 1)

    return list(sort(0, size))


def separated(shuffle: Any, vectors: Sequence[Any]) -> list[Any]:
    """The planes of `vectors`, as many as a group has words; shuffle(a, b, picks) takes elements of two vectors."""

    def split(vectors: Sequence[Any], step: int) -> list[Any]:
        if len(vectors) == 1:
            return list(vectors)
        pairs, planes = list(zip(vectors[::2], vectors[1::2], strict=True)), [None] * len(vectors)
        for i, picks in enumerate(_STEPS[step][:2]):
            planes[i::2] = split([shuffle(a, b, picks) for a, b in pairs], step + 1)
        return planes

    planes, apart = [None] * len(vectors), max(1, len(vectors) // EIGHT)
    for i in range(apart):  # of a group of several vectors, the columns of each are apart already
        planes[i * EIGHT : (i + 1) * EIGHT] = split(vectors[i::apart], 0)
    return planes


def merged(shuffle: Any, planes: Sequence[Any]) -> list[Any]:
    """The inverse of `separated`."""

    def join(planes: Sequence[Any], step: int) -> list[Any]:
        if len(planes) == 1:
            return list(planes)
        halves = [join(planes[i::2], step + 1) for i in range(2)]
        return [shuffle(a, b, picks) for a, b in zip(*halves, strict=True) for picks in _STEPS[step][2]]

    vectors, apart = [None] * len(planes), max(1, len(planes) // EIGHT)
    for i in range(apart):
        vectors[i::apart] = join(planes[i * EIGHT : (i + 1) * EIGHT], 0)
    return vectors


def in_planes(feature: Any, size: int, halves: int) -> Any:
    """feature (tiles * 8 * size,) in the order in which `prune_tile` reads it: planes of a tile, one after another."""
    return np.take(feature.reshape(-1, EIGHT * size), _order(size, halves), axis=1).ravel()


@functools.cache
def _order(size: int, halves: int) -> Any:
    place = np.arange(EIGHT * size).reshape(size // halves, EIGHT, halves)
    planes = separated(lambda a, b, picks: np.concatenate((a, b))[list(picks)], list(place))
    return np.stack(planes).transpose(0, 2, 1).ravel()


class _Code:
    """Emits vector instructions, for groups of `size` weights that are `halves` to a word."""

    def __init__(self, builder: Any, size: int, halves: int, shift: int) -> None:
        self.builder, self.size, self.halves, self.shift = builder, size, halves, shift
        self.memory = _HALVES if halves == 2 else _WORDS
        self.sign = -(1 << (self.memory.element.width - 1))

    def fill(self, number: Any, kind: Any = _WORDS) -> Any:
        return ir.Constant(kind, [number] * kind.count)

    def shuffle(self, a: Any, b: Any, picks: Sequence[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.Constant(_WORDS, list(picks)))

    def smaller(self, a: Any, b: Any) -> tuple[Any, Any]:
        """The smaller and the larger one."""
        less = self.builder.icmp_signed("<", a, b)
        return self.builder.select(less, a, b), self.builder.select(less, b, a)

    def largest(self, vectors: Sequence[Any], seen: Any) -> Any:
        """`seen` and the magnitudes of the weights in all words: what is largest in each place, as words."""
        build, top = self.builder, self.builder.bitcast(seen, self.memory)
        for vector in vectors:
            size = build.and_(build.bitcast(vector, self.memory), self.fill(~self.sign, self.memory))
            top = build.select(build.icmp_signed(">", size, top), size, top)
        return build.bitcast(top, _WORDS)

    def magnitude(self, words: Sequence[Any], i: int) -> Any:
        """|w| of column i as float32."""
        build, word = self.builder, words[i // self.halves]
        if self.shift == 16:
            word = word if i % 2 else build.shl(word, self.fill(16))
            return build.bitcast(build.and_(word, self.fill(0x7FFF0000)), _NUMBERS)
        if self.halves == 1:
            return build.bitcast(build.and_(word, self.fill(0x7FFFFFFF)), _NUMBERS)
        word = build.and_(build.lshr(word, self.fill(16)) if i % 2 else word, self.fill(0x7FFF))
        small = build.bitcast(build.shl(word, self.fill(self.shift)), _NUMBERS)
        return build.fmul(small, self.fill(2.0**112, _NUMBERS))

    def sum(self, numbers: Sequence[Any]) -> Any:
        """The sum of vectors, in pairs."""
        while len(numbers) > 1:
            numbers = [self.builder.fadd(a, b) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
        return numbers[0]

    def without_ties(self, keys: list[Any], limit: Any, beyond: Any, drop: Any) -> list[Any]:
        """keys, of which as many as `drop` are <= limit: where `beyond`, the next one, equals it, rightmost keys that
        equal it are increased."""
        build, block = self.builder, self.builder.block
        tied = build.icmp_signed("==", limit, beyond)
        any_tied = build.icmp_unsigned("!=", build.bitcast(tied, _I8), _I8(0))
        with build.if_then(any_tied, likely=False):
            left = lanes.splat(build, drop, EIGHT)
            for key in keys:
                left = build.add(left, build.sext(build.icmp_signed("<", key, limit), _WORDS))
            changed = []
            for key in keys:
                equal = build.icmp_signed("==", key, limit)
                spared = build.and_(equal, build.icmp_signed("<", left, self.fill(1)))
                changed.append(build.sub(key, build.sext(spared, _WORDS)))
                left = build.add(left, build.sext(equal, _WORDS))
            other = build.block
        chosen = []
        for key, new in zip(keys, changed, strict=True):
            phi = build.phi(_WORDS)
            phi.add_incoming(key, block)
            phi.add_incoming(new, other)
            chosen.append(phi)
        return chosen

    def mask_words(self, gone: Sequence[Any]) -> list[Any]:
        """Planes of words whose bits are set where weights are kept."""
        build, planes = self.builder, []
        for i in range(0, self.size, self.halves):
            word = self.fill(-1)
            for half in range(self.halves):
                cleared = self.fill((-0x10000, 0xFFFF)[half] if self.halves == 2 else 0)
                word = build.and_(word, build.select(gone[i + half], cleared, self.fill(-1)))
            planes.append(word)
        return planes


@lanes.function
def prune_tile(
    typing: Any, shape: Any, row: Any, begin: Any, feature: Any, place: Any, square: Any, drop: Any, order: Any,
    out: Any, keep: Any, sums: Any,
) -> Any:  # fmt: skip
    """Prunes `drop` weights of every group of the tile row[begin:] to out[begin:]; zeros become +0.0.

    shape: a pair of tuples, as long as a group and as the shift that converts a magnitude to float32. row and out
    uint16|uint32; feature from `in_planes`, read from `place` on; square: whether the score is that of w². keep bool,
    written if it has elements. order (8 * size,) int32 is scratch. To sums (3, 8) float32 are added the scores of all
    weights, and of those pruned; the third row has the largest magnitude bits so far, of each word or of its halves.
    """
    size, shift = (len(part) for part in shape)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def at(number: int, index: Any, kind: Any) -> Any:
            return lanes.pointer(context, builder, signature.args[number], arguments[number], index, kind)

        def further(index: Any, by: int) -> Any:
            return builder.add(index, index.type(by))

        begin, place, square, drop = (arguments[i] for i in (2, 4, 5, 6))
        total, removed, top = (
            at(10, ir.Constant(begin.type, EIGHT * i), kind) for i, kind in enumerate((_NUMBERS, _NUMBERS, _WORDS))
        )

        def update(sum: Any, number: Any) -> None:
            builder.store(builder.fadd(builder.load(sum, align=1), number), sum, align=1)

        code = _Code(builder, size, 2 if row.dtype.bitwidth == 16 else 1, shift)
        step = EIGHT * code.halves
        for number in range(0, size // code.halves, 2):
            for which, write in ((1, 0), (8, 1)):
                ahead = further(begin, step * number + _AHEAD // (row.dtype.bitwidth // 8))
                lanes.prefetch(builder, at(which, ahead, _I8), write)
        vectors = [builder.load(at(1, further(begin, step * i), _WORDS), align=1) for i in range(size // code.halves)]
        builder.store(code.largest(vectors, builder.load(top, align=1)), top, align=1)
        words, scores = separated(code.shuffle, vectors), []
        squared = lanes.splat(builder, square, EIGHT)
        for i in range(size):
            weight = code.magnitude(words, i)
            factor = builder.select(squared, weight, code.fill(1.0, _NUMBERS))
            known = builder.load(at(3, further(place, EIGHT * i), _NUMBERS), align=1)
            scores.append(builder.fmul(builder.fmul(weight, factor), known))
        keys = [builder.bitcast(score, _WORDS) for score in scores]
        ranked = list(keys)
        for i, j in comparators(size):
            ranked[i], ranked[j] = code.smaller(ranked[i], ranked[j])
        for i, key in enumerate(ranked):
            builder.store(key, at(7, ir.Constant(begin.type, EIGHT * i), _WORDS), align=1)
        behind = builder.mul(builder.sext(drop, begin.type), begin.type(EIGHT))
        limit, beyond = (builder.load(at(7, index, _WORDS), align=1) for index in (further(behind, -EIGHT), behind))
        settled = code.without_ties(keys, limit, beyond, drop)
        gone = [builder.icmp_signed("<=", key, limit) for key in settled]
        nothing = code.fill(0.0, _NUMBERS)
        lost = code.sum([builder.select(g, score, nothing) for g, score in zip(gone, scores, strict=True)])
        update(total, code.sum(scores))
        update(removed, lost)
        masks = merged(code.shuffle, code.mask_words(gone))
        for i, (vector, mask) in enumerate(zip(vectors, masks, strict=True)):
            kept = builder.bitcast(builder.and_(vector, mask), code.memory)
            minus = builder.icmp_signed("==", kept, code.fill(code.sign, code.memory))
            kept = builder.select(minus, code.fill(0, code.memory), kept)
            builder.store(kept, at(8, further(begin, step * i), code.memory), align=1)
        with builder.if_then(_has_elements(context, builder, signature.args[9], arguments[9]), likely=False):
            for i, mask in enumerate(masks):
                kind = ir.VectorType(_I8, step)
                bools = builder.and_(builder.trunc(builder.bitcast(mask, code.memory), kind), code.fill(1, kind))
                builder.store(bools, at(9, further(begin, step * i), kind), align=1)
        return context.get_dummy_value()

    arguments = (shape, row, types.intp, feature, types.intp, types.boolean, types.int32, order, out, keep, sums)
    return types.void(*arguments), emit


@lanes.function
def move(typing: Any, shape: Any, source: Any, i: Any, mask: Any, target: Any, j: Any) -> Any:
    """target[j : j + size] = source[i : i + size] & mask, with the size of a group in `shape`; see prune_tile."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        width = 8 if source.dtype == types.boolean else source.dtype.bitwidth
        kind = ir.VectorType(ir.IntType(width), len(shape[0]))
        zero = ir.Constant(arguments[2].type, 0)
        found, bits, place = (
            lanes.pointer(context, builder, signature.args[n], arguments[n], at, kind)
            for n, at in ((1, arguments[2]), (3, zero), (4, arguments[5]))
        )
        builder.store(builder.and_(builder.load(found, align=1), builder.load(bits, align=1)), place, align=1)
        return context.get_dummy_value()

    return types.void(shape, source, types.intp, mask, target, types.intp), emit


def _has_elements(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    found = cgutils.create_struct_proxy(kind)(context, builder, array).nitems
    return builder.icmp_signed(">", found, found.type(0))
