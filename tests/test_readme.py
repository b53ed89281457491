"""What the README shows runs, and what it counts is counted."""

import re
from pathlib import Path

import pytest
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.readme import updated, updated_results
from dvora import DVoRAConfig

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
RESULTS = (Path(__file__).parent.parent / "docs" / "results.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def model_folder(tmp_path: Path) -> str:
    """A small model on disk, in place of the reader's own."""
    small = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertForSequenceClassification(small).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("code", EXAMPLES, ids=["PEFT", "one layer", "functions", "adapters", "speed", "training"])
def test_the_examples_run(code: str, model_folder: str, tmp_path: Path) -> None:
    exec(code, {"model_folder": model_folder, "adapter_folder": str(tmp_path / "adapter")})


def test_the_figures_are_those_of_the_result_files() -> None:
    assert updated(README) == README
    assert updated_results(RESULTS) == RESULTS


def trained_values(config: object) -> int:
    model = get_peft_model(nn.Sequential(nn.Linear(1000, 1000)), config)
    return model.get_nb_trainable_parameters()[0]


# VeRA warns that its matrices depend on the machine; here only its size is of interest.
@pytest.mark.filterwarnings("ignore:Specified to not save vera_A and vera_B")
@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("DVoRA", DVoRAConfig(r=8, target_modules=["0"])),
        ("VeRA", VeraConfig(r=8, target_modules=["0"])),
        ("LoRA", LoraConfig(r=8, target_modules=["0"])),
        ("DoRA", LoraConfig(r=8, target_modules=["0"], use_dora=True)),
    ],
)
def test_the_table_of_trained_values_is_what_peft_counts(method: str, config: object) -> None:
    row = re.search(rf"^\| {method} \|.*\| ([\d,]+) \|$", README, flags=re.MULTILINE)
    assert row is not None
    assert trained_values(config) == int(row[1].replace(",", ""))
