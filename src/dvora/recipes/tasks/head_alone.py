"""The head alone: how far the frozen base gets without an adapter, to start from and to compare with; and the same fit
again at the end, to what the trained model gives.

What the last layer of the model's head reads is computed once for every row, which takes nearly all of the time; a
linear layer is then fitted to it by scikit-learn, with the penalty that the validation rows prefer. It has no random
part.

Dimensions: N rows, H features, C outputs.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from ...tensors import Float
from ...whole_files import write_atomically
from ..models.bases import computing, device_of
from ..settings import Settings

MOST_ROWS = 20_000
"""Training rows that it is fitted on at most, spread over all of them."""
STRENGTHS = (1e-2, 1e-1, 1e-3, 1e-4)
"""Of the L2 penalty, beside a mean loss on features of unit variance; the first without validation rows."""

ITERATIONS = 100
SOON, OFTEN = 3.0, 30.0
"""Seconds after which an estimate is made, and another one."""


class FittedHead(NamedTuple):
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
    return _linear(**values)


def _linear(weight: Float[Tensor, "C H"], bias: Float[Tensor, "C"]) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], len(weight))
    layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return layer.requires_grad_(False)


def last_layer(model: Any) -> nn.Linear | None:
    """The linear layer beside the base that gives the model's outputs; None where the head ends otherwise."""
    outputs, base = model.config.num_labels, f"{model.base_model_prefix}."
    linear = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == outputs and not name.startswith(base)
    ]
    return linear[-1] if linear else None


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
    layer, device, before = last_layer(model), device_of(settings), model.device
    if layer is None:
        raise ValueError(f"the head of {type(model).__name__} does not end in a linear layer")
    name = next(name for name, module in model.named_modules() if module is layer)
    rows, order = list[Tensor](), list[int]()
    try:
        # Without this layer the model's outputs are what the layer reads, of the token that the model chooses.
        model.set_submodule(name, nn.Identity())
        model.to(device).eval()
        for chosen, batch in longest_first(dataset, collator, settings, note):
            with computing(settings):
                read = model(**{key: values for key, values in batch.items() if key != "labels"}).logits.float().cpu()
            of_tokens = read.dim() == 3
            rows += (
                [row[tags >= 0] for row, tags in zip(read, batch["labels"].cpu(), strict=True)]
                if of_tokens
                else read.split(1)
            )
            order += chosen
    finally:
        model.set_submodule(name, layer)
        model.to(before)
    return torch.cat([rows[place] for place in np.argsort(order)])


def longest_first(
    dataset: Dataset, collator: Any, settings: Settings, note: Callable[[str], None] = lambda _: None
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
) -> FittedHead:
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
    head, strength = _best(features, labels, len(classes), has_bias, note)
    half = np.random.default_rng(settings.seed).permutation(len(labels["train"]))[::2]
    start = fitted(features["train"][half], labels["train"][half], len(classes), strength, has_bias)
    return FittedHead(head, start, {part: head(read) for part, read in features.items() if part != "train"})


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
    head, _ = _best(features, labels, len(classes), last.bias is not None, note)
    trained = deepcopy(last).float().cpu()
    before, after = (_validation_loss(one, features, labels, len(classes)) for one in (trained, head))
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
        (settings.max_steps or MOST_ROWS) * settings.batch_size * settings.accumulation,
    )
    chosen = train.select(np.linspace(0, len(train) - 1, most).round().astype(int))
    parts = {"train": chosen, **{part: datasets[part] for part in ("validation", "test") if part in datasets}}
    features = {part: last_features(model, rows, collator, settings, note) for part, rows in parts.items()}
    return features, {part: labels_of(rows) for part, rows in parts.items()}


def _best(
    features: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    classes: int,
    has_bias: bool,
    note: Callable[[str], None],
) -> tuple[nn.Linear, float]:
    """The head of the penalty with the lowest validation loss, if there are rows to validate on, and the penalty."""
    if "validation" not in features:
        return fitted(features["train"], labels["train"], classes, STRENGTHS[0], has_bias), STRENGTHS[0]
    on_fit, heads = _estimating(note, "a head is fitted", len(STRENGTHS)), dict[float, nn.Linear]()
    for strength in STRENGTHS:
        heads[strength] = fitted(features["train"], labels["train"], classes, strength, has_bias)
        on_fit(1)
    best = min(heads, key=lambda strength: _validation_loss(heads[strength], features, labels, classes))
    return heads[best], best


@torch.no_grad()
def _validation_loss(
    head: nn.Linear, features: Mapping[str, Tensor], labels: Mapping[str, Tensor], classes: int
) -> float:
    """Cross-entropy, or the mean squared error of numbers, of the validation rows."""
    outputs, expected = head(features["validation"]).double(), labels["validation"]
    loss = cross_entropy(outputs, expected) if classes else mse_loss(outputs.flatten(), expected.double())
    return float(loss)


def _estimating(note: Callable[[str], None], what: str, total: int) -> Callable[[int], None]:
    """What is to be called with each part of the total work, and says from time to time how long the rest takes."""
    start, done, told = time.monotonic(), 0, 0.0

    def on_part(part: int) -> None:
        nonlocal done, told
        done += part
        passed = time.monotonic() - start
        if done < total and passed > told + (OFTEN if told else SOON):
            told = passed
            note(f"{what}: {done / total:.0%} done, about {passed * (total / done - 1):.0f} s left")

    return on_part


def fitted(
    features: Float[Tensor, "N H"], labels: Tensor, classes: int, strength: float, has_bias: bool = True
) -> nn.Linear:
    """A linear layer fitted with an L2 penalty on its weight: logistic regression, or ridge regression of numbers.

    Args:
        features, labels: of the training rows; labels are indices of classes, or numbers.
        classes: how many; 0 for numbers.
        strength: of the penalty, beside the mean loss on features of unit variance.
        has_bias: False: the bias is zero, for models whose last layer has none.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler(with_mean=has_bias).fit(features.double().numpy())
    # Some models have features that hardly change: of unit variance they would get weights of 1e30, and gradients too.
    scaler.scale_[scaler.scale_ < 1e-6 * scaler.scale_.max()] = 1.0
    x, y = scaler.transform(features.double().numpy()), labels.numpy()
    if not classes:
        model = Ridge(alpha=strength * len(x), fit_intercept=has_bias).fit(x, y)
    else:
        # A mean row of each class with next to no weight: the layer has an output of classes that have no rows here.
        means, weights = np.zeros((classes, x.shape[1])), [1.0] * len(x) + [1e-3] * classes
        model = LogisticRegression(C=1 / (strength * len(x)), max_iter=ITERATIONS, fit_intercept=has_bias)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(np.vstack([x, means]), np.append(y, range(classes)), sample_weight=weights)
    weight, bias = np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)
    if classes == 2:
        # scikit-learn gives the second class's logit minus the first's.
        weight, bias = np.vstack([-weight, weight]) / 2, np.append(-bias, bias) / 2
    weight = weight / scaler.scale_
    bias = bias - weight @ scaler.mean_ if has_bias else np.zeros(len(weight))
    return _linear(torch.tensor(weight).float(), torch.tensor(bias).float())
