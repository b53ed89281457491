"""Several forward passes before a step, and several backward passes through one: factors are reused, never stale."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dvora import DVoRAAdapter, SharedProjections
from dvora.matrices import dense, structured
from dvora.matrices.interface import DISTRIBUTIONS
from dvora.method import gain
from dvora.weight import adapted_weight, factor_pass
from dvora.weight.factor_pass import add_factor_pass
from tests.cases import DIRECTIONS, linear, nearly_cancelled, randn, train
from tests.reference import DenseDVoRA, worst_error

WIDTH, RANK, LAYERS = 6, 3, 3


class Passes(nn.Module):
    """Layers of one shape, one after another; their factors are made together.

    Args:
        layers: adapted ones.
        together: whether a pass is known as one.
    """

    def __init__(self, layers: list[nn.Module], together: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if together:
            add_factor_pass(self)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def layers(distribution: str = "kaiming_uniform", **options: object) -> list[DVoRAAdapter]:
    shared = SharedProjections(3, distribution)
    made = [
        train(DVoRAAdapter(linear(WIDTH, WIDTH, dtype=torch.float64), RANK, shared=shared, **options))
        for _ in range(LAYERS)
    ]
    with torch.no_grad():
        for index, layer in enumerate(made):
            layer.base_layer.weight.mul_(1 + index)
            layer.magnitude.mul_(1 + index)
            layer.lambda_b.mul_(1 - 0.3 * index)
    return made


def model_of(distribution: str = "kaiming_uniform", norm_cache: bool | str = "auto", **options: object) -> Passes:
    made = layers(distribution, **options)
    for layer in made:
        layer.adapted.norm_cache = norm_cache
        layer.adapted.refresh(layer.base_layer.weight)
    return Passes(made)


def dense_of(model: Passes) -> Passes:
    return Passes([DenseDVoRA.of(layer) for layer in model.layers], together=False)


def x(seed: int) -> Tensor:
    return randn(4, WIDTH, seed=seed, dtype=torch.float64)


def loss(model: Passes, seed: int) -> Tensor:
    return (model(x(seed)) * randn(4, WIDTH, seed=seed + 50, dtype=torch.float64)).sum()


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] in ("magnitude", "lambda_b", "lambda_d")}


def assert_gradients_equal(model: Passes, reference: Passes) -> None:
    expected = parameters(reference)
    for name, parameter in parameters(model).items():
        assert worst_error(parameter.grad, expected[name].grad) < 1e-11, name


def two_forwards_one_backward(model: Passes) -> None:
    (loss(model, 1) + loss(model, 2)).backward()


def two_forwards_two_backwards(model: Passes) -> None:
    first, second = loss(model, 1), loss(model, 2)
    first.backward()
    second.backward()


def two_backwards_in_the_other_order(model: Passes) -> None:
    first, second = loss(model, 1), loss(model, 2)
    second.backward()
    first.backward()


def forward_and_backward_twice(model: Passes) -> None:
    loss(model, 1).backward()
    loss(model, 2).backward()


def backward_twice_through_one(model: Passes) -> None:
    value = loss(model, 1)
    value.backward(retain_graph=True)
    value.backward()


def an_evaluation_in_between(model: Passes) -> None:
    first = loss(model, 1)
    with torch.no_grad():
        loss(model, 3)
    first.backward()
    with torch.inference_mode():
        loss(model, 3)
    loss(model, 2).backward()


def parts_of_one_forward(model: Passes) -> None:
    y = model(x(1))
    y[:2].sum().backward(retain_graph=True)
    y[2:].square().sum().backward()


def a_backward_within_the_next_forward(model: Passes) -> None:
    first, done = loss(model, 1), []
    handle = model.layers[1].register_forward_pre_hook(lambda *_: done or done.append(first.backward()))
    loss(model, 2).backward()
    handle.remove()


WAYS: dict[str, Callable[[Passes], None]] = {
    way.__name__: way
    for way in (
        two_forwards_one_backward,
        two_forwards_two_backwards,
        two_backwards_in_the_other_order,
        forward_and_backward_twice,
        backward_twice_through_one,
        an_evaluation_in_between,
        parts_of_one_forward,
        a_backward_within_the_next_forward,
    )
}
every_way = pytest.mark.parametrize("way", WAYS)


@every_way
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("norm_cache", [True, False], ids=["C kept", "C made again"])
def test_gradients_that_are_added_up_are_the_dense_methods(norm_cache: bool, distribution: str, way: str) -> None:
    model = model_of(distribution, norm_cache)
    for step in range(4):
        model.zero_grad()
        reference = dense_of(model)
        WAYS[way](model)
        WAYS[way](reference)
        assert_gradients_equal(model, reference)
        if step % 2:
            torch.optim.SGD(parameters(model).values(), lr=0.01).step()


@every_way
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("detach_norm", [True, False])
def test_of_every_setting(detach_norm: bool, direction: str, way: str) -> None:
    model = model_of(direction=direction, detach_norm=detach_norm, alpha=5.0)
    for _ in range(3):
        model.zero_grad()
        reference = dense_of(model)
        WAYS[way](model)
        WAYS[way](reference)
        assert_gradients_equal(model, reference)


class Towers(nn.Module):
    """Two ways from the inputs that have no layer in common, with the factors of both in one stack."""

    def __init__(self, layers: list[nn.Module], together: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if together:
            add_factor_pass(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.layers[0](x)).sum(), torch.tanh(self.layers[1](x)).square().sum()


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0,), (1,)])
def test_losses_of_disjoint_towers_are_backpropagated_one_after_the_other(order: tuple[int, ...]) -> None:
    model = Towers(layers()[:2])
    for _ in range(3):
        model.zero_grad()
        reference = Towers([DenseDVoRA.of(layer) for layer in model.layers], together=False)
        for each in (model, reference):
            losses = each(x(1))
            for index in order:
                losses[index].backward()
        for index, (layer, dense_layer) in enumerate(zip(model.layers, reference.layers, strict=True)):
            for name in ("magnitude", "lambda_b", "lambda_d"):
                found = getattr(layer, name).grad
                if index in order:
                    assert worst_error(found, getattr(dense_layer, name).grad) < 1e-11
                else:
                    assert found is None or not found.any()


def test_a_tower_that_is_not_used_gets_no_gradient_and_does_not_move() -> None:
    model = Towers(layers()[:2])
    for _ in range(2):
        model.zero_grad()
        model(x(1))[0].backward()
        assert all(vector.grad is None for vector in model.layers[1].vectors)


@pytest.mark.parametrize("ratio", [1e-3, 1e-6])
@every_way
def test_rows_that_the_update_nearly_cancels_have_their_gradients_too(way: str, ratio: float) -> None:
    made = [nearly_cancelled(layer, ratio) for layer in layers()[:1]] + layers()[1:]
    for layer in made:
        layer.adapted.refresh(layer.base_layer.weight)
    model = Passes(made)
    for _ in range(3):
        model.zero_grad()
        reference = dense_of(model)
        WAYS[way](model)
        WAYS[way](reference)
        expected = parameters(reference)
        for name, parameter in parameters(model).items():
            assert worst_error(parameter.grad, expected[name].grad) < 1e-5, name


@pytest.mark.parametrize("ratio", [1e-6, 1.0])
def test_a_layer_that_runs_twice_in_a_pass_may_have_two_backward_passes(ratio: float) -> None:
    layer = nearly_cancelled(layers()[0], ratio)
    layer.adapted.refresh(layer.base_layer.weight)
    model = Towers([layer, layer])
    for _ in range(3):
        model.zero_grad()
        reference = DenseDVoRA.of(layer)
        for each in (model, Towers([reference, reference], together=False)):
            first, second = each(x(1))
            first.backward()
            second.backward()
        for name in ("magnitude", "lambda_b", "lambda_d"):
            assert worst_error(getattr(layer, name).grad, getattr(reference, name).grad) < 1e-5


# What is made once a step.


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    found: Counter[str] = Counter()

    def counted(owner: object, name: str) -> None:
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kw: found.update([name]) or function(*args, **kw))

    for owner in (dense.DenseMatrices, structured.StructuredMatrices):
        counted(owner, "row_dots")
    counted(adapted_weight, "row_factors")
    counted(factor_pass, "row_factors")
    assert gain.row_factors
    return found


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_C_that_is_made_again_is_made_once_a_step(distribution: str, counts: Counter[str]) -> None:
    model = model_of(distribution, norm_cache=False)
    loss(model, 0).backward()
    for _ in range(3):
        torch.optim.SGD(parameters(model).values(), lr=0.01).step()
        counts.clear()
        for seed in range(4):
            loss(model, seed).backward()
        assert counts == {"row_dots": LAYERS, "row_factors": 1}


STEPS: dict[str, Callable[[list[nn.Parameter]], object]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01).step(),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True).step(),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True).step(),
    "by data": lambda p: [each.data.add_(each.grad, alpha=-0.01) for each in p],
    "one value, by data": lambda p: p[-1].data[:1].add_(0.01),
    "NumPy": lambda p: [each.detach().numpy().__imul__(1.01) for each in p],
    "data assigned": lambda p: [setattr(each, "data", each.data - 0.01 * each.grad) for each in p],
    "in place": torch.no_grad()(lambda p: p[0].mul_(1.01)),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kept_graph", [True, False], ids=["while a graph lives", "after backward"])
def test_factors_are_not_reused_after_a_step(kept_graph: bool, step: str, counts: Counter[str]) -> None:
    model, graphs = model_of(), []
    own = list(parameters(model).values())
    for _ in range(4):
        value = loss(model, 1)
        value.backward(retain_graph=kept_graph)
        graphs.append(value)
        STEPS[step](own)
        model.zero_grad()
        reference = dense_of(model)
        counts.clear()
        for each in (model, reference):
            loss(each, 2).backward()
        assert counts["row_factors"] in (1, LAYERS)
        assert_gradients_equal(model, reference)


def test_a_first_forward_keeps_its_gradients_after_a_step() -> None:
    # Both backward passes are of the values that their own forward pass had.
    model = model_of()
    loss(model, 0).backward()
    model.zero_grad()
    reference = dense_of(model)
    first = loss(model, 1)
    loss(model, 2).backward()
    model.zero_grad()
    for parameter in parameters(model).values():
        parameter.data.mul_(1.1)
    loss(model, 3)
    first.backward()
    loss(reference, 1).backward()
    assert_gradients_equal(model, reference)


@torch.no_grad()
def write_base(model: Passes) -> None:
    model.layers[1].base_layer.weight.mul_(1.3)


def replace_base(model: Passes) -> None:
    model.layers[1].base_layer.weight = nn.Parameter(2 * model.layers[1].base_layer.weight.detach(), False)


def freeze(model: Passes) -> None:
    model.layers[1].lambda_b.requires_grad_(False)


def refresh_uncounted(model: Passes) -> None:
    weight = model.layers[1].base_layer.weight
    weight.data.mul_(1.3)
    model.layers[1].adapted.refresh(weight)


@pytest.mark.parametrize("change", [write_base, replace_base, freeze, refresh_uncounted])
def test_factors_are_not_reused_after_a_change_between_accumulated_passes(change: Callable[[Passes], None]) -> None:
    model = model_of()
    for seed in range(2):
        loss(model, seed).backward()
    change(model)
    model.zero_grad()
    reference = dense_of(model)
    for seed in range(2):
        loss(model, seed).backward()
        loss(reference, seed).backward()
    expected = parameters(reference)
    for name, parameter in parameters(model).items():
        if parameter.requires_grad:
            assert worst_error(parameter.grad, expected[name].grad) < 1e-11, name
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("name", ["magnitude", "lambda_b", "lambda_d"])
@pytest.mark.parametrize("way", ["trained from now on", "replaced by its twin"])
def test_gradients_reach_vectors_that_have_come_since_the_last_pass(way: str, name: str) -> None:
    model = model_of()
    layer = model.layers[1]
    getattr(layer, name).requires_grad_(way != "trained from now on")
    for seed in range(2):
        loss(model, seed).backward()
    if way == "trained from now on":
        getattr(layer, name).requires_grad_()
    else:
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach().clone()))
    model.zero_grad()
    reference = dense_of(model)
    for each in (model, reference):
        loss(each, 3).backward()
    assert_gradients_equal(model, reference)


def test_layers_of_the_same_values_are_not_mixed_up() -> None:
    model = Passes([layers()[0] for _ in range(3)])
    every = list(model.layers)
    for used in [(0, 1), (0, 1), (0, 2), (0, 2), (0, 1), (0, 1), (2, 0), (1, 2), (1, 2)]:
        model.layers = nn.ModuleList(every[index] for index in used)
        for layer in every:
            layer.zero_grad()
        reference = dense_of(model)
        for each in (model, reference):
            loss(each, 1).backward()
        assert_gradients_equal(model, reference)
        assert all(v.grad is None for i, layer in enumerate(every) if i not in used for v in layer.vectors)
