"""Whether this process can run the Triton kernels, which are off unless asked for: they have not run on a GPU yet."""

from importlib.util import find_spec

import torch

from ...extras import how_to_install

_TF32 = (8, 0)
"""The first compute capability with tensor cores for TF32."""


def check_triton() -> None:
    """Check that the kernels can run on every CUDA device of this process.

    Raises:
        ValueError: Triton or a CUDA device is missing, or a device is too old.
    """
    if find_spec("triton") is None:
        advice = how_to_install("triton")
        raise ValueError(f"use_triton=True needs the package triton, which is not installed; {advice}; or use False")
    if not torch.cuda.is_available():
        raise ValueError("use_triton=True needs a CUDA device, and PyTorch sees none: use False")
    for device in range(torch.cuda.device_count()):
        if (capability := torch.cuda.get_device_capability(device)) < _TF32:
            raise ValueError(
                f"use_triton=True needs compute capability {_TF32[0]}.{_TF32[1]} or newer, and cuda:{device} has "
                f"{capability[0]}.{capability[1]}: use False"
            )
