"""The fused Kronecker product against the dense product in float64, for any factors, dtype and scales."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import randn
from tests.compiled.interpreter import Interpreter, last_rounding

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TYPICAL = [
    pytest.param((16, 44), (16, 64), id="2816 -> 256"),
    pytest.param((44, 16), (64, 16), id="256 -> 2816"),
    pytest.param((4, 24), (4, 24), id="576 -> 16"),
    pytest.param((70, 20), (33, 40), id="several blocks of rows of left"),
    pytest.param((1, 1), (3, 101), id="a prime width"),
    pytest.param((1, 1), (1, 1), id="single values"),
]
"""Shapes of left, (r1, n1), and of right, (r2, n2)."""


def factors(left: tuple[int, int], right: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return randn(*left, seed=1, dtype=dtype) / left[1] ** 0.5, randn(*right, seed=2, dtype=dtype) / right[1] ** 0.5


def assert_close_to_dense(
    y: Tensor, x: Tensor, left: Tensor, right: Tensor, in_scale: Tensor | None, out_scale: Tensor | None
) -> None:
    """Off by the last rounding and by a few roundings of the operands, relative to the sizes of the summed terms."""
    matrix = torch.kron(left.double(), right.double())
    if in_scale is not None:
        matrix = matrix * in_scale.double()
    if out_scale is not None:
        matrix = matrix * out_scale.double()[:, None]
    exact, size = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
    if y.dtype == torch.float32:
        allowed = (left.shape[1] + right.shape[1] + 4) * 2**-24 * size
    else:
        # Four operands of TF32, each rounded to nearest: x * in_scale, right, what lies between, left.
        allowed = last_rounding(y.dtype) * exact.abs() + 4.01 * 2**-11 * size
    # The smallest float16 values are evenly spaced.
    assert ((y.double() - exact).abs() <= allowed + 2**-24).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["no scales", "both scales"])
@pytest.mark.parametrize(("left", "right"), TYPICAL)
def test_typical_factors_equal_the_dense_product(
    interpreter: Interpreter, left: tuple[int, int], right: tuple[int, int], scaled: bool, dtype: torch.dtype
) -> None:
    L, R = factors(left, right)
    x = randn(5, left[1] * right[1], seed=3, dtype=dtype)
    scales = randn(x.shape[1], seed=4), randn(left[0] * right[0], seed=5)
    arguments = x, L, R, *(scales if scaled else (None, None))
    y = interpreter("ops.triton.kronecker", "kronecker", *arguments)
    assert y.dtype == dtype
    assert_close_to_dense(y, *arguments)


@given(
    left=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    right=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    tokens=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    scaled=st.tuples(st.booleans(), st.booleans()),
)
def test_any_factors_equal_the_dense_product(
    interpreter: Interpreter,
    left: tuple[int, int],
    right: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    scaled: tuple[bool, bool],
) -> None:
    L, R = factors(left, right, dtype)
    x = randn(tokens, left[1] * right[1], seed=3, dtype=dtype)
    in_scale = randn(x.shape[1], seed=4) if scaled[0] else None
    out_scale = randn(left[0] * right[0], seed=5) if scaled[1] else None
    y = interpreter("ops.triton.kronecker", "kronecker", x, L, R, in_scale, out_scale)
    assert y.dtype == dtype
    assert y.shape == (tokens, left[0] * right[0])
    assert_close_to_dense(y, x, L, R, in_scale, out_scale)


def test_half_precision_does_not_overflow_between_the_products(interpreter: Interpreter) -> None:
    x = torch.full((2, 16 * 16), 60000.0, dtype=torch.float16)
    right = torch.ones(16, 16)
    left = torch.full((16, 16), 1 / 512)
    y = interpreter("ops.triton.kronecker", "kronecker", x, left, right, None, None)
    assert torch.isinf(60000.0 * right.half() @ right.half()).all(), "what lies between does not fit into float16"
    assert torch.equal(y, torch.full_like(y, 60000.0 * 16 * 16 / 512))


def test_operands_are_rounded_to_nearest_not_cut_off(interpreter: Interpreter) -> None:
    L, R = factors((16, 16), (16, 16))
    x = randn(64, 256, seed=3, dtype=torch.float16)
    exact = x.double() @ torch.kron(L.double(), R.double()).T
    y = interpreter("ops.triton.kronecker", "kronecker", x, L, R, None, None).double()
    shrunk = 1 - (y * exact).sum() / exact.square().sum()
    assert shrunk.abs() < 2e-4, "cut-off operands shrink the result by 3e-4 each"


def test_signs_may_be_integers(interpreter: Interpreter) -> None:
    L, R = factors((3, 6), (5, 7))
    x = randn(4, 42, seed=3)
    signs = randn(42, seed=4).sign(), randn(15, seed=5).sign()
    floats = interpreter("ops.triton.kronecker", "kronecker", x, L, R, *signs)
    integers = interpreter("ops.triton.kronecker", "kronecker", x, L, R, *(s.to(torch.int8) for s in signs))
    assert torch.equal(floats, integers)


def test_strided_rows_and_factors_are_taken(interpreter: Interpreter) -> None:
    L, R = factors((3, 6), (5, 7))
    x = randn(20, 42, seed=3)
    plain = interpreter("ops.triton.kronecker", "kronecker", x, L, R, None, None)
    wide = torch.cat([x, x], dim=1)[:, :42]
    turned = (x.T.contiguous().T, L.T.contiguous().T, R.T.contiguous().T)
    assert torch.equal(interpreter("ops.triton.kronecker", "kronecker", wide, L, R, None, None), plain)
    assert torch.equal(interpreter("ops.triton.kronecker", "kronecker", *turned, None, None), plain)


def test_no_tokens_give_nothing(interpreter: Interpreter) -> None:
    L, R = factors((3, 6), (5, 7))
    assert interpreter("ops.triton.kronecker", "kronecker", torch.zeros(0, 42), L, R, None, None).shape == (0, 15)


@pytest.mark.parametrize(
    ("left", "right", "dtype", "expected"),
    [
        ((16, 64), (16, 64), torch.bfloat16, True),
        ((64, 112), (64, 128), torch.bfloat16, True),
        ((1, 1), (3, 1009), torch.bfloat16, False),
        ((64, 256), (64, 256), torch.float16, False),
        ((16, 64), (16, 64), torch.float64, False),
        ((0, 64), (16, 64), torch.float32, False),
    ],
)
def test_unsupported_sizes_are_reported_and_refused(
    interpreter: Interpreter, left: tuple[int, int], right: tuple[int, int], dtype: torch.dtype, expected: bool
) -> None:
    assert interpreter("ops.triton.kronecker", "supports", left, right, dtype) is expected
    if not expected:
        x = torch.zeros(1, left[1] * right[1], dtype=dtype)
        with pytest.raises(ValueError, match="ask `supports` first"):
            interpreter("ops.triton.kronecker", "kronecker", x, torch.zeros(left), torch.zeros(right), None, None)


def test_rows_of_another_width_are_refused(interpreter: Interpreter) -> None:
    with pytest.raises(ValueError, match=r"6 \* 7 = 42 columns for these factors, got 41"):
        interpreter("ops.triton.kronecker", "kronecker", torch.zeros(4, 41), *factors((3, 6), (5, 7)), None, None)
