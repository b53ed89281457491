"""The training that every engine repeats: a few steps of a tiny Llama, in parts, against one process with all of it."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig
from dvora.training import parameter_groups
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


def assert_trained_as_by_one(
    one: PeftModel, *ranks: Mapping[str, np.ndarray], losses: list[list[float]] | None = None
) -> None:
    """Every rank has the vectors that one process gets by training, to a ten-thousandth of their way.

    Args:
        one: untrained, with all of every batch.
        ranks: the vectors on each.
        losses: on each, of its part of every batch.
    """
    start, expected = vectors(one), train(one)
    if losses is not None:
        for step, loss in enumerate(expected):
            assert sum(of_rank[step] for of_rank in losses) / len(losses) == pytest.approx(loss, rel=1e-5)
    for name, vector in vectors(one).items():
        moved = (vector - start[name]).abs().max()
        for rank in ranks:
            assert rank.keys() == start.keys()
            assert (torch.from_numpy(rank[name]) - vector).abs().max() < 1e-4 * moved, name
            assert (rank[name] == ranks[0][name]).all(), name
