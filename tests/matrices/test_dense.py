"""The dense matrices' products, against naive ones with matrices made from the definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap

from dvora.matrices import philox
from dvora.matrices.dense import DenseMatrices
from tests.cases import DTYPES, randn
from tests.checked import checked

SEED = 11

tokens_and_rank = pytest.mark.parametrize(("tokens", "rank"), [(7, 3), (2, 5)], ids=["many tokens", "few tokens"])
shapes = st.tuples(st.lists(st.integers(0, 4), max_size=3).map(tuple), st.integers(1, 9), st.integers(1, 9))


def unscaled(stream: int, rank: int, size: int) -> Tensor:
    """Rows of unit variance, by the definition."""
    rows = [philox.uniform_row(SEED, stream, row, size).astype(float) for row in range(rank)]
    return math.sqrt(3) * torch.from_numpy(np.stack(rows))


def naive(rank: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """A and B, from the definition, in float64."""
    A = unscaled(0, rank, in_features) * math.sqrt(2 / in_features)
    B = unscaled(1, rank, out_features).T * math.sqrt(2 / rank)
    return A, B


def assert_product(found: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> None:
    """Whether `found` is `(a b) * scale` but for a few roundings of what is added up."""
    scale = torch.ones(()) if scale is None else scale
    expected, sizes = (a.double() @ b) * scale, (a.double().abs() @ b.abs()) * scale.abs()
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
    scale = randn(out, seed=4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert_product(matrices.project(x, rank), x, A.T, dtype)
    assert_product(matrices.project_transpose(z, size), z, A, dtype)
    assert_product(matrices.expand(z, out), z, B.T, dtype)
    assert_product(matrices.expand_transpose(d, rank), d, B, dtype)
    assert_product(matrices.expand(z, out, scale), z, B.T, dtype, scale)
    assert_product(matrices.expand_transpose(d, rank, scale), d, scale.double()[:, None] * B, dtype)


@given(
    tokens=st.integers(0, 9),
    rank=st.integers(1, 9),
    out=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
)
def test_row_products_are_the_naive_ones(tokens: int, rank: int, out: int, dtype: torch.dtype) -> None:
    matrices, (_, B) = checked("matrices.dense").DenseMatrices(SEED), naive(rank, 1, out)
    d, z = randn(tokens, out, seed=0, dtype=dtype), randn(tokens, rank, seed=1, dtype=dtype)
    found = matrices.row_products(d, z)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = (d.double() * (z.double() @ B.T)).sum(0)
    sizes = (d.double().abs() * (z.double().abs() @ B.T.abs())).sum(0)
    assert ((found.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * sizes).all()


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
    scale = randn(4, seed=9, dtype=torch.float64).requires_grad_()
    for function, inputs in [
        (lambda x: matrices.project(x, rank), (x,)),
        (lambda z: matrices.project_transpose(z, 6), (z,)),
        (lambda z: matrices.expand(z, 4), (z,)),
        (lambda z, scale: matrices.expand(z, 4, scale), (z, scale)),
        (lambda d: matrices.expand_transpose(d, rank), (d,)),
        (lambda d, scale: matrices.expand_transpose(d, rank, scale), (d, scale)),
        (matrices.row_products, (d, z)),
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
    (A, B), half, ones = naive(n, n, n), torch.float16, torch.ones(n)
    # The unscaled sums are beyond float16, about 100 n / 2.
    for found, row in (
        (matrices.project(100 * A[0].sign().to(half), n)[0], A[0]),
        (matrices.project_transpose(100 * A[:, 0].sign().to(half), n)[0], A[:, 0]),
        (matrices.expand(100 * B[0].sign().to(half), n)[0], B[0]),
        (matrices.expand(100 * B[0].sign().to(half), n, ones)[0], B[0]),
        (matrices.expand_transpose(100 * B[:, 0].sign().to(half), n)[0], B[:, 0]),
        (matrices.expand_transpose(100 * B[:, 0].sign().to(half), n, ones)[0], B[:, 0]),
    ):
        assert float(found) == pytest.approx(100 * float(row.abs().sum()), rel=3e-3)


def test_sums_over_many_float16_tokens_do_not_overflow() -> None:
    matrices, n = DenseMatrices(SEED), 1024
    many = torch.full((n, 1), 10.0, dtype=torch.float16)
    assert float(matrices.row_products(many, many)) == pytest.approx(100 * n * float(naive(1, 1, 1)[1]))


def every_product(matrices: DenseMatrices, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    z = matrices.project(x, 3)
    y = matrices.expand(z, 5, scale)
    h = matrices.expand_transpose(y, 3, scale)
    rows = matrices.row_products(y.reshape(-1, 5), z.reshape(-1, 3))
    return z, y, h, matrices.project_transpose(h, 6), rows, matrices.row_squares(h.reshape(-1, 3)[0], 6, 5)


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


def test_products_of_a_batch_under_vmap_are_those_of_its_elements() -> None:
    matrices = DenseMatrices(SEED)
    x, scale = randn(3, 4, 6, seed=0, dtype=torch.float64), randn(3, 5, seed=1, dtype=torch.float64)
    batched = vmap(lambda x, scale: every_product(matrices, x, scale))(x, scale)
    single = [every_product(matrices, *element) for element in zip(x, scale, strict=True)]
    for ours, expected in zip(batched, map(torch.stack, zip(*single, strict=True)), strict=True):
        torch.testing.assert_close(ours, expected)
