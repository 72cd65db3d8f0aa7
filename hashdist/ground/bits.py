"""Codes as bits: bit = (z >= 0), packed little-endian, one row per image (docs/decisions.md, S4)."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput

BIT_ORDER: Literal["little"] = "little"
"""Bit j of a code is bit j % 8 of byte j // 8, as faiss reads it."""


def check_bits(bits: int) -> int:
    """`bits` itself if it is a code length hashdist can store, else InvalidInput."""
    if bits < 8 or bits % 8:
        raise InvalidInput(f"the code length must be a positive multiple of 8 bits, found {bits}; use 16, 32, 64, ...")
    return bits


def pack(z_NL: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Codes uint8 [N, L/8] of hash-layer outputs [N, L]; sign(0) is +1, so bit = (z >= 0)."""
    check_bits(z_NL.shape[1])
    codes: NDArray[np.uint8] = np.packbits(z_NL >= 0, axis=1, bitorder=BIT_ORDER)
    return codes


def unpack(codes_NW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bits as 0/1 uint8 [N, 8 W] of packed codes [N, W]."""
    found: NDArray[np.uint8] = np.unpackbits(codes_NW, axis=1, bitorder=BIT_ORDER)
    return found


def signs(codes_NW: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Codes as -1/+1 float32 [N, 8 W]."""
    return unpack(codes_NW).astype(np.float32) * 2 - 1


def hamming(a_W: NDArray[np.uint8], b_NW: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Hamming distances int32 [N] of one code [W] to many [N, W]: the plain reference for the scan kernels."""
    distances: NDArray[np.int32] = np.bitwise_count(np.bitwise_xor(a_W, b_NW)).sum(axis=-1, dtype=np.int32)
    return distances
