"""Adapted outputs in other passes: what evaluation keeps, batched gradients, no update, tracing, autocast."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dvora import SharedProjections
from tests.cases import DTYPES, TOLERANCE, linear, randn, trained_layer
from tests.checked import checked
from tests.reference import DenseDVoRA, worst_error
from tests.weight.thin_products import (
    KINDS,
    AdaptedWeight,
    F,
    Operands,
    PackedFactors,
    PassFactors,
    Update,
    adapted_linear,
    expected_gradients,
    gradients,
    operands,
    plain,
)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS)
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
few_and_many = pytest.mark.parametrize("tokens", [(2,), (3, 5)], ids=["few tokens", "many tokens"])


@every_dtype
@every_kind
@with_and_without_bias
@few_and_many
def test_what_evaluation_keeps_gives_the_same_bits_for_any_tokens(
    tokens: tuple[int, ...], bias: bool, kind: str, dtype: torch.dtype
) -> None:
    o = operands(tokens, 4, 7, dtype, bias=bias)
    update = o.update(kind, keeps=True)
    for seed in (0, 20, 0):
        other = operands(tokens, 4, 7, dtype, bias=bias, seed=seed)
        with torch.no_grad():
            y = adapted_linear(update, other.base_output, other.z, o.bias)
        expected = other._replace(lambda_d=o.lambda_d, gain_minus_one=o.gain_minus_one, scale=o.scale, bias=o.bias)
        assert torch.equal(y, expected.combined(kind))
    assert len(update.factors.prepared) == 1


@every_kind
@few_and_many
def test_what_evaluation_keeps_follows_the_bias_and_the_dtype_of_tokens(tokens: tuple[int, ...], kind: str) -> None:
    o = operands(tokens, 4, 7, torch.float32)
    update = o.update(kind, keeps=True)

    def assert_as_new(bias: Tensor | None) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            y = adapted_linear(update, o.base_output.to(dtype), o.z.to(dtype), bias)
            new = update._replace(factors=PassFactors(update.factors.packed))
            assert torch.equal(y, adapted_linear(new, o.base_output.to(dtype), o.z.to(dtype), bias))

    with torch.no_grad():
        assert_as_new(o.bias)
        o.bias.mul_(3)
        assert_as_new(o.bias)
        assert_as_new(randn(7, seed=50))
        assert_as_new(None)
        assert_as_new(o.bias)
        with torch.inference_mode():
            bias = o.bias.clone()
            assert_as_new(bias)
            bias.mul_(2)
            assert_as_new(bias)


@every_kind
@few_and_many
def test_what_evaluation_keeps_follows_the_dtype_of_outputs(tokens: tuple[int, ...], kind: str) -> None:
    # A base may compute its outputs in another dtype than the projections have.
    o = operands(tokens, 4, 7, torch.float32)
    update = o.update(kind, keeps=True)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            y = adapted_linear(update, o.base_output.to(dtype), o.z, o.bias)
            new = update._replace(factors=PassFactors(update.factors.packed))
            assert worst_error(y, adapted_linear(new, o.base_output.to(dtype), o.z, o.bias).double()) < 1e-6, dtype


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@every_kind
@with_and_without_bias
@few_and_many
def test_outputs_may_have_another_dtype_than_the_projections(
    tokens: tuple[int, ...], bias: bool, kind: str, half: torch.dtype
) -> None:
    o = operands(tokens, 4, 7, torch.float32, bias=bias)
    for base_output, z in ((o.base_output, o.z.to(half)), (o.base_output.to(half), o.z)):
        mixed = o._replace(base_output=base_output, z=z).trained()
        grad_output = randn(*tokens, 7, seed=99, dtype=base_output.dtype)
        expected, _ = expected_gradients(mixed, kind, grad_output)
        y = mixed.combined(kind)
        assert y.dtype == base_output.dtype
        assert worst_error(y, plain(mixed.map(Tensor.double), kind)) < 2e-2
        with torch.no_grad():
            assert torch.equal(mixed.combined(kind), y)
        for name, operand, ours, theirs in zip(
            o._fields, mixed, gradients(mixed, y, grad_output), expected, strict=True
        ):
            if operand is not None:
                assert ours.dtype == operand.dtype, name
                assert worst_error(ours, theirs) < 2e-2, name


@every_dtype
@every_kind
@with_and_without_bias
@few_and_many
def test_gradients_in_batches_are_those_one_by_one(
    tokens: tuple[int, ...], bias: bool, kind: str, dtype: torch.dtype
) -> None:
    assert_batches_are_single_ones(operands(tokens, 4, 7, dtype, bias=bias).trained(), kind)


@every_kind
def test_gradients_in_batches_of_a_larger_layer_are_those_one_by_one(kind: str) -> None:
    assert_batches_are_single_ones(operands((400,), 4, 600, torch.float32).trained(), kind)


def assert_batches_are_single_ones(o: Operands, kind: str) -> None:
    y, leaves = o.combined(kind), [t for t in o if t is not None]
    batch = randn(3, *y.shape, seed=99, dtype=y.dtype)
    found = torch.autograd.grad(y, leaves, batch, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, leaves, of_y, retain_graph=True) for of_y in batch]
    tolerance = 8 * torch.finfo(y.dtype).eps
    for ours, theirs in zip(found, zip(*single, strict=True), strict=True):
        assert worst_error(ours, torch.stack(theirs).double()) < tolerance * 10


def related(o: Operands) -> Operands:
    """Operands that depend on one another, as the base's outputs do on its bias."""
    base_output = o.base_output if o.bias is None else o.base_output + o.bias
    return o._replace(base_output=base_output, scale=o.scale * o.lambda_d.sum(), z=o.z + o.lambda_d)


@every_kind
@with_and_without_bias
@few_and_many
@pytest.mark.parametrize("graph", ["create_graph", "is_grads_batched"])
def test_operands_may_depend_on_one_another(graph: str, tokens: tuple[int, ...], bias: bool, kind: str) -> None:
    o = operands(tokens, 4, 7, bias=bias).trained()
    leaves, grad_output = [t for t in o if t is not None], randn(*tokens, 7, seed=99, dtype=torch.float64)
    expected = torch.autograd.grad(plain(related(o), kind), leaves, grad_output)
    given_ = grad_output[None] if graph == "is_grads_batched" else grad_output
    found = torch.autograd.grad(related(o).combined(kind), leaves, given_, **{graph: True})
    for name, ours, theirs in zip(
        [n for n, t in zip(o._fields, o, strict=True) if t is not None], found, expected, strict=True
    ):
        assert worst_error(ours.view_as(theirs), theirs) < 1e-12, name


@every_kind
@few_and_many
@pytest.mark.parametrize("graph", ["plain", "create_graph", "is_grads_batched"])
def test_a_trained_base_has_the_gradients_of_the_dense_method(graph: str, tokens: tuple[int, ...], kind: str) -> None:
    shared = SharedProjections(3, kind)
    layer = trained_layer(6, 5, 4, dtype=torch.float64, freeze_base_layer=False, shared=shared)
    x, grad_output = (randn(*tokens, n, seed=n, dtype=torch.float64) for n in (6, 5))
    expected = DenseDVoRA.of(layer).gradients(x, grad_output)
    leaves = {"x": x.requires_grad_(), "weight": layer.base_layer.weight, "bias": layer.base_layer.bias}
    leaves |= layer.vectors._asdict()
    given_ = grad_output[None] if graph == "is_grads_batched" else grad_output
    options = {} if graph == "plain" else {graph: True}
    found = torch.autograd.grad(layer(x), list(leaves.values()), given_, **options)
    for name, gradient in zip(leaves, found, strict=True):
        assert worst_error(gradient.view_as(expected[name]), expected[name]) < 1e-12, name


# Without an update.


@every_dtype
@with_and_without_bias
@pytest.mark.parametrize("tokens", [(), (0,), (3,), (2, 3)], ids=str)
def test_a_layer_with_a_magnitude_alone(tokens: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    o = operands(tokens, 0, 7, dtype, bias=bias)
    o = o._replace(scale=torch.zeros_like(o.scale))
    grad_output = randn(*tokens, 7, seed=99, dtype=dtype)
    for wanted in product([True, False], repeat=2):
        leaves = o._replace(
            base_output=o.base_output.clone().requires_grad_(wanted[0]),
            gain_minus_one=o.gain_minus_one.clone().requires_grad_(wanted[1]),
        )
        y = leaves.combined("kaiming_uniform")
        zero_bias = torch.zeros(7) if o.bias is None else o.bias
        products = o.base_output.double() - zero_bias
        expected = o.base_output + o.gain_minus_one * products
        assert y.dtype == dtype
        assert worst_error(y, expected) < 4 * torch.finfo(dtype).eps
        if not any(wanted):
            continue
        found = iter(torch.autograd.grad(y, [t for t in leaves if t is not None and t.requires_grad], grad_output))
        if wanted[0]:
            assert worst_error(next(found), grad_output * (1 + o.gain_minus_one.double())) < 4 * torch.finfo(dtype).eps
        if wanted[1]:
            exact = (grad_output.double() * products).reshape(-1, 7).sum(0)
            assert worst_error(next(found), exact) < 4 * torch.finfo(o.scale.dtype).eps + 1e-7


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_magnitude_alone_leaves_the_scale_without_a_gradient(create_graph: bool) -> None:
    o = operands((3,), 0, 5).trained()
    (gradient,) = torch.autograd.grad(o.combined("structured").square().sum(), o.scale, create_graph=create_graph)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_higher_derivatives_of_a_layer_with_a_magnitude_alone() -> None:
    o = operands((3,), 0, 5).trained()

    def combined(base_output: Tensor, gain_minus_one: Tensor, bias: Tensor) -> Tensor:
        return o._replace(base_output=base_output, gain_minus_one=gain_minus_one, bias=bias).combined("structured")

    inputs = (o.base_output, o.gain_minus_one, o.bias)
    assert torch.autograd.gradcheck(combined, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(combined, inputs)


# What is kept for the backward pass.


@every_kind
@with_and_without_bias
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [5, 7, 20], ids=["few tokens", "one more than few", "many tokens"])
def test_kept_are_outputs_z_and_vectors(tokens: int, dtype: torch.dtype, bias: bool, kind: str) -> None:
    o = operands((tokens,), 3, 6, dtype, bias=bias).trained()
    kept: list[tuple[int, ...]] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor):
        o.combined(kind)
    # Of few tokens the update too, where that spares a product of the outputs' size.
    update = [(tokens, 6)] if tokens <= 6 and kind == "kaiming_uniform" else []
    assert sorted(kept) == sorted([(tokens, 6), (tokens, 3), (3,), (2, 6), *update, *([(6,)] if bias else [])])


@pytest.mark.parametrize("name", ["z", "lambda_d", "bias"])
def test_an_operand_that_is_written_to_before_the_backward_pass_is_noticed(name: str) -> None:
    o = operands((5,), 2, 6).trained()
    written = getattr(o, name) * 1
    y = o._replace(**{name: written}).combined("kaiming_uniform")
    written.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Tracing and autocast.


@every_dtype
@every_kind
@with_and_without_bias
@few_and_many
def test_traced_outputs_and_gradients_are_those_of_the_formula(
    tokens: tuple[int, ...], bias: bool, kind: str, dtype: torch.dtype
) -> None:
    o = operands(tokens, 4, 7, dtype, bias=bias)
    grad_output = randn(*tokens, 7, seed=99, dtype=dtype)
    expected, sizes = expected_gradients(o.trained(), kind, grad_output)
    o.update(kind)  # its frozen side is kept, and cannot be made within a transform

    def loss(operands: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        y = Operands(*operands, *([] if bias else [None])).combined(kind)
        return (y * grad_output).sum(), y

    found, y = torch.func.grad(loss, has_aux=True)(tuple(t for t in o if t is not None))
    tolerance = TOLERANCE.get(dtype, 2e-2 if dtype == torch.bfloat16 else 2e-3)
    assert y.dtype == dtype
    assert worst_error(y, plain(o.map(Tensor.double), kind)) < tolerance
    for name, ours, theirs, size in zip(o._fields, found, expected, sizes, strict=False):
        assert ((ours - theirs).abs() <= 4 * tolerance * size.max()).all(), name


@given(
    tokens=st.integers(1, 12),
    shape=st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(1, 12)),
    kind=st.sampled_from([*KINDS]),
    bias=st.booleans(),
    half=st.sampled_from([torch.bfloat16, torch.float16]),
    inside=st.booleans(),
)
def test_autocast_of_any_shape_equals_the_dense_method(
    tokens: int, shape: tuple[int, int, int], kind: str, bias: bool, half: torch.dtype, inside: bool
) -> None:
    (in_features, out_features, rank), shared = shape, SharedProjections(3, kind)
    base = linear(in_features, out_features, bias=bias).requires_grad_(False)
    x = randn(tokens, in_features, seed=0).requires_grad_()
    o = operands((tokens,), rank, out_features, torch.float32)
    adapted = checked_weight(base.weight, rank, kind)
    leaves = [t.clone().requires_grad_() for t in (o.lambda_d, o.gain_minus_one, o.scale)]

    def outputs(lambda_d: Tensor, gain_minus_one: Tensor, scale: Tensor) -> Tensor:
        trained = torch.stack([gain_minus_one, scale])
        packed = PackedFactors(trained, torch.stack([1 + gain_minus_one, -gain_minus_one]).detach(), lambda_d)
        vectors = F.Vectors(adapted.w, torch.zeros_like(adapted.w), lambda_d)
        update = Update(adapted, vectors, PassFactors(packed), adapted.matrices)
        return adapted_linear(update, base(x), x, base.bias)

    grad_output = randn(tokens, out_features, seed=99, dtype=half)
    with torch.autocast("cpu", half):
        y = outputs(*leaves)
        found = torch.autograd.grad(y, [x, *leaves], grad_output) if inside else None
    found = found or torch.autograd.grad(y, [x, *leaves], grad_output)
    assert y.dtype == half
    wide = [t.detach().double().requires_grad_() for t in (x, *leaves)]
    given_x, lambda_d, gain_minus_one, scale = wide
    A, B = shared.A(rank, in_features, torch.float64), shared.B(rank, out_features, torch.float64)
    products = given_x @ base.weight.double().T
    b = 0 if base.bias is None else base.bias.double()
    expected = (1 + gain_minus_one) * products + b + scale * ((given_x @ A.T * lambda_d) @ B.T)
    size = products.abs().max() + expected.abs().max() + (given_x.abs() @ A.abs().T * lambda_d.abs() @ B.abs().T).max()
    assert (y - expected).abs().max() < 3e-2 * size
    for ours, theirs, leaf in zip(found, torch.autograd.grad(expected, wide, grad_output.double()), wide, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 5e-2 * (theirs.abs().max() + size * grad_output.abs().sum()), leaf.shape


def checked_weight(weight: Tensor, rank: int, kind: str) -> AdaptedWeight:
    return AdaptedWeight(weight.detach(), rank, shared=checked("matrices.interface").SharedProjections(3, kind))
