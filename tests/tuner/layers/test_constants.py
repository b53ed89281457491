"""The norm constants of a layer are measured once, and again only when its weight has changed."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig
from dvora.weight.adapted_weight import AdaptedWeight
from tests.tuner.tiny import MODELS


def measured(model: nn.Module) -> list[Tensor]:
    """The measured row norms of every layer; a further measurement makes new tensors."""
    return [module.w for module in model.modules() if isinstance(module, AdaptedWeight)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(a is b for a, b in zip(first, second, strict=True))


def adapted() -> PeftModel:
    return get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules="all-linear"))


def test_a_forward_pass_measures_nothing() -> None:
    model = adapted()
    before = measured(model)
    model(torch.ones(2, 10)).sum().backward()
    assert same(before, measured(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_after_loading_a_forward_pass_measures_nothing(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(MODELS["mlp"](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    before = measured(model)
    model(torch.ones(2, 10))
    assert same(before, measured(model))


def test_a_move_to_where_the_model_is_measures_nothing() -> None:
    model = adapted()
    before = measured(model)
    model.to("cpu")(torch.ones(2, 10))
    assert same(before, measured(model))


def test_a_write_to_the_base_is_measured_again() -> None:
    model = adapted()
    before = measured(model)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(2.0)
    model(torch.ones(2, 10))
    assert all(torch.allclose(2 * old, new) for old, new in zip(before, measured(model), strict=True))
