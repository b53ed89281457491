"""The forward of a layer, folded and thin, against the dense method: outputs, all gradients, what is kept for them."""

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef

from dvora import DVoRAAdapter, SharedProjections
from dvora import layer as forward
from dvora.factors import FactorPass, Factors, FactorSource, factors_of
from dvora.layer import folds, project, thin_outputs
from dvora.matrices.interface import DISTRIBUTIONS
from dvora.weight import AdaptedWeight
from tests.cases import DIRECTIONS, DTYPES, TOLERANCE, fresh_copy, linear, randn, trained_layer
from tests.census import Census
from tests.reference import DenseDVoRA, worst_error

IN, OUT, RANK = 12, 10, 4
THIN, FOLDED = 3, 40
"""Tokens, by which training is thin or folded."""
LARGEST = int(forward.FOLD_RANK * IN)
"""The rank up to which it folds."""
ROUNDING = {**TOLERANCE, torch.bfloat16: 4e-2, torch.float16: 5e-3}

both = pytest.mark.parametrize("tokens", [THIN, FOLDED], ids=["thin", "folded"])
distributions = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
directions = pytest.mark.parametrize("direction", DIRECTIONS)
bias_or_not = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def is_folded(y: Tensor) -> bool:
    return "_Folded" in type(y.grad_fn).__name__


def inputs(tokens: int, dtype: torch.dtype = torch.float32, width: int = IN) -> Tensor:
    return randn(tokens, width, seed=8, dtype=dtype)


def gradients(layer: DVoRAAdapter, y: Tensor, x: Tensor, d: Tensor, **options: Any) -> dict[str, Tensor]:
    """Those of the inputs and of everything trained, by the reference's names."""
    trained = {n.removeprefix("base_layer."): p for n, p in layer.named_parameters() if p.requires_grad}
    leaves = {"x": x, **trained} if x.requires_grad else trained
    return dict(zip(leaves, torch.autograd.grad(y, [*leaves.values()], d, **options), strict=True))


def assert_as_the_dense_method(layer: DVoRAAdapter, tokens: int, tolerance: float, x_trained: bool = True) -> Tensor:
    dtype = layer.base_layer.weight.dtype
    x = inputs(tokens, dtype, layer.base_layer.in_features).requires_grad_(x_trained)
    d = randn(tokens, layer.base_layer.out_features, seed=9, dtype=dtype)
    dense = DenseDVoRA.of(layer)
    y = layer(x)
    assert y.dtype == dtype
    assert worst_error(y, dense(x)) < tolerance
    expected = dense.gradients(x, d)
    for name, gradient in gradients(layer, y, x, d).items():
        assert worst_error(gradient, expected[name]) < 5 * tolerance, name
    return y


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    distribution=st.sampled_from(DISTRIBUTIONS),
    direction=st.sampled_from(DIRECTIONS),
    bias=st.booleans(),
    detach_norm=st.booleans(),
    alpha=st.floats(0.5, 9),
    x_trained=st.booleans(),
)
def test_outputs_and_gradients_equal_the_dense_method(
    tokens: int, dtype: torch.dtype, distribution: str, x_trained: bool, **options: object
) -> None:
    layer = trained_layer(IN, OUT, RANK, dtype=dtype, shared=SharedProjections(3, distribution), **options)
    y = assert_as_the_dense_method(layer, tokens, 4 * ROUNDING[dtype], x_trained)
    assert is_folded(y) == (tokens == FOLDED and dtype.itemsize >= 4)


@given(
    sizes=st.tuples(st.integers(2, 20), st.integers(1, 20), st.integers(1, 24)),
    tokens=st.integers(1, 40),
    direction=st.sampled_from(DIRECTIONS),
    distribution=st.sampled_from(DISTRIBUTIONS),
)
def test_any_sizes_equal_the_dense_method(
    sizes: tuple[int, int, int], tokens: int, distribution: str, **options: object
) -> None:
    layer = trained_layer(*sizes, dtype=torch.float64, shared=SharedProjections(3, distribution), **options)
    y = assert_as_the_dense_method(layer, tokens, 1e-10)
    enough = tokens >= max(sizes[0], forward.FOLD_TOKENS * sizes[2])
    assert is_folded(y) == (enough and sizes[2] <= forward.FOLD_RANK * sizes[0])


@both
@pytest.mark.parametrize("trained", ["weight and bias", "weight", "bias"])
@directions
def test_a_trained_base_gets_its_gradients(direction: str, trained: str, tokens: int) -> None:
    layer = trained_layer(IN, OUT, RANK, dtype=torch.float64, freeze_base_layer=False, direction=direction)
    for name, parameter in layer.base_layer.named_parameters():
        parameter.requires_grad_(name in trained)
    y = assert_as_the_dense_method(layer, tokens, 1e-12)
    assert is_folded(y) == (tokens == FOLDED and trained == "bias")


@both
@directions
@pytest.mark.parametrize("zero", [[0, 3], [*range(OUT)]], ids=["two", "all"])
def test_zero_rows_equal_the_dense_method(zero: list[int], direction: str, tokens: int) -> None:
    layer = trained_layer(IN, OUT, RANK, dtype=torch.float64, direction=direction, alpha=2)
    with torch.no_grad():
        layer.base_layer.weight[zero] = 0
    assert_as_the_dense_method(layer, tokens, 1e-12)


@both
@distributions
def test_every_call_gives_the_same_bits(distribution: str, tokens: int) -> None:
    layer, x = trained_layer(IN, OUT, RANK, shared=SharedProjections(3, distribution)), inputs(tokens)
    d = randn(tokens, OUT, seed=9)
    first, again = ([layer(x), *gradients(layer, layer(x), x, d).values()] for _ in range(2))
    assert all(map(torch.equal, first, again))
    with torch.no_grad():
        evaluated = layer(x)
        assert torch.equal(layer.eval()(x), evaluated)
    with torch.inference_mode():
        assert torch.equal(layer(x), evaluated)
    if tokens == THIN:
        assert torch.equal(first[0], evaluated)
    torch.testing.assert_close(first[0], evaluated)


@both
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_only_products_of_tokens_are_in_half_precision(half: torch.dtype, tokens: int) -> None:
    layer, d = trained_layer(IN, OUT, RANK), randn(tokens, OUT, seed=9)
    expected, reference = DenseDVoRA.of(layer).gradients(inputs(tokens), d), DenseDVoRA.of(layer)(inputs(tokens))
    found = []
    for within in (True, False):
        x = inputs(tokens).requires_grad_()
        with torch.autocast("cpu", half):
            y = layer(x)
            assert is_folded(y) == (tokens == FOLDED)
            assert y.dtype == half
            if within:
                found.append(gradients(layer, y, x, d.to(half)))
        if not within:
            found.append(gradients(layer, y, x, d.to(half)))
    assert worst_error(y, reference) < ROUNDING[half]
    for name, gradient in found[0].items():
        assert gradient.dtype == torch.float32
        assert worst_error(gradient, expected[name]) < 3 * ROUNDING[half], name
        assert torch.equal(gradient, found[1][name]), name


@both
def test_a_backward_pass_under_autocast_is_in_the_dtype_of_its_forward_pass(tokens: int) -> None:
    # Of the vectors: the gradient of x comes from PyTorch's products.
    layer, x, d = trained_layer(IN, OUT, RANK), inputs(tokens), randn(tokens, OUT, seed=9)
    expected, y = gradients(layer, layer(x), x, d), layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, gradients(layer, y, x, d).values(), expected.values()))


# One computation or the other.


class Subclass(nn.Linear):
    """Another class with the same forward."""


def set_forward(base: nn.Linear) -> None:
    plain = base.forward
    base.forward = lambda x: plain(x)


DECIDED: dict[str, tuple[bool, Callable[[DVoRAAdapter], object]]] = {
    "nothing": (True, lambda layer: None),
    "a trained bias": (True, lambda layer: layer.base_layer.bias.requires_grad_()),
    "a frozen vector": (True, lambda layer: layer.magnitude.requires_grad_(False)),
    "a hook of the adapter": (True, lambda layer: layer.register_forward_hook(lambda *_: None)),
    "frozen vectors": (False, lambda layer: layer.requires_grad_(False)),
    "a trained weight": (False, lambda layer: layer.base_layer.weight.requires_grad_()),
    "a forward hook": (False, lambda layer: layer.base_layer.register_forward_hook(lambda *_: None)),
    "a forward pre-hook": (False, lambda layer: layer.base_layer.register_forward_pre_hook(lambda *_: None)),
    "a backward hook": (False, lambda layer: layer.base_layer.register_full_backward_hook(lambda *_: None)),
    "a backward pre-hook": (False, lambda layer: layer.base_layer.register_full_backward_pre_hook(lambda *_: None)),
    "a forward of its own": (False, lambda layer: set_forward(layer.base_layer)),
    "a subclass": (False, lambda layer: setattr(layer.base_layer, "__class__", Subclass)),
    "a parametrization": (False, lambda layer: nn.utils.parametrizations.weight_norm(layer.base_layer)),
    "half precision": (False, lambda layer: layer.to(torch.bfloat16)),
    "a gain near zero": (False, lambda layer: layer.magnitude.data[3].mul_(1e-3)),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("case", DECIDED)
def test_a_layer_folds_where_its_weight_is_plain_and_frozen(case: str) -> None:
    folded, change = DECIDED[case]
    layer = trained_layer(IN, OUT, RANK)
    change(layer)
    x = inputs(FOLDED, layer.base_layer.weight.dtype).requires_grad_()
    y = layer(x)
    assert ("_Folded" in str(_nodes(y))) == folded
    assert worst_error(y, DenseDVoRA.of(layer)(x)) < ROUNDING[y.dtype]


def _nodes(y: Tensor) -> list[str]:
    """The names of the last steps of a graph."""
    names, node = [], y.grad_fn
    while node is not None and len(names) < 4:
        names.append(type(node).__name__)
        node = node.next_functions[0][0] if node.next_functions else None
    return names


def test_a_hook_of_all_modules_sees_the_base() -> None:
    seen: list[nn.Module] = []
    layer = trained_layer(IN, OUT, RANK)
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    layer(inputs(FOLDED))
    hook.remove()
    assert layer.base_layer in seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_layer_folds_in_training_and_for_inputs_of_its_dtype_only(mode: Callable[[], Any]) -> None:
    layer = trained_layer(IN, OUT, RANK)
    source = FactorSource(layer.adapted, layer.vectors)
    x, weight, factors = inputs(FOLDED), layer.base_layer.weight, factors_of(source, layer.base_layer.weight)
    assert folds(layer.base_layer, x, layer.adapted, factors)
    assert not folds(layer.base_layer, x.double(), layer.adapted, factors)
    with torch.autocast("cpu", torch.bfloat16):
        assert folds(layer.base_layer, x.bfloat16(), layer.adapted, factors)
    with mode():
        assert not folds(layer.base_layer, x, layer.adapted, factors_of(source, weight))


# Rows of a batch with an adapter each.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 7), (5, 2, 3), (5, 0)], ids=str)
@given(bias=st.booleans(), distribution=st.sampled_from(DISTRIBUTIONS))
def test_each_row_of_a_batch_gets_what_it_gets_alone(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool, distribution: str
) -> None:
    base = linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    adapted = AdaptedWeight(base.weight, RANK, shared=SharedProjections(3, distribution))
    wide, index = adapted.w.dtype, torch.tensor([2, 0, 2, 1, 2])
    values = (0.3 * randn(3, 2 * OUT + RANK, seed=1, dtype=wide)).requires_grad_()
    x = randn(*shape, IN, seed=8, dtype=dtype).requires_grad_()
    d = randn(*shape, OUT, seed=9, dtype=dtype)

    def outputs(x: Tensor, factors: Factors) -> Tensor:
        return thin_outputs(base(x), x, adapted, factors, base.bias)

    y = outputs(x, Factors.of_rows(values[index], RANK, x.dim()))
    ours = torch.autograd.grad(y, [x, values], d)
    gain_minus_one, scale, lambda_d = values.split([OUT, OUT, RANK], -1)
    single = [
        outputs(x[row], Factors(gain_minus_one[i], scale[i], lambda_d[i])) for row, i in enumerate(index.tolist())
    ]
    theirs = torch.autograd.grad(torch.stack(single), [x, values], d)
    for one, other in zip((y, *ours), (torch.stack(single), *theirs), strict=True):
        assert worst_error(one, other.double()) < max(10 * torch.finfo(one.dtype).eps, 1e-6 if wide != dtype else 0)
    with torch.no_grad():
        assert torch.equal(outputs(x, Factors.of_rows(values[index], RANK, x.dim())), y)


# Derivatives.


@distributions
@bias_or_not
@pytest.mark.parametrize("tokens", [2, 8], ids=["thin", "folded"])
def test_derivatives_of_higher_order_equal_finite_differences(tokens: int, bias: bool, distribution: str) -> None:
    layer = trained_layer(4, 3, 1, dtype=torch.float64, shared=SharedProjections(3, distribution), bias=bias)
    if bias:
        layer.base_layer.bias.requires_grad_()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    x = inputs(tokens, torch.float64, 4).requires_grad_()
    assert is_folded(layer(x)) == (tokens == 8)

    def outputs(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(trained, values, strict=True)), x)

    leaves = x, *(p.detach().clone().requires_grad_() for p in trained.values())
    assert torch.autograd.gradcheck(outputs, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(outputs, leaves)


@directions
@both
def test_second_derivatives_with_a_detached_norm_are_those_of_the_dense_method(tokens: int, direction: str) -> None:
    layer = trained_layer(IN, OUT, RANK, dtype=torch.float64, detach_norm=True, direction=direction)
    x, d = inputs(tokens, torch.float64), randn(tokens, OUT, seed=9, dtype=torch.float64)
    dense, second = DenseDVoRA.of(layer), []
    for module in (layer, dense):
        leaves = [module.magnitude, module.lambda_b, module.lambda_d]
        first = torch.autograd.grad(module(x), leaves, d, create_graph=True)
        second.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves))
    for ours, theirs in zip(*second, strict=True):
        assert worst_error(ours, theirs) < 1e-12


# What is kept for the backward pass.


@distributions
@pytest.mark.parametrize(("dtype", "folded"), [(torch.float32, True), (torch.bfloat16, False)], ids=["folded", "thin"])
def test_of_a_pass_outputs_and_z_are_held_and_nothing_after_its_backward_pass(
    dtype: torch.dtype, folded: bool, distribution: str
) -> None:
    # Many tokens, so that nothing else matters beside them.
    tokens, width, out, rank = 4000, 36, 48, 4
    layer = trained_layer(width, out, rank, dtype=dtype, shared=SharedProjections(3, distribution))
    x = inputs(tokens, dtype, width).requires_grad_()
    assert is_folded(layer(x)) == folded

    def loss() -> Tensor:
        # A sum keeps nothing of the outputs, and nobody else the inputs.
        return layer(1 * x).sum()

    # Not in training mode, where the layer keeps its input for the explicit backward pass.
    layer.eval()
    loss().backward()
    with Census() as census:
        made = loss()
        held = sum(census.held())
        made.backward()
        del made
        behind = sum(census.held())
    assert held <= 1.1 * tokens * (out + rank) * dtype.itemsize
    assert behind <= 4 * 8 * out * rank


@both
def test_an_output_that_is_written_to_is_noticed_where_it_is_needed(tokens: int) -> None:
    layer, x = trained_layer(IN, OUT, RANK), inputs(tokens).requires_grad_()
    y = layer(x)
    y.mul_(2)
    if tokens == FOLDED:
        with pytest.raises(RuntimeError, match=r"^Linear\(12, 10\): the layer's output was written to in place"):
            y.sum().backward()
        return
    y.sum().backward()
    other = x.detach().clone().requires_grad_()
    (2 * layer(other)).sum().backward()
    assert torch.equal(x.grad, other.grad)


@pytest.mark.parametrize("hooks", [save_on_cpu, lambda: saved_tensors_hooks(Tensor.clone, Tensor.clone)])
@both
def test_saved_tensors_may_be_moved_away_and_back(tokens: int, hooks: Callable[[], Any]) -> None:
    layer, d = trained_layer(IN, OUT, RANK), randn(tokens, OUT, seed=9)
    x = inputs(tokens).requires_grad_()
    expected = gradients(layer, layer(x), x, d)
    with hooks():
        y = layer(x)
    assert all(map(torch.equal, gradients(layer, y, x, d).values(), expected.values()))


# Siblings, which read the same inputs.


class Siblings(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        shared = SharedProjections(3)
        self.layers = nn.ModuleList(trained_layer(IN, out, RANK, shared=shared, **options) for out in (5, 8, OUT))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


@both
@distributions
def test_siblings_give_what_layers_with_matrices_of_their_own_do(distribution: str, tokens: int) -> None:
    shared = SharedProjections(3, distribution)
    layers = [trained_layer(IN, out, RANK, shared=shared) for out in (5, 8, OUT)]
    alone = [trained_layer(IN, out, RANK, shared=SharedProjections(3, distribution)) for out in (5, 8, OUT)]
    found = []
    for group in (layers, alone):
        x = inputs(tokens).requires_grad_()
        y = torch.cat([layer(1 * x if group is alone else x) for layer in group], -1)
        y.square().sum().backward()
        found.append([y, x.grad, *(v.grad for layer in group for v in layer.vectors)])
    for ours, theirs in zip(*found, strict=True):
        assert worst_error(ours, theirs.double()) < 1e-5


def pair(rank: int = RANK, other_rank: int = RANK, **options: object) -> tuple[AdaptedWeight, AdaptedWeight]:
    shared = SharedProjections(3, **options)
    weight = randn(OUT, IN, seed=1)
    return AdaptedWeight(weight, rank, shared=shared), AdaptedWeight(weight, other_rank, shared=shared)


def assign_data(x: Tensor) -> None:
    x.data = randn(*x.shape, seed=3)


BETWEEN: dict[str, tuple[bool, Callable[[Tensor], Any]]] = {
    "nothing": (True, lambda x: None),
    "a read": (True, lambda x: x.sum()),
    "a write": (False, lambda x: x.add_(1)),
    "data assigned": (False, assign_data),
    "a gradient asked for": (False, lambda x: x.requires_grad_()),
    "another pass": (False, lambda x: FactorPass().begin()),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_siblings_share_z_while_their_inputs_are_the_same(case: str) -> None:
    shared, between = BETWEEN[case]
    first, second = pair()
    x = randn(IN, IN, seed=8)
    z = project(first, x)
    owner = FactorPass()
    if case == "another pass":
        owner.begin()
    else:
        between(x)
    again = project(second, x)
    owner.end()
    assert (again is z) == shared
    torch.testing.assert_close(again, x @ second.A(x).T)


READERS: dict[str, Callable[[AdaptedWeight, AdaptedWeight, Tensor], tuple[Tensor, Tensor]]] = {
    "the same layer": lambda a, b, x: (project(a, x), project(a, x)),
    "another view": lambda a, b, x: (project(a, x), project(b, x[:])),
    "autocast": lambda a, b, x: (project(a, x), _within(torch.autocast("cpu", torch.bfloat16), b, x)),
    "no_grad": lambda a, b, x: (project(a, x.requires_grad_()), _within(torch.no_grad(), b, x)),
    "hooks": lambda a, b, x: (project(a, x), _within(saved_tensors_hooks(lambda t: t, lambda t: t), b, x)),
    "both under hooks": lambda a, b, x: tuple(_within(save_on_cpu(), each, x) for each in (a, b)),
    "other matrices": lambda a, b, x: (project(a, x), project(pair()[1], x)),
    "another rank": lambda a, b, x: (project(a, x), project(AdaptedWeight(x, RANK + 1, shared=a.shared), x)),
    "another thread": lambda a, b, x: (project(a, x), _in_thread(b, x)),
    "inference tensors": lambda a, b, x: tuple(project(each, _inference(x)) for each in (a, b)),
    "vmap": lambda a, b, x: (project(a, x), torch.vmap(lambda row: project(b, row))(x)),
    "not shared": lambda a, b, x: (setattr(a.shared, "share_inputs", False), project(a, x), project(b, x))[1:],
}


def _within(context: AbstractContextManager[object], adapted: AdaptedWeight, x: Tensor) -> Tensor:
    with context:
        return project(adapted, x)


def _in_thread(adapted: AdaptedWeight, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(project, adapted, x).result()


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


@pytest.mark.parametrize("case", READERS)
def test_z_is_shared_with_nobody_else(case: str) -> None:
    first, second = READERS[case](*pair(), randn(IN, IN, seed=8))
    assert first is not second
    if first.shape == second.shape and case != "other matrices":
        torch.testing.assert_close(first, second.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_z_is_freed_with_its_inputs_or_its_graph(requires_grad: bool, leaf: bool) -> None:
    first, _ = pair()
    x = randn(3, IN, seed=8).requires_grad_(requires_grad)
    x = x if leaf else 1 * x
    z = project(first, x)
    of_z, of_x = (StorageWeakRef(t.untyped_storage()) for t in (z, x))
    del z
    if leaf and requires_grad:
        gc.collect()
        assert of_z.expired()
    del x
    gc.collect()
    assert of_z.expired()
    assert of_x.expired()


@both
@pytest.mark.parametrize("training", [True, False])
def test_inputs_of_any_layout_give_the_same(tokens: int, training: bool) -> None:
    layer = trained_layer(IN, OUT, RANK).train(training)
    with torch.no_grad() if not training else nullcontext():
        for x in (
            randn(IN, tokens, seed=0).T,
            randn(tokens, 2 * IN, seed=0)[:, ::2],
            randn(IN, seed=0).expand(tokens, IN),
        ):
            assert not x.is_contiguous()
            torch.testing.assert_close(layer(x), fresh_copy(layer)(x.contiguous()))
            three = x.reshape(1, tokens, IN)
            torch.testing.assert_close(layer(three)[0], layer(x))
