"""Whether the rates of our folders fit a model's rows: python -m benchmarks.yardstick --rates

The magnitude has the scale of a weight's rows. Our folders were written for rows of norm one, since nobody has read the
real models for them.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from benchmarks.yardstick.experiments import Experiment, of_task
from benchmarks.yardstick.tasks import METHOD, Task
from dvora.training import MAGNITUDE_SHARE, magnitude_rate


def describe(task: Task) -> str:
    """The rates of a task's folders beside those that the model's rows ask for, as lines of text."""
    model = _model(task)
    ours = [experiment for experiment in of_task(task.name) if experiment.method == METHOD]
    return "\n".join(compare(experiment, model) for experiment in ours)


def compare(experiment: Experiment, model: nn.Module) -> str:
    """The magnitude's rate of one folder beside that of `dvora.training.recommended_rates`.

    Returns:
        One line.
    """
    wanted = magnitude_rate(torch.cat(list(row_norms(experiment, model))), experiment.rate)
    median = wanted / (MAGNITUDE_SHARE * experiment.rate)
    return (
        f"{experiment.task} {experiment.name}: rows of median norm {median:.3g}; recommended for the magnitude "
        f"{wanted:.3g}, in the folder {experiment.magnitude_rate:.3g}"
    )


def row_norms(experiment: Experiment, model: nn.Module) -> Iterable[Tensor]:
    """The norms of the rows of the layers that an experiment adapts, layer by layer.

    Raises:
        ValueError: the model has none of them.
    """
    endings = tuple(f".{name}" for name in experiment.target_modules)
    layers = [layer for name, layer in model.named_modules() if name.endswith(endings) and isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError(f"the model has no layer named {', '.join(experiment.target_modules)}, which are the targets")
    return (layer.weight.detach().float().norm(dim=1) for layer in layers)


def _model(task: Task) -> nn.Module:
    """The model that a task adapts, on the CPU."""
    if task.name == "image-gen":
        from diffusers import Flux2Transformer2DModel  # type: ignore[import-not-found, unused-ignore]

        images: nn.Module = Flux2Transformer2DModel.from_pretrained(
            task.models[0], subfolder="transformer", torch_dtype=torch.bfloat16
        )
        return images
    from transformers import AutoModelForCausalLM

    language: nn.Module = AutoModelForCausalLM.from_pretrained(task.models[0], dtype=torch.bfloat16)
    return language
