"""torch's distributed checkpoints of adapters: into another number of processes, and into no other adapter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from dvora.training import AdapterSettings, parameter_groups
from tests.engines.processes import refusal, run
from tests.engines.test_fully_sharded import shard
from tests.engines.training import STEPS, adapted, assert_trained_as_by_one, batch
from tests.peft.tiny import MODELS

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
WHOLE = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)


class Run:
    """An adapted model, where there are several processes in FSDP2, and its optimizer."""

    def __init__(self, **settings: object) -> None:
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        model = adapted(**settings)
        self.model = shard(model) if self.processes > 1 else model
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.02))

    def steps(self, first: int, last: int) -> None:
        """Train with this process's part of the batches."""
        for step in range(first, last):
            part = batch(step).chunk(self.processes)[self.rank]
            self.optimizer.zero_grad()
            self.model(input_ids=part, labels=part).loss.backward()
            self.optimizer.step()

    def save(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=TRAINED)
        state = {"model": model, "optimizer": optimizer, "adapters": AdapterSettings(self.model)}
        dcp.save(state, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        # First, so that nothing of another adapter is read.
        dcp.load({"adapters": AdapterSettings(self.model)}, checkpoint_id=folder)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=TRAINED)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=TRAINED)

    def vectors(self) -> dict[str, np.ndarray]:
        """All of them on the first rank, none on the others."""
        whole = get_model_state_dict(self.model, options=WHOLE)
        return {name: vector.numpy() for name, vector in whole.items()}


# Of four processes one has none of three groups.
GROUPS = (1, 3)


def continued(folder: Path, first: int, last: int) -> dict[int, dict[str, np.ndarray]]:
    """Goes on from the checkpoints after the first steps, if there are any, and leaves some after the last."""
    found = {}
    for groups in GROUPS:
        part = Run(lambda_d_groups=groups)
        if first:
            part.load(folder / f"{groups}, {first}")
        part.steps(first, last)
        part.save(folder / f"{groups}, {last}")
        found[groups] = part.vectors()
    return found


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_a_run_goes_on_in_any_number_of_processes(tmp_path: Path) -> None:
    run(continued, 2, tmp_path, 0, 2)
    continued(tmp_path, 2, 3)
    first, *_ = run(continued, 4, tmp_path, 3, STEPS)
    for groups in GROUPS:
        assert_trained_as_by_one(adapted(lambda_d_groups=groups), first[groups])


def saved_and_refused(folder: Path) -> dict[str, Any]:
    part = Run()
    part.steps(0, 2)
    part.save(folder / "checkpoint")
    whole, first = get_model_state_dict(part.model, options=WHOLE), dist.get_rank() == 0
    if first:
        part.model.save_pretrained(folder / "gathered", state_dict=whole)
    return {
        "outputs": outputs(part.model),
        "parts": refusal(lambda: part.model.save_pretrained(folder / "parts", is_main_process=first)),
        "said": [
            refusal(lambda other=other: Run(**other).load(folder / "checkpoint"))
            for other in ({"projection_seed": 5}, {"r": 5}, {"target_modules": ["q_proj"]}, {"lambda_d_groups": 2})
        ],
    }


@torch.no_grad()
def outputs(model: nn.Module) -> np.ndarray:
    return model.eval()(input_ids=batch(STEPS)).logits.numpy()


def test_files_are_right_or_refused_on_every_rank(tmp_path: Path) -> None:
    for found in run(saved_and_refused, 2, tmp_path):
        loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "gathered")
        np.testing.assert_allclose(outputs(loaded), found["outputs"], rtol=1e-5, atol=1e-6)
        assert "dvora_magnitude.default is sharded between the processes (DTensor" in found["parts"]
        for said, difference in zip(found["said"], ("projections=", "rank=5", "no adapter", "groups=2"), strict=True):
            assert "the checkpoint is of other adapters" in said
            assert difference in said
    assert not (tmp_path / "parts" / "adapter_model.safetensors").exists()
