"""The task of the examples with several processes: MiniLM learns to classify movie reviews as good or bad."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerBase

from materials.data import movie_reviews
from materials.models import minilm
from materials.splits import Texts

MAX_TOKENS = 56

Batch = tuple[Tensor, Tensor, Tensor]
"""Token numbers, mask and labels."""


class SentenceClassifier(nn.Module):
    """An encoder whose token vectors are averaged and classified. Its head starts as zeros, so it draws no numbers."""

    def __init__(self, encoder: BertModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.utils.skip_init(nn.Linear, encoder.config.hidden_size, 2)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(batch, 2) logits; ids and mask are (batch, tokens), mask is 0 at the padding."""
        tokens = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].to(tokens.dtype)
        logits: Tensor = self.classifier((tokens * weights).sum(1) / weights.sum(1))
        return logits


def classifier() -> SentenceClassifier:
    """The frozen model, with a head of zeros: the same bits in every process, and no dropout."""
    encoder = BertModel.from_pretrained(
        minilm(), add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return SentenceClassifier(encoder).eval()


def batches(count: int, size: int, part: str = "train", start: int = 0) -> list[Batch]:
    """The same batches in every process, from one place of a part on; each padded to its longest sentence."""
    texts, tokenizer = _parts()[part], AutoTokenizer.from_pretrained(minilm())
    ends = range(start + size, start + count * size + 1, size)
    return [_batch(texts.texts[end - size : end], texts.labels[end - size : end], tokenizer) for end in ends]


def _batch(texts: Sequence[str], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Batch:
    rows = [torch.tensor(row) for row in tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask, torch.tensor(labels)


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
