"""The order in which images are trained on: a pure function of seed and epoch, cut into slices of ranks."""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al. 2014): a bijection of 64-bit words that looks random."""
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """A permutation of range(n), int64 [n], that depends on (n, key) only (not on numpy's generators)."""
    state = np.zeros(1, np.uint64)
    for word in key:
        state = mix64(state ^ mix64(np.array([word], np.int64).astype(np.uint64)))
    return np.argsort(mix64(state ^ mix64(np.arange(n, dtype=np.uint64))), kind="stable")


def epoch_batches(n: int, batch: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Rows of every global batch of an epoch, int64 [n // batch, batch]; the last partial batch is dropped."""
    steps = n // batch
    return permutation(n, seed, epoch)[: steps * batch].reshape(steps, batch)


def rank_slice(batch: int, rank: int, world_size: int) -> slice:
    """Rows floor(rB/G) .. floor((r+1)B/G) - 1 of a global batch: any B >= G, sizes differ by at most one."""
    return slice(rank * batch // world_size, (rank + 1) * batch // world_size)
