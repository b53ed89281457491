"""Passes of PEFT models: whatever is done to a model between or within them.

Changes of values between passes are one table in `tests/test_changes.py`; here are those that PEFT's model makes.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from dvora import DVoRAConfig
from dvora.layer import current_pass, stop_sharing_inputs
from dvora.peft import DVoRALayer
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import dvora_layers, same_bits, train_vectors

WIDTH, RANK = 8, 3
LAYERS = ["lin0", "lin1", "lin2", "lin3"]
CHANGED = "lin3"
"""The layer that tests change in the middle of a pass, before it runs."""


class Tower(nn.Module):
    """Four layers, of which the first two read the same inputs, with a place in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.lin2, self.lin3 = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.middle = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.tanh(self.lin1(x) - self.lin0(x)))
        return self.lin3(torch.tanh(self.lin2(x)))


def tower() -> Tower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tower()


def adapted(names: tuple[str, ...] = ("default",), **settings: object) -> PeftModel:
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


def inputs() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


def alone(model: PeftModel) -> PeftModel:
    """A copy in which nothing is kept or shared, and every layer computes its constants by itself."""
    made = copy.deepcopy(model)
    for _, layer in dvora_layers(made):
        for adapted in map(layer.adapted, layer.dvora_adapted):
            adapted.dvora_projections = copy.deepcopy(adapted.shared)
            adapted.refresh(layer.unmerged())
    stop_sharing_inputs(inner(made))
    return made


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.numel()).to(y.dtype).view_as(y)).sum()


def trained(model: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    y = model(inputs() if x is None else x)
    loss_of(y).backward()
    return {"outputs": y.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@torch.no_grad()
def evaluated(model: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    return {"outputs": model(inputs() if x is None else x)}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys() or found.keys() == {"outputs"}
    return max(worst_difference(value, expected[name]) for name, value in found.items())


@contextmanager
def in_the_middle(model: nn.Module, do: Callable[[nn.Module], object]) -> Iterator[None]:
    """Do something to the model after half of its layers have run, in the next pass."""
    done = []

    def hook(*_: object) -> None:
        if not done:
            done.append(None)
            do(model)

    handle = inner(model).middle.register_forward_pre_hook(hook)
    yield
    handle.remove()
    assert done


@pytest.fixture(autouse=True)
def no_pass_is_left() -> Iterator[None]:
    yield
    assert current_pass() is None


OPERATIONS: dict[str, Callable[[PeftModel], object]] = {
    "no bias": lambda model: setattr(layer_of(model).base_layer, "bias", None),
    "a layer replaced": lambda model: setattr(inner(model), CHANGED, copy.deepcopy(layer_of(model, "lin0"))),
    "a layer called twice": lambda model: setattr(inner(model), CHANGED, layer_of(model, "lin0")),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_between_passes_is_followed(operation: str) -> None:
    for run in (evaluated, torch.inference_mode()(evaluated), trained):
        model = adapted(("default", "second")).eval()
        before = [run(model)["outputs"].clone() for _ in range(3)][-1]
        OPERATIONS[operation](model)
        expected = trained(alone(model))
        assert worst_difference(before, expected["outputs"]) > 1e-3
        for _ in range(2):
            assert worst(run(model), expected) < 1e-5


def test_rows_with_adapters_of_their_own_follow_each() -> None:
    model, names = adapted(("default", "second")).eval(), ["second", "default", "__base__", "second", "second"]
    before = [evaluated(partial(model, adapter_names=names))["outputs"] for _ in range(2)][-1]
    train_vectors(model, "second", seed=4)
    found = evaluated(partial(model, adapter_names=names))
    assert worst(found, evaluated(partial(alone(model), adapter_names=names))) < 1e-5
    assert [same_bits(*rows) for rows in zip(before, found["outputs"], strict=True)] == [n != "second" for n in names]


CHANGES: dict[str, Callable[[DVoRALayer], object]] = {
    "strength": lambda layer: layer.set_strength("default", 0.3),
    "adapter switched": lambda layer: layer.set_adapter(["second"]),
    "adapter deleted": lambda layer: (layer.set_adapter(["second"]), layer.delete_adapter("default")),
    "adapter disabled": lambda layer: layer.enable_adapters(False),
    "both active": lambda layer: layer.set_adapter(["default", "second"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_follows_a_change_in_its_middle(change: str) -> None:
    for run in (trained, evaluated):
        model = adapted(("default", "second"))
        run(model), run(model)
        with in_the_middle(model, lambda of: CHANGES[change](layer_of(of))):
            found = run(model)
        expected = trained(alone(model))
        assert worst(found, expected) < 1e-5
        assert worst(run(model), expected) < 1e-5


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) + len(module._forward_hooks_always_called)
        for module in model.modules()
    )


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_hooks_are_there_once_whatever_is_added_and_gone_after_unloading() -> None:
    model = get_peft_model(tower(), DVoRAConfig(r=3, target_modules=LAYERS))
    count = hooks_of(model)
    assert count == 3
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=["lin0"]))
    model.delete_adapter("default")
    model.add_adapter("default", DVoRAConfig(r=5, target_modules=LAYERS))
    assert hooks_of(model) == count
    for unload in (lambda m: m.unload(), lambda m: m.merge_and_unload()):
        made = copy.deepcopy(model)
        trained(made)
        assert hooks_of(unload(made)) == 0
    injected = inject_adapter_in_model(DVoRAConfig(r=3, target_modules=["lin0"]), tower())
    inject_adapter_in_model(DVoRAConfig(r=3, target_modules=[CHANGED]), injected, adapter_name="second")
    assert hooks_of(injected) == count
