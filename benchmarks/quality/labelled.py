"""The tasks by name: sentences with a class or a number to predict; the one with generated answers is in `cron.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.quality.cron import CronExpressions
from benchmarks.quality.evaluation import Evaluation
from benchmarks.quality.grid import TaskPlan
from benchmarks.quality.heads import best_head, kept_head
from benchmarks.quality.models import LOADERS, SentenceReader
from materials import data, many_classes
from materials.batches import Sentences, batches_by_length, in_order, random_batches, unlabelled
from materials.models import minilm, mpnet
from materials.splits import TextTask

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Part:
    """Rows of one split."""

    sentences: Sentences
    labels: Tensor

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(ids) for ids in self.sentences.ids]


class Labelled:
    """Sentences with a class or a number to predict.

    Args:
        name, plan: of the task.
        parts: "train" for the head, "batches" for everything else, "validation" and "test".
        outputs: classes, or 1 for a number.
    """

    def __init__(self, name: str, plan: TaskPlan, parts: dict[str, Part], outputs: int) -> None:
        self.name, self.plan, self.parts, self.outputs = name, plan, parts, outputs

    def model(self, base: str) -> SentenceReader:
        """The backbone with a head fitted to its features (of the float32 base where `base` is quantised)."""
        whole = "float32" if base == "nf4" else base
        reader = SentenceReader(LOADERS[self.plan.model](whole), nn.Linear(0, 0)).eval()
        of_model = "" if self.plan.model == "minilm" else f"-{self.plan.model}"
        name = f"{self.name}-{self.plan.train}-{self.plan.validation}{of_model}"
        head = kept_head(name if whole == "float32" else f"{name}-{whole}", partial(self.fitted, reader, "train"))
        backbone = reader.backbone if base == whole else LOADERS[self.plan.model](base)
        return SentenceReader(backbone, head).eval()

    def fitted(self, reader: SentenceReader, part: str) -> nn.Linear:
        """The best head for the features of a part, of the penalty with the lowest validation loss."""
        features, checked = (self._everything(reader.features, of) for of in (part, "validation"))
        losses = partial(self._losses, labels=self.parts["validation"].labels)
        return best_head(features, self.parts[part].labels, self.outputs, lambda head: losses(head(checked)).mean())

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

    def evaluate(self, model: Callable[[dict[str, Tensor]], Tensor], part: str) -> Evaluation:
        """Accuracy or correlation."""
        return self.evaluate_outputs(self._everything(model, part), part)

    def commonest(self, part: str) -> Evaluation:
        """What knows nothing of the sentences."""
        train = self.parts["train"].labels
        if self.outputs == 1:
            outputs = torch.zeros(1, dtype=torch.float64) + train.double().mean()
        else:
            outputs = (torch.bincount(train, minlength=self.outputs).double() / len(train)).log()
        return self.evaluate_outputs(outputs.expand(len(self.parts[part].labels), -1), part)

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

    @torch.no_grad()
    def _everything(self, model: Callable[[dict[str, Tensor]], Tensor], part: str) -> Tensor:
        """(rows, outputs) of all rows of a split, in their order."""
        batches = batches_by_length(self.parts[part].lengths(), EVALUATION_BATCH)
        return in_order(torch.cat([model(self._batch(part, rows)) for rows in batches]), batches)

    def _batch(self, part: str, rows: np.ndarray) -> dict[str, Tensor]:
        ids, mask = self.parts[part].sentences.batch(rows)
        return {"ids": ids, "mask": mask}


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation; 0 where either is constant."""
    if predicted.std() == 0 or not np.isfinite(predicted).all():
        return 0.0
    return float(np.corrcoef(predicted, labels)[0, 1])


SOURCES: Mapping[str, Callable[[], TextTask]] = {
    "movie_ratings": data.movie_ratings,
    "countries": many_classes.countries,
    "webster_fields": many_classes.webster_fields,
    "code_languages": many_classes.code_languages,
    "wordnet_topics": many_classes.wordnet_topics,
}
"""Tasks with labels by their name in a grid."""


TOKENIZERS: Mapping[str, Callable[[], Path]] = {"minilm": minilm, "mpnet": mpnet}
"""Where they are, by the model of a plan."""
Problem = Labelled | CronExpressions
"""One task: a model to start from, batches, a loss, and an evaluation of a split."""


@lru_cache(maxsize=2)
def problem(name: str, plan: TaskPlan) -> Problem:
    """The task of a name, its data read and tokenised once a process."""
    if name == "cron_expressions":
        return CronExpressions(plan)
    task, tokenizer = SOURCES[name](), AutoTokenizer.from_pretrained(TOKENIZERS[plan.model]())

    def part(of: str, rows: slice) -> Part:
        some = getattr(task, of)
        return Part(unlabelled(some.texts[rows], tokenizer), torch.from_numpy(some.labels[rows]))

    parts = {of: part(of, slice(getattr(plan, of))) for of in ("train", "validation", "test")}
    fresh = slice(0 if plan.with_train else plan.train, plan.train + plan.fresh)
    parts["batches"] = part("train", fresh) if plan.fresh else parts["train"]
    return Labelled(name, plan, parts, len(task.classes) or 1)
