"""What a training loop calls: groups of parameters and their rates, and whether processes hold the same adapters."""

import re

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from dvora import DVoRAAdapter, DVoRAConfig
from dvora.training import (
    LAMBDA_RATE,
    MAGNITUDE_SHARE,
    AdapterSettings,
    check_ranks_agree,
    parameter_groups,
    recommended_rates,
)
from tests.cases import SHARED, linear
from tests.engines.processes import run
from tests.peft.tiny import LAYERS, MODELS, mlp

WITH_HEAD = {"modules_to_save": ["classifier"]}


def adapted(name: str = "bert", **settings: object) -> nn.Module:
    return get_peft_model(MODELS[name](), DVoRAConfig(**{"r": 4, "target_modules": LAYERS[name], **settings}))


def members(model: nn.Module) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.1)}


@pytest.mark.parametrize("name", MODELS)
def test_every_trained_parameter_is_in_one_group(name: str) -> None:
    model = adapted(name, **(WITH_HEAD if name == "bert" else {}))
    groups = members(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(n for group in groups.values() for n in group) == sorted(trained)
    for vector in ("magnitude", "lambda_b", "lambda_d"):
        assert groups[vector]
        assert all(f".dvora_{vector}." in n for n in groups[vector])
    assert groups.get("head", []) == [n for n in trained if "classifier" in n]


def test_recommended_rates_are_of_the_groups_that_are_trained() -> None:
    model, alone = adapted(**WITH_HEAD), adapted(train=["lambda_b"])
    assert list(recommended_rates(model)) == list(members(model)) == ["magnitude", "lambda_b", "lambda_d", "head"]
    assert list(recommended_rates(alone)) == list(members(alone)) == ["lambda_b"]


def test_plain_layers_are_grouped_and_a_trained_base_is_head() -> None:
    model = nn.Sequential(
        DVoRAAdapter(linear(6, 6), rank=3, shared=SHARED),
        DVoRAAdapter(linear(6, 6), rank=3, shared=SHARED, freeze_base_layer=False),
        nn.Linear(6, 2),
    )
    sizes = {name: len(group) for name, group in members(model).items()}
    assert sizes == {"magnitude": 2, "lambda_b": 2, "lambda_d": 2, "head": 4}


def test_rates_and_decays_go_to_their_groups() -> None:
    groups = parameter_groups(
        adapted(**WITH_HEAD), 0.1, learning_rates={"lambda_d": 0.5}, weight_decay=0.01, weight_decays={"head": 0.1}
    )
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "magnitude": (0.1, 0.0),
        "lambda_b": (0.1, 0.01),
        "lambda_d": (0.5, 0.01),
        "head": (0.1, 0.1),
    }


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
def test_a_wrong_group_or_number_is_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parameter_groups(adapted(), **{"learning_rate": 0.1, **settings})


def test_a_model_that_trains_nothing_is_refused() -> None:
    model = adapted(inference_mode=True)
    for call in (lambda: parameter_groups(model, 0.1), lambda: recommended_rates(model)):
        with pytest.raises(ValueError, match="the model trains nothing: adapt it first"):
            call()


def test_one_rate_moves_all_but_the_heads() -> None:
    model = adapted(**WITH_HEAD)
    usual, third = recommended_rates(model), recommended_rates(model, LAMBDA_RATE / 3)
    assert {name: usual[name] / third[name] for name in usual} == pytest.approx(
        {"magnitude": 3, "lambda_b": 3, "lambda_d": 3, "head": 1}
    )
    with pytest.raises(ValueError, match="learning_rate"):
        recommended_rates(model, -1.0)


@pytest.mark.parametrize(
    ("norms", "median"),
    [([1.0, 2.0, 9.0], 2.0), ([100.0, 200.0, 900.0], 200.0), ([1e-8, 2.0, 1e-6, 0.0, 1e-3], 2.0)],
    ids=["usual rows", "larger rows", "rows next to nothing do not count"],
)
def test_the_magnitudes_rate_goes_with_the_median_row(norms: list[float], median: float) -> None:
    base = nn.Linear(6, len(norms))
    with torch.no_grad():
        base.weight.copy_(torch.eye(len(norms), 6) * torch.tensor(norms)[:, None])
    layer = DVoRAAdapter(base, rank=3, shared=SHARED)
    assert recommended_rates(layer)["magnitude"] == pytest.approx(MAGNITUDE_SHARE * LAMBDA_RATE * median)


@pytest.mark.usefixtures("one_process")
def test_rates_of_a_sharded_model_are_refused() -> None:
    layer = DVoRAAdapter(linear(6, 5), rank=3, shared=SHARED)
    layer.magnitude = nn.Parameter(distribute_tensor(layer.magnitude.detach(), init_device_mesh("cpu", (1,))))
    with pytest.raises(ValueError, match="a magnitude is sharded over processes"):
        recommended_rates(layer)


OTHERS: list[tuple[dict[str, object] | None, str]] = [
    ({}, "agreed"),
    ({"projection_seed": 7}, "projections=kaiming_uniform/"),
    ({"r": 5}, "rank=5"),
    ({"alpha": 9}, "alpha=9"),
    ({"target_modules": ["lin0"]}, "no adapter"),
    (None, "no adapter"),
]
"""Settings of the second rank, None for no adapter, and what the check says where the first has the defaults."""


def answers() -> list[str]:
    return [answer(other if dist.get_rank() else {}) for other, _ in OTHERS]


def answer(settings: dict[str, object] | None) -> str:
    try:
        check_ranks_agree(mlp() if settings is None else adapted("mlp", **settings))
    except ValueError as error:
        return str(error)
    return "agreed"


def test_every_rank_hears_of_a_difference() -> None:
    first, second = run(answers, 2)
    assert first == second
    for text, (_, message) in zip(first, OTHERS, strict=True):
        assert message in text


def test_one_process_agrees_with_itself_but_needs_an_adapter() -> None:
    check_ranks_agree(adapted("mlp"))
    with pytest.raises(ValueError, match="no DVoRA adapters to compare between ranks: adapt it first"):
        check_ranks_agree(mlp())


@pytest.mark.parametrize(("settings", "message"), OTHERS[:-1])
def test_a_checkpoint_is_of_the_same_adapters_with_and_without_wrappers_or_refused(
    settings: dict[str, object], message: str
) -> None:
    saved = AdapterSettings(adapted("mlp", **settings)).state_dict()
    model = AdapterSettings(nn.ModuleDict({"module": adapted("mlp")}))
    if not settings:
        model.load_state_dict(saved)
        return
    with pytest.raises(ValueError, match="the checkpoint is of other adapters") as refused:
        model.load_state_dict(saved)
    assert message in str(refused.value)
