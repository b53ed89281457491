"""What each task makes of its rows: the model's inputs, batches of them, and metrics of its outputs."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    DefaultDataCollator,
)

from ..data.chats import IGNORED, chat_features
from ..data.entities import token_tags
from ..data.images import opened_image
from ..models.bases import NO_LIMIT, longest_text
from ..settings import Settings
from . import metrics

Rows = Sequence[dict[str, Any]]
Encoded = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """The parts of a task that a trainer needs.

    Args:
        collator: makes a batch of features.
        compute_metrics: of predictions and labels, by name.
        rows: of the same the numbers of each row that two models are compared by, see `comparison.METRICS`.
        reduce_logits: makes of a batch's outputs and labels the predictions.
        best: the metric that the best step is chosen by, one of `metrics.GREATER_IS_BETTER`.
    """

    collator: Any
    compute_metrics: Callable[[Any], dict[str, float]]
    rows: Callable[[Any], Any]
    reduce_logits: Callable[[Any, Any], Any]
    best: str


@dataclass(frozen=True)
class Truncation:
    """How many texts are longer than `max_length`, and what of them the model does not read.

    Args:
        texts: in all.
        cut: those that are longer.
        tokens: of all texts.
        tokens_lost: those beyond `max_length`.
        left_out: chats that are cut before the assistant speaks, so that nothing is learned from them.
    """

    texts: int = 0
    cut: int = 0
    tokens: int = 0
    tokens_lost: int = 0
    left_out: int = 0

    def __add__(self, other: "Truncation") -> "Truncation":
        return Truncation(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def sentence(self, max_length: int) -> str:
        """What was lost, in a sentence; empty where nothing was."""
        if not self.cut:
            return ""
        sentence = (
            f"{self.cut:,} of {self.texts:,} texts ({self.cut / self.texts:.1%}) are longer than {max_length} tokens "
            f"and were cut: {self.tokens_lost / self.tokens:.1%} of all tokens were not read"
        )
        return sentence + (
            f"; {self.left_out:,} chats were left out, for nothing of an answer remained" * bool(self.left_out)
        )


def truncation_of(tokens: Sequence[int], max_length: int) -> Truncation:
    """Of texts with these numbers of tokens, before they are cut."""
    lost = [count - max_length for count in tokens if count > max_length]
    return Truncation(len(tokens), len(lost), sum(tokens), sum(lost))


class Features(NamedTuple):
    """The model's inputs for some rows, and what of their texts is not in them."""

    dataset: Dataset
    truncation: Truncation


def task_parts(settings: Settings, labels: Sequence[str], processor: Any) -> Task:
    """The parts of a run's task."""
    if settings.task == "causal-lm":
        padding = DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED)
        return Task(padding, metrics.of_tokens, metrics.token_rows, metrics.surprise, "loss")
    if settings.task == "token-classification":
        if not processor.is_fast:
            raise ValueError(
                "the tokenizer does not say where its tokens are in a text; give a fast one, tokenizer.json"
            )
        of_tokens = DataCollatorForTokenClassification(processor)
        of_entities, rows = (partial(of, tags=labels) for of in (metrics.of_entities, metrics.entity_rows))
        return Task(of_tokens, of_entities, rows, metrics.best_tags, "f1")
    images = settings.task == "image-classification"
    collator: Any = DefaultDataCollator() if images else DataCollatorWithPadding(processor)
    if labels:
        return Task(collator, metrics.of_classes, metrics.class_rows, metrics.only_logits, "accuracy")
    return Task(collator, metrics.of_numbers, metrics.number_rows, metrics.only_logits, "rmse")


def longest(settings: Settings, processor: Any, model_config: Any) -> int:
    """Tokens beyond which a text is cut: as set, and never more than the tokenizer and the model can take."""
    return min(settings.max_length or NO_LIMIT, longest_text(processor, model_config))


def features(rows: Rows, settings: Settings, processor: Any, max_length: int) -> Features:
    """The model's inputs for rows of the task, as `load_data` gives them; rows without a label give inputs without one.

    Args:
        rows, settings: of the run.
        processor: the tokenizer, or the image processor.
        max_length: see `longest`; without meaning for images.

    Raises:
        ValueError: a chat cannot be written with the tokenizer's template.
    """
    if settings.task == "image-classification":
        return Features(
            Dataset.from_list(list(rows)).with_transform(lambda batch: _pixels(batch, processor)), Truncation()
        )
    if settings.task == "causal-lm":
        return _language_features(rows, processor, max_length)
    texts = [(row["text"], row["text2"]) if "text2" in row else row["text"] for row in rows]
    has_tags = settings.task == "token-classification"
    encoded = processor(texts, truncation=True, max_length=max_length, return_offsets_mapping=has_tags)
    columns = {name: encoded[name] for name in processor.model_input_names if name in encoded}
    if has_tags and rows and "label" in rows[0]:
        columns["labels"] = [
            token_tags(offsets, row["label"]) for row, offsets in zip(rows, encoded["offset_mapping"], strict=True)
        ]
    elif rows and "label" in rows[0]:
        columns["label"] = [row["label"] for row in rows]
    # Only of those that fill `max_length` the whole length is not known.
    tokens = [len(ids) for ids in encoded["input_ids"]]
    full = [index for index, count in enumerate(tokens) if count >= max_length]
    for index, ids in zip(
        full, processor([texts[i] for i in full], verbose=False)["input_ids"] if full else [], strict=True
    ):
        tokens[index] = len(ids)
    return Features(Dataset.from_dict(columns), truncation_of(tokens, max_length))


def _pixels(batch: dict[str, list[Any]], processor: Any) -> dict[str, Any]:
    images = []
    for path in batch["image"]:
        with opened_image(Path(path)) as image:
            images.append(image.convert("RGB"))
    inputs = {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
    return {**inputs, "label": batch["label"]} if "label" in batch else inputs


def _language_features(rows: Rows, tokenizer: Any, max_length: int) -> Features:
    """Chats, each cut to `max_length` tokens, and texts in blocks of at most so many."""
    encoded: list[Encoded] = []
    lengths, left_out = [], 0
    for row in rows:
        if "messages" in row:
            chat = chat_features(row["messages"], tokenizer, max_length)
            lengths.append(chat.pop("tokens"))
            teaches = any(label != IGNORED for label in chat["labels"][1:])
            left_out += not teaches
            encoded += [chat] * teaches
        else:
            encoded += _blocks(row, tokenizer, max_length)
    return Features(Dataset.from_list(encoded), replace(truncation_of(lengths, max_length), left_out=left_out))


def _blocks(row: dict[str, Any], tokenizer: Any, max_length: int) -> list[Encoded]:
    """A text as blocks of at most `max_length` tokens, of which none is lost."""
    text = row.get("text") or row["passage"]
    # Special tokens belong to whole texts; a passage goes on before and after.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if "text" in row and tokenizer.eos_token_id is not None:
        tokens, offsets = [*tokens, tokenizer.eos_token_id], [*offsets, (len(text), len(text))]
    blocks = []
    for start in range(0, len(tokens), max_length):
        block, places = tokens[start : start + max_length], offsets[start : start + max_length]
        if len(block) > 1:
            scored = text[places[0][1] : places[-1][1]]
            blocks.append({"input_ids": block, "labels": block, "bytes": len(scored.encode())})
    return blocks


def bytes_of(dataset: Dataset) -> int | None:
    """Bytes of text that the scored tokens of a dataset stand for; None where no tokens are scored."""
    return int(np.sum(dataset["bytes"])) if "bytes" in dataset.column_names else None


def without_bytes(dataset: Dataset) -> Dataset:
    """A dataset as the model takes it."""
    return dataset.remove_columns("bytes") if "bytes" in dataset.column_names else dataset
