"""One wrapped layer."""

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dvora import DVoRAAdapter, DVoRAConfig, MergePrecisionWarning, SharedProjections
from dvora.peft import DVoRALayer
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import MODELS, dvora_layers, same_bits, train_vectors


def conv1d(in_features: int, out_features: int) -> Conv1D:
    """A layer of GPT-2 with the values that `linear` has."""
    layer, like = Conv1D(out_features, in_features), linear(in_features, out_features)
    with torch.no_grad():
        layer.weight.copy_(like.weight.T)
        layer.bias.copy_(like.bias)
    return layer


def linear(in_features: int, out_features: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Linear(in_features, out_features)


def wrapped(base: nn.Module, **options: object) -> DVoRALayer:
    """The only layer of a model, adapted and trained."""
    model = get_peft_model(nn.Sequential(base), DVoRAConfig(**{"r": 5, "target_modules": ["0"], **options}))
    train_vectors(model)
    return next(layer for _, layer in dvora_layers(model.eval()))


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("direction", ["unit", "weight"])
@pytest.mark.parametrize("options", [{}, {"alpha": 2.0}, {"detach_norm": True}], ids=str)
def test_a_linear_layer_gives_the_bits_of_the_plain_adapter(direction: str, options: dict[str, object]) -> None:
    layer = wrapped(linear(10, 7), direction=direction, **options)
    plain = DVoRAAdapter(linear(10, 7), 5, shared=SharedProjections(0, "structured"), direction=direction, **options)
    with torch.no_grad():
        for own, other in zip(plain.vectors, layer.vectors("default"), strict=True):
            own.copy_(other)
    assert same_bits(layer(x(3, 10)), plain(x(3, 10)))


def test_conv1d_equals_linear_with_the_transposed_weight() -> None:
    ours, like = wrapped(conv1d(10, 7)), wrapped(linear(10, 7))
    assert worst_difference(ours(x(3, 10)), like(x(3, 10))) < 1e-6
    assert worst_difference(ours.get_delta_weight("default"), like.get_delta_weight("default").T) < 1e-6


@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("shape", [(10,), (1, 10), (2, 3, 4, 10), (0, 10), (2, 0, 10)], ids=str)
def test_inputs_may_have_any_number_of_leading_dimensions(
    make: Callable[[int, int], nn.Module], shape: tuple[int, ...]
) -> None:
    if make is conv1d and shape == (10,):
        shape = (1, 10)  # transformers' Conv1D itself needs two dimensions
    layer = wrapped(make(10, 7))
    inputs = x(*shape)
    assert layer(inputs).shape == (*shape[:-1], 7)
    flat = layer(inputs.reshape(-1, 10)).reshape(*shape[:-1], 7)
    assert torch.allclose(layer(inputs), flat, atol=1e-6)


@pytest.mark.parametrize("make", [linear, conv1d])
def test_inputs_need_not_be_contiguous(make: Callable[[int, int], nn.Module]) -> None:
    layer = wrapped(make(10, 7))
    inputs = x(10, 6).T
    assert not inputs.is_contiguous()
    assert torch.allclose(layer(inputs), layer(inputs.contiguous()), atol=1e-6)


@pytest.mark.parametrize("make", [linear, conv1d])
def test_the_delta_weight_has_the_layout_of_the_base_and_is_what_merging_adds(
    make: Callable[[int, int], nn.Module],
) -> None:
    layer = wrapped(make(10, 7))
    before = layer.base_layer.weight.detach().clone()
    delta = layer.get_delta_weight("default")
    assert delta.shape == before.shape
    layer.merge()
    assert torch.equal(layer.base_layer.weight, before + delta)
    assert torch.equal(layer.get_delta_weight("default"), delta)
    layer.unmerge()
    assert same_bits(layer.base_layer.weight, before)


@pytest.mark.parametrize("make", [linear, conv1d])
def test_the_unmerged_weight_is_that_of_the_base_while_merged(make: Callable[[int, int], nn.Module]) -> None:
    layer = wrapped(make(10, 7))
    before = layer.unmerged().detach().clone()
    layer.merge()
    assert same_bits(layer.unmerged(), before)
    assert not torch.equal(layer.layer_type.layout.matrix(layer.base_layer.weight), before)


def test_a_layers_own_merge_warns_of_updates_lost_to_rounding() -> None:
    layer = wrapped(linear(10, 7).to(torch.bfloat16))
    with torch.no_grad():
        layer.dvora_lambda_b["default"].zero_()
        layer.dvora_magnitude["default"].copy_(layer.adapted("default").w * (1 + 1e-4))
    with pytest.warns(MergePrecisionWarning, match=r"most in 0: \d+\.\d%"):
        layer.merge()


def test_unmerging_an_unmerged_layer_warns() -> None:
    with pytest.warns(UserWarning, match="Already unmerged"):
        wrapped(linear(10, 7)).unmerge()


def test_the_base_is_called_once_and_as_it_is() -> None:
    layer = wrapped(linear(10, 7))
    calls: list[torch.Tensor] = []
    layer.base_layer.register_forward_hook(lambda _, args, __: calls.append(args[0]))
    inputs = x(3, 10)
    layer(inputs)
    assert len(calls) == 1
    assert calls[0] is inputs


def test_a_zero_row_stays_zero_and_finite() -> None:
    base = linear(10, 7)
    with torch.no_grad():
        base.weight[2] = 0
    layer = wrapped(base)
    y = layer(x(3, 10))
    y.sum().backward()
    assert torch.allclose(y[:, 2], base.bias[2].expand(3))
    assert all(vector.grad.isfinite().all() for vector in layer.vectors("default"))


def test_the_layer_shows_its_sizes_and_its_adapters() -> None:
    shown = repr(wrapped(linear(10, 7)))
    assert shown.startswith("dvora.DVoRALinear(")
    for part in ("in_features=10, out_features=7", "rank=5", "alpha=5", "direction='unit'", "seed=0"):
        assert part in shown


def test_weight_and_bias_are_those_of_the_base() -> None:
    layer = wrapped(linear(10, 7))
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert layer.get_base_layer() is layer.base_layer


def test_models_that_read_the_weight_of_a_layer_find_it() -> None:
    model = get_peft_model(MODELS["t5"](), DVoRAConfig(r=3, target_modules=["wo"]))
    wo = model.get_submodule("base_model.model.encoder.block.0.layer.1.DenseReluDense.wo")
    assert wo.weight.dtype == torch.float32
