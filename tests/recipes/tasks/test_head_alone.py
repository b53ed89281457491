"""The head alone: fitted by scikit-learn, on what the head's last layer reads, of a base that stays as it was."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from dvora.heads import last_layer
from dvora.recipes.models.bases import load_base, load_processor
from dvora.recipes.settings import Settings
from dvora.recipes.tasks import head_alone
from dvora.recipes.tasks.head_alone import (
    fit_head_again,
    fitted_head,
    labels_of,
    last_features,
    read_head_alone,
    save_head_alone,
)
from dvora.recipes.tasks.task import features, task_parts
from tests.recipes import tiny_data
from tests.recipes.finished_runs import settings_of

ROWS = [{"text": "good " * (1 + number % 7) + "a movie", "label": number % 2} for number in range(11)]


def made(
    task: str, model: Path, rows: list[dict[str, Any]], classes: tuple[str, ...]
) -> tuple[Any, Any, Any, Settings]:
    """A base with a new head, inputs, what makes batches of them, and the settings."""
    chosen = settings_of(task, model, batch_size=4)
    processor = load_processor(chosen)
    base = load_base(chosen, classes, getattr(processor, "pad_token_id", None)).model
    return base, features(rows, chosen, processor, 24).dataset, task_parts(chosen, classes, processor).collator, chosen


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_features_are_what_the_last_layer_reads(models: dict[str, Path], name: str) -> None:
    base, dataset, collator, chosen = made("text-classification", models[name], ROWS, ("bad", "good"))
    found = last_features(base, dataset, collator, chosen)
    layer = last_layer(base)
    assert layer is not None
    with torch.no_grad():
        for row, features_of_row in zip(dataset, found, strict=True):
            batch = collator([row])
            del batch["labels"]
            torch.testing.assert_close(layer(features_of_row), base(**batch).logits[0], rtol=1e-4, atol=1e-5)
    assert last_layer(base) is layer


def test_images_have_features_too(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_data.images(tmp_path / "images", 6)
    rows = [{"image": str(path), "label": number % 2} for number, path in enumerate(sorted(folder.rglob("*.png")))]
    base, dataset, collator, chosen = made("image-classification", models["vit"], rows, ("a", "b"))
    head, _, outputs = fitted_head(base, {"train": dataset, "test": dataset}, collator, chosen, ("a", "b"))
    assert head.weight.shape == (2, 16)
    right = outputs["test"].argmax(-1) == labels_of(dataset)
    assert float(right.float().mean()) >= 0.5


def test_the_base_stays_as_it_was(models: dict[str, Path]) -> None:
    base, dataset, collator, chosen = made("text-classification", models["bert"], ROWS, ("bad", "good"))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    state = torch.get_rng_state()
    head, _, outputs = fitted_head(base, {"train": dataset, "validation": dataset}, collator, chosen, ("bad", "good"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert outputs.keys() == {"validation"}
    again, _, _ = fitted_head(base, {"train": dataset, "validation": dataset}, collator, chosen, ("bad", "good"))
    assert torch.equal(head.weight, again.weight)


@pytest.mark.parametrize(("task", "base"), [("text-classification", "bert"), ("regression", "llama")])
def test_a_head_is_replaced_by_a_better_one_only(models: dict[str, Path], task: str, base: str) -> None:
    # The last layer of the second base has no bias.
    classes = ("bad", "good") if task == "text-classification" else ()
    model, dataset, collator, chosen = made(task, models[base], ROWS, classes)
    parts = {"train": dataset, "validation": dataset}
    head, _, _ = fitted_head(model, parts, collator, chosen, classes)
    last = last_layer(model)
    assert last is not None
    assert fit_head_again(model, parts, collator, chosen, classes)
    assert torch.equal(last.weight, head.weight)
    assert not fit_head_again(model, parts, collator, chosen, classes)
    assert torch.equal(last.weight, head.weight)
    next(model.parameters()).data.fill_(torch.nan)
    assert not fit_head_again(model, parts, collator, chosen, classes)


def test_it_reads_no_more_rows_than_the_run(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, dataset, collator, chosen = made("text-classification", models["bert"], ROWS, ("bad", "good"))
    calls: list[int] = []
    base.register_forward_hook(lambda module, inputs, outputs: calls.append(len(outputs.logits)))
    short = chosen.model_copy(update={"max_steps": 1})
    fitted_head(base, {"train": dataset}, collator, short, ("bad", "good"))
    assert sum(calls) == short.batch_size


def test_a_head_that_ends_otherwise_has_none(models: dict[str, Path]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(models["bert"], num_labels=3)
    model.classifier = nn.Sequential(nn.Linear(16, 5), nn.Tanh())
    assert last_layer(model) is None


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    head = nn.Linear(3, 2)
    save_head_alone(head, tmp_path / "a.safetensors")
    assert torch.equal(read_head_alone(tmp_path / "a.safetensors").weight, head.weight)
    head.bias = nn.Parameter(torch.randn(3))
    save_head_alone(head, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        read_head_alone(tmp_path / "a.safetensors")


def test_a_long_reading_says_how_long_it_still_takes(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, dataset, collator, chosen = made("text-classification", models["bert"], ROWS, ("bad", "good"))
    monkeypatch.setattr(head_alone, "SOON", 0.0)
    notes: list[str] = []
    last_features(base, dataset, collator, chosen, notes.append)
    assert len(notes) == 1
    assert re.fullmatch(r"the model reads 11 rows: \d+% done, about \d+ s left", notes[0])
