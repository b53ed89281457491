"""How each supported layer type holds its weight."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dvora.tuner.kinds import KINDS, bias_of, kind_of, weight_of


@pytest.fixture(params=["Linear", "Conv1D"])
def layer(request: pytest.FixtureRequest) -> nn.Module:
    """Three inputs, five outputs."""
    return nn.Linear(3, 5) if request.param == "Linear" else Conv1D(5, 3)


def test_the_matrix_is_an_out_by_in_view_of_the_weight(layer: nn.Module) -> None:
    matrix = kind_of(layer, "layer").matrix(weight_of(layer))
    assert matrix.shape == (5, 3)
    with torch.no_grad():
        matrix.zero_()
    assert not layer.weight.any()


def test_the_matrix_is_what_the_layer_multiplies_by(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.normal_()
    x = torch.randn(4, 3)
    expected = x @ kind_of(layer, "layer").matrix(weight_of(layer)).T + bias_of(layer)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_the_matrix_of_the_matrix_is_the_weight(layer: nn.Module) -> None:
    kind = kind_of(layer, "layer")
    assert kind.matrix(kind.matrix(layer.weight)).shape == layer.weight.shape


def test_a_layer_without_a_bias_has_none() -> None:
    assert bias_of(nn.Linear(3, 5, bias=False)) is None


def test_a_subclass_is_of_its_parents_kind() -> None:
    class Named(nn.Linear):
        pass

    assert kind_of(Named(3, 5), "layer") is KINDS[nn.Linear]


def test_another_type_is_refused_with_the_supported_types() -> None:
    with pytest.raises(
        TypeError, match=r"a\.b of type Conv2d is not supported; .*torch's Linear, transformers's Conv1D"
    ):
        kind_of(nn.Conv2d(1, 1, 1), "a.b")


def test_the_projection_inside_multi_head_attention_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a\.out_proj belongs to .*MultiheadAttention.*exclude_modules=\['out_proj'\]"):
        kind_of(nn.MultiheadAttention(4, 2).out_proj, "a.out_proj")
