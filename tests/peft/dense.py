"""The adapted model rebuilt with dense float64 layers from `reference.py`."""

import copy
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dvora import SharedProjections
from dvora.peft import DVoRALayer
from tests.peft.tiny import dvora_layers
from tests.reference import DenseDVoRA


class DenseSum(nn.Module):
    """A layer whose weight is `W + sum of (W'_i - W)` over adapters i, each from the definition."""

    def __init__(self, adapters: Sequence[DenseDVoRA]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)

    def weight(self) -> Tensor:
        base = self.adapters[0].weight
        return base + sum(adapter.merged_weight() - base for adapter in self.adapters)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight(), self.adapters[0].bias)


def dense_layer(layer: DVoRALayer, model: PeftModel, adapter_name: str) -> DenseDVoRA:
    """The dense reference of one adapter of one layer, with matrices made anew from the configuration."""
    config, base = model.peft_config[adapter_name], layer.base_layer
    shared = SharedProjections(config.projection_seed, config.projection_init)
    magnitude, lambda_b, lambda_d = layer.vectors(adapter_name)
    rank, out_features, in_features = len(lambda_d), layer.out_features, layer.in_features
    return DenseDVoRA(
        base.weight.T if isinstance(base, Conv1D) else base.weight,
        base.bias,
        shared.A(rank, in_features, torch.float64),
        shared.B(rank, out_features, torch.float64),
        magnitude,
        lambda_b,
        lambda_d,
        scaling=1.0 if config.alpha is None else config.alpha / rank,
        direction=config.direction,
        detach_norm=config.detach_norm,
    )


def dense_model(model: PeftModel, adapter_names: Sequence[str] = ("default",)) -> nn.Module:
    """The unmerged base model in float64, its adapted layers replaced by `DenseSum`."""
    rebuilt = copy.deepcopy(model).unload().double()
    for name, layer in dvora_layers(model):
        present = [dense_layer(layer, model, each) for each in adapter_names if each in layer.dvora_adapted]
        rebuilt.set_submodule(name, DenseSum(present))
    return rebuilt


def dense_gradients_by_peft_name(rebuilt: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The gradients that the reference collected, by the names that PEFT gives the vectors."""
    return {
        f"base_model.model.{name}.dvora_{vector}.{adapter_name}": getattr(module.adapters[0], vector).grad
        for name, module in rebuilt.named_modules()
        if isinstance(module, DenseSum)
        for vector in ("magnitude", "lambda_b", "lambda_d")
    }
