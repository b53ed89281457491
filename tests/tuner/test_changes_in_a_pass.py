"""What is changed between the making of a pass's factors and their use is followed by the layers that come after it.

The factors of all layers are made as a pass begins. A hook in its middle changes the last layer, which must then
answer, and get gradients, as in a model that was made with those values.
"""

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from dvora.tuner import DVoRALayer
from tests.tuner.towers import (
    CHANGED,
    Results,
    adapted,
    alone,
    calls,
    evaluated,
    in_the_middle,
    inner,
    layer_of,
    trained,
)

__all__ = ["calls"]
Change = Callable[[DVoRALayer], object]


def other(values: Tensor, seed: int = 9) -> Tensor:
    """Other values of the same size."""
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=values.dtype)
    return values.detach() * (1.3 + 0.4 * noise.tanh())


def vector(index: int, write: Callable[[nn.Parameter], object]) -> Change:
    @torch.no_grad()
    def change(layer: DVoRALayer) -> None:
        write(layer.vectors("default")[index])

    return change


def replace(index: int, requires_grad: bool = True) -> Change:
    def change(layer: DVoRALayer) -> None:
        vectors = layer.vector_dicts()[index]
        vectors["default"] = nn.Parameter(other(vectors["default"]), requires_grad)

    return change


def freeze(*indices: int) -> Change:
    def change(layer: DVoRALayer) -> None:
        for index, each in enumerate(layer.vectors("default")):
            each.requires_grad_(index not in indices)

    return change


def cast(dtype: torch.dtype) -> Change:
    def change(layer: DVoRALayer) -> None:
        layer.to(dtype)
        layer.register_forward_pre_hook(lambda _, args: tuple(x.to(dtype) for x in args))

    return change


@torch.no_grad()
def write_weight(layer: DVoRALayer) -> None:
    layer.base_layer.weight.copy_(other(layer.base_layer.weight))


def replace_base(layer: DVoRALayer) -> None:
    layer.base_layer = copy.deepcopy(layer.base_layer)
    write_weight(layer)


def swap_rows(layer: DVoRALayer) -> None:
    """The same memory in another order."""
    layer.base_layer.weight.data = layer.base_layer.weight.data.T


CHANGES: dict[str, Change] = {
    **{f"vector {index} in place": vector(index, lambda v: v.copy_(other(v))) for index in range(3)},
    **{f"vector {index}, its data": vector(index, lambda v: setattr(v, "data", other(v))) for index in range(3)},
    **{f"vector {index} replaced": replace(index) for index in range(3)},
    "a vector replaced by a frozen one": replace(1, requires_grad=False),
    "a vector through detach": vector(1, lambda v: v.detach().mul_(1.5)),
    "a vector, one value of its memory": vector(0, lambda v: setattr(v, "data", v.data[:1].expand(len(v)))),
    **{f"vector {index} frozen": freeze(index) for index in range(3)},
    "all vectors frozen": freeze(0, 1, 2),
    "cast to float64": cast(torch.float64),
    "cast to bfloat16": cast(torch.bfloat16),
    "cast and back": lambda layer: layer.double().float(),
    "weight in place": write_weight,
    "weight, its data": lambda layer: setattr(layer.base_layer.weight, "data", other(layer.base_layer.weight)),
    "weight transposed in its place": swap_rows,
    "weight replaced": lambda layer: setattr(
        layer.base_layer, "weight", nn.Parameter(other(layer.base_layer.weight), False)
    ),
    "weight trained": lambda layer: layer.base_layer.weight.requires_grad_(),
    "base replaced": replace_base,
    "bias": torch.no_grad()(lambda layer: layer.base_layer.bias.add_(1)),
    "bias, its data": lambda layer: layer.base_layer.bias.data.add_(1),
    "strength": lambda layer: layer.set_strength("default", 0.3),
    "adapter switched": lambda layer: layer.set_adapter(["second"]),
    "both adapters": lambda layer: layer.set_adapter(["default", "second"]),
    "adapter deleted": lambda layer: (layer.set_adapter(["second"]), layer.delete_adapter("default")),
    "adapter disabled": lambda layer: layer.enable_adapters(False),
}
NOT_OF_THE_VALUES = {
    *(f"vector {index} frozen" for index in range(3)),
    *{"all vectors frozen", "cast and back", "weight trained", "cast to float64", "cast to bfloat16"},
}
"""Changes after which the outputs are those of before, to rounding."""


def with_memory() -> PeftModel:
    """A model with two adapters, whose next pass makes the factors of all layers at once."""
    model = adapted(("default", "second"))
    trained(model)
    trained(model)
    return model


def changed_in_the_middle(change: Callable[[PeftModel], object], model: PeftModel) -> Results:
    with in_the_middle(model, lambda _: change(model)):
        return trained(model)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("stepped", [True, False], ids=["made again", "of the pass before"])
def test_a_layer_follows_a_change_after_its_factors_were_made(stepped: bool, change: str) -> None:
    model = with_memory()
    if stepped:
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    before = trained(alone(model))["outputs"]
    found = changed_in_the_middle(lambda of: CHANGES[change](layer_of(of)), model)
    expected = trained(alone(model))
    assert found.differ(expected) < 1e-5
    same = torch.allclose(found["outputs"].float(), before, atol=0.02 if "bfloat16" in change else 1e-5)
    assert same == (change in NOT_OF_THE_VALUES)
    assert trained(model).differ(expected) < 1e-5


@pytest.mark.parametrize("change", CHANGES)
def test_an_evaluation_follows_a_change_in_its_middle(change: str) -> None:
    model = with_memory().eval()
    before = [evaluated(model) for _ in range(2)][1]
    with in_the_middle(model, lambda of: CHANGES[change](layer_of(of))):
        found = evaluated(model)
    expected = evaluated(alone(model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    same = torch.allclose(found.float(), before, atol=0.02 if "bfloat16" in change else 1e-5)
    assert same == (change in NOT_OF_THE_VALUES)
    torch.testing.assert_close(evaluated(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("index", range(3))
def test_a_frozen_vector_that_is_trained_from_the_middle_on_gets_its_gradient(index: int) -> None:
    model = with_memory()
    layer_of(model).vectors("default")[index].requires_grad_(False)
    trained(model)
    trained(model)
    found = changed_in_the_middle(lambda of: layer_of(of).vectors("default")[index].requires_grad_(), model)
    expected = trained(alone(model))
    assert found.differ(expected) < 1e-5
    assert len(expected) == 13  # three of four layers, and outputs


def test_a_layer_that_ran_already_keeps_its_values_and_gradients_of_then() -> None:
    model = with_memory()
    expected = trained(alone(model))
    with in_the_middle(model, lambda of: CHANGES["vector 1 in place"](layer_of(of, "lin0"))):
        found = trained(model)
    assert found.differ(expected) < 1e-5
    assert trained(model).differ(trained(alone(model))) < 1e-5


@pytest.mark.parametrize("uncounted", [lambda v: v.data.mul_(1.5), lambda v: v.detach().numpy().fill(0.3)])
def test_a_write_that_is_not_counted_is_found_by_the_next_pass(uncounted: Callable[[Tensor], object]) -> None:
    # Within one pass none are expected: the layer may use either value.
    for index in range(3):
        model = with_memory()
        changed_in_the_middle(lambda of, index=index: uncounted(layer_of(of).vectors("default")[index]), model)
        expected = trained(alone(model))
        assert trained(model).differ(expected) < 1e-5
        torch.testing.assert_close(evaluated(model), expected["outputs"], rtol=1e-5, atol=1e-6)


# What a pass does to the model, not to one layer; the same hook runs in the model that is compared with.


def later_layers(model: nn.Module) -> list[DVoRALayer]:
    return [layer_of(model, name) for name in ("lin2", "lin3")]


def switch_later(model: nn.Module) -> None:
    for layer in later_layers(model):
        layer.set_adapter(["second"])


def disable_later(model: nn.Module) -> None:
    for layer in later_layers(model):
        layer.enable_adapters(False)


def put(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model, name, make(getattr(model, name)))


def plain_copy(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer.base_layer)


def other_layer(layer: nn.Module) -> nn.Module:
    made = copy.deepcopy(layer)
    CHANGES["vector 1 in place"](made)
    return made


MODEL_CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "adapters switched": switch_later,
    "adapters disabled": disable_later,
    "a layer replaced by its base": put(CHANGED, plain_copy),
    "a layer replaced by another": put(CHANGED, other_layer),
    "a layer replaced by one that ran": put(CHANGED, lambda layer: layer),
    "a layer deleted": put(CHANGED, lambda _: nn.Identity()),
    "two layers exchanged": lambda model: (
        lambda a, b: (put("lin2", lambda _: b)(model), put("lin3", lambda _: a)(model))
    )(model.lin2, model.lin3),
    "gradients off": lambda _: torch.set_grad_enabled(False),
}


@pytest.mark.parametrize("change", MODEL_CHANGES)
def test_a_model_that_changes_in_the_middle_of_a_pass(change: str) -> None:
    model = with_memory()
    results = []
    for each in (alone(model), model):
        with in_the_middle(each, lambda of: MODEL_CHANGES[change](inner(of))), torch.enable_grad():
            results.append(trained(each))
    expected, found = results
    assert found.differ(expected) < 1e-5
    assert trained(model).differ(trained(alone(model))) < 1e-5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_part_of_a_pass_may_run_in_another_mode(mode: Callable[[], object]) -> None:
    model = with_memory()

    def in_mode(own: DVoRALayer, x: Tensor) -> Tensor:
        with mode():
            return type(own).forward(own, x)

    def outputs_of(of: PeftModel) -> Tensor:
        own = layer_of(of)
        own.forward = partial(in_mode, own)
        y = of(torch.ones(2, 8))
        del own.forward
        return y

    expected = outputs_of(alone(model))
    for _ in range(2):
        torch.testing.assert_close(outputs_of(model), expected, rtol=1e-5, atol=1e-6)
    assert trained(model).differ(trained(alone(model))) < 1e-5


def test_gradients_within_an_evaluation_are_the_layers_own(calls: Counter[int]) -> None:
    model = with_memory()
    x = torch.ones(2, 8)
    for _ in range(2):
        calls.clear()
        with torch.no_grad(), in_the_middle(model, lambda _: torch.set_grad_enabled(True)):
            y = model(x)
        y.sum().backward()
        assert layer_of(model).vectors("default").magnitude.grad is not None
    torch.testing.assert_close(y.detach(), evaluated(alone(model), x))
    assert calls[4] == 0


def test_a_weight_that_becomes_nan_in_the_middle_is_an_error_and_no_pass_is_left() -> None:
    model = with_memory()

    def spoil(of: nn.Module) -> None:
        layer_of(of).base_layer.weight.data = torch.full((8, 8), torch.nan)

    with in_the_middle(model, spoil), pytest.raises(ValueError, match=r"lin3: 8 of 8 rows"):
        model(torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"lin3: 8 of 8 rows"):
        model(torch.ones(2, 8))
    layer_of(model).base_layer.weight.data = torch.eye(8)
    assert trained(model).differ(trained(alone(model))) < 1e-5
