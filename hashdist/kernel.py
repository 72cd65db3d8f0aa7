"""Functions compiled by numba, without the interpreter's lock, for threads of our own."""

from collections.abc import Callable
from typing import Any

from numba import njit


def kernel(function: Callable[..., Any]) -> Any:
    """`function` compiled at its first call; the code is kept on disk where numba finds a writable folder."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return njit(nogil=True)(function)
