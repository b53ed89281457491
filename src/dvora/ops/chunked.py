"""Work on tokens in float32 by chunks that stay in cache: rescaling half precision, and sums of products.

Dimensions: T tokens, N their width.
"""

import torch
from torch import Tensor

from .annotations import Float
from .buffers import scratch
from .dtypes import as_dtype, norm_dtype

CHUNK_VALUES = 2**17
"""Values in a chunk."""


def widened(name: str, tokens: Float[Tensor, "T N"]) -> Float[Tensor, "T N"]:
    """The tokens in float32 or wider: themselves, or a copy in the reused buffer of that name."""
    dtype = norm_dtype(tokens.dtype)
    return tokens if tokens.dtype == dtype else scratch(name, tokens.shape, dtype, tokens.device).copy_(tokens)


def rescaled(
    tokens: Float[Tensor, "T N"],
    gain: Float[Tensor, "N"],
    offset: Float[Tensor, "N"] | None = None,
    update: Float[Tensor, "T N"] | None = None,
) -> Float[Tensor, "T N"]:
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
    count = max(1, CHUNK_VALUES // tokens.shape[-1])
    for part, of_tokens in zip(result.split(count), tokens.split(count), strict=True):
        wide = widened("wide tokens", of_tokens)
        if update is not None:
            wide = widened("wide update", part).addcmul_(wide, gain)
        else:
            wide = wide * gain if wide is of_tokens else wide.mul_(gain)
        part.copy_(wide if offset is None else wide.add_(offset))
    return result


def sum_of_products(
    a: Float[Tensor, "T N"], b: Float[Tensor, "T N"], into: Float[Tensor, "N"] | None = None
) -> Float[Tensor, "N"]:
    """`sum_t a b`, in float32 or wider; not differentiable.

    Args:
        a, b: tokens.
        into: the tensor to write to; None makes one.
    """
    dtype, tokens = norm_dtype(a.dtype), max(1, CHUNK_VALUES // a.shape[1])
    if len(a) <= tokens or not a.is_cpu:
        return torch.sum(as_dtype(a, dtype) * b, 0, out=into)
    # One sum for each token of a chunk, so that the sums stay in cache.
    sums = scratch("sums", (tokens, a.shape[1]), dtype, a.device).zero_()
    for part_a, part_b in zip(a.split(tokens), b.split(tokens), strict=True):
        sums[: len(part_a)].addcmul_(widened("wide a", part_a), widened("wide b", part_b))
    return torch.sum(sums, 0, out=into)
