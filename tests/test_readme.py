"""What the README shows runs and is short; every generated table is the one of its result file."""

import re
from pathlib import Path

import pytest
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn

from benchmarks.readme import PAGES, filled
from dvora import DVoRAConfig
from tests.recipes import tiny_models

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
FEW_LINES = 150


# transformers deprecates a property that PEFT still asks for.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("code", EXAMPLES, ids=["PEFT", "one layer"])
def test_the_examples_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_models.bert(tmp_path / "minilm")
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= FEW_LINES


def test_its_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_are_those_of_the_result_files(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    parts = PAGES[name]()
    assert filled(page, name, parts) == page
    assert all(isinstance(part, str) for part in parts.values())


def trained_parameters(config: object) -> int:
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
        ("LoRA of rank 1", LoraConfig(r=1, target_modules=["0"])),
        ("DoRA", LoraConfig(r=8, target_modules=["0"], use_dora=True)),
    ],
)
def test_the_table_of_trained_parameters_is_what_peft_counts(method: str, config: object) -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {method} \|.*\| ([\d,]+) \|$", page, flags=re.MULTILINE)
    assert row is not None
    assert trained_parameters(config) == int(row[1].replace(",", ""))
