"""FSDP2: processes that each hold a part of every parameter, against one process that holds all."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run
from test_data_parallel import adapted, train, vectors
from torch.distributed.fsdp import fully_shard


def trained_in_parts(settings: dict[str, object]) -> tuple[list[float], dict[str, np.ndarray], list[bool]]:
    model = adapted(**settings)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    losses = train(model, dist.get_rank(), dist.get_world_size())
    named = {name: vector for name, vector in model.named_parameters() if "dvora_" in name}
    whole = {name: vector.detach().full_tensor().numpy() for name, vector in named.items()}
    return losses, whole, [vector.to_local().numel() < vector.numel() for vector in named.values()]


@pytest.mark.parametrize("projection_init", ["kaiming_uniform", "structured"])
def test_processes_with_parts_train_what_one_does(projection_init: str) -> None:
    settings = {"projection_init": projection_init}
    one = adapted(**settings)
    losses = train(one)
    found = run(trained_in_parts, 2, settings)
    start = vectors(adapted(**settings))
    for step, loss in enumerate(losses):
        assert sum(part[step] for part, _, _ in found) / 2 == pytest.approx(loss, rel=1e-5)
    for _, trained, sharded in found:
        assert all(sharded)
        assert trained.keys() == start.keys()
        for name, vector in vectors(one).items():
            moved = (vector - start[name]).abs().max()
            assert (torch.from_numpy(trained[name]) - vector).abs().max() < 1e-4 * moved, name
