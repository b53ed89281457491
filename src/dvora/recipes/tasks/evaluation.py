"""How good a model is on rows with labels, and how good the simplest guess is."""

from collections import Counter
from collections.abc import Sequence
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainingArguments

from ..models.bases import device_of
from ..settings import Settings
from .head_alone import labels_of
from .task import Task, bytes_of, without_bytes

HIDDEN = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "tokens")


class Evaluated(NamedTuple):
    """A model on rows: its metrics, and the numbers of each row that two models are compared by (`Task.rows`)."""

    metrics: dict[str, Any]
    rows: Any


def evaluator(model: nn.Module, task: Task, settings: Settings, folder: Path) -> Any:
    """A trainer that only evaluates, in the batches and the precision of the run; it writes nothing to the folder."""
    trainer = Trainer(
        model,
        TrainingArguments(**common_arguments(settings, folder)),
        data_collator=task.collator,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.reduce_logits,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def common_arguments(settings: Settings, folder: Path) -> dict[str, Any]:
    """Arguments that all trainers of a run share; they write to the folder."""
    gpu = device_of(settings).type == "cuda"
    return {
        "output_dir": str(folder),
        "per_device_eval_batch_size": settings.batch_size,
        "bf16": settings.mixed_precision == "bf16",
        "fp16": settings.mixed_precision == "fp16" and gpu,
        "use_cpu": settings.cpu,
        "dataloader_pin_memory": gpu,
        # PEFT's wrapper hides them from the trainer.
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
    }


def evaluated(trainer: Any, task: Task, dataset: Dataset) -> Evaluated:
    """The loss and the task's metrics on a dataset."""
    size, found = bytes_of(dataset), trainer.predict(without_bytes(dataset))
    values = {name.removeprefix("test_"): value for name, value in found.metrics.items()}
    metrics = {name: value for name, value in values.items() if name not in HIDDEN}
    if size:
        # In a unit that does not depend on the tokenizer.
        metrics["bits_per_byte"] = values["loss"] * values["tokens"] / log(2) / size
    return Evaluated(metrics, task.rows(found))


def evaluated_outputs(task: Task, outputs: Tensor, dataset: Dataset) -> Evaluated:
    """The same of outputs for every row, or for every token with a tag, without a loss."""
    predicted, labels = outputs.detach().float().numpy(), labels_of(dataset).numpy()
    if "labels" not in dataset.column_names:
        return _scored(task, predicted, labels)
    ends = np.cumsum([sum(tag >= 0 for tag in row) for row in dataset["labels"]])[:-1]
    return _scored(task, np.split(predicted.argmax(-1), ends), np.split(labels, ends))


def simplest_guess_on(
    task: Task, train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], labels: Sequence[str]
) -> Evaluated:
    """The same of always predicting the commonest class of the training rows, or their mean."""
    values, right = [row["label"] for row in train], np.array([row["label"] for row in held_out])
    guess: Any = Counter(values).most_common(1)[0][0] if labels else fmean(values)
    output = np.eye(len(labels))[guess] if labels else np.array([guess])
    found = _scored(task, np.tile(output, (len(right), 1)), right)
    return found._replace(metrics={"guess": labels[guess] if labels else guess, **found.metrics})


def _scored(task: Task, predicted: Any, labels: Any) -> Evaluated:
    found = EvalPrediction(predicted, labels)
    return Evaluated(task.compute_metrics(found), task.rows(found))
