"""Statistics of codes: plain numbers, which figures draw."""

import numpy as np
from numpy.typing import NDArray


def bit_entropy(share_L: NDArray[np.floating]) -> NDArray[np.float64]:
    """Entropy in bits of bits with these shares of ones."""
    inside = np.clip(np.asarray(share_L, np.float64), 1e-300, 1)
    outside = np.clip(1 - np.asarray(share_L, np.float64), 1e-300, 1)
    entropy: NDArray[np.float64] = -(inside * np.log2(inside) + outside * np.log2(outside))
    return entropy


def bit_correlation(signs_NL: NDArray[np.floating]) -> NDArray[np.float64]:
    """Pearson correlation [L, L] between bits; 0 beside a bit that is the same everywhere."""
    centred = signs_NL - signs_NL.mean(0, dtype=np.float64)
    spread = np.sqrt((centred**2).mean(0))
    matrix: NDArray[np.float64] = centred.T @ centred / len(centred)
    scale = np.outer(spread, spread)
    return np.where(scale > 1e-12, matrix / np.maximum(scale, 1e-12), 0.0)
