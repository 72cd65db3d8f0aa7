"""What one rank of tests/models/test_gloo.py does, in a process of its own: many checks for one slow start."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from hashdist.ground.permutation import rank_slice
from hashdist.methods import dsah
from hashdist.methods.contract import Batch, Place, method_settings
from hashdist.methods.parts.communicator import Communicator, SingleProcess, TorchDistributed
from hashdist.methods.parts.pairs import FlatGradients, all_rows, unit, with_own_rows
from hashdist.methods.parts.similarity import ImplicitW, quantize
from hashdist.models.training import Checkpoint
from tests.worlds.training import deep, run, same_bits, sparse, through_file, tiny_data, tiny_settings, weights

BATCH = 50
PAPERS = ("csdh", "ddh", "dsah", "sadh")
"""Over real processes; the baselines' ranks are threads (tests/contracts)."""


def rank_main(rank: int, world_size: int, folder: str) -> None:
    """Entry of a spawned process; rank 0 leaves what it found in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        found = checks(TorchDistributed())
    finally:
        dist.destroy_process_group()
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")


def checks(comm: Communicator) -> dict[str, Any]:
    """Everything that must not depend on the number of ranks, as tensors and numbers."""
    found: dict[str, Any] = {f"gradient {name}": gradient(name, comm) for name in PAPERS}
    found |= {f"weights {name}": whole_run(name, comm) for name in PAPERS}
    found |= {f"resumed {name}": resumes(name, comm) for name in PAPERS}
    found["gradient dsah, own rows"] = gradient("dsah", comm, gather_whole=1)
    found |= {f"wrong: {name}": recipe(comm) for name, recipe in WRONG.items()}
    found["refresh"] = refresh(comm)
    found["exchange"] = exchange(comm)
    return found


def own_slice(comm: Communicator) -> tuple[slice, tuple[int, ...]]:
    """This rank's rows of the batch, and how many each has."""
    slices = [rank_slice(BATCH, r, comm.world_size) for r in range(comm.world_size)]
    return slices[comm.rank], tuple(s.stop - s.start for s in slices)


def gradient(name: str, comm: Communicator, **options: Any) -> Tensor:
    """All gradients of one batch of a method, float64, through the flat buffer."""
    data, module = tiny_data(), deep(name)
    chosen: Any = method_settings(module, "paper", {"batch": BATCH, **options})
    head = module.network(chosen, 12, 16, torch.Generator().manual_seed(1), classes=data.classes).double()
    method = module.Method(chosen, Place(16, True, data, comm, dtype=torch.float64, seed=3))
    assert data.features is not None
    features = torch.from_numpy(data.features).double()

    def encode() -> Tensor:
        with torch.no_grad():
            return head(features)["z"].float()  # type: ignore[no-any-return]

    method.prepare(head, encode)
    method.start_epoch(0, encode)
    rows = np.random.default_rng(2).permutation(data.n)[:BATCH]
    own, sizes = own_slice(comm)
    method.loss(head(features[rows[own]]), Batch(rows, own, sizes, 0)).backward.backward()
    return reduced(head, comm)


def reduced(head: nn.Module, comm: Communicator) -> Tensor:
    """The summed gradients, flat."""
    FlatGradients(head.parameters()).reduce(comm)
    return torch.cat([p.grad.flatten() for p in head.parameters() if p.grad is not None])


def whole_run(name: str, comm: Communicator) -> dict[str, Tensor]:
    """Weights after 2 rounds in float64."""
    return weights(run(comm, tiny_data(), tiny_settings(name), dtype=torch.float64))


def resumes(name: str, comm: Communicator) -> bool:
    """Whether a run continued from a checkpoint within an epoch and from one behind a round ends with the same bits."""
    saved: list[Checkpoint] = []
    settings = tiny_settings(name, checkpoint_steps=3)
    full = weights(run(comm, tiny_data(), settings, save=saved.append))
    count = [torch.tensor([len(saved)])] if comm.rank == 0 else []
    total = int(comm.gather(count[0] if count else torch.tensor([0]), [1] * comm.world_size)[0])
    same = []
    for index in (0, total // 2, total - 2):
        box: list[Any] = [through_file(saved[index]) if comm.rank == 0 else None]
        if comm.world_size > 1:
            dist.broadcast_object_list(box)
        same.append(same_bits(weights(run(comm, tiny_data(), settings, resume=box[0])), full))
    return all(same)


def refresh(comm: Communicator) -> dict[str, Any]:
    """Thresholds of three rounds and the W they end with."""
    n = 2100
    positive = np.random.default_rng(0).random((n, n)) < 0.004
    graph = sparse(positive | positive.T)
    w, found = ImplicitW(graph.indptr, graph.indices), []
    for seed in range(3):
        centres = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
        noise = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed + 10))
        found.append(w.refresh(quantize(torch.tanh(centres[torch.arange(n) % 8] + noise)), 0.5, comm).threshold)
    return {"thresholds": found, "w": w.block(np.arange(n)).to(torch.int8)}


def exchange(comm: Communicator) -> bool:
    """Whether blocks of any dtype and uneven, also empty, sizes arrive whole, and sums are the same on every rank."""
    right = True
    for dtype in (torch.int16, torch.int64, torch.float16, torch.float32, torch.float64, torch.bool):
        sizes = [(3 * r) % 4 for r in range(comm.world_size)]
        sizes[-1] = 2
        blocks = [(torch.arange(2 * rows).view(rows, 2) + r).to(dtype) for r, rows in enumerate(sizes)]
        found = comm.gather(blocks[comm.rank], sizes)
        right &= all(torch.equal(f, b) and f.dtype == dtype for f, b in zip(found, blocks, strict=True))
    flat = torch.full((5,), float(comm.rank + 1))
    comm.sum_(flat)
    return right and torch.equal(flat, torch.full((5,), comm.world_size * (comm.world_size + 1) / 2))


# Recipes that look right and are not, of one batch in float64; each must differ from the right gradient.


def _batch(comm: Communicator) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    data = tiny_data()
    assert data.features is not None
    assert data.graph is not None
    rows = np.random.default_rng(2).permutation(data.n)[:BATCH]
    head = dsah.Head(12, 16, torch.Generator().manual_seed(1)).double()
    head.standardize.fit(data.features, 64.0)
    w_BB = ImplicitW(data.graph.indptr, data.graph.indices, dtype=torch.float64).block(rows)
    own, sizes = own_slice(comm)
    z_bL = head(torch.from_numpy(data.features[rows[own]]).double())["z"]
    return head, z_bL, all_rows(z_bL, sizes, comm), w_BB[own]


def without_the_column_role(comm: Communicator) -> Tensor:
    """Own rows against rows without gradient, each pair once: the pair's other role is lost."""
    head, z_bL, zbar_BL, w_bB = _batch(comm)
    s_bB = unit(z_bL) @ unit(zbar_BL).T
    lse = torch.logsumexp((unit(zbar_BL) @ unit(zbar_BL).T).flatten(), 0)
    (((lse - s_bB) * (s_bB - w_bB) ** 2).sum() / BATCH**2).backward()
    return reduced(head, comm)


def with_a_local_normaliser(comm: Communicator) -> Tensor:
    """Both roles, but PIC's normaliser over the own rows only."""
    head, z_bL, zbar_BL, w_bB = _batch(comm)
    s_bB = unit(z_bL) @ unit(zbar_BL).T
    (2 * ((torch.logsumexp(s_bB.flatten(), 0) - s_bB) * (s_bB - w_bB) ** 2).sum() / BATCH**2).backward()
    return reduced(head, comm)


def without_the_normalisers_gradient(comm: Communicator) -> Tensor:
    """Both roles and the global normaliser's value, but not its gradient."""
    head, z_bL, zbar_BL, w_bB = _batch(comm)
    s_bB = unit(z_bL) @ unit(zbar_BL).T
    lse = torch.logsumexp((unit(zbar_BL) @ unit(zbar_BL).T).flatten(), 0)
    (2 * ((lse - s_bB) * (s_bB - w_bB) ** 2).sum() / BATCH**2).backward()
    return reduced(head, comm)


def averaged_over_the_ranks(comm: Communicator) -> Tensor:
    """The whole loss on every rank, averaged as DDP does, without the factor G that belongs to it."""
    return right_pair_gradient(comm) / comm.world_size


def right_pair_gradient(comm: Communicator) -> Tensor:
    """The pair term alone by recipe C, for comparison."""
    head, z_bL, _, _ = _batch(comm)
    _, sizes = own_slice(comm)
    data = tiny_data()
    assert data.graph is not None
    rows = np.random.default_rng(2).permutation(data.n)[:BATCH]
    w_BB = ImplicitW(data.graph.indptr, data.graph.indices, dtype=torch.float64).block(rows)
    dsah.global_loss(with_own_rows(z_bL, sizes, comm), w_BB, dsah.PRESETS["paper"])[0].backward()
    return reduced(head, comm)


WRONG = {
    "right": right_pair_gradient,
    "column role": without_the_column_role,
    "local normaliser": with_a_local_normaliser,
    "normaliser's gradient": without_the_normalisers_gradient,
    "average": averaged_over_the_ranks,
}


def alone() -> dict[str, Any]:
    """The same in this process."""
    return checks(SingleProcess())
