"""Training in several processes, each with a part of the batch, against one process with all of it."""

import numpy as np
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.engines.processes import run
from tests.engines.training import adapted, assert_trained_as_by_one, train, vectors

CASES: dict[str, tuple[dict[str, object], dict[str, bool]]] = {
    "dense": ({}, {}),
    "structured, buffers left alone": ({"projection_init": "structured"}, {"broadcast_buffers": False}),
}
"""Settings of the adapter, and options of DDP."""


def trained_in_parallel() -> dict[str, tuple[list[float], dict[str, np.ndarray]]]:
    """Losses and vectors of every case."""
    found = {}
    for case, (settings, options) in CASES.items():
        model = DistributedDataParallel(adapted(**settings), **options)
        losses = train(model, dist.get_rank(), dist.get_world_size())
        # Tensors would travel in memory that goes with this process.
        found[case] = losses, {name: vector.numpy() for name, vector in vectors(model).items()}
    return found


def test_two_processes_train_what_one_does() -> None:
    found = run(trained_in_parallel, 2)
    for case, (settings, _) in CASES.items():
        losses, ranks = zip(*(rank[case] for rank in found), strict=True)
        assert_trained_as_by_one(adapted(**settings), *ranks, losses=list(losses))
