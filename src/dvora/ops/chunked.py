"""Work on tokens in float32 by chunks that stay in cache: rescaling half precision, and sums of products.

Dimensions: T tokens, N their width. A factor or a sum is one for all tokens (N), or one for each row of a batch
(*B N, with a one for every other dimension of the tokens).
"""

import torch
from torch import Tensor

from .annotations import Float
from .buffers import scratch
from .dtypes import as_dtype, norm_dtype

CHUNK_VALUES = 2**17
"""Values in a chunk."""


def widened(name: str, tokens: Float[Tensor, "*T N"]) -> Float[Tensor, "*T N"]:
    """The tokens in float32 or wider: themselves, or a copy in the reused buffer of that name."""
    dtype = norm_dtype(tokens.dtype)
    return tokens if tokens.dtype == dtype else scratch(name, tokens.shape, dtype, tokens.device).copy_(tokens)


def rescaled(
    tokens: Float[Tensor, "*T N"],
    gain: Float[Tensor, "*B N"],
    offset: Float[Tensor, "*B N"] | None = None,
    update: Float[Tensor, "*T N"] | None = None,
) -> Float[Tensor, "*T N"]:
    """`update + tokens gain + offset` in the dtype of the tokens, rounded once; not differentiable.

    Args:
        tokens: in any dtype, usually half precision.
        gain, offset: float32 or wider.
        update: in the dtype of the tokens; the result may be written into it.
    """
    if tokens.numel() <= CHUNK_VALUES or not tokens.is_cpu:
        if offset is None:
            return (tokens * gain).to(tokens.dtype) if update is None else update.addcmul_(tokens, gain)
        wide = torch.addcmul(offset, tokens, gain)
        return (wide if update is None else wide.add_(update)).to(tokens.dtype)
    result = torch.empty_like(tokens, memory_format=torch.contiguous_format) if update is None else update.contiguous()
    count = max(1, CHUNK_VALUES // tokens[0].numel())
    for start in range(0, len(tokens), count):
        rows = slice(start, start + count)
        of_gain = gain if gain.dim() == 1 else gain[rows]
        of_offset = offset if offset is None or offset.dim() == 1 else offset[rows]
        of_tokens, part = tokens[rows], result[rows]
        wide = widened("wide tokens", of_tokens)
        if update is not None:
            wide = widened("wide update", part).addcmul_(wide, of_gain)
        else:
            wide = wide * of_gain if wide is of_tokens else wide.mul_(of_gain)
        part.copy_(wide if of_offset is None else wide.add_(of_offset))
    return result


def sum_of_products(
    a: Float[Tensor, "*T N"], b: Float[Tensor, "*T N"], into: Float[Tensor, "*B N"] | None = None
) -> Float[Tensor, "*B N"]:
    """`sum_t a b`, in float32 or wider; not differentiable.

    Args:
        a, b: tokens.
        into: the tensor to write to, for the sums over all tokens or over those of each row; None makes one for all.
    """
    if into is not None and into.dim() > 1:
        return _sums_by_row(a, b, into)
    dtype, tokens = norm_dtype(a.dtype), max(1, CHUNK_VALUES // a.shape[1])
    if len(a) <= tokens or not a.is_cpu:
        return torch.sum(as_dtype(a, dtype) * b, 0, out=into)
    # One sum for each token of a chunk, so that the sums stay in cache.
    sums = scratch("sums", (tokens, a.shape[1]), dtype, a.device).zero_()
    for part_a, part_b in zip(a.split(tokens), b.split(tokens), strict=True):
        sums[: len(part_a)].addcmul_(widened("wide a", part_a), widened("wide b", part_b))
    return torch.sum(sums, 0, out=into)


def _sums_by_row(
    a: Float[Tensor, "*T N"], b: Float[Tensor, "*T N"], into: Float[Tensor, "*B N"]
) -> Float[Tensor, "*B N"]:
    inner = tuple(range(1, a.dim() - 1))
    count = max(1, CHUNK_VALUES * len(a) // max(1, a.numel())) if a.is_cpu else max(1, len(a))
    for part_a, part_b, sums in zip(a.split(count), b.split(count), into.split(count), strict=True):
        products = as_dtype(part_a, into.dtype) * part_b
        sums.copy_(products.sum(inner, keepdim=True) if inner else products)
    return into
