"""Is an adapted model right? A table of what passes and what fails, with numbers, for DVoRA, LoRA, DoRA and VeRA."""

import torch
from peft import PeftModel

from ..dense_rebuild import adapters_of, subjects
from .checks import CHECKS
from .findings import Examination, Finding
from .model import Examined, Inputs, Loss, recorded, restored

__all__ = ["Examination", "Finding", "examine"]


def examine(
    model: PeftModel,
    inputs: Inputs,
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    layers: int | None = None,
    fresh_process: bool = True,
) -> Examination:
    """Check that a model with a LoRA, DoRA, VeRA or DVoRA adapter is right; the model is left as it was.

    It holds the model's weights twice while it runs.

    Args:
        model: with an active adapter, trained or not.
        inputs: a small batch, two rows or more: keyword arguments of the model's forward, or its only argument. With
            labels among them, gradients are those of the model's own loss.
        loss: of the model's outputs, where the model has none of its own; left out, a random sum of its outputs.
        optimizer: that trains the model, to look at its learning rates.
        layers: check no more than so many layers one by one, spread evenly over the model, since each is built as
            a dense matrix some twenty times; None: all. Checks of the whole model see every layer.
        fresh_process: also save the adapter and load it in another process.

    Returns:
        A finding for each check.

    Raises:
        TypeError: the model is not of PEFT, or returns no tensor of numbers.
        ValueError: no layer has an active adapter of a known method, adapters are merged, or `layers` is below one.
    """
    adapters_of(model)
    every = subjects(model)
    if not every:
        raise ValueError("no layer has an active LoRA, DoRA, VeRA or DVoRA adapter that can be rebuilt")
    if layers is not None and layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    count = len(every) if layers is None else min(layers, len(every))
    some = tuple(every[place * len(every) // count] for place in range(count))
    left_out = {*(["learning rates"] if optimizer is None else []), *([] if fresh_process else ["save and load"])}
    with restored(model), torch.no_grad():
        examined = Examined(model, inputs, loss, optimizer, every, some, *recorded(model, inputs, every))
        findings = [check(examined) for name, check in CHECKS.items() if name not in left_out]
    return Examination(tuple(findings), len(every), count)
