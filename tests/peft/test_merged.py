"""`dvora.merged`: adapters in the weights for as long as a context lasts."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import dvora
from dvora import DVoRAConfig
from dvora.peft.layer import DVoRALayer, layers_in
from tests.peft.tiny import MODELS


def trained() -> PeftModel:
    config = DVoRAConfig(r=4, target_modules="all-linear", init_weights=False)
    return get_peft_model(MODELS["mlp"](), config).eval()


X = torch.linspace(-1, 1, 20).reshape(2, 10)


def test_within_it_the_base_runs_alone_and_gives_the_adapted_outputs() -> None:
    model = trained()
    before, weights = model(X), [layer.stored().clone() for layer in layers_in(model)]
    calls: list[object] = []
    for layer in layers_in(model):
        layer.adapted("default").combine = calls.append
    with dvora.merged(model):
        torch.testing.assert_close(model(X), before)
        assert all(layer.merged for layer in layers_in(model))
    assert not calls
    for layer, weight in zip(layers_in(model), weights, strict=True):
        assert torch.equal(layer.stored(), weight)
        assert not layer.merged


def test_the_weights_come_back_after_an_error() -> None:
    model = trained()
    weights = [layer.stored().clone() for layer in layers_in(model)]
    with pytest.raises(KeyError), dvora.merged(model):
        raise KeyError
    assert all(torch.equal(layer.stored(), w) for layer, w in zip(layers_in(model), weights, strict=True))


def test_adapters_may_be_unmerged_within_it() -> None:
    model = trained()
    with dvora.merged(model):
        model.unmerge_adapter()
    assert not any(layer.merged for layer in layers_in(model))


def test_only_active_adapters_are_merged() -> None:
    model = trained()
    model.add_adapter("other", DVoRAConfig(r=4, target_modules="all-linear", init_weights=False))
    model.set_adapter("other")
    expected = model(X)
    with dvora.merged(model):
        torch.testing.assert_close(model(X), expected)


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"), dvora.merged(trained().train()):
        pass


def test_merged_adapters_are_refused() -> None:
    model = trained()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged already"), dvora.merged(model):
        pass
    assert all(layer.merged for layer in layers_in(model))


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no DVoRA layers"), dvora.merged(nn.Sequential().eval()):
        pass


def test_a_value_that_is_not_finite_is_refused_before_anything_is_merged() -> None:
    model = trained()
    *_, last = (module for module in model.modules() if isinstance(module, DVoRALayer))
    with torch.no_grad():
        last.vectors("default").magnitude[0] = torch.inf
    with pytest.raises(ValueError, match="not finite"), dvora.merged(model):
        pass
    assert not any(layer.merged for layer in layers_in(model))
