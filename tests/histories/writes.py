"""Operations that write values, in every way that there is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from tests.histories.operations import (
    Case,
    MismatchError,
    Rng,
    check_close,
    in_peft_unmerged,
    is_plain,
    operation,
    unmerged,
)
from tests.histories.subjects import BASE, NAMES, VECTORS, keys, layer_of, replace_parameter


def vector_names(case: Case) -> list[str]:
    """Of all vectors."""
    return [name for name in case.shadow.names() if name.rpartition(".")[2] in VECTORS]


def base_names(case: Case) -> list[str]:
    """Of all weights and biases."""
    return [name for name in case.shadow.names() if name.rpartition(".")[2] in BASE]


def other_values(case: Case, rng: Rng, names: list[str]) -> dict[str, Tensor]:
    """New values in float64 for the names, which the parameters' dtypes can hold."""
    made = {}
    for layer in NAMES:
        values = case.shadow.other_base(layer, rng) | case.shadow.other_vectors(layer, rng)
        made |= {f"{layer}.{value}": values[value] for value in values}
    return {name: made[name] for name in names}


def as_held(case: Case, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values in the dtypes of their parameters."""
    return {name: value.to(case.parameter(name).dtype) for name, value in values.items()}


def entered(case: Case, values: dict[str, Tensor]) -> None:
    """Write into the shadow."""
    for name, value in values.items():
        case.shadow[name] = value


Way = Callable[[Case, str, Tensor], None]


@torch.no_grad()
def _in_place(case: Case, name: str, value: Tensor) -> None:
    case.parameter(name).copy_(value)


def _in_inference_mode(case: Case, name: str, value: Tensor) -> None:
    with torch.inference_mode():
        case.parameter(name).copy_(value)


def _through_data(case: Case, name: str, value: Tensor) -> None:
    case.parameter(name).data.copy_(value)


def _through_detach(case: Case, name: str, value: Tensor) -> None:
    case.parameter(name).detach().copy_(value)


def _through_numpy(case: Case, name: str, value: Tensor) -> None:
    case.parameter(name).detach().numpy()[...] = value.numpy()


def _other_memory(case: Case, name: str, value: Tensor) -> None:
    case.parameter(name).data = value.clone()


def _replaced(case: Case, name: str, value: Tensor) -> None:
    replace_parameter(case.model, name, value.clone())
    case.shadow.gradients.pop(name, None)


@torch.no_grad()
def _row_by_row(case: Case, name: str, value: Tensor) -> None:
    for row, new in enumerate(value):
        case.parameter(name)[row] = new


COUNTED: list[Way] = [_in_place, _in_inference_mode, _through_detach, _other_memory, _replaced, _row_by_row]
"""Ways of writing that PyTorch counts, or that put other memory in place: the base's are followed after these."""
UNCOUNTED: list[Way] = [_through_data, _through_numpy]
"""On a CPU the vectors are followed after these too."""


@operation(3)
def write_vectors(case: Case, rng: Rng) -> None:
    """Some, each in one of the ways."""
    values = as_held(case, other_values(case, rng, case.some(rng, vector_names(case))))
    ways = [*COUNTED, *UNCOUNTED]
    for name, value in values.items():
        ways[int(rng.integers(len(ways)))](case, name, value)
    entered(case, values)


@operation(2, unmerged)
def write_base(case: Case, rng: Rng) -> None:
    """Some weights and biases."""
    values = as_held(case, other_values(case, rng, case.some(rng, base_names(case))))
    for name, value in values.items():
        COUNTED[int(rng.integers(len(COUNTED)))](case, name, value)
    entered(case, values)


@operation()
def write_one_value(case: Case, rng: Rng) -> None:
    """One value of one vector."""
    name = vector_names(case)[int(rng.integers(len(vector_names(case))))]
    values, index = as_held(case, other_values(case, rng, [name]))[name], int(rng.integers(len(case.shadow[name])))
    with torch.no_grad():
        case.parameter(name)[index] = values[index]
    case.shadow[name] = case.shadow[name].index_put((torch.tensor(index),), values[index].double())


@operation()
def assign_views_of_one_vector(case: Case, rng: Rng) -> None:
    """`vector_to_parameters`, and then a write to the vector that they all view."""
    names = vector_names(case)
    values = as_held(case, other_values(case, rng, names))
    whole = torch.cat([values[name] for name in names])
    nn.utils.vector_to_parameters(whole, [case.parameter(name) for name in names])
    with torch.no_grad():
        case.model(case.inputs(rng))
    whole.mul_(1.25)
    entered(case, {name: value * 1.25 for name, value in values.items()})


@operation(2, unmerged)
def load(case: Case, rng: Rng) -> None:
    """A state dict with some or all values."""
    names = case.some(rng, case.shadow.names()) if rng.random() < 0.5 else case.shadow.names()
    values = as_held(case, other_values(case, rng, names))
    key, assign = keys(case.model, names), bool(rng.random() < 0.3)
    state = {key[name]: value.clone() for name, value in values.items()}
    case.model.load_state_dict(state, strict=len(names) == len(case.shadow.names()), assign=assign)
    entered(case, values)
    if assign:
        for name in names:
            case.shadow.gradients.pop(name, None)


@operation(1, unmerged)
def load_into_base_layers(case: Case, rng: Rng) -> None:
    """State dicts of the bases alone; their adapters are not notified."""
    assign = bool(rng.random() < 0.5)
    names = base_names(case)
    values = as_held(case, other_values(case, rng, names))
    for layer in NAMES:
        state = {n.partition(".")[2]: value.clone() for n, value in values.items() if n.startswith(layer)}
        layer_of(case.model, layer).base_layer.load_state_dict(state, assign=assign)
    entered(case, values)
    if assign:
        for name in names:
            case.shadow.gradients.pop(name, None)


@operation(1, in_peft_unmerged)
def load_through_peft(case: Case, rng: Rng) -> None:
    """`set_peft_model_state_dict`."""
    values = as_held(case, other_values(case, rng, vector_names(case)))
    by_key = {key.replace(".default", ""): values[name] for name, key in keys(case.model, list(values)).items()}
    assert by_key.keys() == get_peft_model_state_dict(case.model).keys()
    set_peft_model_state_dict(case.model, by_key)
    entered(case, values)


@operation(1, is_plain)
def set_parameters(case: Case, rng: Rng) -> None:
    """One layer's values as one vector, and what it says about them."""
    layer = NAMES[int(rng.integers(3))]
    names = [f"{layer}.{vector}" for vector in VECTORS]
    if not case.layer(layer).freeze_base_layer:
        names += [name for name in base_names(case) if name.startswith(layer)]
    values = as_held(case, other_values(case, rng, names))
    case.layer(layer).set_parameters(
        torch.cat([value.flatten().to(case.shadow.vector_dtype) for value in values.values()])
    )
    entered(case, values)
    held = case.layer(layer).get_parameters()
    check_close(held, torch.cat([value.flatten().double() for value in values.values()]), 1e-6, "get_parameters")


@operation()
def load_what_is_refused(case: Case, rng: Rng) -> None:
    """A value that is not finite, or a vector of another size, in one layer or one file: nothing of it is taken."""
    layer = NAMES[int(rng.integers(3))]
    values = as_held(
        case, other_values(case, rng, [n for n in vector_names(case) if n.startswith(layer) or not case.plain])
    )
    spoilt = list(values)[int(rng.integers(len(values)))]
    values[spoilt][0] = [float("nan"), float("inf")][int(rng.integers(2))]
    if rng.random() < 0.3:
        values[spoilt] = torch.ones(len(values[spoilt]) + 1)
    try:
        if not case.plain:
            by_name = keys(case.model, list(values)).items()
            set_peft_model_state_dict(case.model, {key.replace(".default", ""): values[n] for n, key in by_name})
        elif rng.random() < 0.5:
            state = {name.partition(".")[2]: value for name, value in values.items()}
            case.layer(layer).load_state_dict(state, strict=False)
        else:
            case.layer(layer).set_parameters(torch.cat([value.flatten() for value in values.values()]))
    except ValueError:
        return
    raise MismatchError(f"a value of {spoilt} that is not finite, or too many, were taken")
