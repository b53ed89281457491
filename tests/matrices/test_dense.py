"""The dense matrices' products, against naive ones with matrices made from the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap

from dvora.matrices.dense import DenseMatrices
from tests.cases import DTYPES, randn
from tests.checked import checked
from tests.matrices import naive as definition

SEED = 11

tokens_and_rank = pytest.mark.parametrize(("tokens", "rank"), [(7, 3), (2, 5)], ids=["many tokens", "few tokens"])
shapes = st.tuples(st.lists(st.integers(0, 4), max_size=3).map(tuple), st.integers(1, 9), st.integers(1, 9))


def naive(rank: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """A and B, from the definition, in float64."""
    return definition.dense(SEED, rank, in_features, out_features)


def assert_product(found: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Whether `found` is `a b` but for a few roundings of what is added up."""
    expected, sizes = a.double() @ b, a.double().abs() @ b.abs()
    assert found.dtype == dtype
    assert found.shape == expected.shape
    subnormal = 1e-6 if dtype == torch.float16 else 0.0
    assert ((found.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * sizes + subnormal).all()


@given(
    shape=shapes,
    size=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
)
def test_products_of_any_shape_and_dtype_are_the_naive_ones(
    shape: tuple[tuple[int, ...], int, int], size: int, dtype: torch.dtype
) -> None:
    leading, rank, out = shape
    matrices, (A, B) = checked("matrices.dense").DenseMatrices(SEED), naive(rank, size, out)
    x, z, d = (randn(*leading, width, seed=width, dtype=dtype) for width in (size, rank, out))
    assert_product(matrices.project(x, rank), x, A.T, dtype)
    assert_product(matrices.project_transpose(z, size), z, A, dtype)
    assert_product(matrices.expand(z, out), z, B.T, dtype)
    assert_product(matrices.expand_transpose(d, rank), d, B, dtype)


def test_the_matrices_themselves_are_the_naive_ones() -> None:
    for rank, size in [(1, 1), (3, 8), (9, 4)]:
        matrices, (A, B) = DenseMatrices(SEED), naive(rank, size, size + 1)
        for dtype, tolerance in [(torch.float64, 1e-7), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]:
            for found, expected in [
                (matrices.A(rank, size, dtype), A),
                (matrices.B(rank, size + 1, dtype), B),
                (matrices.gram(rank, size, dtype), A @ A.T),
            ]:
                assert found.dtype == dtype
                torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_A_are_selected(dtype: torch.dtype) -> None:
    A, _ = naive(4, 9, 1)
    matrices = checked("matrices.dense").DenseMatrices(SEED)
    for index in (torch.tensor([[0, 3, 3], [8, 1, 0]]), torch.tensor(5), torch.zeros(0, dtype=torch.long)):
        found = matrices.select(index, 4, 9, dtype)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), A.T[index], rtol=torch.finfo(dtype).eps + 1e-7, atol=0)


@tokens_and_rank
def test_first_and_second_derivatives_are_those_of_the_values(tokens: int, rank: int) -> None:
    matrices = DenseMatrices(SEED)
    x, z, d = (randn(tokens, n, seed=n, dtype=torch.float64).requires_grad_() for n in (6, rank, 4))
    for function, inputs in [
        (lambda x: matrices.project(x, rank), (x,)),
        (lambda z: matrices.project_transpose(z, 6), (z,)),
        (lambda z: matrices.expand(z, 4), (z,)),
        (lambda d: matrices.expand_transpose(d, rank), (d,)),
    ]:
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_matrices_are_constants_that_no_gradient_reaches(dtype: torch.dtype) -> None:
    matrices = DenseMatrices(SEED)
    x = randn(3, 6, seed=0, dtype=dtype).requires_grad_()
    matrices.expand(matrices.project(x, 2), 5).sum().backward()
    assert x.grad.dtype == dtype
    assert not any(buffer.requires_grad for buffer in matrices.buffers())


@pytest.mark.parametrize("enabled", [True, False])
def test_products_under_autocast_have_gradients(enabled: bool) -> None:
    matrices, (A, B) = DenseMatrices(SEED), naive(3, 6, 5)
    x = randn(4, 6, seed=0).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        y = matrices.expand(matrices.project(x, 3), 5)
    grad_output = randn(4, 5, seed=1)
    y.float().backward(grad_output)
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad.double(), grad_output.double() @ B @ A, rtol=0.02, atol=0.1 if enabled else 1e-5)


def test_wide_float16_products_do_not_overflow() -> None:
    matrices, n = DenseMatrices(SEED), 1024
    (A, B), half = naive(n, n, n), torch.float16
    # The unscaled sums are beyond float16, about 100 n / 2.
    for found, row in (
        (matrices.project(100 * A[0].sign().to(half), n)[0], A[0]),
        (matrices.project_transpose(100 * A[:, 0].sign().to(half), n)[0], A[:, 0]),
        (matrices.expand(100 * B[0].sign().to(half), n)[0], B[0]),
        (matrices.expand_transpose(100 * B[:, 0].sign().to(half), n)[0], B[:, 0]),
    ):
        assert float(found) == pytest.approx(100 * float(row.abs().sum()), rel=3e-3)


def every_product(matrices: DenseMatrices, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    z = matrices.project(x, 3)
    y = scale * matrices.expand(z, 5)
    h = matrices.expand_transpose(y * scale, 3)
    layers = h.reshape(-1, 3)
    squares = matrices.row_squares(layers[0], 6, 5), matrices.row_squares(layers, 6, 5)
    return z, y, h, matrices.project_transpose(h, 6), *squares


def test_products_are_one_graph() -> None:
    torch.compiler.reset()
    matrices = DenseMatrices(SEED)
    matrices.reserve(3, 6, 5, torch.float32)
    compiled = torch.compile(every_product, fullgraph=True, backend="aot_eager")
    for x in (randn(4, 6, seed=0), randn(2, 1, 6, seed=1).requires_grad_()):
        scale = randn(5, seed=2)
        for ours, expected in zip(compiled(matrices, x, scale), every_product(matrices, x, scale), strict=True):
            torch.testing.assert_close(ours, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("tokens", [(4,), (2, 4)], ids=str)
def test_products_of_a_batch_under_vmap_are_those_of_its_elements(tokens: tuple[int, ...]) -> None:
    matrices = DenseMatrices(SEED)
    x, scale = randn(3, *tokens, 6, seed=0, dtype=torch.float64), randn(3, 5, seed=1, dtype=torch.float64)
    batched = vmap(lambda x, scale: every_product(matrices, x, scale))(x, scale)
    single = [every_product(matrices, *element) for element in zip(x, scale, strict=True)]
    for ours, expected in zip(batched, map(torch.stack, zip(*single, strict=True)), strict=True):
        torch.testing.assert_close(ours, expected)
