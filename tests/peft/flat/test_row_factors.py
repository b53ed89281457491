"""The factors of all layers at once: those that each layer makes for itself, of the definition."""

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dvora.flat import LayerFactors, Layout
from dvora.peft import DVoRALayer
from tests.peft import bases
from tests.peft.dense import dense_layer
from tests.peft.flat.adapters import KINDS, Kind, mlp
from tests.peft.tiny import MODELS, dvora_layers
from tests.reference import worst_error

SEVERAL = ["bert model", "llama model", "Embedding, padding", "Conv2d, groups, reflect", "experts (E, out, in)"]
SEVERAL += ["MultiheadAttention, kdim and vdim", "transformers Conv1D", "patterns", "structured", "magnitudes", "head"]
SEVERAL += ["scales in one shape"]


def own_factors(layer: DVoRALayer, adapter_name: str = "default") -> LayerFactors:
    """What a layer makes for itself."""
    with torch.no_grad():
        (active,) = layer._active([adapter_name])
    gain_minus_one, scale, lambda_d, *_ = active.factors
    return LayerFactors(gain_minus_one, scale, lambda_d)


def layers(model: PeftModel) -> dict[str, DVoRALayer]:
    return {layer.name: layer for _, layer in dvora_layers(model)}


def agree(found: LayerFactors, expected: LayerFactors) -> bool:
    """To two units in the last place: products of other sizes may be summed in another order."""
    pairs = list(zip(found, expected, strict=True))
    return all(a.dtype == b.dtype and worst_error(a, b.double()) <= 2 * 2**-23 for a, b in pairs)


@pytest.mark.parametrize("name", SEVERAL)
def test_they_are_the_layers_own(name: str) -> None:
    model = KINDS[name].trained()
    layout = Layout.of(model)
    found = layout.factors(model, layout.to_vector(model))
    assert list(found) == sorted(layers(model))
    assert all(agree(found[name], own_factors(layer)) for name, layer in layers(model).items())


@pytest.mark.parametrize("name", ["bert model", "patterns", "structured", "gpt2 model"])
def test_they_are_those_of_the_definition(name: str) -> None:
    model = KINDS[name].trained(alpha_pattern={})
    layout = Layout.of(model)
    found = layout.factors(model, layout.to_vector(model))
    for layer_name, layer in layers(model).items():
        dense = dense_layer(layer, model, "default")
        of_layer = found[layer_name]
        assert worst_error(of_layer.gain_minus_one, dense.gain() - 1) < 1e-5
        assert worst_error(of_layer.scale, dense.scale()) < 1e-5
        assert torch.equal(of_layer.lambda_d, layer.vectors("default").lambda_d)


def test_an_untrained_adapter_changes_nothing() -> None:
    model = KINDS["bert model"].fresh()
    layout = Layout.of(model)
    for factors in layout.factors(model, layout.to_vector(model)).values():
        assert not factors.gain_minus_one.any()
        assert not factors.scale.any()


@pytest.mark.parametrize("name", [*SEVERAL, "all biases"])
def test_a_batch_has_the_factors_of_each_of_its_vectors(name: str) -> None:
    model = KINDS[name].trained()
    layout = Layout.of(model)
    vectors = torch.stack([layout.to_vector(KINDS[name].trained(seed)) for seed in range(3)])
    batch = layout.factors(model, vectors)
    for number, vector in enumerate(vectors):
        for layer, single in layout.factors(model, vector).items():
            assert agree(LayerFactors(*(each[number] for each in batch[layer])), single)


def test_one_tensor_serves_all_layers_of_a_shape() -> None:
    model = KINDS["bert model"].trained()
    layout = Layout.of(model)
    found = layout.factors(model, layout.to_vector(model)[None])
    queries = [factors for name, factors in found.items() if name.endswith("query")]
    assert len(queries) == 2
    assert len({each.gain_minus_one.untyped_storage().data_ptr() for each in queries}) == 1
    assert queries[0].gain_minus_one.shape == (1, 32)


def test_they_have_the_strength_that_the_layers_have() -> None:
    model = mlp().trained()
    model.set_strength({"lin1": 0.25})
    layout = Layout.of(model)
    found = layout.factors(model, layout.to_vector(model))
    assert all(agree(found[name], own_factors(layer)) for name, layer in layers(model).items())


def test_they_are_those_of_the_vector_and_leave_the_model_alone() -> None:
    model, other = mlp().trained(), mlp().trained(seed=1)
    layout = Layout.of(model)
    before = layout.to_vector(model)
    found = layout.factors(model, layout.to_vector(other).requires_grad_())
    assert all(agree(found[name], own_factors(layer)) for name, layer in layers(other).items())
    assert torch.equal(layout.to_vector(model), before)
    assert not any(factor.requires_grad for factors in found.values() for factor in factors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_has_factors_in_float32(dtype: torch.dtype) -> None:
    model = Kind(lambda: MODELS["mlp"]().to(dtype), mlp().settings).trained()
    layout = Layout.of(model)
    found = layout.factors(model, layout.to_vector(model))
    assert {factor.dtype for factors in found.values() for factor in factors} == {torch.float32}
    assert all(agree(found[name], own_factors(layer)) for name, layer in layers(model).items())


@pytest.mark.parametrize("base", bases.FAMILIES)
def test_a_quantised_base_too(base: str) -> None:
    kind = Kind(lambda: bases.quantised(bases.wide(), base), {"r": 5, "target_modules": ["lin0", "lin1", "lin2"]})
    plain = Kind(bases.wide, kind.settings)
    model = kind.trained()
    layout = Layout.of(model)
    vector = layout.to_vector(model)
    found = layout.factors(model, vector)
    assert all(agree(found[name], own_factors(layer)) for name, layer in layers(model).items())
    other = plain.fresh()
    assert Layout.of(other) == layout
    layout.from_vector(vector, other)
    assert torch.equal(layout.to_vector(other), vector)


def test_rows_that_an_update_nearly_cancels_are_measured() -> None:
    model = mlp().trained()
    layer = model.base_model.model.lin1
    A, B = (getattr(layer.adapted("default").shared, each)(4, 24) for each in "AB")
    vectors = layer.vectors("default")
    with torch.no_grad():
        update: Tensor = (B * vectors.lambda_d) @ A
        layer.base_layer.weight.copy_(-update * (1 + 1e-4 * torch.linspace(-1, 1, 24)))
        vectors.lambda_b.copy_(1 / update.norm(dim=1))
    layout = Layout.of(model)
    found = layout.factors(model, layout.to_vector(model).repeat(2, 1))["lin1"]
    assert agree(LayerFactors(*(each[1] for each in found)), own_factors(layer))
    assert float(found.gain_minus_one.min()) > 100
