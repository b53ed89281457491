"""Adapted models as if they had been trained, healthy ones, for the doctor to look at."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn

import dvora
from tests.peft import tiny

METHODS: dict[str, Callable[..., PeftConfig]] = {
    "dvora": lambda **more: dvora.DVoRAConfig(**{"r": 8, **more}),
    "dvora weight": lambda **more: dvora.DVoRAConfig(**{"r": 8, "direction": "weight", "alpha": 4.0, **more}),
    "dvora detached": lambda **more: dvora.DVoRAConfig(**{"r": 8, "detach_norm": True, "strength": 0.5, **more}),
    "dvora groups": lambda **more: dvora.DVoRAConfig(**{"r": 8, "lambda_d_groups": 3, **more}),
    "magnitude": lambda **more: dvora.DVoRAConfig(**{"r": 8, "magnitude_modules": more["target_modules"], **more}),
    "lora": lambda **more: LoraConfig(**{"r": 4, **more}),
    "dora": lambda **more: LoraConfig(**{"r": 4, "use_dora": True, **more}),
    "vera": lambda **more: VeraConfig(**{"r": 8, "projection_prng_key": 0, **more}),
}


class Convolved(nn.Module):
    """A convolution and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.conv(x)).mean((2, 3)))


def adapted(base: nn.Module, method: str, targets: Any, moved: float = 0.02, **more: Any) -> PeftModel:
    """A base with an adapter whose trained parameters are some steps away from their initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(base, METHODS[method](target_modules=targets, **more))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_((moved * torch.randn_like(parameter)).to(parameter.dtype))
    return model.eval()


def small_model(method: str = "dvora", **more: Any) -> PeftModel:
    """A small network of linear layers with an adapter."""
    return adapted(tiny.mlp(), method, ["lin0", "lin1", "lin2"], **more)


def inputs() -> dict[str, Tensor]:
    """Of the small network."""
    return tiny.inputs(tiny.mlp())


def four_bits() -> nn.Module:
    """Two layers whose weights bitsandbytes has quantised to four bits."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    generator = torch.Generator().manual_seed(0)
    layers = []
    for _ in range(2):
        plain = torch.randn(64, 64, generator=generator) / 8
        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.load_state_dict({"weight": plain})
        # It quantises when a layer is moved, even to where it is.
        layers.append(layer.requires_grad_(False).to("cpu"))
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])
