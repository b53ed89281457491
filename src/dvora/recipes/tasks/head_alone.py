"""The head alone: how far the frozen base gets without an adapter, for a run to be compared with.

What the last layer of the model's head reads is computed once for every row; a linear layer is then fitted to it (for
classes a softmax regression, for numbers a ridge regression), as strong as the validation rows prefer. It costs a
forward pass over the rows, and has no random part.

Dimensions: N rows, H features, C outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...tensors import Float
from ...whole_files import write_atomically
from ..models.bases import computing, device_of
from ..settings import Settings
from .metrics import class_metrics, number_metrics

MOST_ROWS = 20_000
"""Training rows that it is fitted on at most, spread over all of them."""
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)
"""Of the L2 penalty, on features of unit variance."""
MIDDLE = 1e-2
"""Without validation rows."""


@dataclass(frozen=True)
class HeadAlone:
    """A linear layer on frozen features.

    Args:
        weight: (C, H).
        bias: (C,).
    """

    weight: Float[Tensor, "C H"]
    bias: Float[Tensor, "C"]

    def outputs(self, features: Float[Tensor, "N H"]) -> Float[Tensor, "N C"]:
        """Logits of classes, or numbers."""
        found: Tensor = features @ self.weight.T + self.bias
        return found

    def save(self, file: Path) -> None:
        """Write it as safetensors, whole or not at all."""
        write_atomically(file, save({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}))


def read_head_alone(file: Path) -> HeadAlone:
    """One that was saved.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    values = load_file(file)
    if values.keys() != {"weight", "bias"} or values["weight"].shape[:1] != values["bias"].shape:
        raise ValueError(f"{file} is damaged: it is not a weight and a bias of one linear layer")
    return HeadAlone(values["weight"], values["bias"])


def last_layer(model: Any) -> nn.Linear | None:
    """The linear layer beside the base that gives the model's outputs; None where the head ends otherwise."""
    outputs, base = model.config.num_labels, f"{model.base_model_prefix}."
    linear = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == outputs and not name.startswith(base)
    ]
    return linear[-1] if linear else None


@torch.no_grad()
def frozen_features(model: Any, dataset: Dataset, collator: Any, settings: Settings) -> Float[Tensor, "N H"]:
    """What the last layer of the head reads of every row, in float32 on the CPU.

    Args:
        model: of transformers, without an adapter; it is left in evaluation mode on the CPU.
        dataset: the model's inputs.
        collator: makes a batch of them.
        settings: of the run: batches, device, precision.

    Raises:
        ValueError: the model has no last layer, see `last_layer`.
    """
    layer, device = last_layer(model), device_of(settings)
    if layer is None:
        raise ValueError(f"the head of {type(model).__name__} does not end in a linear layer")
    seen: dict[str, Tensor] = {}
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.update(read=inputs[0], given=output))
    # Rows of similar length together: a batch is padded to its longest.
    lengths = list(map(len, dataset["input_ids"])) if "input_ids" in dataset.column_names else [0] * len(dataset)
    order = sorted(range(len(dataset)), key=lengths.__getitem__)
    rows: list[Tensor] = []
    try:
        model.to(device).eval()
        for start in range(0, len(order), settings.batch_size):
            batch = collator([dataset[index] for index in order[start : start + settings.batch_size]])
            with computing(settings):
                logits = model(**{name: values.to(device) for name, values in batch.items() if name != "labels"}).logits
            rows.append(_read_for(logits, seen["read"], seen["given"]).float().cpu())
    finally:
        handle.remove()
        model.to("cpu")
    found = torch.cat(rows)
    return found[torch.tensor(order).argsort()]


def _read_for(logits: Float[Tensor, "N C"], read: Tensor, given: Tensor) -> Float[Tensor, "N H"]:
    """The features behind the logits: of a layer that is called on every token, those of the token that was chosen."""
    if read.dim() == 2:
        return read
    chosen = (given == logits[:, None].to(given)).all(-1).int().argmax(1)
    return read[torch.arange(len(read), device=read.device), chosen]


def fitted_head(
    model: Any, datasets: Mapping[str, Dataset], collator: Any, settings: Settings, classes: Sequence[str]
) -> tuple[HeadAlone, dict[str, dict[str, float]]]:
    """Fit the head alone, and evaluate it on the parts that were held out.

    Args:
        model: the base with its head, before anything is trained; its values stay as they are.
        datasets: inputs of "train" and, where there are rows, of "validation" and "test", with their `label`.
        collator: makes a batch of them.
        settings: of the run, which reads no fewer training rows than this does.
        classes: their names; empty for numbers.

    Returns:
        The layer, and the task's metrics by part.
    """
    train = datasets["train"]
    most = min(len(train), MOST_ROWS, (settings.max_steps or MOST_ROWS) * settings.batch_size * settings.accumulation)
    chosen = train.select(np.linspace(0, len(train) - 1, most).round().astype(int))
    parts = {"train": chosen, **{part: datasets[part] for part in ("validation", "test") if part in datasets}}
    features = {part: frozen_features(model, dataset, collator, settings) for part, dataset in parts.items()}
    labels = {part: torch.tensor(dataset.with_format(None)["label"][:]) for part, dataset in parts.items()}
    best: tuple[float, HeadAlone] | None = None
    for strength in STRENGTHS if "validation" in parts else (MIDDLE,):
        head = fitted(features["train"], labels["train"], len(classes), strength)
        score = 0.0
        if "validation" in parts:
            found = head_metrics(head.outputs(features["validation"]), labels["validation"], classes)
            score = found["accuracy"] if classes else -found["rmse"]
        if best is None or score > best[0]:
            best = score, head
    assert best is not None
    held_out = [part for part in parts if part != "train"]
    return best[1], {part: head_metrics(best[1].outputs(features[part]), labels[part], classes) for part in held_out}


def head_metrics(outputs: Float[Tensor, "N C"], labels: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """The task's metrics of a head's outputs."""
    if classes:
        return class_metrics(outputs.argmax(-1).numpy(), labels.numpy())
    return number_metrics(outputs.flatten().double().numpy(), labels.double().numpy())


def fitted(features: Float[Tensor, "N H"], labels: Tensor, classes: int, strength: float) -> HeadAlone:
    """A linear layer fitted with an L2 penalty on its weight.

    Args:
        features: of the training rows.
        labels: indices of classes, or numbers.
        classes: how many; 0 for numbers.
        strength: of the penalty.
    """
    x = features.double()
    mean, spread = x.mean(0), x.std(0, unbiased=False).clamp_min(1e-6)
    x = (x - mean) / spread
    weight, bias = (
        _softmax_regression(x, labels, classes, strength) if classes else _ridge_regression(x, labels, strength)
    )
    weight = weight / spread
    return HeadAlone(weight.float(), (bias - weight @ mean).float())


def _ridge_regression(x: Tensor, labels: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    y = labels.double()
    mean = y.mean()
    penalty = strength * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x / len(x) + penalty, x.T @ (y - mean) / len(x))[None], mean[None]


@torch.enable_grad()
def _softmax_regression(x: Tensor, labels: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = cross_entropy(x @ weight.T + bias, labels) + strength / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()
