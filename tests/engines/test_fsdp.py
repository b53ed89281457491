"""Adapted models inside FSDP, which holds parameters in a way of its own while it runs."""

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.peft.layer_cases import CASES
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import train_vectors


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`|When using ``NO_SHARD``|FSDP:UserWarning")
@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "Embedding", "MultiheadAttention", "experts (E, out, in)"])
def test_no_adapter_is_passed_by_and_files_have_the_same_names(name: str) -> None:
    case = CASES[name]
    model = get_peft_model(case.base(), case.config()).eval()
    train_vectors(model)
    with torch.no_grad():
        expected, base = model(case.inputs()), case.base()(case.inputs())
        keys = get_peft_model_state_dict(model).keys()
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        assert worst_difference(sharded(case.inputs()), expected) < 1e-6
        assert worst_difference(sharded(case.inputs()), base) > 1e-3
        assert get_peft_model_state_dict(sharded).keys() == keys
