"""Products with a matrix that is a Kronecker product, without ever forming it.

Dimensions: N = n1 n2 the wide side, R the narrow one, *T tokens.

    M = (left (x) right) diag(diagonal), cut to its first rows       left (r1, n1), right (r2, n2), M (rows, N)

A token of N values is an (n1, n2) matrix X, so `x M^T` is `left (X * diagonal) right^T`: n1 n2 r2 + n1 r1 r2
multiply-adds instead of N R. Several such matrices, one upon the other, are a stack.
"""

from collections.abc import Sequence
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

_FEW_VALUES = 2**17
"""Up to this many values, products are made in one piece, in fresh memory."""

_CHUNK_VALUES = 2**20
"""Intermediate values held at a time on a CPU, in reused buffers."""


class Kronecker(NamedTuple):
    """`(left (x) right) diag(diagonal)`, cut to its first `rows` rows."""

    left: Float[Tensor, "r1 n1"]
    right: Float[Tensor, "r2 n2"]
    diagonal: Float[Tensor, "N"]
    rows: int


Stack = tuple[Kronecker, ...]


def factors_of_size(size: int) -> tuple[int, int]:
    """`n1 <= n2` with `n1 n2 = size`, as close to the square root as divisors allow; for a prime n1 = 1."""
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
    """The rows of each matrix of a stack: at most `size`, since no more can be orthogonal."""
    return [min(size, rows - start) for start in range(0, rows, size)]


def operations(rows: int, size: int) -> int:
    """Multiply-adds of one product with a stack, or with its transpose, for each token, the diagonal included."""
    n1, n2 = factors_of_size(size)
    total = 0
    for part in block_rows(rows, size):
        r1, r2 = factors_of_rows(part, n1, n2)
        total += size + n1 * n2 * r2 + n1 * r1 * r2
    return total


def apply_transpose(x: Float[Tensor, "*T N"], stack: Stack, use_triton: bool = False) -> Float[Tensor, "*T R"]:
    """`x M^T`, in the dtype of `x`; nothing of `x` is saved for the backward pass.

    Args:
        x: tokens.
        stack: M.
        use_triton: run on CUDA in the Triton kernel, for the sizes and dtypes that it takes.
    """
    if not (_in_chunks(x, stack) or (use_triton and fits_triton(x, stack))):
        return _apply_transpose_at_once(x, stack)
    return _product(x, stack, transpose=True)


def apply(z: Float[Tensor, "*T R"], stack: Stack, use_triton: bool = False) -> Float[Tensor, "*T N"]:
    """`z M`, in the dtype of `z`; nothing of `z` is saved for the backward pass. Arguments as for `apply_transpose`."""
    if not (_in_chunks(z, stack) or (use_triton and fits_triton(z, stack))):
        return _apply_at_once(z, stack)
    return _product(z, stack, transpose=False)


def add_product(
    z: Float[Tensor, "T R"], stack: Stack, onto: Float[Tensor, "T N"] | None, use_triton: bool = False
) -> Float[Tensor, "T N"]:
    """`onto + z M`, written into `onto`; a new tensor in the dtype of `z` without one. Not differentiable."""
    if onto is None:
        return apply(z, stack, use_triton)
    if z.is_cuda and use_triton and fits_triton(z, stack):
        return onto.add_(_apply_in_triton(z, stack))
    chunk = chunk_tokens(len(z), stack) if _in_chunks(z, stack) else len(z)
    for of_z, into in zip(as_chunks(z, chunk), as_chunks(onto, chunk), strict=True):
        for M, block in zip(stack, _split(of_z, [M.rows for M in stack]), strict=True):
            into.addcmul_(_without_diagonal(block, M), M.diagonal)
    return onto


def scaled_gradients(
    d: Float[Tensor, "T N"],
    z: Float[Tensor, "T R"],
    lambda_d: Float[Tensor, "R"],
    scale: Float[Tensor, "N"],
    stack: Stack,
    d_scale: Float[Tensor, "N"],
) -> tuple[Float[Tensor, "T R"], Float[Tensor, "R"]]:
    """The gradients of `(d * ((z * lambda_d) M * scale)).sum()` with respect to z and lambda_d.

    That of the scale is written into `d_scale`. It comes from the product half-way: with `P = left^T (z lambda_d)`, a
    matrix (n1, r2) for each token, and the tokens of d as matrices D (n1, n2), it is
    `diagonal * sum_k2 right (sum_t P D)`, so that no (T, N) tensor is made.

    Args:
        d: in the dtype of `z`.
        stack: M, in float32 or wider.
    """
    wide, chunk = stack[0].left.dtype, chunk_tokens(len(d), stack)
    inner, scaled_stack, rows = as_dtype(lambda_d, wide), scaled(stack, scale), [M.rows for M in stack]
    d_z: list[Tensor] = []
    sums: list[_BlockSums] = []
    for of_d, of_z in zip(as_chunks(d, chunk), as_chunks(z, chunk), strict=True):
        of_d, of_z = as_dtype(of_d, wide), as_dtype(of_z, wide)
        before: Sequence[_BlockSums | None] = sums or [None] * len(stack)
        blocks = zip(scaled_stack, _split(of_z, rows), _split(inner, rows), before, strict=True)
        found = [_block_gradients(of_d, *block) for block in blocks]
        sums = [of_block for _, of_block in found]
        d_z.append(as_dtype(_joined([of_block for of_block, _ in found]), z.dtype))
    for index, (total, M) in enumerate(zip(sums, stack, strict=True)):
        outputs = total.outputs.mul_(M.right).sum(1).flatten()
        d_scale.addcmul_(outputs, M.diagonal) if index else torch.mul(outputs, M.diagonal, out=d_scale)
    return d_z[0] if len(d_z) == 1 else torch.cat(d_z), _joined([total.lambda_d for total in sums])


class _BlockSums(NamedTuple):
    """Sums over tokens, for one matrix of a stack."""

    outputs: Float[Tensor, "n1 r2 n2"]
    lambda_d: Float[Tensor, "R"]


def _block_gradients(
    d: Float[Tensor, "t N"],
    M: Kronecker,
    z: Float[Tensor, "t R"],
    lambda_d: Float[Tensor, "R"],
    before: _BlockSums | None,
) -> tuple[Float[Tensor, "t R"], _BlockSums]:
    """The gradient of z, and the sums with those of the tokens before."""
    n1, n2 = M.left.shape[1], M.right.shape[1]
    P = _half_way(z * lambda_d, M).permute(1, 2, 0)
    D, h = d.view(len(d), n1, n2).transpose(0, 1), _apply_transpose_block(d, M)
    outputs = torch.bmm(P, D) if before is None else before.outputs.baddbmm_(P, D)
    d_lambda_d = (h * z).sum(0)
    return h * lambda_d, _BlockSums(outputs, d_lambda_d if before is None else before.lambda_d + d_lambda_d)


def as_chunks(tokens: Tensor, size: int) -> Sequence[Tensor]:
    """Chunks of tokens; the tensor itself where that is all."""
    return [tokens] if len(tokens) <= size else tokens.split(size)


def _split(values: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return [values] if len(sizes) == 1 else values.split(sizes, -1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


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


def scaled(stack: Stack, scale: Float[Tensor, "N"]) -> Stack:
    """The stack of `M diag(scale)`."""
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


def _apply_transpose_at_once(x: Float[Tensor, "*T N"], stack: Stack) -> Float[Tensor, "*T R"]:
    return as_dtype(_joined([_apply_transpose_block(x, M) for M in stack]), x.dtype)


def _apply_transpose_block(x: Float[Tensor, "*T N"], M: Kronecker) -> Float[Tensor, "*T R"]:
    left, right, diagonal, rows = M
    (r1, n1), (r2, n2) = left.shape, right.shape
    inner = (x * diagonal).reshape(-1, n2) @ right.T
    tokens = inner.shape[0] // n1
    # A plain product starts faster than a batched one.
    product = left @ inner if tokens == 1 else torch.bmm(left.expand(tokens, r1, n1), inner.view(tokens, n1, r2))
    product = product.view(*x.shape[:-1], r1 * r2)
    return product if rows == r1 * r2 else product[..., :rows]


def _apply_at_once(z: Float[Tensor, "*T R"], stack: Stack) -> Float[Tensor, "*T N"]:
    parts = _split(z, [M.rows for M in stack])
    blocks = [_without_diagonal(part, M) * M.diagonal for part, M in zip(parts, stack, strict=True)]
    x = sum(blocks[1:], blocks[0])
    return as_dtype(x, z.dtype)


def _without_diagonal(z: Float[Tensor, "*T R"], M: Kronecker) -> Float[Tensor, "*T N"]:
    """`z (left (x) right)`."""
    n1, (r2, n2) = M.left.shape[1], M.right.shape
    return (_half_way(z, M).view(-1, r2) @ M.right).view(*z.shape[:-1], n1 * n2)


def _half_way(z: Float[Tensor, "*T R"], M: Kronecker) -> Float[Tensor, "t n1 r2"]:
    """`left^T z` with the values of each token as a matrix (r1, r2)."""
    (r1, n1), r2 = M.left.shape, len(M.right)
    padded = z if M.rows == r1 * r2 else pad(z, (0, r1 * r2 - M.rows))
    wide = as_dtype(padded, M.left.dtype)
    tokens = z.numel() // M.rows
    # A plain product starts faster than a batched one.
    if tokens == 1:
        return (M.left.T @ wide.reshape(r1, r2))[None]
    return torch.bmm(M.left.T.expand(tokens, n1, r1), wide.reshape(tokens, r1, r2))


def chunk_tokens(tokens: int, stack: Stack) -> int:
    """Tokens in a chunk; all chunks are of about the same length."""
    (_, n1), (r2, n2) = stack[0].left.shape, stack[0].right.shape
    most = max(1, _CHUNK_VALUES // (n1 * (n2 + r2)))
    return max(1, ceil(tokens / max(1, ceil(tokens / most))))


def _in_chunks(x: Tensor, stack: Stack) -> bool:
    if not x.is_cpu or torch.compiler.is_compiling() or is_batched(x):
        return False
    return x.numel() // x.shape[-1] * stack[0].diagonal.shape[0] > _FEW_VALUES


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
            return _apply_transpose_in_triton(x, stack) if transpose else _apply_in_triton(x, stack)
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
        (r1, n1), (r2, n2), tokens = left.shape, right.shape, len(x)
        signed = torch.mul(x, diagonal, out=wide)
        half = torch.mm(signed.view(-1, n2), right.T, out=inner[: tokens * n1 * r2].view(-1, r2)).view(tokens, n1, r2)
        repeated = left.expand(tokens, r1, n1)
        if rows == r1 * r2 and block.is_contiguous() and block.dtype == half.dtype:
            torch.bmm(repeated, half, out=block.view(tokens, r1, r2))
        else:
            block.copy_(torch.bmm(repeated, half).view(tokens, -1)[:, :rows])


def apply_chunk(z: Float[Tensor, "t R"], stack: Stack, into: Float[Tensor, "t N"]) -> None:
    """`into = z M` for a few tokens."""
    wide, inner = _scratch(len(z), stack)
    # Sum half-precision results in float32 and round once.
    total = into if into.dtype == wide.dtype else torch.empty_like(into, dtype=wide.dtype)
    for index, (M, block) in enumerate(zip(stack, z.split([M.rows for M in stack], 1), strict=True)):
        (r1, n1), (r2, n2), tokens = M.left.shape, M.right.shape, len(z)
        missing = r1 * r2 - M.rows
        padded = pad(block.to(wide.dtype), (0, missing)) if missing else block.to(wide.dtype)
        half = inner[: tokens * n1 * r2]
        torch.bmm(M.left.T.expand(tokens, n1, r1), padded.reshape(tokens, r1, r2), out=half.view(tokens, n1, r2))
        product = wide if index else total
        torch.mm(half.view(-1, r2), M.right, out=product.view(-1, n2))
        if index:
            total.addcmul_(product, M.diagonal)
        else:
            total.mul_(M.diagonal)
    if total is not into:
        into.copy_(total)


def _apply_transpose_in_triton(x: Float[Tensor, "*T N"], stack: Stack) -> Float[Tensor, "*T R"]:
    from ..ops.triton.kronecker import kronecker

    flat = x.reshape(-1, x.shape[-1])
    found = [kronecker(flat, M.left, M.right, M.diagonal, None)[:, : M.rows] for M in stack]
    return torch.cat(found, 1).view(*x.shape[:-1], -1)


def _apply_in_triton(z: Float[Tensor, "*T R"], stack: Stack) -> Float[Tensor, "*T N"]:
    from ..ops.triton.kronecker import kronecker

    parts = z.reshape(-1, z.shape[-1]).split([M.rows for M in stack], 1)
    padded = [pad(part, (0, len(M.left) * len(M.right) - M.rows)) for part, M in zip(parts, stack, strict=True)]
    found = [kronecker(part, M.left.T, M.right.T, None, M.diagonal) for part, M in zip(padded, stack, strict=True)]
    return sum(found[1:], found[0]).view(*z.shape[:-1], -1)


def _scratch(chunk: int, stack: Stack) -> tuple[Tensor, Tensor]:
    """Buffers for one chunk: on the wide side, and between the two products."""
    diagonal, (_, n1) = stack[0].diagonal, stack[0].left.shape
    widest = max(M.right.shape[0] for M in stack)
    wide = scratch("kronecker wide", (chunk, len(diagonal)), diagonal.dtype, diagonal.device)
    return wide, scratch("kronecker inner", (chunk * n1 * widest,), diagonal.dtype, diagonal.device)
