"""Sixteen vectors of lanes.py at once: their totals, and their columns. For compiled functions only."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types

from streamprune.kernels.lanes import COUNT, FLOAT, function, pointer, shuffle

_NUMBERS = ir.VectorType(ir.FloatType(), COUNT)
_JOINS = {1: 2, 2: 1, 4: 8, 8: 4}
"""Halves of what is joined by `totals`, and how far apart in the result, so that shuffles move whole 128 bits at first
and stay within 128 bits then."""


@function
def totals(typing: Any, array: Any, index: Any) -> Any:
    """Lane i is total(load(array, index + 16 i)), for float32: sixteen trees in 15 sums and 30 shuffles."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def tree(number: int, half: int) -> Any:
            if half == COUNT:
                place = builder.add(arguments[1], ir.Constant(arguments[1].type, number * COUNT))
                return builder.load(pointer(context, builder, array, arguments[0], place, _NUMBERS), align=1)
            a, b = (tree(other, 2 * half) for other in (number, number + _JOINS[half]))
            order = range(2 * COUNT) if half > 2 else sorted(range(2 * COUNT), key=lambda i: i % COUNT // 4)
            low = [i for i in order if not i & half]
            return builder.fadd(shuffle(builder, a, b, low), shuffle(builder, a, b, [i + half for i in low]))

        return tree(0, 1)

    return FLOAT(array, types.intp), emit


@function
def turn(typing: Any, array: Any, index: Any, step: Any, target: Any, place: Any) -> Any:
    """target[place + 16 k + i] = array[index + step i + k] for i and k of 0..15, float32."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, begin, step, drain, end = arguments
        vectors = []
        for _ in range(COUNT):
            vectors.append(builder.load(pointer(context, builder, array, source, begin, _NUMBERS), align=1))
            begin = builder.add(begin, step)
        for half in (8, 4, 2, 1):
            for i in (i for i in range(COUNT) if not i & half):
                a, b = vectors[i], vectors[i + half]
                vectors[i] = shuffle(builder, a, b, [k + COUNT - half if k & half else k for k in range(COUNT)])
                vectors[i + half] = shuffle(builder, a, b, [k + COUNT if k & half else k + half for k in range(COUNT)])
        for i, vector in enumerate(vectors):
            spot = builder.add(end, ir.Constant(end.type, i * COUNT))
            builder.store(vector, pointer(context, builder, target, drain, spot, vector.type), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, target, types.intp), emit
