"""A model that is trained for a while, and is then as it was before."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Train a model inside, however that ends: afterwards its values, and what trainers put on it, are those of before.

    It stays on the device that it was moved to. The values that are trained, and all buffers, are held on the CPU
    meanwhile; the frozen ones are not, since no optimizer has them.
    """
    attributes = dict(vars(model))
    values = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _changing(model)}
    try:
        yield
    finally:
        # Mixed precision replaces `forward`; a model that is marked as prepared would not be prepared again.
        vars(model).clear()
        vars(model).update(attributes)
        with torch.no_grad():
            for name, tensor in _changing(model):
                # Without one from before it is a buffer that the first pass made, of what never changes.
                if name in values:
                    _put_back(tensor, values[name])
        model.zero_grad(set_to_none=True)
        # Trainers are in cycles; what hooks of theirs are on the parameters goes with them.
        gc.collect()


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    yield from model.named_buffers()


def _put_back(tensor: Tensor, value: Tensor) -> None:
    # Buffers that nobody has written to stay untouched: some are shared, or prepared for fast passes.
    if not torch.equal(tensor.detach().cpu(), value):
        tensor.copy_(value)
