"""Products with stacks of Kronecker products against the dense matrix: factors, values, derivatives, transforms."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from dvora.matrices import kronecker as kronecker_plain
from tests.cases import randn
from tests.checked import checked
from tests.reference import worst_error

kronecker = checked("matrices.kronecker")
Kronecker = kronecker.Kronecker

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([64, 97, 384]))
LONG = 2**14


def stack(rows: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Kronecker, ...]:
    n1, n2 = kronecker.factors_of_size(size)
    blocks = []
    for index, part in enumerate(kronecker.block_rows(rows, size)):
        r1, r2 = kronecker.factors_of_rows(part, n1, n2)
        shapes = [(r1, n1), (r2, n2), (size,)]
        factors = [randn(*shape, seed=seed + 3 * index + i, dtype=dtype) for i, shape in enumerate(shapes)]
        blocks.append(Kronecker(*factors, part))
    return tuple(blocks)


def naive(matrices: tuple[Kronecker, ...]) -> Tensor:
    """The dense matrix, entry by entry of its definition."""
    blocks = []
    for left, right, diagonal, rows in matrices:
        (r1, n1), (r2, n2) = left.shape, right.shape
        block = torch.einsum("ai,bj->abij", left.double(), right.double()).reshape(r1 * r2, n1 * n2)
        blocks.append(block[:rows] * diagonal.double())
    return torch.cat(blocks)


@given(size=st.integers(1, 3000))
def test_factors_of_a_size_are_its_divisors_next_to_the_root(size: int) -> None:
    n1, n2 = kronecker.factors_of_size(size)
    assert n1 * n2 == size
    assert n1 <= n2
    assert not any(size % divisor == 0 for divisor in range(n1 + 1, int(size**0.5) + 1))


@given(n1=st.integers(1, 40), more=st.integers(0, 60), data=st.data())
def test_factors_of_rows_have_the_fewest_operations(n1: int, more: int, data: st.DataObject) -> None:
    n2 = n1 + more
    rows = data.draw(st.integers(1, n1 * n2))

    def cost(r1: int, r2: int) -> int:
        width = min(16 * -(-r2 // 16), n2)
        return n1 * n2 * width + n1 * r1 * width

    r1, r2 = kronecker.factors_of_rows(rows, n1, n2)
    assert r1 <= n1
    assert r2 <= n2
    assert rows <= r1 * r2 < rows + r2
    others = [pair for pair in product(range(1, n1 + 1), range(1, n2 + 1)) if pair[0] * pair[1] >= rows]
    assert cost(r1, r2) == min(cost(*pair) for pair in others)


@pytest.mark.parametrize(
    ("rows", "size", "factors"),
    [
        (256, 1024, (16, 16)),
        (1024, 1024, (32, 32)),
        (1024, 5632, (64, 16)),
        (7, 1024, (1, 7)),
        (100, 101, (1, 100)),
        (1, 1, (1, 1)),
        (101, 384, (7, 16)),
    ],
)
def test_factors_of_rows_are_pinned(rows: int, size: int, factors: tuple[int, int]) -> None:
    # Another choice is another matrix: a new format.
    assert kronecker.factors_of_rows(rows, *kronecker.factors_of_size(size)) == factors


@given(rows=SIZES, size=SIZES)
def test_operations_are_those_of_the_products(rows: int, size: int) -> None:
    expected = 0
    for left, right, diagonal, _ in stack(rows, size):
        left_first = left.numel() * right.shape[1] + left.shape[0] * right.numel()
        right_first = left.shape[1] * right.numel() + left.numel() * right.shape[0]
        expected += diagonal.numel() + min(left_first, right_first)
    assert kronecker.operations(rows, size) == expected


def test_a_wide_product_takes_a_small_part_of_the_dense_operations() -> None:
    assert kronecker.operations(256, 1024) < 1024 * 256 / 9
    assert kronecker.operations(1024, 1024) < 1024 * 1024 / 15


@given(rows=SIZES, size=SIZES, tokens=st.sampled_from([(), (0,), (1,), (3,), (2, 0), (2, 5)]))
def test_products_equal_those_with_the_dense_matrix(rows: int, size: int, tokens: tuple[int, ...]) -> None:
    matrices = stack(rows, size)
    M = naive(matrices)
    x, z = (randn(*tokens, n, seed=9, dtype=torch.float64) for n in (size, rows))
    scale = randn(size, seed=10, dtype=torch.float64)
    assert worst_error(kronecker.dense(matrices), M) < 1e-14
    assert worst_error(kronecker.apply_transpose(x, matrices), x @ M.T) < 1e-12
    assert worst_error(kronecker.apply(z, matrices), z @ M) < 1e-12
    assert worst_error(kronecker.apply_transpose(x, kronecker.scaled(matrices, scale)), (x * scale) @ M.T) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize(("rows", "size"), [(40, LONG), (37, LONG), (700, 300)])
def test_many_tokens_are_taken_in_chunks(
    rows: int, size: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kronecker, "_CHUNK_VALUES", 2**18)
    matrices = stack(rows, size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    M, tokens = naive(matrices), 50 if size == LONG else 2000
    x, z = (randn(2, tokens // 2, n, seed=9, dtype=dtype) for n in (size, rows))
    assert kronecker.in_chunks(x, matrices)
    assert kronecker.chunk_tokens(tokens, matrices) < tokens
    narrowed, widened = kronecker.apply_transpose(x, matrices), kronecker.apply(z, matrices)
    assert narrowed.dtype == widened.dtype == dtype
    assert worst_error(narrowed, x.double() @ M.T) < tolerance
    assert worst_error(widened, z.double() @ M) < tolerance


def test_tokens_need_not_lie_one_after_the_other() -> None:
    matrices = stack(5, LONG)
    x = randn(LONG, 40, seed=0, dtype=torch.float64).T
    assert worst_error(kronecker.apply_transpose(x, matrices), x @ naive(matrices).T) < 1e-12


def transpose_in_chunks(x: Tensor, matrices: tuple[Kronecker, ...]) -> Tensor:
    return kronecker._Product.apply(x, matrices, True)


def product_in_chunks(z: Tensor, matrices: tuple[Kronecker, ...]) -> Tensor:
    return kronecker._Product.apply(z, matrices, False)


PATHS = [
    pytest.param(kronecker.apply_transpose, 12, id="transpose"),
    pytest.param(kronecker.apply, 7, id="product"),
    pytest.param(transpose_in_chunks, 12, id="transpose in chunks"),
    pytest.param(product_in_chunks, 7, id="product in chunks"),
]


# PyTorch's own forward mode uses what PyTorch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(("path", "width"), PATHS)
@pytest.mark.parametrize("blocks", [1, 2])
def test_derivatives_of_first_and_second_order(path, width: int, blocks: int) -> None:
    matrices = stack(7, 12) if blocks == 1 else (*stack(4, 12), *stack(3, 12, seed=20))
    x = randn(3, width, seed=0, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: path(x, matrices), x, check_forward_ad=True)
    assert gradgradcheck(lambda x: path(x, matrices), x)


@pytest.mark.parametrize(("path", "width"), PATHS)
def test_nothing_of_the_size_of_the_tokens_is_kept_for_backward(path, width: int) -> None:
    matrices = stack(7, 12)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    x = randn(1000, width, seed=0, dtype=torch.float64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = path(x, matrices)
    assert max(kept, default=0) < 1000
    y.sum().backward()
    M = naive(matrices)
    assert worst_error(x.grad, (M if y.shape[-1] == 7 else M.T).sum(0).expand(1000, width)) < 1e-12


@pytest.mark.parametrize(("path", "width"), PATHS)
def test_batches_of_tokens_and_of_scales(path, width: int) -> None:
    matrices = stack(7, 12)
    x = randn(5, 2, 3, width, seed=0, dtype=torch.float64)
    scales = randn(5, 12, seed=1, dtype=torch.float64)
    assert torch.equal(torch.vmap(lambda x: path(x, matrices), in_dims=1, out_dims=1)(x), path(x, matrices))

    def scaled(x: Tensor, scale: Tensor) -> Tensor:
        return path(x, kronecker.scaled(matrices, scale))

    expected = torch.stack([scaled(*pair) for pair in zip(x, scales, strict=True)])
    assert worst_error(torch.vmap(scaled)(x, scales), expected) < 1e-12
    assert worst_error(torch.vmap(scaled, (None, 0))(x[0], scales)[1], scaled(x[0], scales[1])) < 1e-12


@pytest.mark.parametrize(("path", "width"), PATHS)
def test_gradients_of_every_token_at_once(path, width: int) -> None:
    matrices = stack(7, 12)
    x = randn(5, width, seed=0, dtype=torch.float64)
    found = torch.func.vmap(torch.func.grad(lambda x: path(x[None], matrices).square().sum()))(x)
    M = naive(matrices)
    M = M if path in (kronecker.apply_transpose, transpose_in_chunks) else M.T
    assert worst_error(found, 2 * x @ M.T @ M) < 1e-12


@pytest.mark.parametrize("size", [12, LONG])
def test_a_compiled_product_is_one_graph_with_the_same_gradients(size: int) -> None:
    torch.compiler.reset()
    matrices = stack(7, size)
    compiled = torch.compile(
        lambda x: kronecker_plain.apply_transpose(x, matrices), fullgraph=True, backend="aot_eager"
    )
    x = randn(40, size, seed=0, dtype=torch.float64).requires_grad_()
    y = compiled(x)
    assert worst_error(y, kronecker.apply_transpose(x, matrices)) < 1e-12
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert worst_error(gradient, kronecker.apply(2 * y, matrices)) < 1e-12


@given(rows=st.integers(1, 60), size=st.integers(1, 30), data=st.data())
def test_columns_by_index(rows: int, size: int, data: st.DataObject) -> None:
    index = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2)))[:, None]
    matrices = stack(rows, size)
    assert torch.equal(kronecker.columns(matrices, index), kronecker.dense(matrices).T[index])


@given(sizes=st.tuples(*[st.integers(1, 12)] * 4), tokens=st.integers(0, 3), buffered=st.booleans())
def test_a_sandwich_is_three_matrices_with_the_fewest_operations(
    sizes: tuple[int, int, int, int], tokens: int, buffered: bool
) -> None:
    a, b, c, d = sizes
    left, X, right = (randn(*shape, seed=sum(shape), dtype=torch.float64) for shape in ((a, b), (tokens, b, c), (c, d)))
    inner = torch.full((tokens * max(a * c, b * d),), torch.nan, dtype=torch.float64) if buffered else None
    out = torch.full((tokens, a * d), torch.nan, dtype=torch.float64) if buffered else None
    with FlopCounterMode(display=False) as counter:
        found = kronecker_plain.sandwich(left, X, right, inner, out)
    assert torch.allclose(found, torch.einsum("ab,tbc,cd->tad", left, X, right))
    assert counter.get_total_flops() == 2 * tokens * min(a * c * (b + d), b * d * (a + c))
    if out is not None:
        assert torch.equal(out, found.flatten(1))
