"""PEFT's model classes of the tasks: the head is trained, saved and loaded with the adapter."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification

from dvora import DVoRAConfig
from tests.peft.tiny import bert, same_bits, train_vectors

TASKS: dict[str, tuple[type[nn.Module], str]] = {
    "SEQ_CLS": (BertForSequenceClassification, "classifier"),
    "TOKEN_CLS": (BertForTokenClassification, "classifier"),
    "QUESTION_ANS": (BertForQuestionAnswering, "qa_outputs"),
}


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    found = model(input_ids=torch.arange(12).view(2, 6))
    return torch.cat([value.flatten() for value in found.values()])


@pytest.mark.parametrize("further", [None, ["pooler", "key"]], ids=["head only", "further modules"])
@pytest.mark.parametrize("task", TASKS)
def test_the_head_of_a_task_is_trained_saved_and_loaded(task: str, further: list[str] | None, tmp_path: Path) -> None:
    config = DVoRAConfig(r=4, target_modules=["query"], task_type=task, modules_to_save=further)
    model = get_peft_model(bert(TASKS[task][0], num_labels=2), config).eval()
    # PEFT adds it to the configuration.
    head = [name for name, p in model.named_parameters() if p.requires_grad and TASKS[task][1] in name]
    assert len(head) == 2
    train_vectors(model)
    with torch.no_grad():
        for name in head:
            model.get_parameter(name).add_(0.5)
    model.save_pretrained(tmp_path)
    assert set(model.peft_config["default"].modules_to_save) >= {TASKS[task][1], *(further or ())}
    assert same_bits(outputs(PeftModel.from_pretrained(bert(TASKS[task][0], num_labels=2), tmp_path)), outputs(model))
