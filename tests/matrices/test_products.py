"""Products, columns and squares of every kind of matrices against dense ones from the definition, in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dvora.matrices import dense
from dvora.matrices.dense import Matrices, Shard
from dvora.matrices.interface import DISTRIBUTION, SharedProjections
from tests.cases import DTYPES, randn
from tests.census import Census
from tests.checked import checked
from tests.matrices import naive
from tests.matrices.naive import VERA
from tests.reference import worst_error

SEED = 3
KINDS = [DISTRIBUTION, VERA]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Beside the largest sum of the absolute values that are added up."""

SIZE = st.integers(1, 40) | st.sampled_from([48, 64, 97, 384])
RANK = st.integers(1, 50) | st.sampled_from([128, 211])
Product = Callable[[Matrices, Tensor], Tensor]


def matrices(kind: str) -> Matrices:
    """With shapes that are checked."""
    return checked("matrices.interface").SharedProjections(SEED, kind).impl


def fitting(kind: str, *sizes: int) -> list[int]:
    """Sizes that matrices of PEFT's VeRA have."""
    return [min(size, most) for size, most in zip(sizes, (40, 48, 48), strict=True)] if kind == VERA else list(sizes)


def products(rank: int, in_features: int, out_features: int) -> dict[str, tuple[Product, int]]:
    return {
        "project": (lambda m, x: m.project(x, rank), in_features),
        "project_transpose": (lambda m, h: m.project_transpose(h, in_features), rank),
        "expand": (lambda m, z: m.expand(z, out_features), rank),
        "expand_transpose": (lambda m, d: m.expand_transpose(d, rank), out_features),
    }


def by_definition(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {"project": A.T, "project_transpose": A, "expand": B.T, "expand_transpose": B}


@given(
    kind=st.sampled_from(KINDS),
    leading=st.lists(st.integers(0, 4), max_size=3),
    sizes=st.tuples(RANK, SIZE, SIZE),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "strided", "permuted"]),
)
def test_products_are_those_with_the_dense_matrices(
    kind: str, leading: list[int], sizes: tuple[int, int, int], dtype: torch.dtype, layout: str
) -> None:
    rank, in_features, out_features = fitting(kind, *sizes)
    ours, reference = matrices(kind), by_definition(*naive.matrices(kind, SEED, rank, in_features, out_features))
    for name, (product, width) in products(rank, in_features, out_features).items():
        x = randn(*leading, 2 * width, seed=width, dtype=dtype)[..., ::2]
        x = {"contiguous": x.contiguous(), "strided": x, "permuted": x.mT.contiguous().mT if leading else x}[layout]
        before, y, M = x.clone(), product(ours, x), reference[name]
        assert y.dtype == dtype, name
        assert y.shape == (*leading, M.shape[1]), name
        assert torch.equal(x, before), name
        terms = x.double().abs() @ M.abs()
        error = (y.double() - x.double() @ M).abs()
        assert not y.numel() or error.max() <= TOLERANCE[dtype] * terms.max() + 1e-7, name


@given(kind=st.sampled_from(KINDS), rank=RANK, size=SIZE, dtype=st.sampled_from(DTYPES))
def test_columns_of_A_are_selected(kind: str, rank: int, size: int, dtype: torch.dtype) -> None:
    rank, size, _ = fitting(kind, rank, size, 1)
    A, _ = naive.matrices(kind, SEED, rank, size, 1)
    for index in (
        torch.arange(size).flip(0)[:, None],
        torch.tensor(size // 2),
        torch.zeros(0, 2, dtype=torch.long),
    ):
        columns = matrices(kind).select(index, rank, size, dtype)
        assert columns.dtype == dtype
        assert columns.shape == (*index.shape, rank)
        torch.testing.assert_close(columns.double(), A.T[index], rtol=torch.finfo(dtype).eps, atol=1e-6)


@given(
    kind=st.sampled_from(KINDS),
    adapters=st.lists(st.integers(1, 3), max_size=1),
    sizes=st.tuples(RANK, SIZE, SIZE),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    at_once=st.sampled_from([0, 2**22]),
)
@example("kaiming_uniform", [2], (211, 36, 384), torch.float32, 0)
def test_squares_and_their_gradient_are_those_of_the_dense_rows(
    kind: str, adapters: list[int], sizes: tuple[int, int, int], dtype: torch.dtype, at_once: int
) -> None:
    rank, in_features, out_features = fitting(kind, *sizes)
    A, B = naive.matrices(kind, SEED, rank, in_features, out_features)
    lambda_d, d_half_q = (randn(*adapters, n, seed=n, dtype=dtype) for n in (rank, out_features))
    expected = squares_and_gradient(A, B, lambda_d.double(), d_half_q.double())
    # The same sums of absolute values: a single row may nearly cancel.
    largest = squares_and_gradient(A.abs(), B.abs(), lambda_d.double().abs(), d_half_q.double().abs())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checked("matrices.dense"), "_AT_ONCE", at_once)
        ours = matrices(kind)
        squares = ours.squares(lambda_d, in_features, out_features)
        gradient = ours.squares_gradient(d_half_q, lambda_d, in_features)
    for value, exact, terms in zip((squares, gradient), expected, largest, strict=True):
        assert value.dtype == dtype
        assert value.shape == exact.shape
        assert not value.numel() or (value.double() - exact).abs().max() <= TOLERANCE[dtype] * terms.max()


def squares_and_gradient(A: Tensor, B: Tensor, lambda_d: Tensor, d_half_q: Tensor) -> tuple[Tensor, Tensor]:
    lambda_d.requires_grad_()
    squares = ((B * lambda_d.unsqueeze(-2)) @ A).square().sum(-1)
    return squares.detach(), *torch.autograd.grad(squares / 2, lambda_d, d_half_q)


@given(
    kind=st.sampled_from(KINDS),
    sizes=st.tuples(RANK, SIZE, SIZE),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_updates_are_those_of_the_dense_matrices(kind: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    rank, in_features, out_features = fitting(kind, *sizes)
    A, B = naive.matrices(kind, SEED, rank, in_features, out_features)
    lambda_d, scale = randn(rank, seed=1, dtype=dtype), randn(out_features, seed=2, dtype=dtype)
    update = (B * lambda_d.double()) @ A
    ours = matrices(kind)
    found = [
        (ours.update(lambda_d, in_features, out_features), update),
        (ours.update(lambda_d, in_features, out_features, scale), scale.double()[:, None] * update),
        (ours.matrix("A", rank, in_features, dtype, torch.device("cpu")), A),
        (ours.matrix("B", rank, out_features, dtype, torch.device("cpu")), B.T),
    ]
    # As large as sums of as many values as are added up.
    terms = rank * float(A.abs().max() * B.abs().max() * lambda_d.abs().max()) * max(1.0, float(scale.abs().max()))
    for value, exact in found:
        assert value.dtype == dtype
        assert value.shape == exact.shape
        assert (value.double() - exact).abs().max() <= TOLERANCE[dtype] * max(float(exact.abs().max()), terms)


def differentiable(rank: int = 5) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """All that has derivatives, on inputs in float64: 6 inputs, 4 outputs, two tokens."""
    ours = SharedProjections(SEED).impl
    ours.reserve(rank, 6, 4, torch.float64)
    cases = {
        name: (lambda x, product=product: product(ours, x), (randn(2, width, seed=width, dtype=torch.float64),))
        for name, (product, width) in products(rank, 6, 4).items()
    }
    lambda_d, d_half_q = (randn(2, n, seed=n, dtype=torch.float64) for n in (rank, 4))
    cases["squares"] = lambda lambda_d: ours.squares(lambda_d, 6, 4), (lambda_d,)
    cases["squares_gradient"] = lambda d, lambda_d: ours.squares_gradient(d, lambda_d, 6), (d_half_q, lambda_d)
    cases["update"] = (
        lambda lambda_d: torch.stack([ours.update(row, 6, 4) for row in lambda_d.view(-1, rank)]).squeeze(0),
        (lambda_d,),
    )
    return cases


# PyTorch's own forward mode uses what PyTorch has deprecated.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@forward_mode
@pytest.mark.parametrize("rank", [5, 9])
def test_derivatives_of_first_and_second_order_and_vmap(rank: int) -> None:
    for function, inputs in differentiable(rank).values():
        torch.testing.assert_close(torch.vmap(function)(*inputs), function(*inputs), rtol=1e-7, atol=1e-8)
        inputs = tuple(x.requires_grad_() for x in inputs)
        assert gradcheck(function, inputs, check_forward_ad=True)
        assert gradgradcheck(function, inputs)


def test_autocast_changes_the_products_no_more_than_those_of_a_linear_layer() -> None:
    ours = SharedProjections(SEED).impl
    A, B = naive.matrices(DISTRIBUTION, SEED, 16, 24, 32)
    x, d_y, lambda_d = randn(5, 24, seed=0).requires_grad_(), randn(5, 32, seed=1), randn(16, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours.expand(ours.project(x, 16), 32)
        wide = ours.project(x.double(), 16)
        squares = ours.squares(lambda_d, 24, 32)
    assert y.dtype == torch.bfloat16
    y.float().backward(d_y)
    assert x.grad.dtype == torch.float32
    assert worst_error(y, x.double() @ A.T @ B.T) < 3e-2
    assert worst_error(x.grad, d_y.double() @ B @ A) < 3e-2
    assert worst_error(wide, x.double() @ A.T) < 1e-12, "nor are products of float64"
    assert worst_error(squares, ours.squares(lambda_d.double(), 24, 32)) < 1e-6, "a norm is never of half precision"


def test_large_values_of_float16_do_not_overflow() -> None:
    ours, n = SharedProjections(SEED).impl, 1024
    A, B = ours.values("A", n, n, torch.float64), ours.values("B", n, n, torch.float64).T
    # The sums of unscaled values would be beyond float16.
    for name, matrix in by_definition(A, B).items():
        product, _ = products(n, n, n)[name]
        x = 100 * matrix[:, 0].sign().half()
        assert float(product(ours, x)[0]) == pytest.approx(100 * float(matrix[:, 0].abs().sum()), rel=3e-3)


SIZES = [(24, 20, 6, 2), (24, 20, 30, 4), (48, 36, 16, 4), (14, 10, 5, 3)]
"""Out, in, rank, parts: even and uneven ones, a rank above both sizes, parts of one size and not."""


def shards(total: int, parts: int) -> list[Shard]:
    size = -(-total // parts)
    return [Shard(start, min(start + size, total), total) for start in range(0, total, size)]


@pytest.mark.parametrize(("out_features", "in_features", "rank", "parts"), SIZES)
def test_products_with_shards_of_the_outputs_make_up_the_whole(
    out_features: int, in_features: int, rank: int, parts: int
) -> None:
    whole, f64 = SharedProjections(SEED).impl, torch.float64
    z, d, x, d_half_q = (randn(5, n, seed=n, dtype=f64) for n in (rank, out_features, in_features, out_features))
    lambda_d, found, back, gradient = randn(5, rank, seed=9, dtype=f64), [], 0, 0
    for shard in shards(out_features, parts):
        part, size = whole.of_shard(None, shard), shard.stop - shard.start
        assert part is not whole
        assert whole.of_shard(None, shard) is part
        found.append(
            (part.values("B", rank, size, f64), part.expand(z, size), part.squares(lambda_d, in_features, size))
        )
        back = back + part.expand_transpose(shard.of(d), rank)
        gradient = gradient + part.squares_gradient(shard.of(d_half_q), lambda_d, in_features)
        assert torch.equal(part.project(x, rank), whole.project(x, rank))
    Bt, expanded, squares = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    assert torch.equal(Bt, whole.values("B", rank, out_features, f64))
    torch.testing.assert_close(expanded, whole.expand(z, out_features))
    torch.testing.assert_close(squares, whole.squares(lambda_d, in_features, out_features))
    torch.testing.assert_close(back, whole.expand_transpose(d, rank))
    torch.testing.assert_close(gradient, whole.squares_gradient(d_half_q, lambda_d, in_features))


@pytest.mark.parametrize(("in_features", "rank", "parts"), [sizes[1:] for sizes in SIZES])
def test_products_with_shards_of_the_inputs_add_up_to_the_whole(in_features: int, rank: int, parts: int) -> None:
    whole, f64 = SharedProjections(SEED).impl, torch.float64
    x, h = (randn(5, n, seed=n, dtype=f64) for n in (in_features, rank))
    A, z, back = whole.values("A", rank, in_features, f64), 0, []
    for shard in shards(in_features, parts):
        part, size = whole.of_shard(shard, None), shard.stop - shard.start
        z = z + part.project(shard.of(x), rank)
        back.append(part.project_transpose(h, size))
        assert torch.equal(part.values("A", rank, size, f64), shard.of(A))
        assert torch.equal(part.select(torch.arange(size), rank, size, f64), shard.of(A).T)
    torch.testing.assert_close(z, whole.project(x, rank))
    torch.testing.assert_close(torch.cat(back, -1), whole.project_transpose(h, in_features))
    assert whole.of_shard(None, None) is whole


def test_squares_of_many_layers_need_no_more_memory_than_those_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_AT_ONCE", 2**14)
    ours, lambda_d, d_half_q = SharedProjections(SEED).impl, torch.ones(40, 16), torch.ones(40, 64)
    ours.reserve(16, 16, 64, torch.float32)
    with Census() as census:
        ours.squares(lambda_d, 16, 64)
        ours.squares_gradient(d_half_q, lambda_d, 16)
    assert census.largest() <= 4 * 2**14
