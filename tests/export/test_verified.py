"""With which adapters a graph is compared."""

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from dvora.export.verified import prepared, sample_of_encoder
from tests.recipes.saved_adapters import save
from tests.serve.served import save_classifier


def test_two_of_each_method_are_compared(bert: Path, tmp_path: Path) -> None:
    """Also where those of one method come first."""
    for number, name in enumerate("abc"):
        save_classifier(bert, tmp_path / name, number, 3)
    for name in "lmn":
        save(bert, tmp_path / name, "lora", task_type="SEQ_CLS")
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    sample = sample_of_encoder({"input_ids": torch.tensor([[2, 7, 8], [2, 9, 0]])}, "logits")
    ready = prepared(model, {name: tmp_path / name for name in "lmnabc"}, sample)
    assert {*ready.expected} == {"null", *"ablm"}
    assert [*ready.vectors] == ["null", *"lmnabc"]
