"""Sums over tokens of products, for which no product of all tokens is made."""

import torch
from torch import Tensor

from .annotations import Float
from .buffers import scratch
from .chunked import CHUNK_VALUES, widened
from .dtypes import norm_dtype


def sum_of_products(a: Float[Tensor, "T N"], b: Float[Tensor, "T N"]) -> Float[Tensor, "N"]:
    """`sum_t a b`, in float32 or wider."""
    dtype, tokens = norm_dtype(a.dtype), max(1, CHUNK_VALUES // a.shape[1])
    if torch.is_grad_enabled() or len(a) <= tokens:
        return (a.to(dtype) * b).sum(0)
    # As many sums as a chunk has tokens, which stay in the processor's cache.
    sums = scratch("sums", (tokens, a.shape[1]), dtype, a.device).zero_()
    for part_a, part_b in zip(a.split(tokens), b.split(tokens), strict=True):
        sums[: len(part_a)].addcmul_(widened("wide a", part_a), widened("wide b", part_b))
    return sums.sum(0)
