"""The state of a model before and after something that must not change it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.peft.tiny import same_bits


class Snapshot(NamedTuple):
    """Everything about a model that adapting it may change."""

    types: dict[str, type[nn.Module]]
    values: dict[str, Tensor]
    trainable: dict[str, bool]


def snapshot(model: nn.Module) -> Snapshot:
    return Snapshot(
        {name: type(module) for name, module in model.named_modules()},
        {name: value.detach().clone() for name, value in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
    )


def assert_unchanged(model: nn.Module, before: Snapshot, *, trainable: bool = True) -> None:
    """The same modules, the same keys, the same bits and, if `trainable`, the same parameters to train."""
    now = snapshot(model)
    assert now.types == before.types
    assert list(now.values) == list(before.values)
    changed = [
        name
        for name, value in now.values.items()
        if not (value.is_meta and before.values[name].is_meta) and not same_bits(value, before.values[name])
    ]
    assert not changed
    if trainable:
        assert now.trainable == before.trainable


def worst_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo().tiny))
