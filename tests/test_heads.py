"""Heads in closed form: scikit-learn's fit as a layer, and `fit_head` on models with and without an adapter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from dvora import DVoRAConfig
from dvora.heads import fitted, last_layer
from dvora.training import fit_head
from tests.peft.tiny import mlp
from tests.recipes.finished_runs import all_models

TEXTS = [f"{'good' if number % 2 else 'poor'} movie {'very ' * (number % 5)}" for number in range(40)]
LABELS = [number % 2 for number in range(40)]


@pytest.fixture(scope="module")
def folder() -> Path:
    return all_models()["bert"]


@pytest.fixture
def model(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def batches(tokenizer: Any, size: int = 7) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(TEXTS), size):
        inputs = tokenizer(TEXTS[start : start + size], padding=True, return_tensors="pt")
        yield {**inputs, "labels": torch.tensor(LABELS[start : start + size])}


@torch.no_grad()
def loss(model: nn.Module, tokenizer: Any) -> float:
    model.eval()
    outputs = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    return float(cross_entropy(outputs, torch.tensor(LABELS)))


@pytest.mark.parametrize("adapted", [False, True])
def test_the_head_is_fitted_in_place_and_nothing_else_changes(model: nn.Module, tokenizer: Any, adapted: bool) -> None:
    if adapted:
        model = get_peft_model(model, DVoRAConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
        assert "dvora" in str({name for name, _ in model.named_parameters()})
    layer = last_layer(model.get_base_model() if adapted else model)
    assert layer is not None
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fit_head(model, TEXTS, LABELS, tokenizer=tokenizer)
    assert [module.training for module in model.modules()] == modes
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == 2
    assert all("classifier" in name and "original" not in name for name in changed)
    assert (found.rows, found.kept) == (40, True)
    assert found.after < found.before
    assert found.after == pytest.approx(loss(model, tokenizer), rel=1e-5)
    assert layer.weight.requires_grad


def test_texts_and_batches_give_the_same_fit(folder: Path, tokenizer: Any) -> None:
    weights = []
    for given in ((TEXTS, LABELS), (batches(tokenizer), None), (batches(tokenizer), torch.tensor(LABELS))):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        fit_head(model, *given, tokenizer=tokenizer)
        weights.append(last_layer(model).weight)  # type: ignore[union-attr]
    for weight in weights[1:]:
        torch.testing.assert_close(weight, weights[0], rtol=1e-3, atol=1e-4)


def test_half_of_the_rows_and_what_validation_rows_prefer(model: nn.Module, tokenizer: Any) -> None:
    layer = last_layer(model)
    assert layer is not None
    assert fit_head(model, TEXTS, LABELS, tokenizer=tokenizer, share=0.5).rows == 20
    half = layer.weight.clone()
    fit_head(model, TEXTS, LABELS, tokenizer=tokenizer, share=0.5, seed=1)
    assert not torch.equal(layer.weight, half)
    found = fit_head(model, TEXTS, LABELS, tokenizer=tokenizer, validation=(TEXTS[:20], LABELS[:20]))
    assert found.kept
    assert found.strength < 1e-2
    fitted_to_all = layer.weight.clone()
    # Labels that are all wrong: the validation rows prefer what is there.
    wrong = fit_head(
        model, TEXTS, [1 - label for label in LABELS], tokenizer=tokenizer, validation=(TEXTS[:20], LABELS[:20])
    )
    assert not wrong.kept
    assert wrong.after > wrong.before
    assert torch.equal(layer.weight, fitted_to_all)


def test_numbers_and_tokens(folder: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    numbers = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    found = fit_head(numbers, TEXTS, [float(len(text)) for text in TEXTS], tokenizer=tokenizer)
    assert found.after < 0.2 * found.before
    tokens = AutoModelForTokenClassification.from_pretrained(folder, num_labels=3)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    tags = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"] % 3, -100)
    tags[:, 0] = -100
    found = fit_head(tokens, [{**inputs, "labels": tags}])
    assert found.rows == int((tags >= 0).sum())
    assert found.after < found.before


def test_what_cannot_be_fitted_is_refused(model: nn.Module, tokenizer: Any) -> None:
    refusals: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((TEXTS,), {"tokenizer": tokenizer}, "need tokenizer and labels"),
        ((TEXTS, LABELS), {}, "need tokenizer and labels"),
        ((TEXTS, LABELS[:-1]), {"tokenizer": tokenizer}, "labels has 39 values, and there are 40 rows"),
        (([],), {}, "data has no rows"),
        (([{"input_ids": torch.ones(2, 3, dtype=torch.long)}],), {}, "a batch has no `labels`"),
        ((TEXTS, LABELS), {"tokenizer": tokenizer, "share": 0.0}, "share is 0.0; expected a part of the rows"),
    ]
    before = last_layer(model).weight.clone()  # type: ignore[union-attr]
    for given, options, message in refusals:
        with pytest.raises(ValueError, match=message):
            fit_head(model, *given, **options)
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="gives one class or number for a row"):
        fit_head(model, TEXTS, LABELS, tokenizer=tokenizer)
    model.config.problem_type = None
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="is not finite"):
        fit_head(model, TEXTS, LABELS, tokenizer=tokenizer)
    assert torch.equal(last_layer(model).weight, before)  # type: ignore[union-attr]


def test_a_model_that_is_not_of_transformers_has_no_config() -> None:
    with pytest.raises(ValueError, match="model has no configuration of transformers"):
        fit_head(mlp(), TEXTS, LABELS)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_layer_on_features_is_scikit_learn_s_on_scaled_ones(classes: int) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(60, 5)) * [1, 2, 3, 4, 5] + 7, generator.integers(0, classes, 60)
    head = fitted(torch.tensor(x).float(), torch.tensor(y), classes, 1e-2)
    scaled = (x - x.mean(0)) / x.std(0)
    expected = LogisticRegression(C=1 / (len(x) * 1e-2), tol=1e-8, max_iter=1000).fit(scaled, y)
    probabilities = head(torch.tensor(x).float()).softmax(-1).numpy()
    np.testing.assert_allclose(probabilities, expected.predict_proba(scaled), atol=1e-3)
    numbers = fitted(torch.tensor(x).float(), torch.tensor(y), 0, 1e-2)(torch.tensor(x).float()).flatten()
    np.testing.assert_allclose(numbers, Ridge(alpha=0.6).fit(scaled, y).predict(scaled), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("classes", [0, 2, 3])
def test_a_layer_without_a_bias_is_fitted_as_one(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(80, 5, generator=generator) + 3, torch.randn(max(classes, 1), 5, generator=generator)
    labels = (x @ weight.T).argmax(-1) if classes else (x @ weight.T).flatten()
    head = fitted(x, labels, classes, 1e-4, has_bias=False)
    assert not head.bias.any()
    found = head(x)
    if classes:
        assert (found.argmax(-1) == labels).double().mean() > 0.95
    else:
        torch.testing.assert_close(found.flatten(), labels, rtol=0.01, atol=0.01)


def test_a_class_without_rows_has_an_output_that_is_not_chosen() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    for labels in (torch.tensor([0, 2] * 10), torch.zeros(20, dtype=torch.int64)):
        head = fitted(x, labels, 4, 1e-2)
        assert head.weight.shape == (4, 3)
        assert {*head(x).argmax(-1).tolist()} <= {*labels.tolist()}


def test_features_that_hardly_change_get_no_weights_that_explode() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-32, 1e-9])
    head = fitted(x, (x[:, 0] > 0).long(), 2, 1e-2)
    assert head.weight.abs().max() < 100
