"""The fused combination and its gradients against the formulas in float64, for any shape, dtype and strides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dvora.ops.dtypes import norm_dtype
from tests.cases import DTYPES, randn
from tests.compiled.interpreter import Interpreter, last_rounding

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 200))


def problem(shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> dict[str, Tensor | None]:
    wide = norm_dtype(dtype)
    return {
        "base_output": randn(*shape, seed=1, dtype=dtype),
        "low_rank": randn(*shape, seed=2, dtype=dtype),
        "gain_minus_one": 0.1 * randn(shape[1], seed=3, dtype=wide),
        "scale": randn(shape[1], seed=4, dtype=wide),
        "bias": randn(shape[1], seed=5, dtype=dtype) if bias else None,
    }


def in_float64(arguments: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
    base, low_rank, gain_minus_one, scale, bias = (
        None if tensor is None else tensor.double() for tensor in arguments.values()
    )
    return base, low_rank, gain_minus_one, scale, torch.zeros_like(scale) if bias is None else bias


def assert_rounded_once(result: Tensor, exact: Tensor, size_of_terms: Tensor, terms: int = 4) -> None:
    """The result is off by its own last rounding and by a few roundings of the wide terms, no more."""
    wide = torch.finfo(norm_dtype(result.dtype)).eps * terms * size_of_terms
    last = last_rounding(result.dtype)
    smallest = torch.finfo(result.dtype).smallest_normal * torch.finfo(result.dtype).eps
    assert ((result.double() - exact).abs() <= last * exact.abs() + wide + smallest).all()


@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), bias=st.booleans())
def test_any_shape_equals_the_formula(
    interpreter: Interpreter, shape: tuple[int, int], dtype: torch.dtype, bias: bool
) -> None:
    arguments = problem(shape, dtype, bias)
    y = interpreter("ops.triton.combine", "combine", *arguments.values())
    base, low_rank, gain_minus_one, scale, b = in_float64(arguments)
    terms = gain_minus_one * (base - b), scale * low_rank
    assert y.dtype == dtype
    assert y.shape == shape
    assert_rounded_once(y, base + sum(terms), base.abs() + sum(term.abs() for term in terms) + b.abs())


@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), bias=st.booleans(), low_rank=st.booleans())
def test_any_gradient_equals_the_formula(
    interpreter: Interpreter, shape: tuple[int, int], dtype: torch.dtype, bias: bool, low_rank: bool
) -> None:
    arguments = problem(shape, dtype, bias)
    grad_output = randn(*shape, seed=6, dtype=dtype)
    given_ = arguments if low_rank else arguments | {"low_rank": None}
    ours = interpreter("ops.triton.combine", "combine_backward", grad_output, *given_.values())
    base, z, gain_minus_one, scale, b = in_float64(arguments)
    d = grad_output.double()
    assert ours.base.dtype == ours.scaled.dtype == dtype
    assert ours.gain.dtype == norm_dtype(dtype)
    assert_rounded_once(ours.base, d * (1 + gain_minus_one), d.abs())
    assert_rounded_once(ours.scaled, d * scale, (d * scale).abs())
    assert_rounded_once(ours.gain, (d * (base - b)).sum(0), (d.abs() * (base.abs() + b.abs())).sum(0), 12)
    if not low_rank:
        assert ours.scale is None
        return
    assert ours.scale.dtype == norm_dtype(dtype)
    assert_rounded_once(ours.scale, (d * z).sum(0), (d * z).abs().sum(0), 12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_untrained_layer_returns_the_bits_of_the_base(interpreter: Interpreter, dtype: torch.dtype) -> None:
    arguments = problem((33, 200), dtype, bias=True)
    untrained = arguments | {name: torch.zeros_like(arguments[name]) for name in ("gain_minus_one", "scale")}
    assert torch.equal(interpreter("ops.triton.combine", "combine", *untrained.values()), arguments["base_output"])


@pytest.mark.parametrize("programs", [1, 6], ids=["all tokens in one", "a few tiles each"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sums_over_several_tiles_run_in_a_fixed_order(
    interpreter: Interpreter, dtype: torch.dtype, programs: int
) -> None:
    arguments = problem((103, 150), dtype, bias=True)
    grad_output = randn(103, 150, seed=6, dtype=dtype)
    first, second = (
        interpreter("ops.triton.combine", "combine_backward", grad_output, *arguments.values(), programs)
        for _ in range(2)
    )
    base, z, gain_minus_one, scale, bias = in_float64(arguments)
    d = grad_output.double()
    assert_rounded_once(first.base, d * (1 + gain_minus_one), d.abs())
    assert_rounded_once(first.scaled, d * scale, (d * scale).abs())
    assert_rounded_once(first.gain, (d * (base - bias)).sum(0), (d * (base - bias)).abs().sum(0), 12)
    assert_rounded_once(first.scale, (d * z).sum(0), (d * z).abs().sum(0), 12)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_rows_are_read_where_they_lie(interpreter: Interpreter) -> None:
    arguments = problem((40, 50), torch.bfloat16, bias=True)
    expected = interpreter("ops.triton.combine", "combine", *arguments.values())
    fused = torch.cat([arguments["base_output"], arguments["low_rank"], arguments["low_rank"]], dim=1)
    slices = {"base_output": fused[:, :50], "low_rank": fused[:, 50:100]}
    assert torch.equal(interpreter("ops.triton.combine", "combine", *(arguments | slices).values()), expected)
    columns = {name: arguments[name].T.contiguous().T for name in slices}
    assert torch.equal(interpreter("ops.triton.combine", "combine", *(arguments | columns).values()), expected)


def test_strided_gradients_are_read_where_they_lie(interpreter: Interpreter) -> None:
    arguments = problem((40, 50), torch.float32, bias=False)
    grad_output = randn(1, 50, seed=6)
    fused = torch.cat([arguments["base_output"], arguments["low_rank"]], dim=1)
    slices = {"base_output": fused[:, :50], "low_rank": fused[:, 50:]}
    plain = interpreter(
        "ops.triton.combine", "combine_backward", grad_output.expand(40, 50).contiguous(), *arguments.values()
    )
    # The gradient of a sum has one value for all rows, or for all elements.
    strided = interpreter(
        "ops.triton.combine", "combine_backward", grad_output.expand(40, 50), *(arguments | slices).values()
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))
    ones = interpreter("ops.triton.combine", "combine_backward", torch.ones(()).expand(40, 50), *arguments.values())
    assert torch.equal(ones.base, (1 + arguments["gain_minus_one"]).expand(40, 50))


def test_no_tokens_give_nothing(interpreter: Interpreter) -> None:
    arguments = problem((0, 50), torch.bfloat16, bias=True)
    assert interpreter("ops.triton.combine", "combine", *arguments.values()).shape == (0, 50)
    grad_output = torch.zeros(0, 50, dtype=torch.bfloat16)
    ours = interpreter("ops.triton.combine", "combine_backward", grad_output, *arguments.values())
    assert ours.base.shape == ours.scaled.shape == (0, 50)
    assert torch.equal(ours.gain, torch.zeros(50))
    assert torch.equal(ours.scale, torch.zeros(50))
