"""A model whose adapted weights are dense float64 matrices from the definition, in whatever layer they sit.

Nothing of the library is asked but for the vectors, the settings and the shared matrices of a seed.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from dvora import SharedProjections
from dvora.peft import DVoRALayer
from tests.peft.tiny import dvora_layers
from tests.reference import DenseDVoRA


class Dense(NamedTuple):
    """The adapters of one weight, and how its matrix becomes the parameter."""

    adapters: list[DenseDVoRA]
    strengths: list[float]
    shape: torch.Size
    turned: bool
    """Stored as (..., in, out)."""

    def parameter(self) -> Tensor:
        """`W + sum of s (W' - W)`, as the module stores it."""
        matrix = self.adapters[0].weight
        for adapter, strength in zip(self.adapters, self.strengths, strict=True):
            matrix = matrix + strength * (adapter.merged_weight() - self.adapters[0].weight)
        return self.stored(matrix)

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix (O, I) in the layout of the parameter."""
        if not self.turned:
            return matrix.reshape(self.shape)
        *experts, in_features, out_features = self.shape
        return matrix.reshape(*experts, out_features, in_features).transpose(-1, -2)


class DenseModel:
    """The unmerged base model in float64 with dense adapted weights.

    Args:
        base: the model before it was adapted.
        model: the adapted one.
        adapter_names: those to be active.
    """

    def __init__(self, base: nn.Module, model: PeftModel, adapter_names: Sequence[str] = ("default",)) -> None:
        self.base = copy.deepcopy(base).double()
        for path, module in list(self.base.named_modules()):
            if parametrize.is_parametrized(module, "weight"):
                self.base.set_submodule(path, _plain(module))
        self.weights = {}
        for path, layer in dvora_layers(model):
            present = [name for name in adapter_names if name in layer.dvora_adapted]
            if present:
                parameter = parameter_name(path, layer)
                self.weights[parameter] = dense_weight(self.base.get_parameter(parameter), layer, model, present)

    def parameters(self) -> dict[str, Tensor]:
        return {name: weight.parameter() for name, weight in self.weights.items()}

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The outputs; logits, where a model returns more."""
        kwargs = {name: _doubled(value) for name, value in kwargs.items()}
        result = functional_call(self.base, self.parameters(), tuple(map(_doubled, args)), kwargs, tie_weights=False)
        return result if isinstance(result, Tensor) else result[0]

    def gradients(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """Gradients of the first adapter's vectors, by the names that the adapted model has for them."""
        return {
            f"{name}.dvora_{vector}.{adapter_name}": getattr(weight.adapters[0], vector).grad
            for name, weight in self.weights.items()
            for vector in ("magnitude", "lambda_b", "lambda_d")
        }


def parameter_name(path: str, layer: DVoRALayer) -> str:
    """The name in the base model of the weight that a layer adapts."""
    return f"{path.replace('.base_layer', '')}.{layer.parameter_name}"


def gradients_by_parameter(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """The gradients of an adapted model's vectors, by the names that `DenseModel.gradients` uses."""
    return {
        f"{parameter_name(path, layer)}.dvora_{vector}.{adapter_name}": value.grad
        for path, layer in dvora_layers(model)
        for vector, value in layer.vectors(adapter_name)._asdict().items()
        if value.requires_grad
    }


def dense_weight(weight: Tensor, layer: DVoRALayer, model: PeftModel, names: Sequence[str]) -> Dense:
    """The named adapters of a layer over a weight, with matrices made anew from the configuration."""
    module, experts = layer.get_base_layer(), weight.dim() == 3 and not isinstance(layer.get_base_layer(), nn.Conv1d)
    turned = isinstance(module, Conv1D | nn.Embedding) or (experts and getattr(module, "is_transposed", False))
    matrix = weight.detach().transpose(-1, -2) if turned else weight.detach()
    matrix = matrix.flatten(0, 1) if experts else matrix.flatten(1)
    adapters = [_adapter(matrix, module, layer, model, name) for name in names]
    return Dense(adapters, [float(layer.strength(name)) for name in names], weight.shape, turned)


def _adapter(matrix: Tensor, module: nn.Module, layer: DVoRALayer, model: PeftModel, name: str) -> DenseDVoRA:
    config = model.peft_config[name]
    magnitude, lambda_b, lambda_d = (vector.detach().double().clone() for vector in layer.vectors(name))
    out_features, in_features = matrix.shape
    shared, rank = SharedProjections(config.projection_seed, config.projection_init), max(1, lambda_d.shape[-1])
    A = shared.A(rank, in_features, torch.float64).clone()
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        A[:, module.padding_idx] = 0
    return DenseDVoRA(
        matrix,
        None,
        A,
        shared.B(rank, out_features, torch.float64),
        magnitude,
        lambda_b,
        lambda_d if lambda_d.numel() else torch.zeros(1, dtype=torch.float64),
        scaling=1.0 if config.alpha is None else config.alpha / rank,
        direction=config.direction,
        detach_norm=config.detach_norm,
    )


@torch.no_grad()
def _plain(linear: nn.Linear) -> nn.Linear:
    plain = nn.Linear(linear.in_features, linear.out_features, dtype=torch.float64)
    plain.weight.copy_(linear.weight)
    plain.bias.copy_(linear.bias)
    return plain


def _doubled(value: Tensor) -> Tensor:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
