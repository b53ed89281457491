"""The six tasks behind one interface: a model to start from, batches, a loss, and an evaluation of a split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.quality.backbones import LOADERS, ImageReader, SentenceReader, TextModel
from benchmarks.quality.grid import TaskPlan
from benchmarks.quality.heads import fitted_head
from materials import data, many_classes
from materials.batches import Sentences, batches_by_length, in_order, random_batches, unlabelled
from materials.models import minilm, smollm2
from materials.splits import ImageTask, TextTask

Batch = dict[str, Tensor]
EVALUATION_BATCH = 64
WINDOW = 128


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a model on one split.

    Args:
        loss: mean of the training loss.
        score: accuracy, Pearson's correlation, or bits per byte (where less is better).
        items: one value a row, from which the score can be computed again: correct (1) or not (0), the predicted
            number, or the nats of a window.
    """

    loss: float
    score: float
    items: np.ndarray = field(repr=False)


class Problem(Protocol):
    """One task."""

    @property
    def reference(self) -> np.ndarray | None:
        """(test items,) what items are compared with: true numbers, or bytes; None: each item is correct or not."""
        ...

    def model(self, base: str) -> SentenceReader | ImageReader | TextModel:
        """The pretrained model, with the head that is best for its frozen features."""
        ...

    def batches(self, seed: int, steps: int) -> list[np.ndarray]:
        """Rows of every step, the same for every method."""
        ...

    def loss(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        """Mean loss of training rows."""
        ...

    def evaluate(self, model: nn.Module, part: str) -> Evaluation:
        """The metrics of the model on "validation" or "test"."""
        ...


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
        """The backbone with a head fitted to its features (of the whole float32 base, whatever `base` is)."""
        reader = self._reader(LOADERS[self.plan.model]("float32"))
        parts = [
            (self.parts[part].labels, lambda part=part: self._everything(reader.features, part))
            for part in ("train", "validation")
        ]
        head = fitted_head(f"{self.name}-{self.plan.train}-{self.plan.validation}", parts, self.outputs)
        backbone = reader.backbone if base == "float32" else LOADERS[self.plan.model](base)
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


class Plays:
    """Shakespeare in windows of tokens; whole plays are held out."""

    def __init__(self, plan: TaskPlan) -> None:
        self.plan = plan
        library, tokenizer = data.shakespeare(), AutoTokenizer.from_pretrained(smollm2())
        every = {"train": plan.train, "validation": plan.validation, "test": plan.test}
        self.windows = {
            part: _windows(list(getattr(library, part).values()), tokenizer, count) for part, count in every.items()
        }
        self.bytes = {
            part: np.array([len(tokenizer.decode(window[1:]).encode()) for window in self.windows[part]])
            for part in ("validation", "test")
        }

    def model(self, base: str) -> TextModel:
        """SmolLM2."""
        return TextModel(LOADERS["smollm2"](base)).eval()

    @property
    def reference(self) -> np.ndarray:
        """Bytes of each test window's text."""
        return self.bytes["test"]

    def batches(self, seed: int, steps: int) -> list[np.ndarray]:
        """Random windows, none twice."""
        order = np.random.default_rng(seed).permutation(len(self.windows["train"]))
        return list(order[: steps * self.plan.batch].reshape(steps, self.plan.batch))

    def loss(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        """Nats a token."""
        nats: Tensor = model({"ids": self.windows["train"][rows]}).mean()
        return nats

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> Evaluation:
        """Bits per byte."""
        windows = self.windows[part]
        nats = torch.cat([model({"ids": some}).double().sum(1) for some in windows.split(4)]).numpy()
        bits = nats.sum() / np.log(2) / self.bytes[part].sum()
        return Evaluation(nats.sum() / (len(windows) * (WINDOW - 1)), float(bits), nats.astype(np.float32))


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


@lru_cache(maxsize=2)
def problem(name: str, plan: TaskPlan) -> Problem:
    """The task of a name, its data read and tokenised once a process."""
    if name == "shakespeare":
        return Plays(plan)
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


def _windows(works: list[str], tokenizer: object, count: int) -> Tensor:
    """(windows, 128) tokens: windows of each work, spread evenly over it, as many of each as it is long."""
    ids = [torch.tensor(tokenizer(work, verbose=False)["input_ids"]) for work in works]  # type: ignore[operator]
    whole = torch.cat([each[: len(each) // WINDOW * WINDOW].reshape(-1, WINDOW) for each in ids])
    if count >= len(whole):
        return whole
    return whole[torch.linspace(0, len(whole) - 1, count).round().long()]
