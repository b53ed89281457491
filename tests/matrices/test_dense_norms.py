"""What dense matrices know of row norms, against the dense rows in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from dvora.matrices import dense
from dvora.matrices.dense import DenseMatrices
from tests.cases import TOLERANCE, randn
from tests.checked import checked
from tests.matrices import naive
from tests.reference import worst_error

DTYPES = [torch.float64, torch.float32]
RANKS = [1, 5, 39, 40, 41, 96, 200, 201]
"""Below and above the inputs of the layers, from which rank on the products are others."""

both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Rows:
    """`B diag(lambda_d) A` for one size, dense, and what belongs to it."""

    def __init__(self, rank: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        self.matrices = checked("matrices.dense").DenseMatrices(5)
        self.A = self.matrices.A(rank, in_features, torch.float64)
        self.B = self.matrices.B(rank, out_features, torch.float64)
        self.lambda_d, self.v = randn(rank, seed=0, dtype=dtype), randn(out_features, seed=1, dtype=dtype)
        self.weight = randn(out_features, in_features, seed=2, dtype=dtype)
        self.sizes = in_features, out_features
        self.wide = self.lambda_d.double().requires_grad_()

    def update(self) -> Tensor:
        return (self.B * self.wide) @ self.A

    def assert_squares(self, tolerance: float) -> None:
        expected = self.update().square().sum(1)
        (gradient,) = torch.autograd.grad(expected, self.wide, self.v.double())
        # While nothing is recorded the same is done in memory that is used again.
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded):
                squares = self.matrices.row_squares(self.lambda_d, *self.sizes)
                found = 2 * self.matrices.row_squares_half_gradient(self.v, self.lambda_d, self.sizes[0])
            assert worst_error(squares, expected) < tolerance
            assert worst_error(found, gradient) < tolerance
            if (half_dq := self.matrices.half_dq(self.lambda_d, *self.sizes)) is not None:
                assert worst_error(self.lambda_d @ half_dq, expected) < tolerance
                assert worst_error(2 * half_dq @ self.v, gradient) < tolerance
            assert found.dtype == self.lambda_d.dtype

    def assert_dots(self, tolerance: float) -> None:
        expected = (self.weight.double() * self.update()).sum(1)
        (gradient,) = torch.autograd.grad(expected, self.wide, self.v.double())
        assert worst_error(self.matrices.row_dots(self.weight, self.lambda_d), expected) < tolerance
        found = self.matrices.row_dots_gradient(self.weight, self.v, len(self.lambda_d))
        assert worst_error(found, gradient) < tolerance
        assert found.dtype == self.lambda_d.dtype


@both_dtypes
@pytest.mark.parametrize("in_features", [40, 200], ids=lambda size: f"{size} inputs")
@pytest.mark.parametrize("rank", RANKS)
def test_row_squares_and_their_gradient_are_those_of_the_dense_rows(
    rank: int, in_features: int, dtype: torch.dtype
) -> None:
    Rows(rank, in_features, 30, dtype).assert_squares(TOLERANCE[dtype])


@given(
    shape=st.tuples(st.integers(1, 80), st.integers(1, 12), st.integers(2, 9)),
)
def test_row_squares_and_dots_of_any_shape(shape: tuple[int, int, int]) -> None:
    rows = Rows(*shape, torch.float64)
    rows.assert_squares(1e-12)
    rows.assert_dots(1e-11)


@both_dtypes
@pytest.mark.parametrize("rank", [1, 9, 70])
def test_row_dots_and_their_gradient_are_those_of_the_dense_rows(
    rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chunk_values in (2**18, 7 * 20, 1):
        monkeypatch.setattr(checked("matrices.dense"), "_CHUNK_VALUES", chunk_values)
        Rows(rank, 20, 30, dtype).assert_dots(TOLERANCE[dtype])


def test_row_dots_of_a_weight_in_half_precision_are_summed_in_float32() -> None:
    rows = Rows(4, 300, 20, torch.float32)
    rows.weight = rows.weight.bfloat16()
    rows.assert_dots(1e-5)


def test_a_gradient_of_outputs_with_zeros_alone_is_zero() -> None:
    rows = Rows(70, 20, 30, torch.float64)
    rows.v.zero_()
    assert not rows.matrices.row_squares_half_gradient(rows.v, rows.lambda_d, 20).any()
    assert not rows.matrices.row_dots_gradient(rows.weight, rows.v, 70).any()


def multiplications(function: Callable[[], object]) -> int:
    """Multiply-adds of matrix products."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


def test_the_squares_and_their_gradient_take_a_product_with_G_each() -> None:
    matrices, lambda_d, v, limit = DenseMatrices(5), randn(128, seed=0), randn(50, seed=1), 128 * 128 * 50
    matrices.reserve(128, 200, 50, torch.float32)
    assert multiplications(lambda: matrices.row_squares(lambda_d, 200, 50)) <= 1.01 * limit
    assert multiplications(lambda: matrices.row_squares_half_gradient(v, lambda_d, 200)) <= 1.01 * limit


def test_half_dq_of_a_large_layer_is_not_kept() -> None:
    matrices = DenseMatrices(5)
    assert matrices.half_dq(randn(256, seed=0), 8, 3072) is not None
    assert matrices.half_dq(randn(256, seed=0), 8, 3073) is None
    assert matrices.half_dq(randn(256, seed=0, dtype=torch.float64), 8, 1537) is None


def test_half_dq_of_many_layers_is_not_kept_where_it_is_large_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = DenseMatrices(5)
    monkeypatch.setattr(dense, "_KEPT_BYTES_OF_ALL", 4 * 7 * 30 * 5)
    assert matrices.half_dq(randn(5, 7, seed=0), 8, 30).shape == (5, 7, 30)
    assert matrices.half_dq(randn(6, 7, seed=0), 8, 30) is None
    assert matrices.half_dq(randn(5, 7, seed=0), 8, 31) is None
    assert matrices.half_dq(randn(3, 7, seed=0, dtype=torch.float64), 8, 30) is None


@pytest.mark.parametrize("rank", [3, 66])
def test_first_and_second_derivatives_are_those_of_the_values(rank: int) -> None:
    matrices = DenseMatrices(5)
    lambda_d, v = (randn(n, seed=n, dtype=torch.float64).requires_grad_() for n in (rank, 4))
    weight = randn(4, 6, seed=0, dtype=torch.float64)
    for function, inputs in [
        (lambda lambda_d: matrices.row_squares(lambda_d, 6, 4), (lambda_d,)),
        (lambda v, lambda_d: matrices.row_squares_half_gradient(v, lambda_d, 6), (v, lambda_d)),
        (lambda lambda_d: matrices.row_squares(torch.stack([lambda_d, 2 * lambda_d]), 6, 4), (lambda_d,)),
        (lambda lambda_d: matrices.row_dots(weight, lambda_d), (lambda_d,)),
        (lambda v: matrices.row_dots_gradient(weight, v, rank), (v,)),
    ]:
        assert gradcheck(function, inputs, fast_mode=rank > 10)
        assert gradgradcheck(function, inputs, fast_mode=rank > 10)


def test_G_is_kept_for_every_size_and_dtype() -> None:
    matrices = DenseMatrices(5)
    for rank, size, dtype in [
        (3, 6, torch.float64),
        (3, 6, torch.float32),
        (2, 6, torch.float32),
        (3, 5, torch.float32),
    ]:
        A = matrices.A(rank, size, torch.float64)
        G = matrices.gram(rank, size, dtype)
        assert G.dtype == dtype
        assert worst_error(G, A @ A.T) < torch.finfo(dtype).eps * 4
        kept = {name: id(buffer) for name, buffer in matrices.named_buffers()}
        assert torch.equal(matrices.gram(rank, size, dtype), G)
        assert {name: id(buffer) for name, buffer in matrices.named_buffers()} == kept


@both_dtypes
@pytest.mark.parametrize("chunk_values", [2**18, 2 * 41 * 30, 1], ids=["at once", "two at a time", "one by one"])
@pytest.mark.parametrize("in_features", [40, 200], ids=lambda size: f"{size} inputs")
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_row_squares_of_several_layers_are_those_of_the_dense_rows(
    layers: int, in_features: int, chunk_values: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked("matrices.dense"), "_CHUNK_VALUES", chunk_values)
    matrices = checked("matrices.dense").DenseMatrices(5)
    rank, out_features = 41, 30
    lambda_d, v = randn(layers, rank, seed=0, dtype=dtype), randn(layers, out_features, seed=1, dtype=dtype)
    A, B = naive.dense(5, rank, in_features, out_features)
    wide = lambda_d.double().requires_grad_()
    expected = ((B * wide[:, None]) @ A).square().sum(2)
    (gradient,) = torch.autograd.grad(expected, wide, v.double())
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            squares = matrices.row_squares(lambda_d, in_features, out_features)
            half = matrices.row_squares_half_gradient(v, lambda_d, in_features)
            half_dq = matrices.half_dq(lambda_d, in_features, out_features)
            matrices.row_squares(2 * lambda_d, in_features, out_features)
        assert squares.dtype == half.dtype == half_dq.dtype == dtype
        for layer in range(layers):
            assert worst_error(squares[layer], expected[layer]) < TOLERANCE[dtype]
            assert worst_error(2 * half[layer], gradient[layer]) < TOLERANCE[dtype]
            # What is kept is not overwritten by what follows.
            assert worst_error(lambda_d[layer] @ half_dq[layer], expected[layer]) < TOLERANCE[dtype]
            assert worst_error(2 * half_dq[layer] @ v[layer], gradient[layer]) < TOLERANCE[dtype]


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(2, 9)),
    layers=st.integers(1, 4),
    chunk_values=st.sampled_from([1, 100, 2**18]),
)
def test_row_squares_of_any_shape_and_number_of_layers_are_those_of_each(
    shape: tuple[int, int, int], layers: int, chunk_values: int
) -> None:
    rank, in_features, out_features = shape
    matrices = checked("matrices.dense").DenseMatrices(5)
    lambda_d, v = (randn(layers, n, seed=n, dtype=torch.float64) for n in (rank, out_features))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checked("matrices.dense"), "_CHUNK_VALUES", chunk_values)
        squares = matrices.row_squares(lambda_d, in_features, out_features)
        half = matrices.row_squares_half_gradient(v, lambda_d, in_features)
    for layer in range(layers):
        of_layer = matrices.row_squares(lambda_d[layer], in_features, out_features)
        assert worst_error(squares[layer], of_layer) < 1e-13
        of_layer = matrices.row_squares_half_gradient(v[layer], lambda_d[layer], in_features)
        assert worst_error(half[layer], of_layer) < 1e-13
