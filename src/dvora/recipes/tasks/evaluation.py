"""How good a model is on rows with labels, and how good the simplest guess is."""

from collections import Counter
from collections.abc import Sequence
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..models.bases import device_of
from ..settings import Settings
from .metrics import class_metrics, number_metrics
from .task import Task, bytes_of, without_bytes

HIDDEN = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "tokens")


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


def evaluated(trainer: Any, dataset: Dataset) -> dict[str, float]:
    """The loss and the task's metrics on a dataset."""
    size, values = bytes_of(dataset), trainer.evaluate(without_bytes(dataset))
    metrics = {name[5:]: value for name, value in values.items() if name.startswith("eval_") and name[5:] not in HIDDEN}
    if size:
        # In a unit that does not depend on the tokenizer.
        metrics["bits_per_byte"] = values["eval_loss"] * values["eval_tokens"] / log(2) / size
    return metrics


def simplest_guess_on(
    train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], labels: Sequence[str]
) -> dict[str, Any]:
    """Metrics on held-out rows of always predicting the commonest class of the training rows, or their mean."""
    values, right = [row["label"] for row in train], [row["label"] for row in held_out]
    if labels:
        commonest = Counter(values).most_common(1)[0][0]
        return {"guess": labels[commonest], **class_metrics([commonest] * len(right), right)}
    mean = fmean(values)
    return {"guess": mean, **number_metrics([mean] * len(right), right)}
