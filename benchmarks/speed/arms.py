"""The methods that are compared: each turns a frozen base model into a model to train or to run.

All models of one workload share the base's weights, so that many of them fit into memory at a time.
"""

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from benchmarks.methods import peft_config
from benchmarks.parts import with_parts


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


BASE, FULL, MAGNITUDE = Arm("base"), Arm("full fine-tuning"), Arm("dvora magnitude")
HYPERADAPT, ROAD, IA3 = Arm("HyperAdapt"), Arm("RoAd"), Arm("(IA)3")
MERGED = Arm("dvora merged", 256)
METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("lora", {}),
    "DoRA": ("dora", {}),
    "VeRA": ("vera", {}),
    "RandLoRA": ("randlora", {}),
    ROAD.method: ("road", {"variant": "road_2"}),
    IA3.method: ("ia3", {}),
    "dvora dense": ("dvora", {}),
    "dvora 64 groups": ("dvora", {"lambda_d_groups": 64}),
    MAGNITUDE.method: ("magnitude", {}),
    MERGED.method: ("dvora", {}),
}
"""By the names in the result files: the method, and options of its configuration."""


def config_of(arm: Arm, targets: Sequence[str]) -> PeftConfig:
    """The configuration of a method that PEFT has."""
    method, options = METHODS[arm.method]
    return peft_config(method, arm.rank, list(targets), options=options)


def adapted(base: nn.Module, arm: Arm, targets: Sequence[str]) -> nn.Module:
    """A model of a method on the base's own weights; its trained parameters have moved slightly."""
    if arm == BASE:
        return base
    if arm == FULL:
        return unfrozen(base)
    if arm == HYPERADAPT:
        model = with_parts(sharing_copy(base), rows=True, columns=True, targets=targets)
        return moved(model.to(next(base.parameters()).device))
    # A merge writes to the weights, so this model has its own.
    own = copy.deepcopy(base) if arm.method == MERGED.method else sharing_copy(base)
    # PEFT's other methods draw their initial values from torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = moved(get_peft_model(own, config_of(arm, targets)))
    return cast(nn.Module, torch.compile(model)) if arm.compiled else model


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
