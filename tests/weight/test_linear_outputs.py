"""The output of an adapted layer by thin products and its gradients in closed form, against float64 autograd."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from tests.cases import DTYPES, TOLERANCE, randn
from tests.reference import worst_error
from tests.weight.thin_products import KINDS, Operands, adapted_linear, expected_gradients, gradients, operands, plain

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS)
shapes = st.tuples(st.lists(st.integers(0, 4), max_size=3).map(tuple), st.integers(1, 7), st.integers(1, 8))
SMALLEST = {torch.float16: 2e-6}
"""Absolute errors below this are those of values that are subnormal."""


def assert_close(value: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert value.shape == expected.shape
    error = (value.double() - expected).abs()
    assert (error <= bound + SMALLEST.get(value.dtype, 0.0)).all(), float((error / bound).max())


@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([*KINDS]),
    bias=st.booleans(),
    gain_distance=st.sampled_from([3.0, 0.3, 3e-2, 3e-3, 1e-4, 1e-6, 0.0]),
    seed=st.integers(0, 2**20),
)
def test_the_output_of_any_shape_and_dtype_is_rounded_like_one_sum(
    shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype, kind: str, **options: object
) -> None:
    o = operands(*shape, dtype, **options)
    wide = o.map(Tensor.double)
    y, expected = o.combined(kind), plain(wide, kind)
    assert y.dtype == dtype
    change = plain(wide.map(Tensor.abs), kind, sizes=True) - wide.base_output.abs()
    eps = torch.finfo(dtype).eps
    # A wide gain is rounded once and so is the output. In half precision the output alone may be: a gain that was
    # rounded as well would lose its distance from one.
    own = 1.02 * (eps if dtype.itemsize >= 4 else eps / 2) * expected.abs()
    assert_close(y, expected, own + 5 * eps * change)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_kind
def test_a_gain_within_the_rounding_of_half_precision_is_not_lost(kind: str, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    o = operands((3000,), 2, 5, dtype, bias=False, gain_distance=0.0)
    gain_minus_one = torch.tensor([-0.4, -0.2, 0.2, 0.4, 0.6]) * eps
    o = o._replace(scale=torch.zeros(5), gain_minus_one=gain_minus_one)
    y, expected = o.combined(kind), plain(o.map(Tensor.double), kind)
    # Half a step is what rounding y alone may cost; a gain that was rounded first would cost up to a whole one.
    assert_close(y, expected, 0.505 * eps * expected.abs())


@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([*KINDS]),
    bias=st.booleans(),
    gain_distance=st.sampled_from([3.0, 0.3, 1e-4]),
    seed=st.integers(0, 2**20),
)
def test_gradients_of_any_shape_and_dtype_equal_those_of_the_formula(
    shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype, kind: str, **options: object
) -> None:
    o = operands(*shape, dtype, **options).trained()
    grad_output = randn(*o.base_output.shape, seed=99, dtype=dtype)
    expected, sizes = expected_gradients(o, kind, grad_output)
    ours = gradients(o, o.combined(kind), grad_output)
    for name, operand, gradient, exact, size in zip(o._fields, o, ours, expected, sizes, strict=True):
        assert (gradient is None) == (operand is None), name
        if gradient is not None:
            assert gradient.dtype == operand.dtype, name
            assert_close(gradient, exact, 5 * torch.finfo(dtype).eps * size)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@every_kind
@pytest.mark.parametrize("tokens", [(700,), (3, 5)], ids=["more tokens than the rank", "fewer"])
def test_gradients_of_a_larger_layer_equal_those_of_the_formula(
    tokens: tuple[int, ...], kind: str, dtype: torch.dtype
) -> None:
    o = operands(tokens, 16, 900, dtype).trained()
    grad_output = randn(*tokens, 900, seed=99, dtype=dtype)
    expected, _ = expected_gradients(o, kind, grad_output)
    for name, ours, exact in zip(o._fields, gradients(o, o.combined(kind), grad_output), expected, strict=True):
        assert worst_error(ours, exact) < TOLERANCE[dtype], name


@every_kind
@pytest.mark.parametrize("create_graph", [False, True])
def test_any_of_the_operands_may_be_frozen(create_graph: bool, kind: str) -> None:
    o = operands((3,), 2, 5)
    grad_output = randn(3, 5, seed=99, dtype=torch.float64)
    expected, _ = expected_gradients(o, kind, grad_output)
    for wanted in product([True, False], repeat=6):
        if not any(wanted):
            continue
        some = Operands(*(t.detach().clone().requires_grad_(w) for t, w in zip(o, wanted, strict=True)))
        for name, ours, exact in zip(
            o._fields,
            gradients(some, some.combined(kind), grad_output, create_graph=create_graph),
            expected,
            strict=True,
        ):
            assert ours is None or worst_error(ours, exact) < 1e-12, (name, wanted)


@every_dtype
@every_kind
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda grad_output: grad_output.transpose(0, 1).contiguous().transpose(0, 1), id="transposed"),
        pytest.param(lambda grad_output: torch.stack([grad_output, -grad_output], -1)[..., 0], id="strided"),
        pytest.param(lambda grad_output: grad_output[:1, :1].expand_as(grad_output), id="expanded over tokens"),
        pytest.param(lambda grad_output: grad_output[..., :1].expand_as(grad_output), id="expanded over outputs"),
        pytest.param(lambda grad_output: grad_output.new_ones(()).expand_as(grad_output), id="of a sum"),
    ],
)
def test_the_layout_of_the_output_gradient_changes_nothing(layout, kind: str, dtype: torch.dtype) -> None:
    o = operands((4, 3), 2, 6, dtype).trained()
    grad_output = layout(randn(4, 3, 6, seed=99, dtype=dtype))
    assert not grad_output.is_contiguous()
    before = grad_output.clone()
    expected, sizes = expected_gradients(o, kind, grad_output)
    for ours, exact, size in zip(gradients(o, o.combined(kind), grad_output), expected, sizes, strict=True):
        assert_close(ours, exact, 5 * torch.finfo(dtype).eps * size)
    assert torch.equal(grad_output, before)


@every_dtype
@every_kind
def test_the_layout_of_the_operands_changes_nothing(kind: str, dtype: torch.dtype) -> None:
    o = operands((4, 3), 2, 6, dtype)
    strided = Operands(*(torch.stack([t, -t], -1)[..., 0] for t in o))
    torch.testing.assert_close(strided.combined(kind), o.combined(kind))
    grad_output = randn(4, 3, 6, seed=99, dtype=dtype)
    expected, sizes = expected_gradients(o, kind, grad_output)
    leaves = strided.map(lambda t: t.requires_grad_())
    for ours, exact, size in zip(gradients(leaves, leaves.combined(kind), grad_output), expected, sizes, strict=True):
        assert_close(ours, exact, 5 * torch.finfo(dtype).eps * size)


@every_kind
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tokens", [(), (2,), (2, 2)], ids=str)
def test_first_and_second_derivatives_are_those_of_the_values(tokens: tuple[int, ...], bias: bool, kind: str) -> None:
    o = operands(tokens, 3, 4, bias=bias).trained()
    inputs = [t for t in o if t is not None]

    def combined(*given: Tensor) -> Tensor:
        return Operands(*given, *([] if bias else [None])).combined(kind)

    assert gradcheck(combined, inputs, check_batched_grad=True)
    assert gradgradcheck(combined, inputs)


@every_dtype
@every_kind
@pytest.mark.parametrize("change", [nn.ReLU(inplace=True), lambda y: y.mul_(3), lambda y: y.zero_()])
def test_the_caller_may_write_into_the_output(change, kind: str, dtype: torch.dtype) -> None:
    o = operands((5,), 2, 6, dtype).trained()
    grad_output = randn(5, 6, seed=99, dtype=dtype)
    out_of_place = gradients(o, change(o.combined(kind).clone()), grad_output)
    in_place = gradients(o, change(o.combined(kind)), grad_output)
    assert all(torch.equal(ours, expected) for ours, expected in zip(in_place, out_of_place, strict=True))


def test_a_base_output_that_is_written_to_before_the_backward_pass_is_noticed() -> None:
    o = operands((5,), 2, 6).trained()
    base_output = o.base_output * 1
    y = o._replace(base_output=base_output).combined("kaiming_uniform")
    base_output.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_dtype
@every_kind
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tokens", [(), (0,), (9,), (3, 2)], ids=str)
def test_with_and_without_gradients_the_bits_are_the_same(
    tokens: tuple[int, ...], bias: bool, kind: str, dtype: torch.dtype
) -> None:
    o = operands(tokens, 3, 7, dtype, bias=bias)
    trained = o.trained().combined(kind)
    assert trained.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = o.combined(kind)
        assert torch.equal(y, trained)
        assert not y.requires_grad


@every_dtype
@every_kind
@pytest.mark.parametrize("gradients", [True, False])
def test_no_operand_is_touched(gradients: bool, kind: str, dtype: torch.dtype) -> None:
    o = operands((9,), 3, 7, dtype)
    before = o.map(Tensor.clone)
    with torch.set_grad_enabled(gradients):
        y = (o.trained() if gradients else o).combined(kind)
    if gradients:
        y.sum().backward()
    y.detach().zero_()
    assert all(torch.equal(now, then) for now, then in zip(o, before, strict=True))


@every_dtype
@every_kind
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_an_untrained_layer_returns_what_its_base_does(bias: bool, kind: str, dtype: torch.dtype) -> None:
    o = operands((50,), 3, 7, dtype, bias=bias, gain_distance=0.0)
    o = o._replace(scale=torch.zeros_like(o.scale))
    assert torch.equal(o.combined(kind), o.base_output)


@every_dtype
@every_kind
@pytest.mark.parametrize("gain_minus_one", [0.0, -0.1, 0.1])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_base_output_that_is_not_finite_stays_what_it_is(
    bias: bool, gain_minus_one: float, kind: str, dtype: torch.dtype
) -> None:
    o = operands((2,), 3, 5, dtype, bias=bias)
    o = o._replace(scale=torch.zeros_like(o.scale), gain_minus_one=torch.full_like(o.scale, gain_minus_one))
    finite = o.combined(kind)
    o.base_output[0, :4] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    y = o.combined(kind)
    assert y[0, :2].tolist() == [math.inf, -math.inf]
    assert y[0, 2].isnan()
    assert torch.equal(y[0, 4], finite[0, 4])
    assert torch.equal(y[1], finite[1])


@pytest.mark.parametrize(("grad_output", "value"), [(1e3, 100.0), (2e-4, 1e-4)], ids=["overflow", "underflow"])
@every_kind
def test_sums_over_tokens_in_float16_are_made_in_float32(grad_output: float, value: float, kind: str) -> None:
    half = torch.float16
    base_output, z = torch.full((64, 4), value, dtype=half), torch.full((64, 2), value, dtype=half)
    lambda_d, gain_minus_one = torch.tensor([1.0, 0.5]), torch.full((4,), 0.01)
    scale = torch.tensor([0.02, 0.01, 0.03, 0.02])
    o = Operands(base_output, z, lambda_d, gain_minus_one, scale, None).trained()
    grad_output = torch.full((64, 4), grad_output, dtype=torch.float16)
    expected, sizes = expected_gradients(o, kind, grad_output)
    ours = gradients(o, o.combined(kind), grad_output)
    for name in ("lambda_d", "gain_minus_one", "scale"):
        # h = (grad_output scale) B itself may be a subnormal value, but nothing may be lost altogether.
        bound = (1e-2 if name != "lambda_d" else 0.1) * getattr(sizes, name)
        assert_close(getattr(ours, name), getattr(expected, name), bound)


def test_a_wrong_shape_is_refused_by_the_checked_copy() -> None:
    o = operands((3,), 2, 5)
    with pytest.raises(TypeCheckError):
        adapted_linear(o.update("kaiming_uniform"), o.base_output[0, 0], o.z, o.bias)
    with pytest.raises(TypeCheckError):
        adapted_linear(o.update("kaiming_uniform"), o.base_output, o.z[:2], o.bias)
