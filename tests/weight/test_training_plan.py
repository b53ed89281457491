"""Training by plans: which layers follow one, and that outputs and gradients are those of layers that follow none.

`tests/tuner/test_changes_in_a_pass.py` changes models in the middle of passes that follow plans.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from dvora.weight import plan
from dvora.weight.plan import TrainingPlan
from tests.tuner.tiny import dvora_layers
from tests.tuner.towers import adapted, alone, inputs, layer_of, trained

both_matrices = pytest.mark.parametrize("matrices", ["kaiming_uniform", "structured"])


@contextmanager
def counted() -> Iterator[list[TrainingPlan]]:
    """The plans that layers follow."""
    followed, follow = list[TrainingPlan](), TrainingPlan.outputs

    def following(plan: TrainingPlan, *args: object) -> Tensor:
        followed.append(plan)
        return follow(plan, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingPlan, "outputs", following)
        yield followed


def followed_by(model: PeftModel) -> int:
    """How many layers follow a plan in a step, which is equal to one in which every layer is by itself."""
    expected = trained(alone(model))
    with counted() as followed:
        found = trained(model)
    assert found.differ(expected) < 1e-5
    return len(followed)


def with_plans(**settings: object) -> PeftModel:
    model = adapted(("default", "second"), **settings)
    trained(model)
    return model


@both_matrices
def test_all_layers_follow_from_the_second_step_on(matrices: str) -> None:
    model = adapted(projection_init=matrices)
    assert [followed_by(model) for _ in range(3)] == [0, 4, 4]
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert followed_by(model) == 4


@pytest.mark.parametrize(("rows", "layers"), [(10, 0), (11, 4)])
def test_many_tokens_of_dense_matrices_go_by_way_of_the_updated_weight(
    rows: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, made = with_plans(projection_init="kaiming_uniform"), inputs(rows=rows), []
    expected, route = trained(alone(model), x), plan.updated_linear
    monkeypatch.setattr(plan, "updated_linear", lambda *args: (made.append(1), route(*args))[1])
    assert trained(model, x).differ(expected) < 1e-5
    assert len(made) == layers


def replace_dropout(model: PeftModel) -> None:
    layer_of(model).dvora_dropout["default"] = nn.Dropout(1e-9)


def train_bias(model: PeftModel) -> None:
    layer_of(model).base_layer.bias.requires_grad_()


@torch.no_grad()
def step_bias(model: PeftModel) -> None:
    layer_of(model).base_layer.bias.add_(1)


@torch.no_grad()
def shrink_rows(model: PeftModel) -> None:
    """A weight whose first row is small beside its bias."""
    layer_of(model).base_layer.weight[0] *= 1e-5


def give_memory_of_another(model: PeftModel) -> None:
    bias = layer_of(model).base_layer.bias
    bias.data = 3 * torch.ones_like(bias)


CHANGES: dict[str, tuple[Callable[[PeftModel], object], int]] = {
    "nothing": (lambda model: None, 4),
    "another strength": (lambda model: model.set_strength(0.5), 0),
    "another strength of one layer": (lambda model: layer_of(model).strength("default").data.fill_(1.0), 4),
    "written strength": (torch.no_grad()(lambda model: layer_of(model).strength("default").fill_(0.5)), 3),
    "both adapters": (lambda model: model.base_model.set_adapter(["default", "second"]), 0),
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), 0),
    "dropout": (replace_dropout, 3),
    "a bias that is trained": (train_bias, 4),
    "another bias": (step_bias, 3),
    "rows small beside their bias": (shrink_rows, 3),
    "a bias in other memory": (give_memory_of_another, 3),
    "a base that is trained": (lambda model: layer_of(model).base_layer.weight.requires_grad_(), 4),
}
"""Each with the number of layers that follow afterwards."""


@both_matrices
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_trained_as_it_is(change: str, matrices: str) -> None:
    model, (write, expected) = with_plans(projection_init=matrices), CHANGES[change]
    assert followed_by(model) == 4
    write(model)
    assert followed_by(model) == expected


def test_a_layer_whose_weight_is_hidden_or_offloaded_does_not_follow() -> None:
    model = with_plans()
    layer_of(model).layer_type = layer_of(model).layer_type._replace(has_weight=False)
    del layer_of(model).adapted("default").kept.training_plan
    layer_of(model).adapted("default").kept.training_plan = None
    assert [followed_by(model) for _ in range(2)] == [3, 3]


def test_a_magnitude_that_is_rounded_is_still_warned_of() -> None:
    model = with_plans()
    magnitude = layer_of(model).dvora_magnitude["default"]
    magnitude.data = magnitude.data.bfloat16()
    with pytest.warns(UserWarning, match="rounds it by up to"):
        trained(model)


def test_a_plan_keeps_no_adapter_alive() -> None:
    model = with_plans()
    (_, layer), *_ = dvora_layers(model)
    kept: TrainingPlan = layer.adapted("default").kept.training_plan
    assert kept._adapted() is layer.adapted("default")
    model.set_adapter("second")
    model.delete_adapter("default")
    assert kept._adapted() is None
