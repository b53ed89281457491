"""Comparisons of a model with its reference."""

from collections.abc import Callable, Mapping

import torch
from peft import PeftModel
from torch import Tensor, nn

from dvora.peft import DVoRALayer
from tests.histories.model import TOKENS
from tests.histories.reference import VECTORS, Adapter, Place, Reference, loss
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import same_bits

OUTPUTS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.06}
"""Largest error of the outputs, relative to the largest output."""
GRADIENTS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest error of a gradient, relative to the norm of all gradients of its kind."""
DELTAS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}
"""Largest error of `W' - W`, relative to the largest weight: it is never computed below float32."""


def layers_of(model: PeftModel) -> dict[str, DVoRALayer]:
    """The adapted layers by the names that their weights have in the base model."""
    return {
        f"{path.replace('.base_layer', '')}.{layer.parameter_name}": layer
        for path, layer in model.base_model.model.named_modules()
        if isinstance(layer, DVoRALayer)
    }


def base_of(model: PeftModel) -> dict[str, nn.Parameter]:
    """The base's own parameters by the names that they have in the base model."""
    named = model.base_model.model.named_parameters()
    return {name.replace(".base_layer", ""): parameter for name, parameter in named if ".dvora_" not in name}


def vectors_of(model: PeftModel) -> dict[Place, nn.Parameter]:
    """All vectors that the model has."""
    return {
        Place(weight, name, vector): parameter
        for weight, layer in layers_of(model).items()
        for vector in VECTORS
        for name, parameter in getattr(layer, f"dvora_{vector}").items()
    }


def expected_vectors(reference: Reference) -> dict[Place, Tensor]:
    """All vectors that it has to have."""
    return {
        Place(weight, name, vector): value
        for name, adapter in reference.adapters.items()
        for weight, vectors in adapter.vectors.items()
        for vector, value in vectors.items()
    }


def forward(model: PeftModel, **options: object) -> Tensor:
    """A pass through PEFT's wrapper, or past it where the wrapper remembers an adapter that was deleted."""
    outer = model if model.active_adapter in model.peft_config else model.base_model
    return outer(TOKENS, **options)


def check_values(model: PeftModel, reference: Reference) -> None:
    """Every parameter to the last bit."""
    base = base_of(model)
    assert base.keys() == reference.stored.keys()
    for name, value in reference.stored.items():
        assert same_bits(base[name], value), name
    expected, actual = expected_vectors(reference), vectors_of(model)
    assert actual.keys() == expected.keys()
    for place, value in expected.items():
        assert same_bits(actual[place], value), place


def check_state(model: PeftModel, reference: Reference) -> None:
    """What is active, merged, disabled, trained."""
    assert list(model.peft_config) == list(reference.adapters)
    assert model.active_adapters == reference.active
    assert model.training == reference.training
    for place, parameter in vectors_of(model).items():
        assert parameter.requires_grad == reference.adapters[place.adapter].trains(place.vector), place
    assert not any(parameter.requires_grad for parameter in base_of(model).values())
    for weight, layer in layers_of(model).items():
        assert layer.merged_adapters == reference.merged.get(weight, []), weight
        assert layer.active_adapters == reference.active, weight
        assert layer.disable_adapters != reference.enabled, weight
        assert same_bits(layer.unmerged(), reference.base(weight)), weight
    assert reference.merged.keys() <= layers_of(model).keys()
    for name, adapter in reference.adapters.items():
        check_config(model, name, adapter)


def check_config(model: PeftModel, name: str, adapter: Adapter) -> None:
    """The configuration, which is what a file will say, and the strength at every layer."""
    config, settings = model.peft_config[name], adapter.settings
    assert (config.r, config.alpha, tuple(config.train)) == (settings.r, settings.alpha, settings.train)
    assert (config.direction, config.detach_norm) == (settings.direction, settings.detach_norm)
    assert (config.projection_seed, config.projection_init) == (settings.seed, settings.projections)
    layers = layers_of(model)
    for weight, strength in adapter.strength.items():
        layer = layers[weight]
        assert float(layer.strength(name)) == config.strength_of(layer.name) == strength, (weight, name)


def check_outputs(model: PeftModel, reference: Reference) -> None:
    """A forward pass; where adapters are disabled it takes merged ones out again."""
    with torch.no_grad():
        actual = forward(model)
    if not reference.enabled:
        reference.unmerge()
    check_close(actual, reference.outputs(model), reference)


def check_close(actual: Tensor, expected: Tensor, reference: Reference) -> None:
    """Outputs of a model."""
    assert actual.dtype == reference.dtype
    assert worst_difference(actual, expected) < OUTPUTS[reference.dtype] * reference.slack


def check_deltas(model: PeftModel, reference: Reference) -> None:
    """`W' - W` of every adapter of every weight; this one is as accurate for a bfloat16 base."""
    layers = layers_of(model)
    for name in reference.adapters:
        for weight, expected in reference.deltas(model, name).items():
            size = max(expected.abs().max(), reference.base(weight).abs().max())
            error = (layers[weight].get_delta_weight(name).double() - expected).abs().max()
            assert error < reference.slack * DELTAS[reference.dtype] * size, weight


def check_gradients(
    model: PeftModel, reference: Reference, run: Callable[[PeftModel], Tensor] = forward
) -> dict[Place, Tensor]:
    """A backward pass; returns the reference's gradients, of what is trained."""
    expected = reference.gradients(model)
    model.zero_grad()
    value = loss(run(model))
    if not reference.enabled:
        reference.unmerge()
    assert value.requires_grad == bool(expected)
    if expected:
        value.backward()
    actual = {place: parameter.grad for place, parameter in vectors_of(model).items() if parameter.grad is not None}
    assert actual.keys() == expected.keys()
    for vector in VECTORS:
        of_kind = {place: gradient for place, gradient in expected.items() if place.vector == vector}
        size = sum(float(gradient.norm()) ** 2 for gradient in of_kind.values()) ** 0.5
        for place, gradient in of_kind.items():
            error = float((actual[place].double() - gradient).norm())
            assert error <= GRADIENTS[reference.dtype] * reference.slack * size, (place, error / size)
    return expected


def take_over_merged(base: Mapping[str, Tensor], exact: Mapping[str, Tensor], reference: Reference) -> None:
    """Merged weights are exact up to the rounding of their dtype; their bits are the reference's from here on."""
    for weight, expected in exact.items():
        actual = base[weight].detach()
        rounding = torch.finfo(reference.dtype).eps * expected.abs()
        arithmetic = DELTAS[reference.dtype] * reference.slack * expected.abs().max()
        assert ((actual.double() - expected).abs() <= rounding + arithmetic).all(), weight
        reference.stored[weight] = actual.clone()
