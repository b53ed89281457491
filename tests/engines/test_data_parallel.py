"""Training in several processes, each with a part of the batch, against one process with all of it."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dvora import DVoRAConfig
from dvora.training import parameter_groups
from tests.engines.processes import run
from tests.peft.tiny import LAYERS, MODELS

BATCH, TOKENS, STEPS = 8, 6, 5


def adapted(**settings: object) -> PeftModel:
    return get_peft_model(MODELS["llama"](), DVoRAConfig(**{"r": 6, "target_modules": LAYERS["llama"], **settings}))


def batch(step: int) -> Tensor:
    return torch.randint(3, 40, (BATCH, TOKENS), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, rank: int = 0, processes: int = 1) -> list[float]:
    """Losses of a few AdamW steps on one rank's part of every batch."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02))
    losses = []
    for step in range(STEPS):
        part = batch(step).chunk(processes)[rank]
        optimizer.zero_grad()
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def vectors(model: nn.Module) -> dict[str, Tensor]:
    return {n.removeprefix("module."): p.detach().clone() for n, p in model.named_parameters() if "dvora_" in n}


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
        one, start = adapted(**settings), vectors(adapted(**settings))
        losses = train(one)
        for step, loss in enumerate(losses):
            assert sum(rank[case][0][step] for rank in found) / 2 == pytest.approx(loss, rel=1e-5)
        for name, vector in vectors(one).items():
            moved = (vector - start[name]).abs().max()
            first = found[0][case][1][name]
            assert (torch.from_numpy(first) - vector).abs().max() < 1e-4 * moved, (case, name)
            assert all((rank[case][1][name] == first).all() for rank in found), (case, name)
