"""The quantised layers of `bases.py` are what the tests take them for."""

import copy

import pytest
import torch
from torch import nn

from tests.peft.bases import BASES, QUANTISED, TRAINABLE, operating_weight, quantised, wide
from tests.peft.models_compared import worst_difference


def inputs(kind: str) -> torch.Tensor:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    return x.to(BASES[kind].dtype)


@pytest.mark.parametrize("mode", ["training", "eval"])
@pytest.mark.parametrize("kind", BASES)
def test_a_base_multiplies_by_its_operating_weight(kind: str, mode: str) -> None:
    base, linear, x = BASES[kind], wide().lin0, inputs(kind)
    layer = quantised(wide(), kind).lin0.train(mode == "training")
    expected = x.double() @ operating_weight(linear, kind).T + linear.bias.to(base.dtype).double()
    tolerance = base.tolerance if mode == "training" else base.eval_tolerance
    assert worst_difference(layer(x), expected) < tolerance


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_weight_is_near_the_original_and_not_the_original(kind: str) -> None:
    weight = wide().lin0.weight.double()
    distance = float((operating_weight(wide().lin0, kind) - weight).norm() / weight.norm())
    assert 1e-4 < distance < 0.15


@pytest.mark.parametrize("kind", BASES)
def test_the_input_gets_its_gradient_where_the_base_is_said_to_be_differentiable(kind: str) -> None:
    layer, x = quantised(wide(), kind).lin0.train(), inputs(kind).requires_grad_()
    y = layer(x)
    assert y.requires_grad == (kind in TRAINABLE)
    if y.requires_grad:
        y.sum().backward()
        expected = operating_weight(wide().lin0, kind).sum(0).expand(5, -1)
        assert worst_difference(x.grad, expected) < BASES[kind].tolerance


@pytest.mark.parametrize("kind", BASES)
def test_quantising_leaves_the_model_itself_alone(kind: str) -> None:
    model = wide()
    before = copy.deepcopy(model.state_dict())
    quantised(model, kind)
    assert type(model.lin0) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
