"""Products with a matrix that is a Kronecker product, without ever forming it.

Dimensions: N = n1 n2 the wide side, R the narrow one, *T tokens.

    M = (left (x) right) diag(diagonal), cut to its first rows       left (r1, n1), right (r2, n2), M (rows, N)

A token of N values is an (n1, n2) matrix X, so `x M^T` is `left (X * diagonal) right^T`: n1 n2 r2 + n1 r1 r2
multiply-adds instead of N R. Several such matrices, one upon the other, are a stack.
"""

from math import ceil, isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from .devices import runs_triton
from .shapes import Float
from .transforms import transforming

_VECTOR = 16
"""Values that processors multiply at once: a narrower inner product costs as much as one of this width."""

_FEW_TOKENS = 16
"""These are one chunk whatever their size."""

_CHUNK_VALUES = 2**18
"""Intermediate values held at a time on a processor: they fit its cache, and no memory is asked for again and again."""


class Kronecker(NamedTuple):
    """`(left (x) right) diag(diagonal)`, cut to its first `rows` rows."""

    left: Float[Tensor, "r1 n1"]
    right: Float[Tensor, "r2 n2"]
    diagonal: Float[Tensor, "N"]
    rows: int


Stack = tuple[Kronecker, ...]


def factors_of_size(size: int) -> tuple[int, int]:
    """`n1 <= n2` with `n1 n2 = size`, as near to the square root as divisors are; a prime has n1 = 1."""
    n1 = next(divisor for divisor in range(isqrt(size), 0, -1) if size % divisor == 0)
    return n1, size // n1


def factors_of_rows(rows: int, n1: int, n2: int) -> tuple[int, int]:
    """`r1 <= n1` and `r2 <= n2` with `rows <= r1 r2 < rows + r2`: the fewest operations, r2 counted in whole vectors.

    The smallest r2 has the fewest (n1 n2 r2 outweighs what a better fit of r1 r2 can save), and the inner product
    over n2 first is never worse than the one over n1 first because n1 <= n2.
    """
    r2 = min(n2, rows, _VECTOR * ceil(rows / (_VECTOR * n1)))
    return ceil(rows / r2), r2


def block_rows(rows: int, size: int) -> list[int]:
    """The rows of each matrix of a stack: at most `size`, as many as can be orthogonal."""
    return [min(size, rows - start) for start in range(0, rows, size)]


def operations(rows: int, size: int) -> int:
    """Multiply-adds of one product with a stack, or with its transpose, for each token, the diagonal included."""
    n1, n2 = factors_of_size(size)
    total = 0
    for part in block_rows(rows, size):
        r1, r2 = factors_of_rows(part, n1, n2)
        total += size + n1 * n2 * r2 + n1 * r1 * r2
    return total


def narrow(x: Float[Tensor, "*T N"], stack: Stack) -> Float[Tensor, "*T R"]:
    """`x M^T`, in the dtype of `x`. Nothing of `x` is kept for the backward pass."""
    return _Narrow.apply(x, stack) if _in_chunks(x, stack) or fits_triton(x, stack) else _narrow_at_once(x, stack)


def widen(z: Float[Tensor, "*T R"], stack: Stack) -> Float[Tensor, "*T N"]:
    """`z M`, in the dtype of `z`. Nothing of `z` is kept for the backward pass."""
    return _Widen.apply(z, stack) if _in_chunks(z, stack) or fits_triton(z, stack) else _widen_at_once(z, stack)


def fits_triton(x: Tensor, stack: Stack) -> bool:
    """Whether the Triton kernel takes a product with the stack or with its transpose."""
    if not runs_triton(x) or transforming():
        return False
    from .triton_kernels.kronecker import supports

    for M in stack:
        (r1, n1), (r2, n2) = M.left.shape, M.right.shape
        both = ((r1, n1), (r2, n2)), ((n1, r1), (n2, r2))
        if not all(supports(left, right, x.dtype) for left, right in both):
            return False
    return True


def scaled(stack: Stack, scale: Float[Tensor, "N"]) -> Stack:
    """The stack of `M diag(scale)`."""
    return tuple(M._replace(diagonal=M.diagonal * scale) for M in stack)


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


def _narrow_at_once(x: Float[Tensor, "*T N"], stack: Stack) -> Float[Tensor, "*T R"]:
    found = []
    for left, right, diagonal, rows in stack:
        (r1, n1), (r2, n2) = left.shape, right.shape
        inner = linear((x * diagonal).to(right.dtype).reshape(-1, n2), right)
        if len(inner) == n1:
            product = torch.mm(left, inner)
        else:
            tokens = inner.view(-1, n1, r2)
            product = torch.bmm(left.expand(len(tokens), r1, n1), tokens)
        product = product.view(*x.shape[:-1], r1 * r2)
        found.append(product if rows == r1 * r2 else product[..., :rows])
    return (found[0] if len(found) == 1 else torch.cat(found, -1)).to(x.dtype)


def _widen_at_once(z: Float[Tensor, "*T R"], stack: Stack) -> Float[Tensor, "*T N"]:
    parts = [z] if len(stack) == 1 else z.split([M.rows for M in stack], -1)
    total: Tensor | None = None
    for part, (left, right, diagonal, rows) in zip(parts, stack, strict=True):
        (r1, n1), (r2, n2) = left.shape, right.shape
        padded = part if rows == r1 * r2 else pad(part, (0, r1 * r2 - rows))
        tokens = padded.to(left.dtype).reshape(-1, r1, r2)
        if len(tokens) == 1:
            inner = torch.mm(left.T, tokens[0])
        else:
            inner = torch.bmm(left.T.expand(len(tokens), n1, r1), tokens)
        product = (inner.view(-1, r2) @ right).view(*z.shape[:-1], n1 * n2) * diagonal
        total = product if total is None else total + product
    assert total is not None
    return total.to(z.dtype)


def _chunk_tokens(tokens: int, stack: Stack) -> int:
    """Tokens that one chunk holds; all chunks are about as long."""
    (_, n1), (r2, n2) = stack[0].left.shape, stack[0].right.shape
    most = max(_FEW_TOKENS, _CHUNK_VALUES // (n1 * (n2 + r2)))
    return ceil(tokens / ceil(tokens / most))


def _in_chunks(x: Tensor, stack: Stack) -> bool:
    tokens = x.numel() // x.shape[-1]
    if tokens <= _FEW_TOKENS or torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return _chunk_tokens(tokens, stack) < tokens


class _Narrow(torch.autograd.Function):
    """`narrow` a few tokens at a time. The gradient of a linear map is its transpose, so no token is kept."""

    @staticmethod
    def forward(x: Tensor, stack: Stack) -> Tensor:
        if x.is_cuda:
            return _narrow_in_triton(x, stack)
        rows = [M.rows for M in stack]
        out = x.new_empty(*x.shape[:-1], sum(rows))
        flat, results = x.reshape(-1, x.shape[-1]), out.view(-1, sum(rows))
        chunk = _chunk_tokens(flat.shape[0], stack)
        wide, inner = _scratch(chunk, stack)
        for part, into in zip(flat.split(chunk), results.split(chunk), strict=True):
            for M, block in zip(stack, into.split(rows, 1), strict=True):
                _narrow_chunk(part, M, block, wide, inner)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Stack], output: Tensor) -> None:
        ctx.stack = inputs[1]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return widen(d, ctx.stack), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return narrow(tangent, ctx.stack)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, Any], x: Tensor, stack: Stack) -> tuple[Tensor, int]:
        return _batched(narrow, _narrow_at_once, in_dims, x, stack)


class _Widen(torch.autograd.Function):
    """`widen` a few tokens at a time."""

    @staticmethod
    def forward(z: Tensor, stack: Stack) -> Tensor:
        if z.is_cuda:
            return _widen_in_triton(z, stack)
        rows, size = [M.rows for M in stack], stack[0].diagonal.shape[0]
        out = z.new_empty(*z.shape[:-1], size)
        flat, results = z.reshape(-1, z.shape[-1]), out.view(-1, size)
        chunk = _chunk_tokens(flat.shape[0], stack)
        wide, inner = _scratch(chunk, stack)
        for part, into in zip(flat.split(chunk), results.split(chunk), strict=True):
            # Half-precision results are summed in float32 and rounded once.
            total = into if into.dtype == wide.dtype else torch.empty_like(into, dtype=wide.dtype)
            for index, (M, block) in enumerate(zip(stack, part.split(rows, 1), strict=True)):
                _widen_chunk(block, M, total, index > 0, wide, inner)
            if total is not into:
                into.copy_(total)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Stack], output: Tensor) -> None:
        ctx.stack = inputs[1]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return narrow(d, ctx.stack), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return widen(tangent, ctx.stack)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, Any], z: Tensor, stack: Stack) -> tuple[Tensor, int]:
        return _batched(widen, _widen_at_once, in_dims, z, stack)


def _narrow_chunk(x: Tensor, M: Kronecker, into: Tensor, wide: Tensor, inner: Tensor) -> None:
    left, right, diagonal, rows = M
    (r1, n1), (r2, n2), tokens = left.shape, right.shape, x.shape[0]
    signed = torch.mul(x, diagonal, out=wide[:tokens])
    half = torch.mm(signed.view(-1, n2), right.T, out=inner[: tokens * n1 * r2].view(-1, r2)).view(tokens, n1, r2)
    repeated = left.expand(tokens, r1, n1)
    if rows == r1 * r2 and into.is_contiguous() and into.dtype == half.dtype:
        torch.bmm(repeated, half, out=into.view(tokens, r1, r2))
    else:
        into.copy_(torch.bmm(repeated, half).view(tokens, -1)[:, :rows])


def _widen_chunk(z: Tensor, M: Kronecker, total: Tensor, add: bool, wide: Tensor, inner: Tensor) -> None:
    left, right, diagonal, rows = M
    (r1, n1), (r2, n2), tokens = left.shape, right.shape, z.shape[0]
    padded = z.to(wide.dtype) if rows == r1 * r2 else pad(z.to(wide.dtype), (0, r1 * r2 - rows))
    half = inner[: tokens * n1 * r2]
    torch.bmm(left.T.expand(tokens, n1, r1), padded.reshape(tokens, r1, r2), out=half.view(tokens, n1, r2))
    product = wide[:tokens] if add else total
    torch.mm(half.view(-1, r2), right, out=product.view(-1, n2))
    if add:
        total.addcmul_(product, diagonal)
    else:
        total.mul_(diagonal)


def _narrow_in_triton(x: Float[Tensor, "*T N"], stack: Stack) -> Float[Tensor, "*T R"]:
    from .triton_kernels.kronecker import kronecker

    flat = x.reshape(-1, x.shape[-1])
    found = [kronecker(flat, M.left, M.right, M.diagonal, None)[:, : M.rows] for M in stack]
    return torch.cat(found, 1).view(*x.shape[:-1], -1)


def _widen_in_triton(z: Float[Tensor, "*T R"], stack: Stack) -> Float[Tensor, "*T N"]:
    from .triton_kernels.kronecker import kronecker

    parts = z.reshape(-1, z.shape[-1]).split([M.rows for M in stack], 1)
    padded = [pad(part, (0, len(M.left) * len(M.right) - M.rows)) for part, M in zip(parts, stack, strict=True)]
    found = [kronecker(part, M.left.T, M.right.T, None, M.diagonal) for part, M in zip(padded, stack, strict=True)]
    return sum(found[1:], found[0]).view(*z.shape[:-1], -1)


def _scratch(chunk: int, stack: Stack) -> tuple[Tensor, Tensor]:
    """Room for one chunk on the wide side and between the two products."""
    diagonal, (_, n1) = stack[0].diagonal, stack[0].left.shape
    widest = max(M.right.shape[0] for M in stack)
    return diagonal.new_empty(chunk, diagonal.shape[0]), diagonal.new_empty(chunk * n1 * widest)


def _batched(product: Any, at_once: Any, in_dims: tuple[Any, Any], x: Tensor, stack: Stack) -> tuple[Tensor, int]:
    """A product under vmap: a batch is more tokens, unless the stack itself holds a batch of scales."""
    if any(dim is not None for M in in_dims[1] for dim in M):
        return torch.vmap(at_once, in_dims)(x, stack), 0
    return product(x.movedim(in_dims[0], 0), stack), 0
