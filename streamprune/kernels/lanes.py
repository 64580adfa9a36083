"""Vectors of sixteen numbers for Numba: LLVM vectors with Python operators.

LLVM compiles each operation to one AVX-512 instruction, two of AVX2 or four of NEON. The kernels use these vectors
because LLVM's loop vectoriser does not generate good code for packing by a mask or for transposing groups into planes,
because they compile faster than vectorised loops, and because sums have a fixed order, so that every processor computes
the same bits. They can be used in compiled functions only. Bounds are not checked.

    load(array, i)               array[i:i+16] (1-D, contiguous) as int32 or float32; uint16 is widened
    store(array, i, a)           and back; int32 into uint16 keep their low halves, masks become bytes
    will_read(array, i)          prefetches the cache line of array[i], as does will_write; any i is allowed
    fill(x), columns()           x, an int32 or float32, in every lane; 0, 1, ... 15
    a + b, a - b, a * b          of equal types; for int32 also & | ^ << and >> (of unsigned bits); b may be a scalar
    a < b, a <= b, a == b        a mask; masks know & and |, and there is invert(mask)
    as_int(a), as_float(a)       the same bits as the other type
    largest(a, b)                the maximum of int32 lanes
    select(mask, a, b)           a where the mask is set
    count(mask)                  how many lanes are set
    total(a), top(a)             the sum of float32 lanes, in halves; the maximum of int32 lanes
    pack(array, i, a, mask)      stores the int32 lanes where the mask is set to array[i:] without gaps; up to 16
                                 elements of the array are overwritten
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

COUNT = 16
_I32, _F32 = ir.IntType(32), ir.FloatType()


class Lanes(types.Type):
    """Numba's type of 16 elements, int32, float32 or bool (a mask)."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


INT, FLOAT, MASK = Lanes(types.int32), Lanes(types.float32), Lanes(types.boolean)
_VECTOR = {
    INT: ir.VectorType(_I32, COUNT),
    FLOAT: ir.VectorType(_F32, COUNT),
    MASK: ir.VectorType(ir.IntType(1), COUNT),
}


class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VECTOR[fe_type])


register_model(Lanes)(_Model)


def function(declare: Callable[..., Any]) -> Any:
    """Registers a function for compiled code: declare(context, *argument types) returns its signature and
    emits(...)."""
    return intrinsic(declare)


def emits(emit: Callable[..., Any]) -> Callable[..., Any]:
    """Adapts emit(builder, *arguments) to Numba's interface for code generation. None stands for no result."""

    def emitter(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result = emit(builder, *arguments)
        return context.get_dummy_value() if result is None else result

    return emitter


def _shuffle(builder: Any, a: Any, b: Any, picks: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(_I32, len(picks)), [_I32(i) for i in picks])
    return builder.shuffle_vector(a, b, mask)


def splat(builder: Any, scalar: Any, size: int = COUNT) -> Any:
    """`size` lanes of a scalar."""
    one = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, size), ir.Undefined), scalar, _I32(0))
    return _shuffle(builder, one, one, [0] * size)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed(">", a, b), a, b)


def _operator(symbol: Any, lanes: Lanes, result: Lanes, emit: Callable[[Any, Any, Any], Any]) -> None:
    """Registers symbol(lanes, lanes or scalar) -> result; emit(builder, a, b) generates it for two vectors."""
    scalar = {INT: types.Integer, FLOAT: types.Float}.get(lanes, ())

    def typing(context: Any) -> Any:
        return lambda a, b: result if a == lanes and (b == lanes or isinstance(b, scalar)) else None

    def with_scalar(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        right = context.cast(builder, arguments[1], signature.args[1], lanes.dtype)
        return emit(builder, arguments[0], splat(builder, right))

    type_callable(symbol)(typing)
    lower_builtin(symbol, lanes, lanes)(emits(emit))
    if scalar:
        lower_builtin(symbol, lanes, scalar)(with_scalar)


def _comparing(emit: Callable[..., Any], sign: str) -> Callable[[Any, Any, Any], Any]:
    return lambda builder, a, b: emit(builder, sign, a, b)


def _register_operators() -> None:
    build = ir.IRBuilder
    for symbol, integer, floating in (
        (operator.add, build.add, build.fadd),
        (operator.sub, build.sub, build.fsub),
        (operator.mul, build.mul, build.fmul),
    ):
        _operator(symbol, INT, INT, integer)
        _operator(symbol, FLOAT, FLOAT, floating)
    for symbol, emit in (
        (operator.and_, build.and_), (operator.or_, build.or_), (operator.xor, build.xor),
        (operator.lshift, build.shl), (operator.rshift, build.lshr),
    ):  # fmt: skip
        _operator(symbol, INT, INT, emit)
    _operator(operator.and_, MASK, MASK, build.and_)
    _operator(operator.or_, MASK, MASK, build.or_)
    for symbol, sign in ((operator.lt, "<"), (operator.le, "<="), (operator.eq, "==")):
        _operator(symbol, INT, MASK, _comparing(build.icmp_signed, sign))
        _operator(symbol, FLOAT, MASK, _comparing(build.fcmp_ordered, sign))


_register_operators()


def _in_memory(array: Any) -> tuple[Any, Lanes]:
    """How 16 elements of a numba array type lie in memory, and the lanes they are loaded as."""
    if array.dtype == types.float32:
        return _VECTOR[FLOAT], FLOAT
    if array.dtype == types.boolean:
        return ir.VectorType(ir.IntType(8), COUNT), MASK
    return ir.VectorType(ir.IntType(array.dtype.bitwidth), COUNT), INT


def pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, content: Any) -> Any:
    """A pointer to array[index], cast to the LLVM type `content`."""
    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), content.as_pointer())


def _loading(declare: Callable[[Any], tuple[Any, Lanes]]) -> Any:
    """A function (array, index) -> lanes; declare(array type) returns the type in memory and the lanes."""

    def loading(typing: Any, array: Any, index: Any) -> Any:
        memory, lanes = declare(array)

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = pointer(context, builder, array, arguments[0], arguments[1], memory)
            found = builder.load(place, align=1)
            return found if memory == _VECTOR[lanes] else builder.zext(found, _VECTOR[lanes])

        return lanes(array, types.intp), emit

    return function(loading)


def _storing(declare: Callable[[Any, Lanes], Any]) -> Any:
    """A function (array, index, lanes); declare(array type, lanes) returns the type in memory."""

    def storing(typing: Any, array: Any, index: Any, a: Any) -> Any:
        memory = declare(array, a)

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            data, place, value = arguments
            if memory != value.type:
                value = builder.zext(value, memory) if a == MASK else builder.trunc(value, memory)
            builder.store(value, pointer(context, builder, array, data, place, memory), align=1)
            return context.get_dummy_value()

        return types.void(array, types.intp, a), emit

    return function(storing)


def prefetch(builder: Any, address: Any, write: int) -> None:
    """Prefetches the cache line of an i8*, to be written if `write` is 1."""
    asking = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
    intrinsic = builder.module.declare_intrinsic("llvm.prefetch", (address.type,), asking)
    builder.call(intrinsic, [address, _I32(write), _I32(2), _I32(1)])


def _prefetching(write: int) -> Any:
    def prefetching(typing: Any, array: Any, index: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            prefetch(builder, pointer(context, builder, array, arguments[0], arguments[1], ir.IntType(8)), write)
            return context.get_dummy_value()

        return types.void(array, types.intp), emit

    return function(prefetching)


load, store = _loading(_in_memory), _storing(lambda array, a: _in_memory(array)[0])
will_read, will_write = _prefetching(0), _prefetching(1)


@function
def fill(typing: Any, x: Any) -> Any:
    """x, an int32 or float32, in every lane."""
    lanes = FLOAT if isinstance(x, types.Float) else INT
    return lanes(lanes.dtype), emits(splat)


@function
def columns(typing: Any) -> Any:
    return INT(), emits(lambda builder: ir.Constant(_VECTOR[INT], [_I32(lane) for lane in range(COUNT)]))


@function
def as_int(typing: Any, a: Any) -> Any:
    return INT(FLOAT), emits(lambda builder, a: builder.bitcast(a, _VECTOR[INT]))


@function
def as_float(typing: Any, a: Any) -> Any:
    return FLOAT(INT), emits(lambda builder, a: builder.bitcast(a, _VECTOR[FLOAT]))


@function
def largest(typing: Any, a: Any, b: Any) -> Any:
    return INT(INT, INT), emits(_larger)


@function
def select(typing: Any, mask: Any, a: Any, b: Any) -> Any:
    return a(MASK, a, a), emits(lambda builder, mask, a, b: builder.select(mask, a, b))


@function
def invert(typing: Any, mask: Any) -> Any:
    return MASK(MASK), emits(lambda builder, mask: builder.not_(mask))


@function
def count(typing: Any, mask: Any) -> Any:
    """How many lanes are set, int64."""

    def emit(builder: Any, mask: Any) -> Any:
        return builder.zext(builder.ctpop(builder.bitcast(mask, ir.IntType(COUNT))), ir.IntType(64))

    return types.int64(MASK), emits(emit)


def _by_halves(lanes: Lanes, join: Callable[[Any, Any, Any], Any]) -> Any:
    """A function that reduces the lanes by joining the lower with the upper half until one element is left."""

    def emit(builder: Any, left: Any) -> Any:
        half = COUNT
        while half > 1:
            half //= 2
            low, high = (_shuffle(builder, left, left, range(begin, begin + half)) for begin in (0, half))
            left = join(builder, low, high)
        return builder.extract_element(left, _I32(0))

    return function(lambda typing, a: (lanes.dtype(lanes), emits(emit)))


total, top = _by_halves(FLOAT, ir.IRBuilder.fadd), _by_halves(INT, _larger)


@function
def pack(typing: Any, array: Any, index: Any, a: Any, mask: Any) -> Any:
    """Stores the chosen lanes without gaps; overwrites up to 16 elements in all."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, place, values, chosen = arguments
        if "+avx512f" in context.codegen().magic_tuple()[2]:
            packed = _compress(builder, values, chosen)
            builder.store(packed, pointer(context, builder, array, data, place, packed.type), align=1)
            return context.get_dummy_value()
        for lane in range(COUNT):
            value, step = (builder.extract_element(lanes, _I32(lane)) for lanes in (values, chosen))
            builder.store(value, pointer(context, builder, array, data, place, _I32))
            place = builder.add(place, builder.zext(step, place.type))
        return context.get_dummy_value()

    return types.void(array, types.intp, INT, MASK), emit


def _compress(builder: Any, values: Any, chosen: Any) -> Any:
    """AVX-512's vpcompressd to a register, as the form that stores to memory is slow on Zen 4.

    Called by its x86 intrinsic, because LLVM's generic one is too recent.
    """
    name = "llvm.x86.avx512.mask.compress.v16i32"
    kind = ir.FunctionType(values.type, [values.type, values.type, chosen.type])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [values, ir.Constant(values.type, None), chosen])
