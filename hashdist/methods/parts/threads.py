"""How many threads torch uses, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Exactly `count` torch threads. A sum is split by their number, so that bits of a result may depend on it.

    The number is set even where it is the one in force: set once, MKL no longer chooses a smaller one by itself.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
