"""Where and how precisely a trained model computes: as its run did, without gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..settings import Settings
from .bases import quiet_transformers


def device_of(settings: Settings) -> torch.device:
    """The accelerator, if there is one and the run does not keep to the CPU."""
    found = None if settings.cpu or not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
    return found or torch.device("cpu")


@contextmanager
def computing(settings: Settings) -> Iterator[None]:
    """Compute outputs in the run's precision, quietly."""
    device = device_of(settings)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.mixed_precision)
    # The Trainer has no float16 on CPUs, so no run was made with it there.
    wanted = half is not None and not (half is torch.float16 and device.type == "cpu")
    with quiet_transformers(), torch.no_grad(), torch.autocast(device.type, half, enabled=wanted):
        yield
