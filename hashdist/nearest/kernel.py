"""Functions compiled by numba that give up the interpreter's lock, and the words of codes that they read."""

from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray


def kernel(function: Callable[..., Any]) -> Any:
    """`function` compiled at its first call; the code is kept on disk where numba finds a writable folder."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return njit(nogil=True)(function)


# Words of codes


AS_BYTE, AS_U32, AS_ID = np.empty(0, np.uint8), np.empty(0, np.uint32), np.empty(0, np.int64)
"""What `load` reads, by their type."""


def address(array: NDArray[Any] | None) -> int:
    """Where an array's data begins, 0 for none; the caller holds the array. Four times as fast as `array.ctypes`."""
    return 0 if array is None else int(array.__array_interface__["data"][0])


@intrinsic
def load(_typing: Any, address: Any, index: Any, like: Any) -> Any:
    """The word at `index` (in words of `like`'s type) from `address`, which need not be aligned."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = context.get_value_type(like.dtype)
        base = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.load(builder.gep(base, [arguments[1]]), align=1)

    return like.dtype(address, index, like), generate


@intrinsic
def prefetch(_typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address, which may lie anywhere; not into the first level, where blocks are held."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        form = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], form)
        builder.call(function, [builder.inttoptr(arguments[0], pointer), number(0), number(1), number(1)])
        return context.get_dummy_value()

    return types.void(address), generate


@intrinsic
def differing(_typing: Any, a: Any, b: Any) -> Any:
    """Bits in which two words differ, in their own type (bytes: uint16): LLVM's ctpop, a vector instruction or a few.

    numba would widen the words first, and half as many would fit a vector.
    """
    result = types.uint16 if a == types.uint8 else a

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        count = builder.ctpop(builder.xor(*arguments))
        return count if result == a else builder.zext(count, context.get_value_type(result))

    return result(a, b), generate


@intrinsic
def narrow(_typing: Any, value: Any, like: Any) -> Any:
    """A small non-negative int64 in the type of `like`."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.trunc(arguments[0], context.get_value_type(like)) if like.bitwidth < 64 else arguments[0]

    return like(value, like), generate


@intrinsic
def plus(_typing: Any, a: Any, b: Any) -> Any:
    """a + b in their own type."""
    return a(a, b), lambda _context, builder, _signature, arguments: builder.add(*arguments)


@intrinsic
def mark_below(_typing: Any, marks: Any, distance: Any, limit: Any) -> Any:
    """`marks` with its highest bit set if distance < limit, all of one type: no comparison, no branch."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.or_(arguments[0], builder.sub(arguments[1], arguments[2]))

    return marks(marks, distance, limit), generate


@intrinsic
def marked(_typing: Any, marks: Any) -> Any:
    """Whether the highest bit is set."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.icmp_signed("<", arguments[0], context.get_constant(marks, 0))

    return types.boolean(marks), generate


@kernel
@no_type_check
def is_dead(dead, row):
    """Whether the bit of a row is set in a bitmap, which is given by address; 0 = none is."""
    return dead != 0 and (load(dead, row >> 3, AS_BYTE) >> (row & 7)) & 1 != 0
