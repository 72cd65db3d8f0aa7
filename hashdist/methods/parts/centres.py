"""Hash centres: one code a class, far from one another (CSQ: Yuan et al., CVPR 2020, section 3.2)."""

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.bits import check_bits


def sylvester(size: int) -> NDArray[np.int8]:
    """The Hadamard matrix of a power of two, [size, size] of +-1: H_2k = [[H, H], [H, -H]]."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"Sylvester's construction needs a power of two, found {size}")
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def centres(classes: int, bits: int, rng: np.random.Generator) -> NDArray[np.int8]:
    """One centre a class, [C, L] of +-1 (Algorithm 1 of CSQ).

    Rows of H_L drawn without repetition where L is a power of two and C <= L: any two differ in L / 2 bits. Rows of
    [H; -H] where C <= 2 L: L / 2 or L bits. Independent fair signs otherwise: L / 2 bits on average.
    """
    check_bits(bits)
    if bits & (bits - 1) or classes > 2 * bits:
        return (2 * rng.integers(0, 2, (classes, bits)) - 1).astype(np.int8)
    rows: NDArray[np.int8] = sylvester(bits)
    if classes > bits:
        rows = np.concatenate([rows, -rows])
    return rows[rng.permutation(len(rows))[:classes]]


def centres_of_images(
    labels_NC: NDArray[np.bool_], centres_CL: NDArray[np.int8], rng: np.random.Generator
) -> NDArray[np.int8]:
    """The centre of every image, [N, L]: bit by bit the majority of its classes' centres, a tie the sign of one draw.

    The draw is one random code for all images, so that images with the same labels have the same centre.
    """
    votes_NL = labels_NC.astype(np.int32) @ centres_CL.astype(np.int32)
    tie_L = 2 * rng.integers(0, 2, centres_CL.shape[1]) - 1
    return np.where(2 * votes_NL + tie_L > 0, 1, -1).astype(np.int8)
