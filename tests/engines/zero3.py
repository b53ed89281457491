"""An adapted model in DeepSpeed ZeRO-3 on CPUs, in a process of a gloo group."""

import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dvora.training import parameter_groups
from tests.engines.training import BATCH, batch


def settings(**zero: object) -> dict[str, Any]:
    """DeepSpeed's configuration; without a threshold of its own every parameter is sharded and freed, however small."""
    return {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
        "gradient_clipping": 0.0,
    }


def deepspeed() -> Any:
    """The package, for CPUs and without an operation of its own that it would have to compile."""
    rank, processes = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def engine(model: nn.Module, **zero: object) -> Any:
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02))
    made, *_ = deepspeed().initialize(model=model, optimizer=optimizer, config=settings(**zero))
    return made


def train(engine: Any, first: int, last: int) -> list[float]:
    """Losses of AdamW steps on this rank's part of every batch."""
    losses = []
    for step in range(first, last):
        part = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
        loss = engine(input_ids=part, labels=part).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def vectors(model: nn.Module) -> dict[str, np.ndarray]:
    named = {name: parameter for name, parameter in model.named_parameters() if "dvora_" in name}
    with deepspeed().zero.GatheredParameters(list(named.values())):
        return {name: vector.detach().clone().numpy() for name, vector in named.items()}


def gradient(parameter: nn.Parameter) -> torch.Tensor:
    """The mean over all ranks, gathered."""
    return deepspeed().utils.safe_get_full_grad(parameter)
