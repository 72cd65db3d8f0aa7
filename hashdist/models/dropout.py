"""Dropout whose masks depend on (seed, step, image id, layer, unit) and on nothing else.

A generator per rank would give every world size other masks, and a resumed run would have to carry its state.
Counter-based masks need neither: any rank can compute any image's mask at any time (docs/decisions.md, H8).

Two kinds of layer are replaced: nn.Dropout, and torchvision's StochasticDepth, which drops a branch for whole images.
Whatever else a network draws comes from torch's own generator, which `Counter.seeded` sets for one forward pass by
(seed, step): the same after a resumption, but not at another number of ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


class Counter:
    """The key of the next forward pass; one is shared by all layers of a network."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self.ids_b = torch.zeros(0, dtype=torch.int64)

    def set(self, step: int, ids_b: Tensor) -> None:
        """Key the coming forward pass: the optimiser step, and the int64 ids [b] of its images in order."""
        self.step, self.ids_b = step, ids_b

    @contextmanager
    def seeded(self, device: torch.device) -> Iterator[None]:
        """torch's generator keyed by (seed, step) meanwhile, and as it was afterwards."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(_key(self.seed, self.step)))
            yield


class CounterDropout(nn.Module):
    """nn.Dropout with masks from a Counter; the identity in evaluation mode.

    Args:
        p: probability of zero.
        layer: number of this layer in its network.
        counter: what the masks follow.
        whole: zero whole images instead of units.
    """

    def __init__(self, p: float, layer: int, counter: Counter, *, whole: bool = False) -> None:
        super().__init__()
        self.p, self.layer, self.counter, self.whole = p, layer, counter, whole

    def forward(self, x: Tensor) -> Tensor:
        """x [b, ...] with units zeroed with probability p and the others divided by 1 - p."""
        if not self.training or self.p == 0:
            return x
        kept = keep_mask(self.counter, self.layer, 1 if self.whole else x[0].numel(), self.p, x.device)
        shape = (len(x),) + (1,) * (x.ndim - 1) if self.whole else x.shape
        return x * (kept.view(shape) / (1 - self.p)).to(x.dtype)


def keep_mask(counter: Counter, layer: int, units: int, p: float, device: torch.device) -> Tensor:
    """bool [b, units], False with probability p."""
    key = _key(counter.seed, counter.step, layer)
    images_b1 = _mix(counter.ids_b.to(device) ^ key.to(device))[:, None]
    words = _mix(images_b1 + torch.arange(units, device=device))
    return _shift_right(words, 11) >= int(p * (1 << 53))


def use_counter(network: nn.Module, seed: int) -> Counter:
    """Replace every dropout of `network` in place by one that follows the returned counter."""
    counter = Counter(seed)
    found = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Dropout) or _drops_images(child)
    ]
    for layer, (parent, name, child) in enumerate(found):
        setattr(parent, name, CounterDropout(child.p, layer, counter, whole=_drops_images(child)))  # type: ignore[arg-type]
    return counter


def _drops_images(module: nn.Module) -> bool:
    """By name, since torchvision is not needed for networks that do not come from it."""
    return type(module).__name__ == "StochasticDepth" and getattr(module, "mode", "") == "row"


def _key(*words: int) -> Tensor:
    """int64: the words mixed one after the other."""
    key = torch.tensor(0, dtype=torch.int64)
    for word in words:
        key = _mix(key ^ _mix(torch.tensor(word, dtype=torch.int64)))
    return key


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser in wrapping int64 arithmetic, as hashdist.ground.permutation.mix64 in uint64."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)
