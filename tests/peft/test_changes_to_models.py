"""Whatever is done to a PEFT model between two passes, or in the middle of one, the layers that come after follow it.

They answer, and get gradients, as in a model that was made with those values. What can be done to the vectors and
weights of any layer is in `tests/test_changes.py`; here is what only PEFT has.
"""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import dvora
from dvora.factors import current_pass
from dvora.peft import DVoRALayer
from tests.cases import COPIES
from tests.peft.layer_cases import CASES
from tests.peft.subjects import Subject as LayerType
from tests.peft.tiny import dvora_layers, same_bits, train_vectors
from tests.peft.towers import (
    CHANGED,
    Results,
    adapted,
    alone,
    evaluated,
    in_the_middle,
    inner,
    inputs,
    layer_of,
    trained,
)

MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


def other(values: Tensor, seed: int = 9) -> Tensor:
    """Other values of the same size."""
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=values.dtype)
    return values.detach() * (1.3 + 0.4 * noise.tanh())


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# Between two passes.


def load_state(model: PeftModel) -> None:
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict({n: other(v) if n in names else v for n, v in model.state_dict().items()})


def load_adapter_state(model: PeftModel) -> None:
    set_peft_model_state_dict(model, {n: other(v) for n, v in get_peft_model_state_dict(model).items()})


def load_base(model: PeftModel) -> None:
    layer_of(model).base_layer.load_state_dict({"weight": torch.eye(8), "bias": torch.ones(8)})


def second_and_back(model: PeftModel) -> None:
    model.set_adapter("second")
    evaluated(model)
    layer_of(model).vectors("default").magnitude.data.mul_(1.4)
    model.set_adapter("default")


def delete_first(model: PeftModel) -> None:
    model.set_adapter("second")
    model.delete_adapter("default")


def replace_first(model: PeftModel) -> None:
    delete_first(model)
    evaluated(model)
    config = dvora.DVoRAConfig(r=3, target_modules=["lin0", "lin1", "lin2", "lin3"], direction="weight")
    model.add_adapter("default", config)
    train_vectors(model, "default", seed=6)
    model.set_adapter("default")


def train_the_second(model: PeftModel) -> None:
    model.set_adapter("second")
    with torch.inference_mode(False), torch.enable_grad():
        trained(model)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05).step()


def merge_there_and_back(model: PeftModel) -> None:
    model.merge_adapter()
    evaluated(model)
    model.unmerge_adapter()
    train_vectors(model, seed=8)


def merge_the_second(model: PeftModel) -> None:
    model.merge_adapter(["second"])
    evaluated(model)
    model.unmerge_adapter()
    model.set_adapter("second")


def disable_for_a_while(model: PeftModel) -> None:
    with model.disable_adapter():
        evaluated(model)
        layer_of(model).vectors("default").lambda_d.data.mul_(1.4)


def use_a_weighted_adapter(model: PeftModel) -> None:
    with torch.no_grad():
        for _, layer in dvora_layers(model):
            layer.vectors("second").lambda_d.copy_(layer.vectors("default").lambda_d)
    model.add_weighted_adapter(["default", "second"], [0.4, 0.9], "third", combination_type="linear")
    model.set_adapter("third")


def use_an_interpolated_adapter(model: PeftModel) -> None:
    model.base_model.interpolate_adapters("default", "second", 0.3, "third")
    model.set_adapter("third")


def set_bias(model: PeftModel) -> None:
    layer_of(model).base_layer.bias = nn.Parameter(torch.ones(8), requires_grad=False)


OPERATIONS: dict[str, Callable[[PeftModel], object]] = {
    **{f.__name__: f for f in (load_state, load_adapter_state, load_base, second_and_back, delete_first)},
    **{f.__name__: f for f in (replace_first, train_the_second, merge_there_and_back, merge_the_second)},
    **{f.__name__: f for f in (disable_for_a_while, use_a_weighted_adapter, use_an_interpolated_adapter, set_bias)},
    "set_adapter": lambda model: model.set_adapter("second"),
    "set_adapter of both": lambda model: model.base_model.set_adapter(["default", "second"]),
    "strength": lambda model: model.set_strength(0.3),
    "strength of one layer": lambda model: model.set_strength({CHANGED: -0.5}),
    "strength twice": lambda model: (model.set_strength(0.3), evaluated(model), model.set_strength(0.7)),
    "strength there and back": lambda model: (
        model.set_strength(0.3),
        evaluated(model),
        model.set_strength(1.0),
        train_vectors(model, seed=4),
    ),
    "strength's data": lambda model: (
        model.set_strength(0.3),
        evaluated(model),
        layer_of(model).strength("default").data.fill_(0.6),
    ),
    "bias": torch.no_grad()(lambda model: layer_of(model).base_layer.bias.add_(1)),
    "no bias": lambda model: setattr(layer_of(model).base_layer, "bias", None),
    "a layer replaced": lambda model: setattr(inner(model), CHANGED, copy.deepcopy(layer_of(model, "lin0"))),
    "a layer deleted": lambda model: setattr(inner(model), CHANGED, nn.Identity()),
    "a layer called twice": lambda model: setattr(inner(model), CHANGED, layer_of(model, "lin0")),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_an_operation_between_passes_is_followed(operation: str) -> None:
    for mode in MODES:
        model = adapted(("default", "second")).eval()
        with mode():
            before = [model(inputs()).clone() for _ in range(3)]
        OPERATIONS[operation](model)
        expected = evaluated(alone(model))
        with mode():
            for _ in range(2):
                close(model(inputs()).clone(), expected)
        assert not torch.allclose(before[2], expected, atol=1e-5)
    assert trained(model).differ(trained(alone(model))) < 1e-5


def load_as_third(model: PeftModel, folder: Path) -> None:
    model.load_adapter(str(folder), "third")
    model.set_adapter("third")


def load_over_the_first(model: PeftModel, folder: Path) -> None:
    model.load_adapter(str(folder), "default")
    model.set_strength(0.7)


@pytest.mark.parametrize("load", [dvora.hotswap_adapter, load_as_third, load_over_the_first])
def test_values_from_a_file_are_followed(load: Callable[[PeftModel, Path], object], tmp_path: Path) -> None:
    source, model = adapted(strength=0.7), adapted().eval()
    train_vectors(source, seed=5)
    source.save_pretrained(tmp_path)
    before = [evaluated(model) for _ in range(3)]
    load(model, tmp_path)
    assert not torch.allclose(before[2], evaluated(model), atol=1e-5)
    close(evaluated(model.eval()), evaluated(source.eval()))


@pytest.mark.parametrize("layer", CASES)
def test_every_layer_type_follows_writes_that_are_not_counted(layer: str) -> None:
    subject = LayerType(layer, "float64")
    model = subject.adapted()
    for _ in range(3):
        with torch.no_grad():
            before = model(subject.x())
            for name, parameter in model.named_parameters():
                if ".dvora_" in name:
                    parameter.data.mul_(1.3)
            found, expected = model(subject.x()), alone(model)(subject.x())
        assert subject.close(found, expected)
        assert not subject.close(found, before)


def test_rows_with_adapters_of_their_own_follow_each() -> None:
    model, names = adapted(("default", "second")).eval(), ["second", "default", "__base__", "second", "second"]
    before = [evaluated(partial(model, adapter_names=names)) for _ in range(2)][1]
    train_vectors(model, "second", seed=4)
    found = evaluated(partial(model, adapter_names=names))
    close(found, evaluated(partial(alone(model), adapter_names=names)))
    assert [same_bits(*rows) for rows in zip(before, found, strict=True)] == [name != "second" for name in names]


def test_modes_and_dtypes_may_alternate() -> None:
    model = adapted().eval().requires_grad_(False)

    def under_autocast(dtype: torch.dtype) -> Callable[[PeftModel], Tensor]:
        return lambda of: torch.autocast("cpu", dtype)(evaluated)(of)

    def in_inference_mode(of: PeftModel) -> Tensor:
        with torch.inference_mode():
            return of(inputs()).clone()

    def for_inputs(of: PeftModel) -> Tensor:
        x = inputs().requires_grad_()
        (gradient,) = torch.autograd.grad(of(x).square().sum(), x)
        return gradient

    ways = [evaluated, in_inference_mode, for_inputs, *map(under_autocast, (torch.bfloat16, torch.float16))]
    for index in (3, 0, 1, 2, 4, 2, 1, 0, 3, 1, 2, 0, 4, 3):
        close(ways[index](model), ways[index](alone(model)))
    for dtype in (torch.float64, torch.bfloat16, torch.float32, torch.float64):
        evaluated(model, inputs().to(next(model.parameters()).dtype))
        model.to(dtype)
        for _ in range(2):
            torch.testing.assert_close(
                evaluated(model, inputs().to(dtype)), evaluated(alone(model), inputs().to(dtype))
            )


# In the middle of a pass, after the factors of all layers were made and before the last layer runs.

Change = Callable[[DVoRALayer], object]


def vector(index: int, write: Callable[[nn.Parameter], object]) -> Change:
    return torch.no_grad()(lambda layer: write(layer.vectors("default")[index]))


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


CHANGES: dict[str, Change] = {
    **{f"vector {index} in place": vector(index, lambda v: v.copy_(other(v))) for index in range(3)},
    **{f"vector {index}, its data": vector(index, lambda v: setattr(v, "data", other(v))) for index in range(3)},
    **{f"vector {index} replaced": replace(index) for index in range(3)},
    "a vector replaced by a frozen one": replace(1, requires_grad=False),
    "a vector through detach": vector(1, lambda v: v.detach().mul_(1.5)),
    "weight in place": write_weight,
    "weight, its data": lambda layer: setattr(layer.base_layer.weight, "data", other(layer.base_layer.weight)),
    "weight transposed in its place": lambda layer: setattr(
        layer.base_layer.weight, "data", layer.base_layer.weight.data.T
    ),
    "weight replaced": lambda layer: setattr(
        layer.base_layer, "weight", nn.Parameter(other(layer.base_layer.weight), False)
    ),
    "base replaced": replace_base,
    "bias": torch.no_grad()(lambda layer: layer.base_layer.bias.add_(1)),
    "strength": lambda layer: layer.set_strength("default", 0.3),
    "adapter switched": lambda layer: layer.set_adapter(["second"]),
    "both adapters": lambda layer: layer.set_adapter(["default", "second"]),
    "adapter deleted": lambda layer: (layer.set_adapter(["second"]), layer.delete_adapter("default")),
    "adapter disabled": lambda layer: layer.enable_adapters(False),
}
OF_EQUAL_VALUES: dict[str, Change] = {
    **{f"vector {index} frozen": freeze(index) for index in range(3)},
    "all vectors frozen": freeze(0, 1, 2),
    "cast to float64": cast(torch.float64),
    "cast to bfloat16": cast(torch.bfloat16),
    "cast and back": lambda layer: layer.double().float(),
    "weight trained": lambda layer: layer.base_layer.weight.requires_grad_(),
}
"""Changes after which the outputs are those of before, to rounding."""


def warm() -> PeftModel:
    """A model with two adapters, whose next pass makes the factors of all layers at once."""
    model = adapted(("default", "second"))
    trained(model)
    trained(model)
    return model


def changed_in_the_middle(change: Callable[[PeftModel], object], model: PeftModel) -> Results:
    with in_the_middle(model, lambda _: change(model)):
        return trained(model)


@pytest.mark.parametrize("change", CHANGES | OF_EQUAL_VALUES)
def test_a_pass_follows_a_change_in_its_middle(change: str) -> None:
    do = (CHANGES | OF_EQUAL_VALUES)[change]
    model = warm()
    before = trained(alone(model))["outputs"]
    found = changed_in_the_middle(lambda of: do(layer_of(of)), model)
    expected = trained(alone(model))
    assert found.differ(expected) < 1e-5
    same = torch.allclose(found["outputs"].float(), before, atol=0.02 if "bfloat16" in change else 1e-5)
    assert same == (change in OF_EQUAL_VALUES)
    assert trained(model).differ(expected) < 1e-5
    model = warm().eval()
    evaluated(model), evaluated(model)
    with in_the_middle(model, lambda of: do(layer_of(of))):
        y = evaluated(model)
    for _ in range(2):
        close(y, expected["outputs"])
        y = evaluated(model)


def test_a_layer_that_ran_already_keeps_its_values_and_gradients_of_then() -> None:
    model = warm()
    expected = trained(alone(model))
    with in_the_middle(model, lambda of: CHANGES["vector 1 in place"](layer_of(of, "lin0"))):
        found = trained(model)
    assert found.differ(expected) < 1e-5
    assert trained(model).differ(trained(alone(model))) < 1e-5


# What the middle of a pass does to the model, not to one layer; the same hook runs in the model that is compared with.


def of_later_layers(change: Change) -> Callable[[nn.Module], None]:
    return lambda model: [change(layer_of(model, name)) for name in ("lin2", "lin3")]


def put(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model, name, make(getattr(model, name)))


def other_layer(layer: nn.Module) -> nn.Module:
    made = copy.deepcopy(layer)
    CHANGES["vector 1 in place"](made)
    return made


def exchange(model: nn.Module) -> None:
    model.lin2, model.lin3 = model.lin3, model.lin2


MODEL_CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "adapters switched": of_later_layers(CHANGES["adapter switched"]),
    "adapters disabled": of_later_layers(CHANGES["adapter disabled"]),
    "a layer replaced by its base": put(CHANGED, lambda layer: copy.deepcopy(layer.base_layer)),
    "a layer replaced by another": put(CHANGED, other_layer),
    "a layer deleted": put(CHANGED, lambda _: nn.Identity()),
    "two layers exchanged": exchange,
    "gradients off": lambda _: torch.set_grad_enabled(False),
}


@pytest.mark.parametrize("change", MODEL_CHANGES)
def test_a_model_that_changes_in_the_middle_of_a_pass(change: str) -> None:
    model = warm()
    results = []
    for each in (alone(model), model):
        with in_the_middle(each, lambda of: MODEL_CHANGES[change](inner(of))), torch.enable_grad():
            results.append(trained(each))
    expected, found = results
    assert found.differ(expected) < 1e-5
    assert trained(model).differ(trained(alone(model))) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_part_of_a_pass_may_run_in_another_mode(mode: Callable[[], object]) -> None:
    model = warm()

    def outputs_of(of: PeftModel) -> Tensor:
        layer = layer_of(of)
        layer.forward = lambda x: mode()(type(layer).forward)(layer, x)
        y = of(torch.ones(2, 8))
        del layer.forward
        return y

    expected = outputs_of(alone(model))
    for _ in range(2):
        close(outputs_of(model), expected)
    assert trained(model).differ(trained(alone(model))) < 1e-5


def test_a_weight_that_becomes_nan_in_the_middle_is_an_error_and_no_pass_is_left() -> None:
    model = warm()

    def spoil(of: nn.Module) -> None:
        layer_of(of).base_layer.weight.data = torch.full((8, 8), torch.nan)

    with in_the_middle(model, spoil), pytest.raises(ValueError, match=r"lin3: 8 of 8 rows"):
        model(torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"lin3: 8 of 8 rows"):
        model(torch.ones(2, 8))
    assert current_pass() is None
    layer_of(model).base_layer.weight.data = torch.eye(8)
    assert trained(model).differ(trained(alone(model))) < 1e-5


# Copies.


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_is_independent(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, made = adapted(), []
    expected = trained(model)
    trained(model), evaluated(model), evaluated(model)
    made.append(copied(model))
    handle = inner(model).middle.register_forward_pre_hook(lambda *_: made.append(copy.deepcopy(model)))
    trained(model)
    handle.remove()
    inner(made[1]).middle._forward_pre_hooks.clear()
    for each in made:
        train_vectors(each, seed=3)
    for each in (*made, model):
        assert trained(each).differ(trained(alone(each))) < 1e-5
        close(evaluated(each), evaluated(alone(each)))
    assert trained(model).differ(expected) < 1e-5


def test_a_pickle_of_one_layer_does_not_hold_the_constants_of_all() -> None:
    model = adapted(r=200, projection_init="kaiming_uniform")

    def size() -> int:
        return len(pickle.dumps(layer_of(model).adapted("default")))

    fresh = size()
    for _ in range(2):
        trained(model)
    assert layer_of(model).adapted("default").C._base is not None  # a part of one tensor for all
    assert size() < fresh + 1000
    evaluated(model)
    assert size() < fresh + 1000
