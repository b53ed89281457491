"""PEFT's DoRA as an independent oracle: any DVoRA adapter is one of its adapters, written out."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAAdapter
from tests.cases import DIRECTIONS, randn, trained_layer
from tests.reference import worst_error

RANK = 6


def peft_dora(layer: DVoRAAdapter) -> nn.Module:
    """The same layer as PEFT writes it: lora_A = diag(lambda_d) A, lora_B = diag(beta) B, scaling one."""
    base, shared = layer.base_layer, layer.shared
    copied = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
    copied.load_state_dict(base.state_dict())
    config = LoraConfig(r=layer.rank, lora_alpha=layer.rank, use_dora=True, target_modules=["0"])
    dora = get_peft_model(nn.Sequential(copied), config).base_model.model[0]
    with torch.no_grad():
        dora.lora_A["default"].weight.copy_(layer.lambda_d[:, None] * shared.A(layer.rank, base.in_features))
        dora.lora_B["default"].weight.copy_(beta(layer)[:, None] * shared.B(layer.rank, base.out_features))
        dora.lora_magnitude_vector["default"].weight.copy_(layer.magnitude)
    return dora


def beta(layer: DVoRAAdapter) -> Tensor:
    """The scale of each row's update of the weight."""
    scale = layer.base_layer.weight.norm(dim=1) if layer.adapted.direction == "unit" else 1.0
    return (scale * layer.lambda_b * layer.alpha / layer.rank).detach()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_outputs_and_gradients_agree_with_pefts_dora(bias: bool, direction: str) -> None:
    # PEFT's DoRA detaches the norm, as section 4.3 of its paper proposes.
    layer = trained_layer(30, 20, RANK, bias=bias, direction=direction, detach_norm=True, alpha=4)
    dora = peft_dora(layer)
    x, theirs_x = (randn(3, 4, 30, seed=8).requires_grad_() for _ in range(2))
    grad_output = randn(3, 4, 20, seed=9)

    y, expected = layer(x), dora(theirs_x)
    assert worst_error(y, expected.double()) < 1e-6
    y.backward(grad_output)
    expected.backward(grad_output)

    by_row_of_A = (dora.lora_A["default"].weight.grad * layer.shared.A(RANK, 30)).sum(1)
    by_row_of_B = (dora.lora_B["default"].weight.grad * layer.shared.B(RANK, 20)).sum(1)
    magnitude = dora.lora_magnitude_vector["default"].weight.grad
    by_lambda_b = beta(layer) / layer.lambda_b.detach() * by_row_of_B
    assert worst_error(x.grad, theirs_x.grad.double()) < 1e-6
    assert worst_error(layer.magnitude.grad, magnitude.double()) < 1e-6
    assert worst_error(layer.lambda_b.grad, by_lambda_b.double()) < 1e-6
    assert worst_error(layer.lambda_d.grad, by_row_of_A.double()) < 1e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_merged_weight_agrees_with_pefts_dora(direction: str) -> None:
    layer = trained_layer(30, 20, RANK, direction=direction)
    dora = peft_dora(layer)
    dora.merge()
    assert worst_error(layer.merge_to_original_layer().weight, dora.base_layer.weight.double()) < 1e-6
