"""accelerate: its preparation for FSDP2, and checkpoints of a run in several processes."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import get_peft_model
from torch import nn

from dvora import DVoRAConfig
from dvora.training import AdapterSettings, parameter_groups
from tests.engines.processes import run
from tests.engines.test_data_parallel import STEPS, adapted, batch, train, vectors
from tests.peft.tiny import LAYERS, MODELS


def accelerator(**options: object) -> Accelerator:
    """This process's place in the group, as a launcher would set it."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return Accelerator(cpu=True, **options)


def trained_in_parts(read_once: bool) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and vectors of an adapted model that accelerate has given to FSDP2.

    Args:
        read_once: only the first rank has read the base model; the others have memory with anything in it.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=read_once,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    made = accelerator(fsdp_plugin=plugin)
    # On CPUs `prepare` takes DDP and says nothing; this is what it calls where there are GPUs.
    made.state.fsdp_plugin = plugin
    base = MODELS["llama"]()
    if read_once and dist.get_rank() != 0:
        for parameter in base.parameters():
            nn.init.constant_(parameter, 0.5)
    model = get_peft_model(base, DVoRAConfig(r=6, target_modules=LAYERS["llama"]))
    prepared = fsdp2_prepare_model(made, model)
    losses = train(prepared, dist.get_rank(), dist.get_world_size())
    return losses, {name: vector.full_tensor().numpy() for name, vector in vectors(prepared).items()}


@pytest.mark.parametrize("read_once", [False, True], ids=["read by all ranks", "read by the first rank"])
def test_a_model_prepared_for_fsdp2_trains_what_one_process_does(read_once: bool) -> None:
    one = adapted()
    losses, start = train(one), vectors(adapted())
    found = run(trained_in_parts, 2, read_once)
    for step, loss in enumerate(losses):
        assert sum(part[step] for part, _ in found) / 2 == pytest.approx(loss, rel=1e-5)
    for _, trained in found:
        for name, vector in vectors(one).items():
            moved = (vector - start[name]).abs().max()
            assert (torch.from_numpy(trained[name]) - vector).abs().max() < 1e-4 * moved, name


def interrupted(folder: str) -> dict[str, Any]:
    """Losses of a whole run and of the rest of one from its checkpoint, and what is said to another adapter."""
    first = Run()
    whole = first.steps(0, 3)
    first.accelerator.save_state(folder)
    whole += first.steps(3, STEPS)
    second = Run()
    second.accelerator.load_state(folder)
    rest = second.steps(3, STEPS)
    try:
        Run(projection_seed=5).accelerator.load_state(folder)
    except ValueError as error:
        return {"whole": whole, "rest": rest, "said": str(error)}
    return {"whole": whole, "rest": rest, "said": "nothing"}


class Run:
    """A model, its optimizer and an accelerator that saves and loads both."""

    def __init__(self, **settings: object) -> None:
        self.accelerator = accelerator()
        model = adapted(**settings)
        self.accelerator.register_for_checkpointing(AdapterSettings(model))
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.02))
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def steps(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            part = batch(step).chunk(self.accelerator.num_processes)[self.accelerator.process_index]
            self.optimizer.zero_grad()
            loss = self.model(input_ids=part, labels=part).loss
            self.accelerator.backward(loss)
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return losses


def test_a_run_goes_on_from_its_checkpoint_and_from_no_other(tmp_path: Path) -> None:
    for rank in run(interrupted, 2, str(tmp_path / "state")):
        assert rank["rest"] == rank["whole"][3:]
        assert "the checkpoint is of other adapters" in rank["said"]
