"""The output of an adapted layer from its two halves, and its gradients, each in one pass over memory.

    y = base_output + (g - 1) * (base_output - bias) + scale * low_rank

Everything is computed in float32 (float64 for float64) and rounded once, to the dtype of the result. Sums over tokens
run in a fixed order that depends on the sizes alone, so they are the same bits at every run.

Dimensions: T tokens, O out, P partial sums.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..annotations import Float

_TILE_BYTES = 4096
"""A tile of one tensor: two loads of 16 bytes a thread, and few enough registers for many programs at a time."""
_WIDTH = 128
"""Columns of a program: whole cache lines, and tall tiles, which seldom read the vectors again."""
WARPS = 4
PROGRAMS = 512
"""How many programs the backward pass aims at: as many as the largest current devices run at once."""


class CombineGradients(NamedTuple):
    """What `combine_backward` returns."""

    base: Float[Tensor, "T O"]
    """`grad_output * g`, in the dtype of the base output."""
    scaled: Float[Tensor, "T O"]
    """`grad_output * scale`, in the dtype of the low-rank product."""
    gain: Float[Tensor, "O"]
    """`sum_t grad_output * (base_output - bias)`, in the dtype of the gain."""
    scale: Float[Tensor, "O"] | None
    """`sum_t grad_output * low_rank`, in the dtype of the gain; None without a low-rank product."""


def combine(
    base_output: Float[Tensor, "T O"],
    low_rank: Float[Tensor, "T O"],
    gain_minus_one: Float[Tensor, "O"],
    scale: Float[Tensor, "O"],
    bias: Float[Tensor, "O"] | None,
) -> Float[Tensor, "T O"]:
    """`base_output + (g - 1) * (base_output - bias) + scale * low_rank`, in the dtype of the base output.

    Args:
        base_output: `x W^T + bias`; its rows may be strided.
        low_rank: `((x A^T) lambda_d) B^T`; its rows may be strided.
        gain_minus_one: `g - 1`, float32 (float64 for float64).
        scale: `g beta`, of the same dtype.
        bias: the base's, in any dtype, or None.
    """
    T, out = base_output.shape
    y = torch.empty((T, out), dtype=base_output.dtype, device=base_output.device)
    if not y.numel():
        return y
    base_output, low_rank = _row_strided(base_output), _row_strided(low_rank)
    rows, columns = tile_of(T, out, y.dtype)
    with torch.cuda.device_of(y):
        _combine_kernel[(triton.cdiv(T, rows) * triton.cdiv(out, columns),)](
            base_output,
            low_rank,
            gain_minus_one.contiguous(),
            scale.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            T,
            out,
            base_output.stride(0),
            low_rank.stride(0),
            WIDE=wide(y.dtype),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return y


def combine_backward(
    grad_output: Float[Tensor, "T O"],
    base_output: Float[Tensor, "T O"],
    low_rank: Float[Tensor, "T O"] | None,
    gain_minus_one: Float[Tensor, "O"],
    scale: Float[Tensor, "O"],
    bias: Float[Tensor, "O"] | None,
    programs: int = PROGRAMS,
) -> CombineGradients:
    """Gradients of `combine`.

    Args:
        grad_output: the gradient with respect to the result; its rows may be strided.
        base_output, gain_minus_one, scale, bias: as in the forward pass.
        low_rank: as in the forward pass, or None where the caller computes the gradient of the scale.
        programs: how many programs to aim at; the order of the sums depends on it.
    """
    T, out = base_output.shape
    base = torch.empty((T, out), dtype=base_output.dtype, device=base_output.device)
    scaled = torch.empty_like(base, dtype=(grad_output if low_rank is None else low_rank).dtype)
    (rows, columns), chunk = tile_of(T, out, base.dtype), chunk_of(T, out, base.dtype, programs)
    chunks = triton.cdiv(T, chunk)
    partial = gain_minus_one.new_empty((1 if low_rank is None else 2, chunks, out))
    if base.numel():
        grad_output, base_output = _row_strided(grad_output), _row_strided(base_output)
        low_rank = None if low_rank is None else _row_strided(low_rank)
        with torch.cuda.device_of(base):
            _combine_backward_kernel[(chunks * triton.cdiv(out, columns),)](
                grad_output,
                base_output,
                low_rank,
                gain_minus_one.contiguous(),
                scale.contiguous(),
                None if bias is None else bias.contiguous(),
                base,
                scaled,
                partial,
                T,
                out,
                chunk,
                chunks,
                grad_output.stride(0),
                base_output.stride(0),
                0 if low_rank is None else low_rank.stride(0),
                WIDE=wide(base.dtype),
                ROWS=rows,
                COLUMNS=columns,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    sums = partial.sum(1)
    return CombineGradients(base, scaled, sums[0], None if low_rank is None else sums[1])


def tile_of(T: int, out: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of a tile: powers of two, no larger than the tensor needs."""
    columns = min(_WIDTH, triton.next_power_of_2(out))
    return max(1, min(_TILE_BYTES // dtype.itemsize // columns, triton.next_power_of_2(T))), columns


def chunk_of(T: int, out: int, dtype: torch.dtype, programs: int) -> int:
    """Rows that a program of the backward pass sums: whole tiles, for about as many programs as asked for."""
    rows, columns = tile_of(T, out, dtype)
    chunks = max(1, programs // triton.cdiv(out, columns))
    return max(1, int(triton.cdiv(triton.cdiv(T, rows), chunks))) * rows


def wide(dtype: torch.dtype) -> Any:
    """The dtype, of triton, that a kernel for tensors of `dtype` computes in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _row_strided(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, so that a slice of a fused projection is not copied."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@triton.jit
def _combine_kernel(
    base_ptr,
    low_rank_ptr,
    gain_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    T,
    out,
    base_stride,
    low_rank_stride,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program, across = tl.program_id(0), tl.cdiv(out, COLUMNS)
    column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    # 64 bits: a long batch of a wide layer has more than 2**31 values.
    first = (program // across).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    inside = (first + row < T) & (column < out)[None, :]

    gain_minus_one = tl.load(gain_ptr + column, column < out, other=0).to(WIDE)
    scale = tl.load(scale_ptr + column, column < out, other=0).to(WIDE)
    base = tl.load(base_ptr + first * base_stride + row * base_stride + column[None, :], inside, other=0).to(WIDE)
    low_rank = tl.load(
        low_rank_ptr + first * low_rank_stride + row * low_rank_stride + column[None, :], inside, other=0
    ).to(WIDE)
    unbiased = base
    if bias_ptr is not None:
        unbiased -= tl.load(bias_ptr + column, column < out, other=0).to(WIDE)[None, :]
    y = base + (gain_minus_one[None, :] * unbiased + scale[None, :] * low_rank)
    tl.store(y_ptr + first * out + row * out + column[None, :], y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _combine_backward_kernel(
    grad_output_ptr,
    base_ptr,
    low_rank_ptr,
    gain_ptr,
    scale_ptr,
    bias_ptr,
    base_gradient_ptr,
    scaled_ptr,
    partial_ptr,
    T,
    out,
    chunk,
    chunks,
    grad_output_stride,
    base_stride,
    low_rank_stride,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program, across = tl.program_id(0), tl.cdiv(out, COLUMNS)
    column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    part = (program // across).to(tl.int64)
    gain = 1 + tl.load(gain_ptr + column, column < out, other=0).to(WIDE)
    scale = tl.load(scale_ptr + column, column < out, other=0).to(WIDE)
    bias = tl.zeros((COLUMNS,), WIDE)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, column < out, other=0).to(WIDE)

    # Accumulate whole tiles and sum over their rows once: warps synchronise only at the end.
    gain_sums = tl.zeros((ROWS, COLUMNS), WIDE)
    scale_sums = tl.zeros((ROWS, COLUMNS), WIDE)
    row = tl.arange(0, ROWS)[:, None]
    for start in range(0, chunk, ROWS):
        first = part * chunk + start
        inside = (first + row < T) & (column < out)[None, :]
        grad_output = tl.load(
            grad_output_ptr + first * grad_output_stride + row * grad_output_stride + column[None, :], inside, other=0
        ).to(WIDE)
        base = tl.load(base_ptr + first * base_stride + row * base_stride + column[None, :], inside, other=0).to(WIDE)
        gain_sums += grad_output * (base - bias[None, :])
        if low_rank_ptr is not None:
            low_rank = tl.load(
                low_rank_ptr + first * low_rank_stride + row * low_rank_stride + column[None, :], inside, other=0
            )
            scale_sums += grad_output * low_rank.to(WIDE)
        here = first * out + row * out + column[None, :]
        tl.store(base_gradient_ptr + here, (grad_output * gain[None, :]).to(base_gradient_ptr.dtype.element_ty), inside)
        tl.store(scaled_ptr + here, (grad_output * scale[None, :]).to(scaled_ptr.dtype.element_ty), inside)

    tl.store(partial_ptr + part * out + column, tl.sum(gain_sums, 0), column < out)
    if low_rank_ptr is not None:
        tl.store(partial_ptr + (chunks + part) * out + column, tl.sum(scale_sums, 0), column < out)
