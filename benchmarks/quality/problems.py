"""The tasks by name: sentences and images with labels here, those of SmolLM2 in `language.py`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.quality.backbones import LOADERS, ImageReader, SentenceReader
from benchmarks.quality.evaluation import Batch, Evaluation, Problem
from benchmarks.quality.grid import TaskPlan
from benchmarks.quality.heads import fitted_head
from benchmarks.quality.language import CronExpressions, Plays
from materials import data, many_classes
from materials.batches import Sentences, batches_by_length, in_order, random_batches, unlabelled
from materials.models import minilm
from materials.splits import ImageTask, TextTask

EVALUATION_BATCH = 64
QUANTISED = ("nf4", "int8")


@dataclass(frozen=True)
class Part:
    """Rows of one split: tokens or images, and labels."""

    inputs: Sentences | np.ndarray
    labels: Tensor

    def lengths(self) -> list[int]:
        """Of each row; images are all alike."""
        return [len(each) for each in (self.inputs.ids if isinstance(self.inputs, Sentences) else self.inputs)]


class Labelled:
    """Sentences or images with a class or a number to predict.

    Args:
        name, plan: of the task.
        parts: "train" for the head, "batches" for everything else, "validation" and "test".
        outputs: classes, or 1 for a number.
    """

    def __init__(self, name: str, plan: TaskPlan, parts: dict[str, Part], outputs: int) -> None:
        self.name, self.plan, self.parts, self.outputs = name, plan, parts, outputs

    def model(self, base: str) -> SentenceReader | ImageReader:
        """The backbone with a head fitted to its features (of the float32 base where `base` is quantised)."""
        whole = "float32" if base in QUANTISED else base
        reader = self._reader(LOADERS[self.plan.model](whole))
        parts = [
            (self.parts[part].labels, lambda part=part: self._everything(reader.features, part))
            for part in ("train", "validation")
        ]
        name = f"{self.name}-{self.plan.train}-{self.plan.validation}"
        head = fitted_head(name if whole == "float32" else f"{name}-{whole}", parts, self.outputs)
        backbone = reader.backbone if base == whole else LOADERS[self.plan.model](base)
        return self._reader(backbone, head)

    @property
    def reference(self) -> np.ndarray | None:
        """The ratings of the test rows."""
        return self.parts["test"].labels.numpy() if self.outputs == 1 else None

    def batches(self, seed: int, steps: int) -> list[np.ndarray]:
        """Sentences of like length go together, so that little of a batch is padding."""
        generator = np.random.default_rng(seed)
        lengths = self.parts["batches"].lengths()
        chosen: list[np.ndarray] = []
        while len(chosen) < steps:
            # Not the last, shorter batch: every step reads as many rows.
            chosen += [
                rows for rows in random_batches(lengths, self.plan.batch, generator) if len(rows) == self.plan.batch
            ]
        return chosen[:steps]

    def loss(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        """Cross-entropy or half the squared error."""
        return self._losses(model(self._batch("batches", rows)), self.parts["batches"].labels[rows]).mean()

    def evaluate(self, model: nn.Module, part: str) -> Evaluation:
        """Accuracy or correlation."""
        return self.evaluate_outputs(self._everything(model, part), part)

    def evaluate_outputs(self, outputs: Tensor, part: str) -> Evaluation:
        """The metrics of (rows, outputs) on a split."""
        labels = self.parts[part].labels
        loss = self._losses(outputs, labels).mean().item()
        if self.outputs == 1:
            predicted = outputs[:, 0].double().numpy()
            return Evaluation(loss, pearson(predicted, labels.double().numpy()), predicted.astype(np.float32))
        correct = (outputs.argmax(1) == labels).numpy()
        return Evaluation(loss, float(correct.mean()), correct)

    def _losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self.outputs == 1:
            return (outputs[:, 0] - labels).square() / 2
        return nn.functional.cross_entropy(outputs, labels, reduction="none")

    def _reader(self, backbone: nn.Module, head: nn.Linear | None = None) -> SentenceReader | ImageReader:
        reader = ImageReader if self.plan.model == "vit" else SentenceReader
        return reader(backbone, head or nn.Linear(0, 0)).eval()

    @torch.no_grad()
    def _everything(self, model: Callable[[Batch], Tensor], part: str) -> Tensor:
        """(rows, outputs) of all rows of a split, in their order."""
        batches = batches_by_length(self.parts[part].lengths(), EVALUATION_BATCH)
        return in_order(torch.cat([model(self._batch(part, rows)) for rows in batches]), batches)

    def _batch(self, part: str, rows: np.ndarray) -> Batch:
        inputs = self.parts[part].inputs
        if isinstance(inputs, np.ndarray):
            return {"pixels": torch.from_numpy(inputs[rows])}
        ids, mask = inputs.batch(rows)
        return {"ids": ids, "mask": mask}


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation; 0 where either is constant."""
    if predicted.std() == 0 or not np.isfinite(predicted).all():
        return 0.0
    return float(np.corrcoef(predicted, labels)[0, 1])


SOURCES: Mapping[str, Callable[[], TextTask | ImageTask]] = {
    each.__name__: each
    for each in (
        *(data.movie_reviews, data.movie_ratings, data.tweets, data.wordnet10, data.fashion_mnist),
        *(many_classes.countries, many_classes.webster_fields, many_classes.code_languages),
        many_classes.wordnet_topics,
    )
}
"""Tasks with labels by their name in a grid."""
LANGUAGE: Mapping[str, Callable[[TaskPlan], Problem]] = {"shakespeare": Plays, "cron_expressions": CronExpressions}


@lru_cache(maxsize=2)
def problem(name: str, plan: TaskPlan) -> Problem:
    """The task of a name, its data read and tokenised once a process."""
    if name in LANGUAGE:
        return LANGUAGE[name](plan)
    task = SOURCES[name]()

    def part(of: str, chosen: slice) -> Part:
        rows = getattr(task, of)
        inputs = rows.pixels[chosen] if plan.model == "vit" else _sentences(rows.texts[chosen])
        return Part(inputs, torch.from_numpy(rows.labels[chosen]))

    parts = {name: part(name, slice(getattr(plan, name))) for name in ("train", "validation", "test")}
    fresh = slice(plan.train, plan.train + plan.fresh)
    parts["batches"] = part("train", fresh) if plan.fresh else parts["train"]
    return Labelled(name, plan, parts, len(task.classes) or 1)


def _sentences(texts: Sequence[str]) -> Sentences:
    return unlabelled(texts, AutoTokenizer.from_pretrained(minilm()))
