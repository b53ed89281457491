"""Every trained parameter is in one group, with its own learning rate and decay, whatever wraps the model."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from dvora import DVoRAAdapter, DVoRAConfig
from dvora.training import parameter_groups, recommended_rates
from dvora.training.optimizer_groups import HEAD_RATE, LAMBDA_RATE, MAGNITUDE_SHARE
from tests.cases import SHARED, linear, randn
from tests.tuner.tiny import LAYERS, MODELS


def adapted(name: str = "bert", **settings: object) -> nn.Module:
    return get_peft_model(MODELS[name](), DVoRAConfig(**{"r": 4, "target_modules": LAYERS[name], **settings}))


def members(model: nn.Module, **settings: object) -> dict[str, list[str]]:
    """The names of the parameters in each group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        group["name"]: [names[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.1, **settings)
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_trained_parameter_is_in_one_group(name: str) -> None:
    model = adapted(name, modules_to_save=["classifier"] if name == "bert" else None)
    groups = members(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(n for group in groups.values() for n in group) == sorted(trained)
    for vector in ("magnitude", "lambda_b", "lambda_d"):
        assert groups[vector]
        assert all(f".dvora_{vector}." in n for n in groups[vector])
    assert groups.get("head", []) == [n for n in trained if "classifier" in n]


def test_a_model_that_is_adapted_in_place_inside_a_trainer_s_module() -> None:
    config = DVoRAConfig(r=4, target_modules=LAYERS["bert"], modules_to_save=["classifier"])
    module = nn.ModuleDict({"model": inject_adapter_in_model(config, MODELS["bert"](), "reviews")})
    whole = adapted(modules_to_save=["classifier"])
    assert {n: len(group) for n, group in members(module).items()} == {n: len(g) for n, g in members(whole).items()}


def test_rates_and_decay_go_to_their_groups() -> None:
    groups = parameter_groups(
        adapted(modules_to_save=["classifier"]),
        0.1,
        learning_rates={"lambda_d": 0.5},
        weight_decay=0.01,
        weight_decays={"head": 0.1},
    )
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "magnitude": (0.1, 0.0),
        "lambda_b": (0.1, 0.01),
        "lambda_d": (0.5, 0.01),
        "head": (0.1, 0.1),
    }


def test_an_optimizer_follows_them() -> None:
    layer = DVoRAAdapter(linear(6, 5), rank=3, shared=SHARED)
    before = {name: vector.detach().clone() for name, vector in layer.vectors._asdict().items()}
    groups = parameter_groups(layer, 1.0, learning_rates={"lambda_d": 0.0})
    torch.optim.SGD(groups, lr=9.0).step(lambda: layer(randn(4, 6, seed=0)).sum().backward())
    moved = {name: not torch.equal(vector, before[name]) for name, vector in layer.vectors._asdict().items()}
    assert moved == {"magnitude": True, "lambda_b": True, "lambda_d": False}


def test_groups_of_a_plain_model_with_several_layers_and_a_trained_base() -> None:
    model = nn.Sequential(
        DVoRAAdapter(linear(6, 6), rank=3, shared=SHARED),
        DVoRAAdapter(linear(6, 6), rank=3, shared=SHARED, freeze_base_layer=False),
        nn.Linear(6, 2),
    )
    assert {name: len(group) for name, group in members(model).items()} == {
        "magnitude": 2,
        "lambda_b": 2,
        "lambda_d": 2,
        "head": 4,
    }


def test_a_subset_that_is_trained_makes_groups_of_its_own_only() -> None:
    assert members(adapted(train=["magnitude"])).keys() == {"magnitude"}


def test_another_method_s_parameters_are_others() -> None:
    model = get_peft_model(MODELS["bert"](), LoraConfig(r=2, target_modules=["query"]))
    assert members(model).keys() == {"head"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rates": {"lambda_c": 1.0}}, "learning_rates names the group 'lambda_c', expected one of magnitude"),
        ({"weight_decays": {"head": 1.0}}, "weight_decays names the group 'head', of which the model trains nothing"),
        ({"learning_rates": {"lambda_b": -1.0}}, "learning_rates['lambda_b'] must be finite and not negative"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and not negative, got nan"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite and not negative, got inf"),
    ],
)
def test_bad_input(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parameter_groups(adapted(), **{"learning_rate": 0.1, **settings})


def test_a_model_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="the model trains nothing: adapt it first"):
        parameter_groups(adapted(inference_mode=True), 0.1)


def test_recommended_rates_are_of_the_groups_that_are_trained() -> None:
    model = adapted(modules_to_save=["classifier"])
    rates = recommended_rates(model)
    assert list(rates) == ["magnitude", "lambda_b", "lambda_d", "head"]
    assert (rates["lambda_b"], rates["lambda_d"], rates["head"]) == (LAMBDA_RATE, LAMBDA_RATE, HEAD_RATE)
    groups = parameter_groups(model, 9.0, learning_rates=rates)
    assert {group["name"]: group["lr"] for group in groups} == rates
    assert list(recommended_rates(adapted(train=["lambda_b"]))) == ["lambda_b"]


def test_one_rate_moves_all_but_the_head_s() -> None:
    model = adapted(modules_to_save=["classifier"])
    usual, third = recommended_rates(model), recommended_rates(model, LAMBDA_RATE / 3)
    assert {name: usual[name] / third[name] for name in usual} == pytest.approx(
        {"magnitude": 3, "lambda_b": 3, "lambda_d": 3, "head": 1}
    )
    with pytest.raises(ValueError, match="learning_rate"):
        recommended_rates(model, -1.0)


@pytest.mark.parametrize("factor", [0.01, 1.0, 100.0])
def test_the_magnitude_s_rate_goes_with_the_rows(factor: float) -> None:
    base = nn.Linear(6, 3)
    with torch.no_grad():
        base.weight.copy_(torch.eye(3, 6) * torch.tensor([[1.0], [2.0], [9.0]]) * factor)
    layer = DVoRAAdapter(base, rank=3, shared=SHARED)
    assert recommended_rates(layer)["magnitude"] == pytest.approx(MAGNITUDE_SHARE * LAMBDA_RATE * 2 * factor)


def test_rows_that_are_next_to_nothing_have_no_say_in_the_magnitude_s_rate() -> None:
    base = nn.Linear(6, 5)
    with torch.no_grad():
        base.weight.copy_(torch.eye(5, 6) * torch.tensor([[1e-8], [2.0], [1e-6], [0.0], [1e-3]]))
    layer = DVoRAAdapter(base, rank=3, shared=SHARED)
    assert recommended_rates(layer)["magnitude"] == pytest.approx(MAGNITUDE_SHARE * LAMBDA_RATE * 2)


def test_rates_for_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="the model trains nothing: adapt it first"):
        recommended_rates(adapted(inference_mode=True))


@pytest.mark.usefixtures("one_process")
def test_rates_of_a_divided_model_are_refused() -> None:
    layer = DVoRAAdapter(linear(6, 5), rank=3, shared=SHARED)
    layer.magnitude = nn.Parameter(distribute_tensor(layer.magnitude.detach(), init_device_mesh("cpu", (1,))))
    with pytest.raises(ValueError, match="a magnitude is sharded over processes"):
        recommended_rates(layer)
