"""Which tensors the Triton kernels take."""

from importlib.util import find_spec

import torch
from torch import Tensor

_HAS_TRITON = find_spec("triton") is not None
_TF32 = (8, 0)
"""The compute capability from which on there are tensor cores for TF32."""


def runs_triton(tensor: Tensor) -> bool:
    """Whether the tensor is on a CUDA device that the kernels are written for, and Triton is installed."""
    return tensor.is_cuda and _HAS_TRITON and torch.cuda.get_device_capability(tensor.device) >= _TF32
