"""accelerate: its preparation for FSDP2, and its checkpoints."""

import os

import numpy as np
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import get_peft_model
from torch import nn

from dvora import DVoRAConfig
from tests.engines.processes import run
from tests.engines.training import adapted, assert_trained_as_by_one, train, vectors
from tests.peft.tiny import LAYERS, MODELS


def trained_in_parts() -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and vectors of an adapted model that accelerate has given to FSDP2.

    Only the first rank has read the base model; the others have memory with anything in it.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    # This process's place in the group, as a launcher would set it.
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    made = Accelerator(cpu=True, fsdp_plugin=plugin)
    # On CPUs `prepare` takes DDP and says nothing; this is what it calls where there are GPUs.
    made.state.fsdp_plugin = plugin
    base = MODELS["llama"]()
    if dist.get_rank() != 0:
        for parameter in base.parameters():
            nn.init.constant_(parameter, 0.5)
    model = get_peft_model(base, DVoRAConfig(r=6, target_modules=LAYERS["llama"]))
    prepared = fsdp2_prepare_model(made, model)
    losses = train(prepared, dist.get_rank(), dist.get_world_size())
    return losses, {name: vector.full_tensor().numpy() for name, vector in vectors(prepared).items()}


def test_a_model_prepared_for_fsdp2_trains_what_one_process_does() -> None:
    losses, ranks = zip(*run(trained_in_parts, 2), strict=True)
    assert_trained_as_by_one(adapted(), *ranks, losses=list(losses))
