"""Dense updates, added to the base's state dict, are the merged model."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model

from dvora import DVoRAConfig
from dvora.peft.conversion import dense_updates
from tests.peft.layer_cases import CASES
from tests.peft.tiny import MODELS, train_vectors

NAMES = [name for name in CASES if "tied" not in name and "weight_norm" not in name]
# One parameter of each kind for all experts.
STACKED = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="transformers stacks Mixtral's experts since 5.0"
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=STACKED if "Mixtral" in name else ()) for name in NAMES])
def test_base_and_updates_give_the_merged_model(name: str) -> None:
    case = CASES[name]
    base = case.base()
    model = get_peft_model(copy.deepcopy(base), case.config(strength=0.7))
    train_vectors(model)
    updates = dense_updates(model)
    weights = base.state_dict()
    assert set(updates) <= set(weights)
    base.load_state_dict({**weights, **{key: weights[key] + update for key, update in updates.items()}})
    merged = model.merge_and_unload().state_dict()
    for key, value in base.state_dict().items():
        torch.testing.assert_close(value, merged[key])


def test_an_adapter_that_is_not_there_is_refused() -> None:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=2, target_modules=["lin0"]))
    with pytest.raises(ValueError, match="no DVoRA adapter 'other'"):
        dense_updates(model, "other")
