"""Products in bfloat16 on processors that have no instructions for them: in float32, and rounded once.

That is what the instructions compute, but for the order of the sums. PyTorch's own kernels take thirty times as long.
"""

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.library import Library


def has_instructions() -> bool:
    """Whether this processor multiplies in bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiply_in_float32_where_slow() -> Library | None:
    """`multiply_in_float32` on processors without the instructions, as long as the result is kept."""
    return None if has_instructions() else multiply_in_float32()


def multiply_in_float32() -> Library:
    """Replace PyTorch's products of matrices on the CPU, as long as the result is kept."""
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        # That kernels are replaced is what is wanted.
        warnings.simplefilter("ignore")
        for name, product in (("mm", torch.mm), ("bmm", torch.bmm), ("addmm", torch.addmm), ("baddbmm", torch.baddbmm)):
            library.impl(name, partial(_rounded, product), "CPU")
    return library


def _rounded(product: Callable[..., Tensor], *operands: Tensor, **factors: float) -> Tensor:
    dtype = operands[0].dtype
    wide = [each.float() for each in operands] if dtype == torch.bfloat16 else operands
    left, right = wide[-2:]
    # Into a given tensor: another operation of PyTorch's, which is not replaced.
    out = left.new_empty(*left.shape[:-1], right.shape[-1])
    return product(*wide, **factors, out=out).to(dtype)
