"""Products with a matrix that is a Kronecker product, without ever forming it.

Dimensions: N = n1 n2 the wide side, R the narrow one, *T tokens.

    M = (left (x) right) diag(diagonal), cut to its first rows       left (r1, n1), right (r2, n2), M (rows, N)

A token of N values is an (n1, n2) matrix X, so `x M^T` is `left (X * diagonal) right^T`: r1 n2 (n1 + r2) multiply-adds
with left first, n1 r2 (n2 + r1) with right first, instead of N R; `sandwich` takes the fewer. Several such matrices,
one upon the other, are a stack.
"""

from collections.abc import Callable, Sequence
from math import ceil, isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ops.annotations import Float
from ..ops.buffers import scratch
from ..ops.dtypes import as_dtype, without_autocast
from ..ops.tracing import grad_recorded, is_batched, is_traced

_VECTOR = 16
"""Width of a CPU's vector unit: a narrower inner product costs as much as one of this width."""

_FEW_VALUES = 2**18
"""Up to this many values, products are made in one piece, in fresh memory."""

_CHUNK_VALUES = 2**20
"""Intermediate values held at a time on a CPU, in reused buffers."""


class Kronecker(NamedTuple):
    """`(left (x) right) diag(diagonal)`, cut to its first `rows` rows."""

    left: Float[Tensor, "r1 n1"]
    right: Float[Tensor, "r2 n2"]
    diagonal: Float[Tensor, "N"]
    """Of `scaled` by row: (*B, N), which only sums of outputs take (`structured_update`)."""
    rows: int


Stack = tuple[Kronecker, ...]


def factors_of_size(size: int) -> tuple[int, int]:
    """`n1 <= n2` with `n1 n2 = size`, as close to the square root as divisors allow; for a prime n1 = 1."""
    n1 = next(divisor for divisor in range(isqrt(size), 0, -1) if size % divisor == 0)
    return n1, size // n1


def factors_of_rows(rows: int, n1: int, n2: int) -> tuple[int, int]:
    """`r1 <= n1` and `r2 <= n2` with `rows <= r1 r2 < rows + r2`: the fewest operations with right first.

    r2 is counted in whole vectors. The smallest has the fewest: n1 n2 r2 outweighs what a better fit of r1 r2 can save.
    """
    r2 = min(n2, rows, _VECTOR * ceil(rows / (_VECTOR * n1)))
    return ceil(rows / r2), r2


def block_rows(rows: int, size: int) -> list[int]:
    """The rows of each matrix of a stack: at most `size`, since no more can be orthogonal."""
    return [min(size, rows - start) for start in range(0, rows, size)]


def operations(rows: int, size: int) -> int:
    """Multiply-adds of one product with a stack, or with its transpose, for each token, the diagonal included."""
    n1, n2 = factors_of_size(size)
    total = 0
    for part in block_rows(rows, size):
        r1, r2 = factors_of_rows(part, n1, n2)
        total += size + min(_of_both_orders(r1, n1, n2, r2))
    return total


def apply_transpose(x: Float[Tensor, "*T N"], stack: Stack, use_triton: bool = False) -> Float[Tensor, "*T R"]:
    """`x M^T`, in the dtype of `x`; nothing of `x` is saved for the backward pass.

    Args:
        x: tokens.
        stack: M.
        use_triton: run on CUDA in the Triton kernel, for the sizes and dtypes that it takes.
    """
    if not (in_chunks(x, stack) or (use_triton and fits_triton(x, stack))):
        return _apply_transpose_at_once(x, stack)
    return _product(x, stack, transpose=True)


def apply(z: Float[Tensor, "*T R"], stack: Stack, use_triton: bool = False) -> Float[Tensor, "*T N"]:
    """`z M`, in the dtype of `z`; nothing of `z` is saved for the backward pass. Arguments as for `apply_transpose`."""
    if not (in_chunks(z, stack) or (use_triton and fits_triton(z, stack))):
        return _apply_at_once(z, stack)
    return _product(z, stack, transpose=False)


def prepared_apply_transpose(stack: Stack, use_triton: bool = False) -> Callable[[Tensor], Tensor]:
    """`apply_transpose` with a stack, not differentiable; quick for few tokens, and that of one token is (1, R)."""
    M, size = stack[0], len(stack[0].diagonal)

    def product(x: Tensor) -> Tensor:
        values = x.numel()
        tokens = x.reshape(1, -1) if values == size else x
        if len(stack) > 1 or not values or (values > size and (x.is_cuda or not is_few(values))):
            return apply_transpose(tokens, stack, use_triton)
        return as_dtype(apply_transpose_block(tokens, M), x.dtype)

    return product


def fits_triton(x: Tensor, stack: Stack) -> bool:
    """Whether the Triton kernel takes a product with the stack or with its transpose."""
    if not x.is_cuda or is_traced():
        return False
    from ..ops.triton.kronecker import supports

    for M in stack:
        (r1, n1), (r2, n2) = M.left.shape, M.right.shape
        both = ((r1, n1), (r2, n2)), ((n1, r1), (n2, r2))
        if not all(supports(left, right, x.dtype) for left, right in both):
            return False
    return True


def scaled(stack: Stack, scale: Float[Tensor, "*B N"]) -> Stack:
    """The stack of `M diag(scale)`, of every row of a batch where scales are by row."""
    return tuple(M._replace(diagonal=M.diagonal * scale) for M in stack)


def column_slice(stack: Stack, start: int, stop: int) -> Stack:
    """The stack of columns `start` to `stop` of M: views, or a dense matrix where they split a block of n2 columns."""
    n2 = stack[0].right.shape[1]
    if start % n2 == 0 and stop % n2 == 0:
        blocks = slice(start // n2, stop // n2)
        return tuple(M._replace(left=M.left[:, blocks], diagonal=M.diagonal[start:stop]) for M in stack)
    one = stack[0].right.new_ones(1, 1)
    columns = [torch.kron(M.left, M.right)[: M.rows, start:stop] for M in stack]
    return tuple(Kronecker(of_M, one, M.diagonal[start:stop], M.rows) for of_M, M in zip(columns, stack, strict=True))


def dense(stack: Stack) -> Float[Tensor, "R N"]:
    """The matrix itself."""
    return torch.cat([torch.kron(M.left, M.right)[: M.rows] * M.diagonal for M in stack])


def columns(stack: Stack, index: Tensor) -> Float[Tensor, "*T R"]:
    """Columns of M by index."""
    found = []
    for left, right, diagonal, rows in stack:
        n2 = right.shape[1]
        outer = (left.T[index // n2])[..., :, None] * (right.T[index % n2])[..., None, :]
        found.append((outer.flatten(-2) * diagonal[index][..., None])[..., :rows])
    return torch.cat(found, -1)


def split_ranks(z: Float[Tensor, "*T R"], stack: Stack) -> Sequence[Tensor]:
    """The values of each matrix of a stack."""
    return [z] if len(stack) == 1 else z.split([M.rows for M in stack], -1)


def joined_ranks(parts: list[Tensor]) -> Float[Tensor, "*T R"]:
    """Those of all matrices."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _apply_transpose_at_once(x: Float[Tensor, "*T N"], stack: Stack) -> Float[Tensor, "*T R"]:
    return as_dtype(joined_ranks([apply_transpose_block(x, M) for M in stack]), x.dtype)


def apply_transpose_block(x: Float[Tensor, "*T N"], M: Kronecker) -> Float[Tensor, "*T R"]:
    """`x M^T` for one matrix of a stack, in the wider dtype."""
    left, right, diagonal, rows = M
    (r1, n1), (r2, n2) = left.shape, right.shape
    product = sandwich(left, (x * diagonal).reshape(-1, n1, n2), right.T).view(*x.shape[:-1], r1 * r2)
    return product if rows == r1 * r2 else product[..., :rows]


def _apply_at_once(z: Float[Tensor, "*T R"], stack: Stack) -> Float[Tensor, "*T N"]:
    parts = split_ranks(z, stack)
    blocks = [without_diagonal(part, M) * M.diagonal for part, M in zip(parts, stack, strict=True)]
    x = sum(blocks[1:], blocks[0])
    return as_dtype(x, z.dtype)


def without_diagonal(z: Float[Tensor, "*T R"], M: Kronecker) -> Float[Tensor, "*T N"]:
    """`z (left (x) right)`."""
    values = M.left.shape[1] * M.right.shape[1]
    return sandwich(M.left.T, as_matrices(z, M), M.right).view(*z.shape[:-1], values)


def as_matrices(z: Float[Tensor, "*T R"], M: Kronecker) -> Float[Tensor, "t r1 r2"]:
    """The values of each token as a matrix."""
    r1, r2 = len(M.left), len(M.right)
    padded = z if M.rows == r1 * r2 else pad(z, (0, r1 * r2 - M.rows))
    return as_dtype(padded, M.left.dtype).reshape(z.numel() // M.rows, r1, r2)


def sandwich(
    left: Float[Tensor, "a b"],
    X: Float[Tensor, "t b c"],
    right: Float[Tensor, "c d"],
    inner: Float[Tensor, "M"] | None = None,
    out: Float[Tensor, "t N"] | None = None,
) -> Float[Tensor, "t a d"]:
    """`left X right` for every token, first the side that leaves fewer operations.

    Args:
        left, X, right: the matrices.
        inner: a buffer for what lies between the two products, or None.
        out: where the result is written to, the values of each token in a row, or None.
    """
    (a, b), (c, d), tokens = left.shape, right.shape, len(X)
    of_left_first, of_right_first = _of_both_orders(a, b, c, d)
    left_first = of_left_first <= of_right_first
    if tokens == 1 and out is None:
        # A plain product starts faster than a batched one.
        return (left.mm(X[0]).mm(right) if left_first else left.mm(X[0].mm(right)))[None]
    rows, columns = (a, c) if left_first else (b, d)
    half = None if inner is None else inner[: tokens * rows * columns].view(tokens, rows, columns)
    each = left.expand(tokens, a, b)
    if left_first:
        half = torch.bmm(each, X, out=half)
        return torch.mm(half.view(-1, c), right, out=None if out is None else out.view(-1, d)).view(tokens, a, d)
    half = torch.mm(X.reshape(-1, c), right, out=None if half is None else half.view(-1, d))
    return torch.bmm(each, half.view(tokens, b, d), out=None if out is None else out.view(tokens, a, d))


def _of_both_orders(a: int, b: int, c: int, d: int) -> tuple[int, int]:
    """Multiply-adds of `sandwich` for each token, with left first and with right first."""
    return a * c * (b + d), b * d * (a + c)


def chunk_tokens(tokens: int, stack: Stack) -> int:
    """Tokens in a chunk; all chunks are of about the same length."""
    (_, n1), (r2, n2) = stack[0].left.shape, stack[0].right.shape
    most = max(1, _CHUNK_VALUES // (n1 * (n2 + r2)))
    return max(1, ceil(tokens / max(1, ceil(tokens / most))))


def is_few(values: int) -> bool:
    """Whether so many values of tokens on the wide side are few enough for a product in one piece."""
    return values <= _FEW_VALUES


def in_chunks(x: Tensor, stack: Stack) -> bool:
    """Whether a product is made by chunks of tokens, in reused buffers."""
    if not x.is_cpu or torch.compiler.is_compiling() or is_batched(x):
        return False
    return not is_few(x.numel() // x.shape[-1] * stack[0].diagonal.shape[-1])


def _product(x: Tensor, stack: Stack, transpose: bool) -> Tensor:
    # Calling an autograd function takes as long as a small product.
    if is_traced() or (x.requires_grad and grad_recorded()):
        product: Tensor = _Product.apply(x, stack, transpose)
        return product
    return _Product.forward(x, stack, transpose)


class _Product(torch.autograd.Function):
    """`apply` or `apply_transpose`, by chunks of tokens; each is the gradient of the other, so no token is saved."""

    @staticmethod
    def forward(x: Tensor, stack: Stack, transpose: bool) -> Tensor:
        if x.is_cuda:
            return _apply_transpose_in_triton(x, stack) if transpose else apply_in_triton(x, stack)
        size = sum(M.rows for M in stack) if transpose else stack[0].diagonal.shape[0]
        product = apply_transpose_chunk if transpose else apply_chunk
        out = x.new_empty(*x.shape[:-1], size)
        flat, results = x.reshape(-1, x.shape[-1]), out.view(-1, size)
        chunk = chunk_tokens(len(flat), stack)
        for part, into in zip(flat.split(chunk), results.split(chunk), strict=True):
            product(part, stack, into)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Stack, bool], output: Tensor) -> None:
        x, ctx.stack, ctx.transpose = inputs
        # On CUDA this function is the kernel's only caller.
        ctx.use_triton = x.is_cuda

    @staticmethod
    @without_autocast
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        return (apply if ctx.transpose else apply_transpose)(d, ctx.stack, ctx.use_triton), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return (apply_transpose if ctx.transpose else apply)(tangent, ctx.stack, ctx.use_triton)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, Any, Any], x: Tensor, stack: Stack, transpose: bool) -> tuple[Tensor, int]:
        # A batch is more tokens, unless the stack itself holds a batch of scales.
        if any(dim is not None for M in in_dims[1] for dim in M):
            return torch.vmap(_apply_transpose_at_once if transpose else _apply_at_once, in_dims[:2])(x, stack), 0
        return (apply_transpose if transpose else apply)(x.movedim(in_dims[0], 0), stack, x.is_cuda), 0


def apply_transpose_chunk(x: Float[Tensor, "t N"], stack: Stack, into: Float[Tensor, "t R"]) -> None:
    """`into = x M^T` for a few tokens."""
    wide, inner = _scratch(len(x), stack)
    for (left, right, diagonal, rows), block in zip(stack, into.split([M.rows for M in stack], 1), strict=True):
        (r1, n1), (r2, n2) = left.shape, right.shape
        X = torch.mul(x, diagonal, out=wide).view(-1, n1, n2)
        fits = rows == r1 * r2 and block.is_contiguous() and block.dtype == wide.dtype
        found = sandwich(left, X, right.T, inner, block if fits else None)
        if not fits:
            block.copy_(found.view(-1, r1 * r2)[:, :rows])


def apply_chunk(z: Float[Tensor, "t R"], stack: Stack, into: Float[Tensor, "t N"]) -> None:
    """`into = z M` for a few tokens."""
    wide, inner = _scratch(len(z), stack)
    # Sum half-precision results in float32 and round once.
    total = into if into.dtype == wide.dtype else torch.empty_like(into, dtype=wide.dtype)
    for index, (M, block) in enumerate(zip(stack, split_ranks(z, stack), strict=True)):
        sandwich(M.left.T, as_matrices(block, M), M.right, inner, wide if index else total)
        if index:
            total.addcmul_(wide, M.diagonal)
        else:
            total.mul_(M.diagonal)
    if total is not into:
        into.copy_(total)


def _apply_transpose_in_triton(x: Float[Tensor, "*T N"], stack: Stack) -> Float[Tensor, "*T R"]:
    from ..ops.triton.kronecker import kronecker

    flat = x.reshape(-1, x.shape[-1])
    found = [kronecker(flat, M.left, M.right, M.diagonal, None)[:, : M.rows] for M in stack]
    return torch.cat(found, 1).view(*x.shape[:-1], -1)


def apply_in_triton(z: Float[Tensor, "*T R"], stack: Stack) -> Float[Tensor, "*T N"]:
    """`z M` by the Triton kernel."""
    from ..ops.triton.kronecker import kronecker

    parts = z.reshape(-1, z.shape[-1]).split([M.rows for M in stack], 1)
    padded = [pad(part, (0, len(M.left) * len(M.right) - M.rows)) for part, M in zip(parts, stack, strict=True)]
    found = [kronecker(part, M.left.T, M.right.T, None, M.diagonal) for part, M in zip(padded, stack, strict=True)]
    return sum(found[1:], found[0]).view(*z.shape[:-1], -1)


def _scratch(chunk: int, stack: Stack) -> tuple[Tensor, Tensor]:
    """Buffers for one chunk: on the wide side, and between the two products."""
    diagonal, (_, n1), (_, n2) = stack[0].diagonal, stack[0].left.shape, stack[0].right.shape
    widest = max(max(len(M.left) * n2, n1 * len(M.right)) for M in stack)
    wide = scratch("kronecker wide", (chunk, len(diagonal)), diagonal.dtype, diagonal.device)
    return wide, scratch("kronecker inner", (chunk * widest,), diagonal.dtype, diagonal.device)
