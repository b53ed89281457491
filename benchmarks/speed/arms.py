"""The methods that are compared: each turns a frozen base model into a model to train or to run.

All models of one workload share the base's weights, so that many of them fit into memory at a time.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftConfig, RandLoraConfig, VeraConfig, get_peft_model
from torch import nn

RANDLORA_RANK = 32
"""PEFT's default; a smaller rank means more trained parameters."""


class Arm(NamedTuple):
    """One method with its rank; the frozen base, full fine-tuning and the magnitude alone have none."""

    method: str
    rank: int = 0
    compiled: bool = False

    @property
    def name(self) -> str:
        """As in the result file."""
        return self.method + (f" r={self.rank}" if self.rank else "") + (" compiled" if self.compiled else "")

    def described(self) -> dict[str, Any]:
        """For a row of the result file."""
        return {"arm": self.name, "method": self.method, "rank": self.rank}


BASE = Arm("base")
FULL = Arm("full fine-tuning")
MAGNITUDE = Arm("dvora magnitude")
MERGED = Arm("dvora merged", 256)


def adapted(base: nn.Module, arm: Arm, targets: Sequence[str]) -> nn.Module:
    """A model of a method on the base's own weights; its trained parameters have moved slightly."""
    model = _eager(base, arm, targets)
    return cast(nn.Module, torch.compile(model)) if arm.compiled else model


def _eager(base: nn.Module, arm: Arm, targets: Sequence[str]) -> nn.Module:
    if arm.method == BASE.method:
        return base
    if arm.method == FULL.method:
        return unfrozen(base)
    # PEFT's other methods draw their initial values from torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = arm.method == MERGED.method
        model: nn.Module = get_peft_model(
            unshared(base) if own else sharing_copy(base), CONFIGS[arm.method](arm.rank, list(targets))
        )
    return moved(model)


def unshared(base: nn.Module) -> nn.Module:
    """A copy with weights of its own, for a method that writes to them."""
    return copy.deepcopy(base)


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that keeps the tensors themselves."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def unfrozen(base: nn.Module) -> nn.Module:
    """A copy whose parameters are trained; they share the base's memory, which nothing here writes to."""
    # Not `detach`, with which a step that is counted here would count as a write to the base of all others.
    trained = {id(p): nn.Parameter(p.data) for p in base.parameters()}
    buffers = {id(buffer): buffer for buffer in base.buffers()}
    return copy.deepcopy(base, {**trained, **buffers})


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """The model with noise on its trained parameters: most methods start as the identity, a possible shortcut."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def _lora(rank: int, targets: list[str]) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)


def _dora(rank: int, targets: list[str]) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, use_dora=True)


def _vera(rank: int, targets: list[str]) -> PeftConfig:
    return VeraConfig(r=rank, target_modules=targets)


def _randlora(rank: int, targets: list[str]) -> PeftConfig:
    return RandLoraConfig(r=rank, target_modules=targets)


def _dvora(rank: int, targets: list[str], distribution: str) -> PeftConfig:
    # Here, because the environments of some peers do not have it.
    from dvora import DVoRAConfig

    return DVoRAConfig(r=rank, target_modules=targets, projection_init=distribution)


def _dvora_dense(rank: int, targets: list[str]) -> PeftConfig:
    return _dvora(rank, targets, "kaiming_uniform")


def _dvora_structured(rank: int, targets: list[str]) -> PeftConfig:
    return _dvora(rank, targets, "structured")


def _magnitude(rank: int, targets: list[str]) -> PeftConfig:
    from dvora import DVoRAConfig

    return DVoRAConfig(r=1, target_modules=targets, magnitude_modules=targets)


CONFIGS: dict[str, Callable[[int, list[str]], PeftConfig]] = {
    "LoRA": _lora,
    "DoRA": _dora,
    "VeRA": _vera,
    "RandLoRA": _randlora,
    "dvora dense": _dvora_dense,
    "dvora structured": _dvora_structured,
    MAGNITUDE.method: _magnitude,
    MERGED.method: _dvora_dense,
}
