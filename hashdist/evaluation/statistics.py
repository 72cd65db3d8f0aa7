"""Statistics of codes and of graphs: plain numbers, which figures draw."""

import numpy as np
from numpy.typing import NDArray

from hashdist.ground import bits
from hashdist.ground.ranges import blocks
from hashdist.methods.parts.labels import similar_pairs
from hashdist.nearest.shared import Sparse


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


def of_codes(codes_NW: NDArray[np.uint8]) -> dict[str, float]:
    """Balance, entropy, correlation and collisions of codes uint8 [N, L/8].

    Returns:
        imbalance: mean over bits of |share of ones - 1/2|. entropy: mean over bits, in bits. correlation: mean of
        |correlation| between different bits. distinct: distinct codes over N.
    """
    signs_NL = bits.signs(codes_NW)
    share = (signs_NL > 0).mean(0)
    off = ~np.eye(len(share), dtype=bool)
    return {
        "imbalance": float(np.abs(share - 0.5).mean()),
        "entropy": float(bit_entropy(share).mean()),
        "correlation": float(np.abs(bit_correlation(signs_NL)[off]).mean()),
        "distinct": len(np.unique(codes_NW, axis=0)) / len(codes_NW),
    }


def edge_agreement(edges: Sparse, labels_NC: NDArray[np.bool_]) -> dict[str, float]:
    """How well listed pairs (i, j), i != j, share a label (DDH, Fig 2): precision, recall, and pairs per row."""
    rows = np.repeat(np.arange(len(edges.indptr) - 1), np.diff(edges.indptr))
    right = 0
    for a, b in blocks(len(rows), 1 << 20):
        right += int((labels_NC[rows[a:b]] & labels_NC[edges.indices[a:b]]).any(1).sum())
    relevant = similar_pairs(labels_NC) - int(labels_NC.any(1).sum())
    n = len(edges.indptr) - 1
    return {"precision": right / max(1, len(rows)), "recall": right / max(1, relevant), "mean_row": len(rows) / n}
