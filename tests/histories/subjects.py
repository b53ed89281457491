"""The models of the histories: a net with siblings and a layer behind them, adapted one by one or through PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor, nn

from dvora import DVoRAAdapter, DVoRAConfig, SharedProjections
from dvora.tuner import DVoRALayer

if TYPE_CHECKING:
    from tests.histories.shadow import Shadow

NAMES = ("first", "second", "last")
VECTORS = ("magnitude", "lambda_b", "lambda_d")
BASE = ("weight", "bias")
ADAPTER = "default"


@dataclass(frozen=True)
class Settings:
    """What a model is made of."""

    interface: str
    kind: str
    direction: str
    detach_norm: bool
    rank: int
    alpha: float | None
    bias: bool
    row: str
    dtype: torch.dtype
    freeze_base: bool
    strength: float
    width: int
    hidden: int
    outputs: int
    seed: int

    @classmethod
    def drawn(cls, rng: np.random.Generator, left_out: frozenset[str] = frozenset()) -> Settings:
        """Any."""

        def one_of(*choices: object) -> object:
            return choices[int(rng.integers(len(choices)))]

        interface = one_of("plain", "peft")
        row = one_of("usual", "usual", "zero", "tiny")
        return cls(
            interface=interface,
            kind=one_of("kaiming_uniform", "structured"),
            direction=one_of("unit", "weight"),
            detach_norm=one_of(False, True),
            rank=one_of(1, 3, 8, 20),
            alpha=one_of(None, None, 2.0),
            bias=one_of(True, True, False),
            row="usual" if row in left_out else row,
            dtype=one_of(torch.float32, torch.float32, torch.bfloat16, torch.float64),
            freeze_base=one_of(True, True, False),
            strength=one_of(1.0, 0.5) if interface == "peft" else 1.0,
            width=one_of(6, 8, 12),
            hidden=one_of(5, 9),
            outputs=one_of(4, 7),
            seed=one_of(0, 3),
        )

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """in_features and out_features by layer."""
        return {
            "first": (self.width, self.hidden),
            "second": (self.width, self.hidden),
            "last": (self.hidden, self.outputs),
        }

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def combined(x: Tensor, first: Callable, second: Callable, last: Callable) -> Tensor:
    """What the net does."""
    return last(first(x) + 0.5 * torch.tanh(second(x)))


class Net(nn.Module):
    """Two layers that read the same inputs, and one that reads theirs."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return combined(x, self.first, self.second, self.last)


@torch.no_grad()
def made(settings: Settings, shadow: Shadow) -> nn.Module:
    """The model that a shadow describes."""
    bases = {}
    for name in NAMES:
        in_features, out_features = settings.sizes[name]
        base = bases[name] = nn.Linear(in_features, out_features, settings.bias, dtype=settings.dtype)
        base.weight.copy_(shadow[f"{name}.weight"])
        if settings.bias:
            base.bias.copy_(shadow[f"{name}.bias"])
    hyper = {"alpha": settings.alpha, "direction": settings.direction, "detach_norm": settings.detach_norm}
    if settings.interface == "plain":
        shared = SharedProjections(settings.seed, settings.kind)
        options = {"freeze_base_layer": settings.freeze_base, "shared": shared, **hyper}
        model = Net({name: DVoRAAdapter(base, settings.rank, **options) for name, base in bases.items()})
    else:
        config = DVoRAConfig(
            r=settings.rank,
            target_modules=list(NAMES),
            projection_seed=settings.seed,
            projection_init=settings.kind,
            strength=settings.strength,
            **hyper,
        )
        model = get_peft_model(Net(bases), config, adapter_name=ADAPTER)
        for name in NAMES:
            layer_of(model, name).base_layer.requires_grad_(not settings.freeze_base)
    for name in shadow.names():
        parameter(model, name).copy_(shadow[name])
    return model.train()


def net_of(model: nn.Module) -> nn.Module:
    """The net in a model."""
    return model if isinstance(model, Net) else model.base_model.model


def layer_of(model: nn.Module, name: str) -> DVoRAAdapter | DVoRALayer:
    """An adapted layer."""
    return getattr(net_of(model), name)


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    """A vector, weight or bias by a name like "first.magnitude"."""
    layer_name, _, value = name.partition(".")
    layer = layer_of(model, layer_name)
    if value in BASE:
        return getattr(layer.base_layer, value)
    return getattr(layer, value) if isinstance(layer, DVoRAAdapter) else getattr(layer, f"dvora_{value}")[ADAPTER]


def replace_parameter(model: nn.Module, name: str, new: Tensor) -> None:
    """Put another parameter under the same name."""
    layer_name, _, value = name.partition(".")
    layer, new = layer_of(model, layer_name), nn.Parameter(new, parameter(model, name).requires_grad)
    if value in BASE:
        setattr(layer.base_layer, value, new)
    elif isinstance(layer, DVoRAAdapter):
        setattr(layer, value, new)
    else:
        getattr(layer, f"dvora_{value}")[ADAPTER] = new


def keys(model: nn.Module, names: list[str]) -> dict[str, str]:
    """The keys in the model's state dict by our names."""
    by_id = {id(value): key for key, value in model.named_parameters()}
    return {name: by_id[id(parameter(model, name))] for name in names}
