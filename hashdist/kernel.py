"""Functions compiled by numba, without the interpreter's lock, for threads of our own."""

from collections.abc import Callable
from typing import Any

from numba import njit, types
from numba.extending import intrinsic


def kernel(function: Callable[..., Any]) -> Any:
    """`function` compiled at its first call; the code is kept on disk where numba finds a writable folder."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return njit(nogil=True)(function)


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
