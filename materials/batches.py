"""From sentences to batches: sentences of like length go together, so that little of a batch is padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from materials.splits import Texts

# 95 % of the sentences are shorter than 47 tokens, and the longest has 79.
MAX_TOKENS = 56
# So many batches are cut from one random draw of sentences, sorted by length.
BATCHES_PER_POOL = 16

Rows = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Sentences:
    """Tokenised sentences.

    Args:
        ids: one list of token numbers for each sentence, without padding.
        labels: (N,) classes, int64.
        padding: the number of the padding token.
    """

    ids: tuple[list[int], ...]
    labels: Tensor
    padding: int

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Token numbers and mask, both (rows, longest of them), int64."""
        chosen = [self.ids[row] for row in rows]
        longest = max(len(ids) for ids in chosen)
        ids = torch.full((len(chosen), longest), self.padding)
        mask = torch.zeros(len(chosen), longest, dtype=torch.int64)
        for index, each in enumerate(chosen):
            ids[index, : len(each)] = torch.tensor(each)
            mask[index, : len(each)] = 1
        return ids, mask

    def first(self, count: int) -> "Sentences":
        """The first `count` sentences."""
        return Sentences(self.ids[:count], self.labels[:count], self.padding)


def labelled(part: Texts, tokenizer: PreTrainedTokenizerBase) -> Sentences:
    """The tokenised part of a data set."""
    labels = torch.from_numpy(part.labels.astype(np.int64))
    return Sentences(_tokenise(part.texts, tokenizer), labels, tokenizer.pad_token_id)


def unlabelled(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Sentences:
    """Tokenised texts whose classes nobody knows: all labels are -1."""
    labels = torch.full((len(texts),), -1)
    return Sentences(_tokenise(texts, tokenizer), labels, tokenizer.pad_token_id)


def batches_by_length(lengths: Sequence[int], size: int) -> list[Rows]:
    """Rows of every batch, shortest sentences first; each row is in one batch."""
    return _cut(np.argsort(lengths, kind="stable"), size)


def random_batches(lengths: Sequence[int], size: int, generator: np.random.Generator) -> list[Rows]:
    """Rows of every batch of one pass in random order; each row is in one batch, with others of like length."""
    order = generator.permutation(len(lengths))
    known = np.asarray(lengths)
    batches = []
    for pool in _cut(order, size * BATCHES_PER_POOL):
        batches += _cut(pool[np.argsort(known[pool], kind="stable")], size)
    return [batches[index] for index in generator.permutation(len(batches))]


def in_order(outputs: Tensor, batches: Sequence[Rows]) -> Tensor:
    """(N, outputs) of all batches one after the other, put back into the order of the rows."""
    ordered = torch.empty_like(outputs)
    ordered[torch.from_numpy(np.concatenate(batches))] = outputs
    return ordered


def _cut(rows: Rows, size: int) -> list[Rows]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], ...]:
    return tuple(tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"])
