"""Who works on what, as pure functions: training order, row slices, parts (docs/decisions.md, S6).

Nothing here knows of a clock, a random generator or a cluster, so any world size computes the same plan.
"""

from collections.abc import Iterator, Sequence


def blocks(n: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of consecutive blocks of at most `size` rows that cover range(n)."""
    for start in range(0, n, size):
        yield start, min(start + size, n)


def runs(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of consecutive items whose sizes add up to at most `most` (a single item may be larger)."""
    start, held = 0, 0
    for number, size in enumerate(sizes):
        if number > start and held + size > most:
            yield start, number
            start, held = number, 0
        held += size
    if start < len(sizes):
        yield start, len(sizes)
