"""DDP, each process with a part of the batch, against one process with all of it; and FSDP."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from tests.engines.processes import run
from tests.engines.training import adapted, assert_trained_as_by_one, train, vectors
from tests.peft.layer_cases import CASES as LAYER_CASES
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import train_vectors

CASES: dict[str, tuple[dict[str, object], dict[str, bool]]] = {
    "dense": ({}, {}),
    "groups": ({"lambda_d_groups": 3}, {}),
    "buffers left alone": ({}, {"broadcast_buffers": False}),
}
"""Settings of the adapter, and options of DDP."""


def trained_in_parallel() -> dict[str, tuple[list[float], dict[str, np.ndarray]]]:
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


# FSDP, which holds parameters in a way of its own while it runs.


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`|When using ``NO_SHARD``|FSDP:UserWarning")
@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel.*deprecated:FutureWarning")
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "Embedding", "MultiheadAttention", "experts (E, out, in)"])
def test_no_adapter_is_passed_by_and_files_have_the_same_names(name: str, groups: int) -> None:
    case = LAYER_CASES[name]
    model = get_peft_model(case.base(), case.config(lambda_d_groups=groups)).eval()
    train_vectors(model)
    with torch.no_grad():
        expected, base = model(case.inputs()), case.base()(case.inputs())
        keys = get_peft_model_state_dict(model).keys()
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        assert worst_difference(sharded(case.inputs()), expected) < 1e-6
        assert worst_difference(sharded(case.inputs()), base) > 1e-3
        assert get_peft_model_state_dict(sharded).keys() == keys
