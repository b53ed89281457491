"""The task of the examples with several processes: MiniLM learns to tell good movie reviews from bad ones."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from benchmarks.data import movie_reviews
from benchmarks.models import minilm
from benchmarks.splits import Texts
from demo.batches import labelled
from demo.model import SentenceClassifier, load_classifier

Batch = tuple[Tensor, Tensor, Tensor]
"""Token numbers, mask and labels."""


def classifier() -> SentenceClassifier:
    """The frozen model, with a head of zeros: the same bits in every process."""
    return load_classifier(minilm())


def batches(count: int, size: int, part: str = "train", start: int = 0) -> list[Batch]:
    """The same batches in every process, from one place of a part on; each padded to its longest sentence."""
    texts = _parts()[part]
    end = start + count * size
    sentences = labelled(
        Texts(texts.texts[start:end], texts.labels[start:end]), AutoTokenizer.from_pretrained(minilm())
    )
    rows = torch.arange(len(sentences)).split(size)
    return [(*sentences.batch(each.numpy()), sentences.labels[each]) for each in rows]


@cache
def _parts() -> dict[str, Texts]:
    """The test part stays with the demo."""
    task = movie_reviews()
    return {"train": task.train, "validation": task.validation}


def part_of(batch: Batch, rank: int, processes: int) -> Batch:
    """One process's share of a batch."""
    ids, mask, labels = (tensor.chunk(processes)[rank] for tensor in batch)
    return ids, mask, labels


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy."""
    ids, mask, labels = batch
    return cross_entropy(model(ids, mask), labels)


@torch.no_grad()
def score(model: nn.Module, held_out: list[Batch]) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    logits = torch.cat([model(ids, mask) for ids, mask, _ in held_out])
    labels = torch.cat([labels for _, _, labels in held_out])
    model.train()
    return cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that is trained, by name."""
    return {
        name.removeprefix("module."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far apart two trainings ended, as a share of how far the second moved; of all tensors the worst.

    AdamW's first steps are as long for a small gradient as for a large one, and so is what rounding makes of one that
    is nearly zero: 1e-3 is common in float32, where the same training in float64 differs by 1e-12.
    """
    return max(
        ((found[name] - expected[name]).abs().max() / (expected[name] - start[name]).abs().max()).item()
        for name in expected
    )
