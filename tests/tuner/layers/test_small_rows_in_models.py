"""Rows of tiny norm beside a usual bias, through PEFT: every kind of layer, several adapters, mixed batches."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dvora import DVoRAConfig
from dvora.tools.doctor import examine
from tests.cases import randn
from tests.tuner.models_compared import worst_difference

TINY = [1, 4]
OUT = 6
Make = Callable[[], nn.Module]

LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(10, OUT), (3, 10)),
    "Linear, many tokens": (lambda: nn.Linear(10, OUT), (4, 60, 10)),
    "transformers' Conv1D": (lambda: Conv1D(OUT, 10), (3, 5, 10)),
    "Conv1d": (lambda: nn.Conv1d(5, OUT, 3, padding=1), (3, 5, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, OUT, 3, stride=2, padding_mode="reflect", padding=1), (3, 4, 7, 6)),
    "Conv2d, groups": (lambda: nn.Conv2d(4, OUT, 3, groups=2), (3, 4, 7, 6)),
    "Conv2d, depthwise": (lambda: nn.Conv2d(OUT, OUT, 3, groups=OUT), (3, OUT, 7, 6)),
    "Conv3d, one image": (lambda: nn.Conv3d(2, OUT, 2), (2, 4, 5, 3)),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)


class Measured(nn.Module):
    """A layer that is known by its forward pass alone, as quantised ones are."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 10, OUT
        self.inner = nn.Linear(10, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def with_tiny_rows(layer: nn.Module, norm: float = 1e-8) -> nn.Module:
    """The layer with values of its own, and some rows next to nothing."""
    with torch.no_grad():
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        weight.copy_(randn(*weight.shape, seed=1))
        rows = weight.flatten(1)
        rows[TINY] *= norm / rows[TINY].norm(dim=1, keepdim=True)
        layer.bias.copy_(1 + randn(OUT, seed=2).abs())
    return layer


def train(model: PeftModel, adapter: str, seed: int) -> None:
    """Vectors as large as those of usual rows."""
    for module in model.modules():
        for vectors, size in (("dvora_magnitude", 0.3), ("dvora_lambda_b", 0.5)):
            if vectors in getattr(module, "_modules", {}) and adapter in getattr(module, vectors):
                with torch.no_grad():
                    vector = getattr(module, vectors)[adapter]
                    vector.add_(size * randn(*vector.shape, seed=seed).abs().to(vector))


def adapted(base: nn.Module, **settings: object) -> PeftModel:
    model = get_peft_model(nn.Sequential(base), DVoRAConfig(r=4, target_modules=["0"], **settings))
    train(model, "default", seed=3)
    return model


def pair(layer: str, **settings: object) -> tuple[PeftModel, PeftModel, Tensor]:
    """The adapted model in float32 and, as its reference, in float64; and inputs."""
    make, shape = LAYERS[layer]
    base = with_tiny_rows(make())
    model = adapted(base, **settings)
    return model, copy.deepcopy(model).double(), randn(*shape, seed=5)


def merged_outputs(model: PeftModel, x: Tensor) -> Tensor:
    """Of a model in float64, with the adapters in its weights."""
    return copy.deepcopy(model).merge_and_unload()(x.double())


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_those_of_the_merged_model_in_float64(layer: str, training: bool) -> None:
    model, reference, x = pair(layer)
    assert worst_difference(model.train(training)(x), merged_outputs(reference, x)) < 1e-5


@every_layer
def test_gradients_are_those_of_float64(layer: str) -> None:
    gradients = []
    model, reference, x = pair(layer)
    for each, dtype in ((model, torch.float32), (reference, torch.float64)):
        inputs = x.detach().to(dtype).requires_grad_()
        y = each.train()(inputs)
        (y * torch.linspace(-1, 2, y.numel(), dtype=dtype).view_as(y)).sum().backward()
        trained = [parameter.grad for parameter in each.parameters() if parameter.requires_grad]
        assert len(trained) == 3
        gradients.append([inputs.grad, *trained])
    for found, expected in zip(*gradients, strict=True):
        assert worst_difference(found, expected) < 1e-4


@every_layer
def test_at_the_start_the_model_is_its_base_to_the_last_bit(layer: str) -> None:
    make, shape = LAYERS[layer]
    base, x = with_tiny_rows(make()), randn(*shape, seed=5)
    expected = base(x)
    model = get_peft_model(nn.Sequential(base), DVoRAConfig(r=4, target_modules=["0"]))
    for training in (True, False):
        assert torch.equal(model.train(training)(x), expected)


@pytest.mark.parametrize("layer", ["Linear", "Conv2d, groups"])
def test_several_adapters_and_strengths_add_up(layer: str) -> None:
    model, _, x = pair(layer)
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=["0"], strength=0.5))
    train(model, "second", seed=7)
    model.base_model.set_adapter(["default", "second"])
    model.base_model.set_strength(-0.25, "default")
    reference = merged_outputs(copy.deepcopy(model).double(), x)
    assert worst_difference(model.eval()(x), reference) < 1e-5


def test_rows_of_a_mixed_batch_are_those_of_their_adapters() -> None:
    model, _, x = pair("Linear")
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=["0"]))
    train(model, "second", seed=7)
    model.eval()
    mixed = model(x, adapter_names=["second", "__base__", "default"])
    for row, name in enumerate(["second", None, "default"]):
        if name is None:
            with model.disable_adapter():
                expected = model(x)
        else:
            model.set_adapter(name)
            expected = model(x)
        assert worst_difference(mixed[row], expected[row].double()) < 1e-6


@pytest.mark.filterwarnings("ignore:rows whose norm is tiny compared to their bias")
def test_a_layer_whose_weight_is_not_at_hand_keeps_its_base_s_outputs_there() -> None:
    layer = Measured()
    with_tiny_rows(layer.inner)
    x = randn(5, 10, seed=5)
    with pytest.warns(
        UserWarning, match=r"rows whose norm is tiny compared to their bias .* 2 rows in 1 layers, most in 0"
    ):
        model = adapted(layer)
    base = layer(x)
    y = model.train()(x)
    rest = [row for row in range(OUT) if row not in TINY]
    assert torch.equal(y[:, TINY], base[:, TINY])
    assert not torch.allclose(y[:, rest], base[:, rest])
    y.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and len(parameter) == OUT]
    assert all(not parameter.grad[TINY].any() and parameter.grad[rest].all() for parameter in trained)
    found = examine(model.eval(), x, fresh_process=False).of("rows left alone")
    assert (found.status, found.figures["worst"]) == ("warn", len(TINY) / OUT)


def test_a_bias_that_is_not_finite_is_refused_by_name() -> None:
    base = nn.Linear(10, OUT)
    with torch.no_grad():
        base.bias[2] = -float("inf")
    with pytest.raises(ValueError, match=r"0: 1 of 6 values of the bias are not finite"):
        adapted(base)
