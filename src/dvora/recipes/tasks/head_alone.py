"""The head alone: how far the frozen base gets without an adapter, to start from and to compare with; and the same fit
again at the end, to what the trained model gives.

Dimensions: N rows, H features, C outputs.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ...heads import STRENGTHS, best_fit, fitted, last_layer, linear, loss_of, reading_last_layer
from ...tensors import Float
from ...whole_files import write_atomically
from ..models.bases import computing, device_of
from ..settings import Settings

MOST_ROWS = 20_000
"""Training rows that it is fitted on at most, spread over all of them."""
SOON, OFTEN = 3.0, 30.0
"""Seconds after which an estimate is made, and another one."""


class HeadAlone(NamedTuple):
    """The head alone, fitted to all rows; one fitted to half of them, to start from; outputs of the first, by part.

    A head that knows the rows of all batches leaves little to learn from them (`benchmarks/LOG.md`, 2026-12-02).
    """

    alone: nn.Linear
    start: nn.Linear
    outputs: dict[str, Tensor]


def save_head_alone(head: nn.Linear, file: Path) -> None:
    """Write it as safetensors, whole or not at all."""
    write_atomically(file, save({name: value.contiguous() for name, value in head.state_dict().items()}))


def read_head_alone(file: Path) -> nn.Linear:
    """One that was saved.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    values = load_file(file)
    shapes = {name: value.shape for name, value in values.items()}
    if shapes.keys() != {"weight", "bias"} or len(shapes["weight"]) != 2 or shapes["weight"][:1] != shapes["bias"]:
        raise ValueError(f"{file} is damaged: it is not a weight and a bias of one linear layer")
    return linear(**values)


@torch.no_grad()
def last_features(
    model: Any, dataset: Dataset, collator: Any, settings: Settings, note: Callable[[str], None] = lambda _: None
) -> Float[Tensor, "N H"]:
    """What the last layer of the head reads of every row, or of every token with a tag, in float32 on the CPU.

    Args:
        model: of transformers, with or without an adapter; it is left in evaluation mode.
        dataset, collator: the model's inputs, and what makes a batch of them.
        settings: of the run: batches, device, precision.
        note: called every half a minute with how long it still takes.

    Raises:
        ValueError: the model has no last layer, see `last_layer`.
    """
    device, before = device_of(settings), model.device
    rows, order = list[Tensor](), list[int]()
    try:
        with reading_last_layer(model):
            model.to(device).eval()
            for chosen, batch in _longest_first(dataset, collator, settings, note):
                with computing(settings):
                    inputs = {key: values for key, values in batch.items() if key != "labels"}
                    read = model(**inputs).logits.float().cpu()
                is_by_token = read.dim() == 3
                rows += (
                    [row[tags >= 0] for row, tags in zip(read, batch["labels"].cpu(), strict=True)]
                    if is_by_token
                    else read.split(1)
                )
                order += chosen
    finally:
        model.to(before)
    return torch.cat([rows[place] for place in np.argsort(order)])


def _longest_first(
    dataset: Dataset, collator: Any, settings: Settings, note: Callable[[str], None]
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """The rows of a dataset that a model reads, by batch: their indices, and its inputs on the run's device.

    Rows of similar length come together, as a batch is padded to its longest; the longest first, to estimate from.
    """
    if "input_ids" in dataset.column_names:
        lengths = np.array([len(tokens) for tokens in dataset["input_ids"]])
    else:
        # Images all cost the same.
        lengths = np.ones(len(dataset), int)
    order, device = np.argsort(-lengths, kind="stable"), device_of(settings)
    on_batch = _estimating(note, f"the model reads {len(order):,} rows", lengths.sum())
    for start in range(0, len(order), settings.batch_size):
        chosen = order[start : start + settings.batch_size]
        batch = collator([dataset[int(row)] for row in chosen])
        yield chosen.tolist(), {key: values.to(device) for key, values in batch.items()}
        on_batch(lengths[chosen].sum())


def labels_of(dataset: Dataset) -> Tensor:
    """The label of every row, or the tag of every token that has one."""
    if "labels" not in dataset.column_names:
        return torch.tensor(dataset.with_format(None)["label"][:])
    tags = torch.tensor([tag for row in dataset["labels"] for tag in row])
    return tags[tags >= 0]


def fitted_head(
    model: Any,
    datasets: Mapping[str, Dataset],
    collator: Any,
    settings: Settings,
    classes: Sequence[str],
    note: Callable[[str], None] = lambda _: None,
) -> HeadAlone:
    """Fit the head alone.

    Args:
        model: the base with its head, before anything is trained; its values stay as they are.
        datasets: inputs of "train" and, where there are rows, of "validation" and "test", with their `label`.
        collator: makes a batch of them.
        settings: of the run, which reads no fewer training rows than this does.
        classes: their names; empty for numbers.
        note: called every half a minute with how long it still takes.
    """
    features, labels = _features_and_labels(model, datasets, collator, settings, note)
    layer = last_layer(model)
    has_bias = layer is not None and layer.bias is not None
    on_fit = _estimating(note, "a head is fitted", len(STRENGTHS))
    head, strength = best_fit(features, labels, len(classes), has_bias, on_fit)
    half = np.random.default_rng(settings.seed).permutation(len(labels["train"]))[::2]
    start = fitted(features["train"][half], labels["train"][half], len(classes), strength, has_bias)
    return HeadAlone(head, start, {part: head(read) for part, read in features.items() if part != "train"})


def fit_head_again(
    model: Any,
    datasets: Mapping[str, Dataset],
    collator: Any,
    settings: Settings,
    classes: Sequence[str],
    note: Callable[[str], None] = lambda _: None,
) -> bool:
    """Fit the last layer to what it reads in a trained model, and keep that, in place, if its validation loss is lower.

    Arguments as for `fitted_head`; "validation" has rows.

    Returns:
        Whether it was kept.
    """
    last = last_layer(model)
    assert last is not None, "the model has a head alone"
    read = {part: datasets[part] for part in ("train", "validation")}
    features, labels = _features_and_labels(model, read, collator, settings, note)
    if not all(bool(of_part.isfinite().all()) for of_part in features.values()):
        # Training diverged, which the verdict says.
        return False
    head, _ = best_fit(features, labels, len(classes), last.bias is not None)
    trained = deepcopy(last).float().cpu()
    held_out = features["validation"], labels["validation"]
    before, after = (loss_of(one, *held_out, len(classes)) for one in (trained, head))
    if after < before:
        last.load_state_dict(head.state_dict(), strict=last.bias is not None)
    return after < before


def _features_and_labels(
    model: Any, datasets: Mapping[str, Dataset], collator: Any, settings: Settings, note: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By part, of "train" at most so many rows as a run reads and a fit takes."""
    train = datasets["train"]
    # Tokens are rows here.
    tokens = len(labels_of(train)) if settings.task == "token-classification" else len(train)
    most = min(
        len(train),
        max(1, MOST_ROWS * len(train) // tokens),
        ((settings.method != "head" and settings.max_steps) or MOST_ROWS) * settings.batch_size * settings.accumulation,
    )
    chosen = train.select(np.linspace(0, len(train) - 1, most).round().astype(int))
    parts = {"train": chosen, **{part: datasets[part] for part in ("validation", "test") if part in datasets}}
    features = {part: last_features(model, rows, collator, settings, note) for part, rows in parts.items()}
    return features, {part: labels_of(rows) for part, rows in parts.items()}


def _estimating(note: Callable[[str], None], what: str, total: int) -> Callable[[int], None]:
    """What is to be called with each part of the total work, and says from time to time how long the rest takes."""
    start, done, last = time.monotonic(), 0, 0.0

    def on_part(part: int) -> None:
        nonlocal done, last
        done += part
        passed = time.monotonic() - start
        if done < total and passed > last + (OFTEN if last else SOON):
            last = passed
            note(f"{what}: {done / total:.0%} done, about {passed * (total / done - 1):.0f} s left")

    return on_part
