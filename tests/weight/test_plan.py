"""Plans in evaluation: where layers follow them, where they must not, and that outputs follow what plans depend on."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from dvora import DVoRAConfig
from dvora.matrices.interface import DISTRIBUTIONS
from dvora.tuner import DVoRALayer
from tests.cases import randn
from tests.tuner.layer_cases import CASES
from tests.tuner.tiny import dvora_layers, train_vectors
from tests.tuner.towers import LAYERS, adapted, alone, evaluated, in_the_middle, inner, inputs, layer_of, tower, trained
from tests.weight.planned import close, followed, watched, with_plans

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
TWO = ("default", "second")


def tower_of(
    distribution: str = "kaiming_uniform", names: tuple[str, ...] = ("default",), **settings: object
) -> PeftModel:
    return with_plans(adapted(names, projection_init=distribution, **settings))


@every_distribution
@pytest.mark.parametrize("rows", [1, 5, 60], ids=lambda rows: f"{rows} tokens")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_from_the_second_pass_on_all_layers_follow_their_plans(
    mode: Callable[[], AbstractContextManager[None]], rows: int, distribution: str
) -> None:
    model, x = adapted(projection_init=distribution).eval(), inputs(rows=rows)
    expected = evaluated(alone(model), x)
    for index in range(4):
        with watched() as ways, mode():
            assert close(model(x), expected)
        assert ways.slowly == ([] if index else LAYERS)
        assert ways.followed == (4 if index else 0)


def test_vectors_that_are_trained_get_a_plan_after_each_step() -> None:
    model = tower_of()
    for _ in range(2):
        before = evaluated(model)
        trained(model)
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
        assert followed(model) == 0
        assert followed(model) == 4
        assert close(evaluated(model), evaluated(alone(model)))
        assert not close(evaluated(model), before)


def test_a_layer_that_is_called_by_itself_does_not_follow_a_plan() -> None:
    model, x = tower_of(), inputs()
    with watched() as ways:
        found = evaluated(layer_of(model), x)
    assert ways.slowly == ["lin3"]
    assert close(found, evaluated(layer_of(alone(model)), x))


PLANNED = {
    **dict.fromkeys(["Linear", "Linear, magnitude only", "transformers Conv1D", "embedding and lm_head, tied"], 1),
    "TransformerEncoderLayer": 2,
}
"""How many layers of each case can; an embedding, a convolution and what modules read cannot."""


@pytest.mark.parametrize("layer", CASES)
def test_of_all_layer_types_only_linear_layers_follow(layer: str) -> None:
    case = CASES[layer]
    model, x = get_peft_model(case.base(), case.config()).eval(), case.inputs()
    train_vectors(model)
    for _ in range(3):
        with watched() as ways:
            found = evaluated(model, x)
    assert close(found, evaluated(alone(model), x))
    assert ways.followed == PLANNED.get(layer, 0)


# Where nothing is followed. Each change makes a model that has plans one whose layers must look for themselves.


def with_small_rows(model: PeftModel) -> None:
    """As far as the weight is concerned; the bias is made anew."""
    for _, layer in dvora_layers(model):
        layer.base_layer.bias = nn.Parameter(1e4 * torch.ones(8), requires_grad=False)


def with_outputs_only(model: PeftModel) -> None:
    """The magnitude trained alone."""
    for _, layer in dvora_layers(model):
        del layer.dvora_lambda_b["default"], layer.dvora_lambda_d["default"]


def cast_inside(model: PeftModel) -> None:
    """Inputs in double precision, which every base takes back."""
    for _, layer in dvora_layers(model):
        layer.register_forward_pre_hook(lambda _, args: (args[0].double(),))
        layer.base_layer.register_forward_pre_hook(lambda _, args: (args[0].float(),))


def turn(weight: Tensor) -> None:
    """The same memory in another order."""
    weight.data = weight.data.T


CHANGED_MODELS: dict[str, Callable[[PeftModel], object]] = {
    "two active adapters": lambda model: model.base_model.set_adapter(list(TWO)),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "the other one merged": lambda model: model.merge_adapter(["second"]),
    "rows small beside their bias": with_small_rows,
    "other dtype of x": cast_inside,
    "weights of other values": lambda model: [turn(layer.base_layer.weight) for _, layer in dvora_layers(model)],
}
AT_FIRST = {"other dtype of x", "weights of other values"}
"""After these another plan is made, or the old one is followed once the change is taken back."""


@every_distribution
@pytest.mark.parametrize("change", CHANGED_MODELS)
def test_a_changed_model_does_not_follow_its_plans(change: str, distribution: str) -> None:
    model = tower_of(distribution, TWO)
    before = evaluated(model)
    with torch.no_grad():
        CHANGED_MODELS[change](model)
    expected = evaluated(alone(model))
    for _ in range(1 if change in AT_FIRST else 3):
        with watched() as ways:
            found = evaluated(model)
        assert ways.followed == 0
        assert found.shape == before.shape
        torch.testing.assert_close(found.float(), expected.float(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_dropout_in_training_mode_is_not_planned_away() -> None:
    model = tower_of(dvora_dropout=0.5)
    before = evaluated(model)
    model.train()
    found = [evaluated(model) for _ in range(4)]
    assert len({float(y.sum()) for y in found}) == 4
    assert followed(model) == 0
    model.eval()
    assert followed(model) == 4
    assert torch.equal(evaluated(model), before)


def test_only_the_dropout_of_the_active_adapter_matters() -> None:
    model = tower_of(names=TWO, dvora_dropout=0.5)
    layer_of(model).dvora_dropout["second"].train()
    assert followed(model) == 4
    layer_of(model).dvora_dropout["default"].train()
    assert followed(model) == 3


@every_distribution
def test_rows_with_adapters_of_their_own_do_not_follow(distribution: str) -> None:
    model, names = tower_of(distribution, TWO), ["second", "default", "__base__", "second", "default"]
    expected = torch.cat([y[None] for y in rows_one_by_one(model, names)])
    with watched() as ways, torch.no_grad():
        found = model(inputs(), adapter_names=names)
    assert ways.followed == 0
    assert close(found, expected)


def rows_one_by_one(model: PeftModel, names: list[str]) -> list[Tensor]:
    rows, made = [], alone(model)
    for x, name in zip(inputs(), names, strict=True):
        made.base_model.set_adapter("default" if name == "__base__" else name)
        with made.disable_adapter() if name == "__base__" else nullcontext():
            rows.append(evaluated(made, x))
    return rows


@every_distribution
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_follow_and_what_it_planned_serves_without(dtype: torch.dtype, distribution: str) -> None:
    model = adapted(projection_init=distribution).eval()
    for _ in range(2):
        for _ in range(3):
            with watched() as ways, torch.autocast("cpu", dtype):
                found = evaluated(model)
            assert ways.followed == 0
        with torch.autocast("cpu", dtype):
            assert torch.equal(found, evaluated(alone(model)))
        # The other layers had inputs in half precision.
        assert followed(model) == 1
        assert followed(model) == 4
        assert close(evaluated(model), evaluated(alone(model)))


def test_where_plans_are_not_followed_they_are_not_made_again_and_again() -> None:
    for strength, dtype in ((1.0, torch.bfloat16), (0.3, None)):
        model = adapted().eval()
        model.set_strength(strength)
        made = []
        for _ in range(4):
            with watched() as ways, torch.autocast("cpu", dtype) if dtype else nullcontext():
                evaluated(model)
            made.append(ways.made)
        assert made == [4, 0, 0, 0]
        train_vectors(model, seed=2)
        assert close(evaluated(model), evaluated(alone(model)))


def test_autocast_in_the_middle_of_a_pass_does_not_follow() -> None:
    model = tower_of()

    def run(own: DVoRALayer, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return DVoRALayer.forward(own, x)

    layer = layer_of(model)
    layer.forward = lambda x: run(layer, x)
    with watched() as ways:
        found = evaluated(model)
    assert (ways.followed, ways.slowly) == (3, ["lin3"])
    assert found.dtype == torch.bfloat16


def test_recorded_gradients_do_not_follow() -> None:
    model = tower_of()
    expected = trained(alone(model))
    with watched() as ways:
        assert trained(model).differ(expected) < 1e-5
    assert ways.followed == 0
    model.requires_grad_(False)
    with_plans(model)
    x = inputs().requires_grad_()
    with watched() as ways:
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    assert ways.followed == 0
    twin = inputs().requires_grad_()
    (expected_gradient,) = torch.autograd.grad(alone(model)(twin).square().sum(), twin)
    assert close(gradient, expected_gradient)


def within(model: PeftModel, act: Callable[[DVoRALayer], object]) -> tuple[object, int]:
    """What a layer does for someone else in the middle of a pass without gradients, and how many plans it followed."""
    found: list[object] = []
    counts: list[int] = []

    def do(of: nn.Module) -> None:
        with watched() as ways:
            found.append(act(layer_of(of)))
        counts.append(ways.followed)

    with in_the_middle(model, do):
        after = evaluated(model)
    assert close(after, evaluated(alone(model)))
    assert close(evaluated(model), after)
    return found[0], counts[0]


@every_distribution
def test_a_layer_under_vmap_within_a_pass_does_not_follow(distribution: str) -> None:
    model, x = tower_of(distribution), inputs(rows=6).view(2, 3, 8)
    found, count = within(model, lambda layer: torch.func.vmap(layer)(x))
    assert count == 0
    assert close(found, evaluated(layer_of(alone(model)), x))


@every_distribution
def test_a_layer_that_is_called_with_other_values_within_a_pass_does_not_follow(distribution: str) -> None:
    model, x, other = tower_of(distribution), inputs(), randn(8, seed=9)
    for name in ("dvora_lambda_b.default", "dvora_magnitude.default", "base_layer.bias"):
        act = partial(torch.func.functional_call, parameter_and_buffer_dicts={name: other}, args=(x,))
        found, count = within(model, act)
        assert count == 0
        made = layer_of(alone(model))
        with torch.no_grad():
            made.get_parameter(name).copy_(other)
        assert close(found, evaluated(made, x))
        assert followed(model) == 4


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@every_distribution
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tangents_within_a_pass_are_those_of_the_layer(dtype: torch.dtype, distribution: str) -> None:
    model = tower_of(distribution)
    x, tangent = inputs().to(dtype), randn(5, 8, seed=3, dtype=dtype)
    expected = evaluated(layer_of(alone(model)), tangent.float()) - evaluated(layer_of(alone(model)), 0 * x.float())
    if dtype == torch.bfloat16:
        with_plans(model.to(dtype), x)

    def by_levels(layer: DVoRALayer) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent.clone()

    for jvp in (by_levels, lambda layer: torch.func.jvp(layer, (x,), (tangent,))[1]):
        found: list[Tensor] = []
        with in_the_middle(model, lambda of, jvp=jvp, found=found: found.append(jvp(layer_of(of)))):
            evaluated(model, x)
        torch.testing.assert_close(found[0].float(), expected, rtol=0.05, atol=0.05 if dtype.itemsize < 4 else 1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_nothing_of_a_transform_is_kept() -> None:
    model, x = tower_of(), inputs()
    layer_of(model).adapted("default").kept.evaluated.factors.prepared.clear()
    within(model, lambda layer: torch.func.jvp(layer, (x,), (x,)))
    for name, layer in dvora_layers(model):
        for add in layer.adapted("default").kept.evaluated.factors.prepared.values():
            held = [cell.cell_contents for cell in add.__closure__]
            assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, filter(torch.is_tensor, held))), name


@pytest.mark.usefixtures("compiler")
def test_a_layer_that_is_compiled_within_a_model_does_not_follow() -> None:
    model = tower_of()
    expected = evaluated(alone(model))
    base = inner(model)
    base.lin3 = torch.compile(base.lin3, backend="eager")
    for _ in range(3):
        with watched() as ways:
            assert close(evaluated(model), expected)
        assert ways.followed == 3
    with torch.no_grad():
        base.lin3.vectors("default").magnitude.mul_(2)
    assert not close(evaluated(model), expected)


def test_an_offloaded_base_is_not_planned() -> None:
    for change in (lambda model: None, train_vectors):
        model = get_peft_model(cpu_offload(tower(), execution_device=torch.device("cpu")), config()).eval()
        train_vectors(model)
        change(model)
        twin = get_peft_model(tower(), config()).eval()
        train_vectors(twin)
        change(twin)
        for _ in range(3):
            with watched() as ways:
                found = evaluated(model)
            assert ways.followed == 0
            assert close(found, evaluated(twin))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
def test_a_weight_that_processes_divide_is_not_planned(style: type[ParallelStyle]) -> None:
    model = adapted().eval()
    expected = evaluated(alone(model))
    parallelize_module(layer_of(model).base_layer, init_device_mesh("cpu", (1,)), style())
    for _ in range(3):
        with watched() as ways:
            assert close(evaluated(model), expected)
        assert "lin3" in ways.slowly


def config(**settings: object) -> DVoRAConfig:
    return DVoRAConfig(r=3, target_modules=LAYERS, **settings)
