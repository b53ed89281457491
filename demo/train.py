"""Training: first the head on the frozen model, then DVoRA and the head together."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from peft import PeftModel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from demo.model import CLASSES, SentenceClassifier
from materials.batches import Sentences, batches_by_length, in_order, random_batches

EVALUATION_BATCH = 64
# Strengths of the penalty on the head's squared weights, tried on the validation sentences.
HEAD_PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Settings:
    """How DVoRA is trained. The learning rates were chosen on the validation sentences.

    Args:
        passes: how often each training sentence is seen.
        batch: sentences in a step.
        lambda_rate: highest learning rate of lambda_b and lambda_d.
        magnitude_rate: highest learning rate of the magnitude.
        head_rate: highest learning rate of the head.
        warmup: share of the steps in which the rates rise; after it they fall to zero along a cosine.
        evaluations: evaluations on the validation sentences, besides the one before the first step.
    """

    passes: int
    batch: int
    lambda_rate: float
    magnitude_rate: float
    head_rate: float
    warmup: float
    evaluations: int


@dataclass
class History:
    """Training losses (`steps`, one a step) and validation results (`checks`: step, loss, accuracy)."""

    steps: list[float] = field(default_factory=list)
    checks: list[tuple[int, float, float]] = field(default_factory=list)
    seconds: float = 0.0


@torch.no_grad()
def encode(model: Callable[[Tensor, Tensor], Tensor], data: Sentences) -> Tensor:
    """(N, outputs) of a model (or of its `features`) for all sentences, in their order."""
    rows_of_batches = batches_by_length([len(ids) for ids in data.ids], EVALUATION_BATCH)
    return in_order(torch.cat([model(*data.batch(rows)) for rows in rows_of_batches]), rows_of_batches)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the rows whose highest logit is at the label."""
    return (logits.argmax(1) == labels).double().mean().item()


def train_head(model: SentenceClassifier, train: Sentences, validation: Sentences) -> None:
    """Fit the head on the frozen model to convergence: a logistic regression.

    The penalty with the best validation accuracy is kept. The problem is convex, so the start does not matter.
    """
    features, checked = encode(model.features, train), encode(model.features, validation)
    # A penalty needs features of one scale; a linear head can take that scale in afterwards.
    mean, scale = features.mean(0), features.std(0)
    features, checked = (features - mean) / scale, (checked - mean) / scale
    heads = [_logistic_regression(features, train.labels, penalty) for penalty in HEAD_PENALTIES]
    best = max(heads, key=lambda head: accuracy(head(checked), validation.labels))
    with torch.no_grad():
        model.classifier.weight.copy_(best.weight / scale)
        model.classifier.bias.copy_(best.bias - (best.weight / scale) @ mean)


def _logistic_regression(features: Tensor, labels: Tensor, penalty: float) -> nn.Linear:
    head: nn.Linear = nn.utils.skip_init(nn.Linear, features.shape[1], len(CLASSES))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = cross_entropy(head(features), labels) + penalty * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


def train_adapter(
    model: PeftModel, train: Sentences, validation: Sentences, settings: Settings, generator: np.random.Generator
) -> History:
    """Train the adapter and the head; returns the losses and accuracies. The model is left in evaluation mode."""
    lengths = [len(ids) for ids in train.ids]
    batches = [rows for _ in range(settings.passes) for rows in random_batches(lengths, settings.batch, generator)]
    optimizer = torch.optim.AdamW(parameter_groups(model, settings))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=len(batches),
        pct_start=settings.warmup,
        cycle_momentum=False,
        final_div_factor=1e3,
    )
    check_after = {round(len(batches) * (number + 1) / settings.evaluations) for number in range(settings.evaluations)}
    history = History()
    _check(model, validation, history)
    with _progress() as progress:
        task = progress.add_task("Training", total=len(batches), loss=float("nan"), accuracy=history.checks[-1][2])
        for step, rows in enumerate(batches, start=1):
            start = time.perf_counter()
            loss = cross_entropy(model(*train.batch(rows)), train.labels[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            history.steps.append(loss.item())
            history.seconds += time.perf_counter() - start
            if step in check_after:
                _check(model, validation, history)
            recent = float(np.mean(history.steps[-20:]))
            progress.update(task, advance=1, loss=recent, accuracy=history.checks[-1][2])
    model.eval()
    return history


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, object]]:
    """The trainable parameters in three groups, each with its own learning rate."""
    groups: dict[str, list[nn.Parameter]] = {"lambda": [], "magnitude": [], "head": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = next((kind for kind in ("lambda", "magnitude") if f"dvora_{kind}" in name), "head")
            groups[kind].append(parameter)
    return [
        {"params": groups["lambda"], "lr": settings.lambda_rate, "weight_decay": 0.01},
        # Decay would pull the rows of the weights towards zero, not towards the pre-trained model.
        {"params": groups["magnitude"], "lr": settings.magnitude_rate, "weight_decay": 0.0},
        {"params": groups["head"], "lr": settings.head_rate, "weight_decay": 0.01},
    ]


def _check(model: PeftModel, validation: Sentences, history: History) -> None:
    model.eval()
    logits = encode(model, validation)
    loss = cross_entropy(logits, validation.labels).item()
    history.checks.append((len(history.steps), loss, accuracy(logits, validation.labels)))
    model.train()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("validation {task.fields[accuracy]:.1%}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
