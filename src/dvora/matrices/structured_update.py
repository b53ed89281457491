"""The update of tokens by a stack of Kronecker products: added in evaluation, differentiated in training.

Dimensions: T tokens, N = n1 n2 the wide side, R the narrow one; t tokens of a chunk. Matrices as in `kronecker`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.annotations import Float
from ..ops.dtypes import as_dtype
from .kronecker import (
    Kronecker,
    Stack,
    apply,
    apply_in_triton,
    apply_transpose_block,
    as_matrices,
    chunk_tokens,
    fits_triton,
    in_chunks,
    is_few,
    joined_ranks,
    sandwich,
    scaled,
    split_ranks,
    without_diagonal,
)


def add_product(
    z: Float[Tensor, "*T R"], stack: Stack, onto: Float[Tensor, "*T N"] | None, use_triton: bool = False
) -> Float[Tensor, "*T N"]:
    """`onto + z M`, written into `onto`; a new tensor in the dtype of `z` without one. Not differentiable."""
    if onto is None:
        return apply(z, stack, use_triton)
    if z.is_cuda and use_triton and fits_triton(z, stack):
        return onto.add_(apply_in_triton(z, stack))
    if not in_chunks(z, stack):
        return _added_at_once(z, stack, onto)
    tokens, outputs = z.reshape(-1, z.shape[-1]), onto.view(-1, onto.shape[-1])
    chunk = chunk_tokens(len(tokens), stack)
    for of_z, into in zip(tokens.split(chunk), outputs.split(chunk), strict=True):
        _added_at_once(of_z, stack, into)
    return onto


def prepared_add_product(stack: Stack, use_triton: bool = False) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`add_product`, also with a stack scaled by row; quick for one token, as (1, R), to outputs of any shape."""
    if stack[0].diagonal.dim() > 1:
        return _prepared_by_row(stack)

    # Without shapes: annotations would be made anew in every call.
    def add(z: Tensor, onto: Tensor | None) -> Tensor:
        M = stack[0]
        # With more matrices than one the rows of the first are fewer than a token's values.
        if z.numel() != M.rows or onto is None:
            return add_product(z, stack, onto, use_triton)
        return onto.addcmul_(without_diagonal(z, M).view(1, -1), M.diagonal)

    return add


def _prepared_by_row(stack: Stack) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`_added_by_row` with a stack; quick for one token a row."""
    M, transpose = stack[0], stack[0].left.T
    values, quick = len(M.diagonal) * M.rows, len(stack) == 1 and is_few(M.diagonal.numel())

    def add(z: Tensor, onto: Tensor | None) -> Tensor:
        if not quick or onto is None or z.numel() != values:
            return _added_by_row(z, onto, stack)
        return onto.addcmul_(sandwich(transpose, as_matrices(z, M), M.right).view(onto.shape), M.diagonal)

    return add


def _added_by_row(z: Float[Tensor, "*T R"], onto: Float[Tensor, "*T N"] | None, stack: Stack) -> Float[Tensor, "*T N"]:
    """`add_product` with a stack that is scaled by row of a batch, by chunks of rows."""
    diagonal, batch = stack[0].diagonal, z.shape[0]
    wide = stack[0].left.new_zeros(*z.shape[:-1], diagonal.shape[-1]) if onto is None else onto
    rows = batch
    if in_chunks(z, stack):
        tokens = z.numel() // (batch * z.shape[-1])
        rows = max(1, chunk_tokens(batch * tokens, stack) // tokens)
    if rows == batch:
        _added_at_once(z, stack, wide)
    else:
        for start in range(0, batch, rows):
            part = slice(start, start + rows)
            _added_at_once(z[part], tuple(M._replace(diagonal=M.diagonal[part]) for M in stack), wide[part])
    return as_dtype(wide, z.dtype) if onto is None else wide


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
    inner, scaled_stack = as_dtype(lambda_d, wide), scaled(stack, scale)
    d_z: list[Tensor] = []
    sums: list[_BlockSums] = []
    for of_d, of_z in zip(_as_chunks(d, chunk), _as_chunks(z, chunk), strict=True):
        of_d, of_z = as_dtype(of_d, wide), as_dtype(of_z, wide)
        before: Sequence[_BlockSums | None] = sums or [None] * len(stack)
        blocks = zip(scaled_stack, split_ranks(of_z, stack), split_ranks(inner, stack), before, strict=True)
        found = [_block_gradients(of_d, *block) for block in blocks]
        sums = [of_block for _, of_block in found]
        d_z.append(as_dtype(joined_ranks([of_block for of_block, _ in found]), z.dtype))
    for index, (total, M) in enumerate(zip(sums, stack, strict=True)):
        outputs = total.outputs.mul_(M.right).sum(1).flatten()
        d_scale.addcmul_(outputs, M.diagonal) if index else torch.mul(outputs, M.diagonal, out=d_scale)
    return d_z[0] if len(d_z) == 1 else torch.cat(d_z), joined_ranks([total.lambda_d for total in sums])


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
    P = torch.bmm(M.left.T.expand(len(d), n1, len(M.left)), as_matrices(z * lambda_d, M)).permute(1, 2, 0)
    D, h = d.view(len(d), n1, n2).transpose(0, 1), apply_transpose_block(d, M)
    outputs = torch.bmm(P, D) if before is None else before.outputs.baddbmm_(P, D)
    d_lambda_d = (h * z).sum(0)
    return h * lambda_d, _BlockSums(outputs, d_lambda_d if before is None else before.lambda_d + d_lambda_d)


def _added_at_once(z: Float[Tensor, "*T R"], stack: Stack, onto: Float[Tensor, "*T N"]) -> Float[Tensor, "*T N"]:
    for M, block in zip(stack, split_ranks(z, stack), strict=True):
        onto.addcmul_(without_diagonal(block, M), M.diagonal)
    return onto


def _as_chunks(tokens: Tensor, size: int) -> Sequence[Tensor]:
    """Chunks of tokens; the tensor itself where that is all."""
    return [tokens] if len(tokens) <= size else tokens.split(size)
