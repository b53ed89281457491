"""A Kronecker product of two small matrices applied to rows: the structured projections in one kernel.

For each row x, seen as a matrix X (n1, n2) after `in_scale`:

    y = out_scale * flatten(left X right^T) = out_scale * (left (x) right) (in_scale * x)

A program takes several tokens, so that `right` multiplies a tall matrix; it transposes the result in registers and
multiplies it by `left`, summing over blocks of n1. Nothing between x and y goes through global memory.

Dimensions: T tokens, n1 n2 in, r1 r2 out.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..annotations import Float

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TILE = 4096
"""Values of a program's largest tile: 32 a thread, which leaves registers for four programs on a multiprocessor."""
_LARGEST_RIGHT = 8192
_LONGEST = 256
"""Values of `right` and of one of its sides up to which all tiles fit into registers and 99 KiB of shared memory."""


class Blocks(NamedTuple):
    """The tiles of a program, powers of two, with the warps that share them and the stages of its software pipeline."""

    tokens: int
    n1: int
    n2: int
    r1: int
    r2: int
    warps: int
    stages: int


def supports(left: tuple[int, int], right: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether `kronecker` takes matrices of these shapes, (r1, n1) and (r2, n2), for rows of `dtype`."""
    r2, n2 = map(_padded, right)
    return dtype in _DTYPES and min(*left, *right) > 0 and max(r2, n2) <= _LONGEST and r2 * n2 <= _LARGEST_RIGHT


def kronecker(
    x: Float[Tensor, "T N"],
    left: Float[Tensor, "R1 N1"],
    right: Float[Tensor, "R2 N2"],
    in_scale: Float[Tensor, "N"] | None,
    out_scale: Float[Tensor, "M"] | None,
) -> Float[Tensor, "T M"]:
    """`((x * in_scale) (left (x) right)^T) * out_scale`, summed in float32, in the dtype of `x`.

    In half precision both products run in TF32, which holds every bfloat16 and float16 value and lets nothing overflow
    between them; in float32 they are IEEE products. The result is rounded once.

    Args:
        x: bfloat16, float16 or float32; its rows may be strided.
        left, right: in any floating dtype.
        in_scale, out_scale: in any dtype, or None for ones. Every program reads its part of them again, so signs are
            best kept in int8.

    Raises:
        ValueError: `supports` is False for these sizes and dtype, or the sizes do not fit together.
    """
    (r1, n1), (r2, n2), T = left.shape, right.shape, x.shape[0]
    if not supports((r1, n1), (r2, n2), x.dtype):
        raise ValueError(
            f"left {tuple(left.shape)} and right {tuple(right.shape)} have no kernel for {x.dtype}; ask `supports` "
            "first and use the two products of the eager path"
        )
    if x.shape[1] != n1 * n2:
        raise ValueError(f"x must have {n1} * {n2} = {n1 * n2} columns for these factors, got {x.shape[1]}")
    y = x.new_empty((T, r1 * r2))
    if not T:
        return y
    x = x if x.stride(-1) == 1 else x.contiguous()
    blocks = blocks_of(T, (r1, n1), (r2, n2), x.dtype)
    with torch.cuda.device_of(x):
        _kronecker_kernel[(triton.cdiv(T, blocks.tokens) * triton.cdiv(r1, blocks.r1),)](
            x,
            left.contiguous(),
            right.contiguous(),
            None if in_scale is None else in_scale.contiguous(),
            None if out_scale is None else out_scale.contiguous(),
            y,
            T,
            x.stride(0),
            N1=n1,
            N2=n2,
            R1=r1,
            R2=r2,
            TOKENS=blocks.tokens,
            BLOCK_N1=blocks.n1,
            BLOCK_N2=blocks.n2,
            BLOCK_R1=blocks.r1,
            BLOCK_R2=blocks.r2,
            PRECISION=precision_of(x.dtype),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            enable_fp_fusion=True,
        )
    return y


def blocks_of(T: int, left: tuple[int, int], right: tuple[int, int], dtype: torch.dtype) -> Blocks:
    """Tiles chosen from the sizes: several tokens for each read of scales and factors, without spilling registers."""
    (r1, n1), (r2, n2) = left, right
    n2, r2 = _padded(n2), _padded(r2)
    # A projection reads its wide rows once; an expansion splits its wide rows over programs at little extra cost.
    widest = 64 if r1 <= n1 else 32
    r1 = max(16, min(_padded(r1), widest, _TILE // r2))
    tokens = max(1, _TILE // (16 * max(n2, r2, r2 * r1 // 16)))
    tokens = min(tokens, 8, triton.next_power_of_2(T))
    return Blocks(tokens, 16, n2, r1, r2, *((8, 2) if dtype == torch.float32 else (4, 3)))


def precision_of(dtype: torch.dtype) -> str:
    """The precision of products of float32 operands: IEEE if the rows are float32, else TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _padded(size: int) -> int:
    # Tensor cores take no smaller operand.
    return max(16, int(triton.next_power_of_2(size)))


@triton.jit
def _operand(values, PRECISION: tl.constexpr):
    """The values as an operand of a product, in float32."""
    values = values.to(tl.float32)
    if PRECISION == "tf32":
        # Tensor cores drop the last 13 bits: without this every product would be too small by up to 0.1 %.
        values = ((values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return values


@triton.jit
def _kronecker_kernel(
    x_ptr,
    left_ptr,
    right_ptr,
    in_scale_ptr,
    out_scale_ptr,
    y_ptr,
    T,
    x_stride,
    N1: tl.constexpr,
    N2: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N1: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_R1: tl.constexpr,
    BLOCK_R2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program, across = tl.program_id(0), tl.cdiv(R1, BLOCK_R1)
    # 64 bits: a long batch of a wide layer has more than 2**31 values.
    first = (program // across).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)
    present = first + token < T
    r1 = (program % across) * BLOCK_R1 + tl.arange(0, BLOCK_R1)
    n2 = tl.arange(0, BLOCK_N2)
    r2 = tl.arange(0, BLOCK_R2)

    right = tl.load(right_ptr + r2[:, None] * N2 + n2[None, :], (r2 < R2)[:, None] & (n2 < N2)[None, :], other=0)
    right = tl.trans(_operand(right, PRECISION))
    total = tl.zeros((TOKENS * BLOCK_R2, BLOCK_R1), tl.float32)
    for start in range(0, N1, BLOCK_N1):
        n1 = start + tl.arange(0, BLOCK_N1)
        place = n1[:, None] * N2 + n2[None, :]
        inside = (n1 < N1)[:, None] & (n2 < N2)[None, :]
        x = tl.load(
            x_ptr + first * x_stride + token[:, None, None] * x_stride + place[None, :, :],
            present[:, None, None] & inside[None, :, :],
            other=0,
        ).to(tl.float32)
        if in_scale_ptr is not None:
            x *= tl.load(in_scale_ptr + place, inside, other=0).to(tl.float32)[None, :, :]
        x = _operand(tl.reshape(x, (TOKENS * BLOCK_N1, BLOCK_N2)), PRECISION)
        rows = tl.dot(x, right, input_precision=PRECISION)
        # (T n1, r2) -> (T r2, n1)
        rows = tl.permute(tl.reshape(rows, (TOKENS, BLOCK_N1, BLOCK_R2)), (0, 2, 1))
        rows = _operand(tl.reshape(rows, (TOKENS * BLOCK_R2, BLOCK_N1)), PRECISION)
        left = tl.load(left_ptr + r1[:, None] * N1 + n1[None, :], (r1 < R1)[:, None] & (n1 < N1)[None, :], other=0)
        total = tl.dot(rows, tl.trans(_operand(left, PRECISION)), total, input_precision=PRECISION)

    y = tl.permute(tl.reshape(total, (TOKENS, BLOCK_R2, BLOCK_R1)), (0, 2, 1))
    place = r1[:, None] * R2 + r2[None, :]
    inside = (r1 < R1)[:, None] & (r2 < R2)[None, :]
    if out_scale_ptr is not None:
        y *= tl.load(out_scale_ptr + place, inside, other=0).to(tl.float32)[None, :, :]
    tl.store(
        y_ptr + first * (R1 * R2) + token[:, None, None] * (R1 * R2) + place[None, :, :],
        y.to(y_ptr.dtype.element_ty),
        present[:, None, None] & inside[None, :, :],
    )
