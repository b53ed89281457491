"""A model with layers of one shape, whose factors are made together, and the same model with every layer by itself."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig
from dvora.factors import remove_factor_pass
from dvora.peft import DVoRALayer
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import dvora_layers, train_vectors

WIDTH, RANK = 8, 3
LAYERS = ["lin0", "lin1", "lin2", "lin3"]
CHANGED = "lin3"
"""The layer that tests change in the middle of a pass, before it runs."""


class Tower(nn.Module):
    """Four layers of one shape, with a place in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.lin2, self.lin3 = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.middle = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.tanh(self.lin1(torch.tanh(self.lin0(x)))))
        return self.lin3(torch.tanh(self.lin2(x)))


def tower() -> Tower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tower()


def adapted(names: tuple[str, ...] = ("default",), **settings: Any) -> PeftModel:
    """The tower with adapters as if trained, the first one active."""
    config = {"r": RANK, "target_modules": LAYERS, **settings}
    model = get_peft_model(tower(), DVoRAConfig(**config))
    for seed, name in enumerate(names):
        if seed:
            model.add_adapter(name, DVoRAConfig(**config))
        train_vectors(model, name, seed)
    return model


def layer_of(model: nn.Module, name: str = CHANGED) -> DVoRALayer:
    return dict(dvora_layers(model))[name]


def inner(model: nn.Module) -> nn.Module:
    """The model that is adapted, whose forward is a pass."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def inputs(seed: int = 1, rows: int = 5) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def anew(model: nn.Module) -> nn.Module:
    """A copy in which all constants are computed from the weights again, and layers share no projections."""
    made = copy.deepcopy(model)
    for _, layer in dvora_layers(made):
        for adapted in map(layer.adapted, layer.dvora_adapted):
            adapted.dvora_projections = copy.deepcopy(adapted.shared)
            adapted.refresh(layer.unmerged())
    return made


def alone(model: PeftModel) -> PeftModel:
    """A copy that has kept nothing, in which every layer makes its factors when it is called."""
    made = anew(model)
    remove_factor_pass(inner(made))
    return made


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.numel()).to(y.dtype).view_as(y)).sum()


class Results(dict[str, Tensor]):
    """Outputs and all gradients of one training pass, by name."""

    def differ(self, other: "Results") -> float:
        """The worst difference, relative to the largest value of each."""
        assert self.keys() == other.keys()
        return max(worst_difference(self[key], other[key]) for key in self)


def trained(model: nn.Module, x: Tensor | None = None) -> Results:
    """What one training pass gives."""
    model.zero_grad()
    y = model(inputs() if x is None else x)
    if y.requires_grad:
        loss_of(y).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Results(outputs=y.detach(), **found)


@torch.no_grad()
def evaluated(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """The outputs, without gradients."""
    return model(inputs() if x is None else x)


@contextmanager
def in_the_middle(model: nn.Module, do: Callable[[nn.Module], object], once: bool = True) -> Iterator[None]:
    """Do something to the model after half of its layers have run, in the next pass or in all."""
    done = []

    def hook(*_: object) -> None:
        if not (once and done):
            done.append(None)
            do(model)

    handle = inner(model).middle.register_forward_pre_hook(hook)
    yield
    handle.remove()
    assert done
