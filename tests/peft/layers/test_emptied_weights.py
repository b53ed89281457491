"""Base weights that an engine takes away between passes, and brings for the base layer's own: no DeepSpeed needed."""

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from dvora import DVoRAAdapter, DVoRAConfig, SharedProjections
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, gradients, outputs, same_bits, train_vectors


def adapted(**settings: object) -> nn.Module:
    model = get_peft_model(MODELS["llama"](), DVoRAConfig(**{"r": 6, "target_modules": LAYERS["llama"], **settings}))
    train_vectors(model)
    return model


def take_away(layer: nn.Linear, left: Tensor) -> None:
    """Leave other values in place of a weight's, as ZeRO-3 does, and bring its own for the layer's passes only."""
    weight, own = layer.weight, layer.weight.data
    weight.ds_id = 0

    def bring(*_: object) -> None:
        weight.data = own.clone()

    def remove(*_: object) -> None:
        weight.data = left

    remove()
    layer.register_forward_pre_hook(bring)
    layer.register_forward_hook(remove)
    layer.register_full_backward_pre_hook(bring)


@pytest.mark.parametrize("left", [(0,), None], ids=["nothing", "values on their way"])
def test_a_weight_that_is_not_at_hand_is_never_measured(left: tuple[int] | None) -> None:
    model = adapted()
    expected, expected_gradients = outputs(model), gradients(model)
    for _, layer in dvora_layers(model):
        weight = layer.base_layer.weight
        take_away(layer.base_layer, torch.full(weight.shape if left is None else left, 7.0))
    norms = [layer.adapted("default").w for _, layer in dvora_layers(model)]
    assert same_bits(outputs(model), expected)
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name])
    assert all(layer.adapted("default").w is w for (_, layer), w in zip(dvora_layers(model), norms, strict=True))


def test_a_plain_layer_does_not_measure_it_either() -> None:
    layer = DVoRAAdapter(nn.Linear(20, 30), rank=4, shared=SharedProjections(seed=0))
    with torch.no_grad():
        layer.lambda_b.fill_(0.3)
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    take_away(layer.base_layer, torch.empty(0))
    assert same_bits(layer(x), expected)


def test_nothing_is_merged_into_a_weight_that_is_not_there() -> None:
    model = adapted()
    for _, layer in dvora_layers(model):
        take_away(layer.base_layer, torch.empty(0))
    with pytest.raises(ValueError, match=r"q_proj: DeepSpeed ZeRO-3 has partitioned the weight.*GatheredParameters"):
        model.merge_adapter()
    assert not any(layer.merged for _, layer in dvora_layers(model))


def test_vectors_that_are_not_there_are_not_saved() -> None:
    model = adapted()
    _, layer = next(iter(dvora_layers(model)))
    layer.dvora_lambda_b["default"].data = torch.empty(0)
    with pytest.raises(ValueError, match=r"q_proj\.dvora_lambda_b.* is sharded between the processes.*Gather on every"):
        get_peft_model_state_dict(model)


def test_what_recognises_the_base_is_kept_from_when_it_was_whole() -> None:
    model = adapted()
    before = {name: list(layer.fingerprint) for name, layer in dvora_layers(model)}
    for _, layer in dvora_layers(model):
        take_away(layer.base_layer, torch.empty(0))
    get_peft_model_state_dict(model)
    assert model.peft_config["default"].fingerprints_to_save == before
