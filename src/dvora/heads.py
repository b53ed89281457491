"""The last linear layer of a model's head, fitted in closed form to what it reads: without an adapter, or after one.

What it reads is computed once for every row, which takes nearly all of the time; a linear layer is then fitted to it by
scikit-learn, with the penalty that validation rows prefer. It has no random part.

Dimensions: N rows, H features, C outputs.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from .tensors import Float

STRENGTHS = (1e-2, 1e-1, 1e-3, 1e-4)
"""Of the L2 penalty, beside a mean loss on features of unit variance; the first without validation rows."""

ITERATIONS = 100
TEXTS = 32
"""That are read at a time."""


@dataclass(frozen=True)
class FittedHead:
    """What `fit_head` did.

    Args:
        rows: that it was fitted to; tokens, where they have classes.
        strength: of the penalty.
        before, after: losses of the validation rows, else of the rows that it was fitted to.
        kept: whether the model has the fitted layer.
    """

    rows: int
    strength: float
    before: float
    after: float
    kept: bool


def fit_head(
    model: Any,
    data: Sequence[str] | Iterable[Mapping[str, Tensor]],
    labels: Sequence[float] | Tensor | None = None,
    *,
    tokenizer: Any = None,
    share: float = 1.0,
    validation: tuple[Any, Any] | Iterable[Mapping[str, Tensor]] | None = None,
    seed: int = 0,
) -> FittedHead:
    """Fit the last layer of a classifier's head, or of a regression's, in place.

    Before training fit it to half of the rows (`share=0.5`), as a head that knows all leaves little to learn; at the
    end to all rows of what the trained model gives, with `validation`.

    Args:
        model: of transformers, for sequences, tokens or images, with or without PEFT's adapter; it keeps its mode.
        data: texts; or batches of inputs, tensors by name, such as a DataLoader's.
        labels: one a text or row: indices of classes, or numbers; None: they are the batches' `labels`, where tokens
            with a negative one are passed over.
        tokenizer: of texts.
        share: of the rows that are used.
        validation: data like the first, or a pair of data and labels. It chooses the penalty, and the layer stays as it
            is unless its loss on these rows falls.
        seed: of the choice of rows.

    Raises:
        ValueError: the model is none of transformers, its head does not end in a linear layer or gives several labels
            of a row, labels are missing or not as many as rows, or nothing finite is read.
    """
    inner = _pretrained(model)
    layer = last_layer(inner)
    if layer is None or inner.config.problem_type == "multi_label_classification":
        raise ValueError(
            f"model: the head of {type(inner).__name__} does not end in a linear layer that gives one class or number "
            "for a row; fit_head fits no other"
        )
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; expected a part of the rows, above 0 and at most 1")
    classes = 0 if inner.config.num_labels == 1 else layer.out_features
    features, expected = {}, {}
    features["train"], expected["train"] = _read(inner, data, labels, tokenizer, classes)
    if validation is not None:
        held_out, right = validation if isinstance(validation, tuple) else (validation, None)
        features["validation"], expected["validation"] = _read(inner, held_out, right, tokenizer, classes)
    rows = len(expected["train"])
    chosen = np.random.default_rng(seed).permutation(rows)[: max(1, round(share * rows))]
    features["train"], expected["train"] = features["train"][chosen], expected["train"][chosen]
    head, strength = best_fit(features, expected, classes, layer.bias is not None)
    judged = "train" if validation is None else "validation"
    before, after = (
        loss_of(one, features[judged], expected[judged], classes) for one in (deepcopy(layer).float().cpu(), head)
    )
    if kept := validation is None or after < before:
        layer.load_state_dict(head.state_dict(), strict=layer.bias is not None)
    return FittedHead(len(chosen), strength, before, after, kept)


def _pretrained(model: Any) -> Any:
    from peft import PeftModel
    from transformers import PreTrainedModel

    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"model has no configuration of transformers, which says what its head gives; it is a {type(inner)}"
        )
    return inner


def _read(model: Any, data: Any, labels: Any, tokenizer: Any, classes: int) -> tuple[Tensor, Tensor]:
    """What the last layer reads of every row, and the labels."""
    texts = [*data] if isinstance(data, Sequence) and data and isinstance(data[0], str) else None
    if texts is not None and (tokenizer is None or labels is None):
        raise ValueError("data is texts, which need tokenizer and labels; give both")
    batches = data if texts is None else _tokenized(texts, tokenizer)
    read, found = list[Tensor](), list[Tensor]()
    modes = {module: module.training for module in model.modules()}
    try:
        with reading_last_layer(model), torch.no_grad():
            model.eval()
            for batch in batches:
                inputs = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
                values = model(**inputs).logits.float().cpu()
                if labels is None:
                    if "labels" not in batch:
                        raise ValueError("labels is None, and a batch has no `labels`; give one of them")
                    tags = batch["labels"].cpu()
                    values, tags = (values[tags >= 0], tags[tags >= 0]) if values.dim() == 3 else (values, tags)
                    found.append(tags)
                read.append(values)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not read:
        raise ValueError("data has no rows; give texts, or batches of inputs")
    features = torch.cat(read)
    expected = torch.cat(found) if labels is None else torch.as_tensor(labels)
    if len(expected) != len(features):
        raise ValueError(f"labels has {len(expected)} values, and there are {len(features)} rows; give one a row")
    if not bool(features.isfinite().all()):
        raise ValueError("model: what the last layer reads is not finite; training has diverged")
    return features, expected.long() if classes else expected.double()


def _tokenized(texts: list[str], tokenizer: Any) -> Iterator[Mapping[str, Tensor]]:
    for start in range(0, len(texts), TEXTS):
        yield tokenizer(texts[start : start + TEXTS], truncation=True, padding=True, return_tensors="pt")


@contextmanager
def reading_last_layer(model: Any) -> Iterator[None]:
    """Within it the model's logits are what its last layer reads, of the token that the model chooses.

    Raises:
        ValueError: there is none.
    """
    layer = last_layer(model)
    if layer is None:
        raise ValueError(f"the head of {type(model).__name__} does not end in a linear layer")
    name = next(name for name, module in model.named_modules() if module is layer)
    model.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        model.set_submodule(name, layer)


def last_layer(model: Any) -> nn.Linear | None:
    """The linear layer beside the base that gives the model's outputs; None where the head ends otherwise."""
    outputs, base = model.config.num_labels, f"{model.base_model_prefix}."
    linear = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == outputs and not name.startswith(base)
    ]
    return linear[-1] if linear else None


def linear(weight: Float[Tensor, "C H"], bias: Float[Tensor, "C"]) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], len(weight))
    layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return layer.requires_grad_(False)


def best_fit(
    features: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    classes: int,
    has_bias: bool,
    on_fit: Callable[[int], None] = lambda _: None,
) -> tuple[nn.Linear, float]:
    """The head of the penalty with the lowest validation loss, if there are rows to validate on, and the penalty.

    Args:
        features, labels: of "train" and "validation".
        classes, has_bias: see `fitted`.
        on_fit: called with 1 after each of the fits.
    """
    if "validation" not in features:
        return fitted(features["train"], labels["train"], classes, STRENGTHS[0], has_bias), STRENGTHS[0]
    heads = dict[float, nn.Linear]()
    for strength in STRENGTHS:
        heads[strength] = fitted(features["train"], labels["train"], classes, strength, has_bias)
        on_fit(1)
    losses = {s: loss_of(head, features["validation"], labels["validation"], classes) for s, head in heads.items()}
    best = min(heads, key=losses.__getitem__)
    return heads[best], best


@torch.no_grad()
def loss_of(head: nn.Linear, features: Float[Tensor, "N H"], labels: Tensor, classes: int) -> float:
    """Cross-entropy, or the mean squared error of numbers."""
    outputs = head(features).double()
    return float(cross_entropy(outputs, labels) if classes else mse_loss(outputs.flatten(), labels.double()))


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
    return linear(torch.tensor(weight).float(), torch.tensor(bias).float())
