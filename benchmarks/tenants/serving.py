"""One batch with a row of every tenant: its time beside the frozen base's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from benchmarks.parts import PartsLinear
from benchmarks.quality.models import SentenceReader
from benchmarks.speed.timing import Step, interleaved, ratios, spread

ROUNDS = 15


def one_adapter_a_row(model: nn.Module, count: int) -> Callable[..., Any]:
    """The adapted backbone with so many copies of its adapter, one for each row: PEFT's, or of `benchmarks.parts`."""
    if isinstance(model, PeftModel):
        names = ["default", *(f"{number}" for number in range(1, count))]
        for name in names[1:]:
            model.add_adapter(name, model.peft_config["default"])
        return partial(model.requires_grad_(False).eval(), adapter_names=names)
    for layer in model.modules():
        if isinstance(layer, PartsLinear):
            for name, values in [*layer.named_parameters(recurse=False)]:
                # Broadcast over the tokens of a row.
                setattr(layer, name, nn.Parameter(values.detach().repeat(count, 1, 1)))
    return model


def features_of(backbone: Callable[..., Any], batch: dict[str, Tensor]) -> Step:
    """A pass up to where a head begins."""
    return torch.no_grad()(partial(SentenceReader(backbone, nn.Identity()).features, batch))


def times_the_base(step: Step, base: Step) -> list[float]:
    """Quartile, median and quartile of the ratio of their times, taken in turns."""
    seconds, _ = interleaved({"base": base, "step": step}, ROUNDS)
    return [round(value, 3) for value in spread(ratios(seconds["step"], seconds["base"]))]
