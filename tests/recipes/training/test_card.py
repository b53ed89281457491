"""The README.md of an adapter: its code loads what predicts, its table is the record's, and nothing in it is markup."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dvora.recipes.reports.run_model import load_trained
from dvora.recipes.training.card import model_card
from tests.recipes.finished_runs import finished

CASES = [
    ("text-classification", "dvora", {}),
    ("text-classification", "dvora", {"lambda_d_groups": 3}),
    ("regression", "lora", {}),
    ("image-classification", "dvora", {}),
    ("causal-lm", "full", {}),
]


@pytest.mark.parametrize(("task", "method", "settings"), CASES)
def test_the_code_loads_the_model(tmp_path: Path, task: str, method: str, settings: dict[str, Any]) -> None:
    run = finished(task, tmp_path, method=method, **settings)
    text = (run.adapter / "README.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    assert ("import dvora" in code) == (method == "dvora")
    named: dict[str, Any] = {}
    here = code.replace("path/to/this/folder", str(run.adapter)).replace(
        "path/to/", f"{Path(run.settings.model).parent}/"
    )
    exec(here, named)
    expected, _ = load_trained(run)
    values = expected.state_dict()
    found = named["model"].state_dict()
    assert found.keys() == values.keys()
    # Of a head that the adapter brings, the one that it replaces is random.
    assert all(torch.equal(value, found[name]) for name, value in values.items() if "original_module" not in name)
    if run.labels:
        assert named["model"].config.id2label == dict(enumerate(run.labels))
        assert named["model"].config.label2id == {label: index for index, label in enumerate(run.labels)}


def test_it_says_what_the_run_was(tmp_path: Path) -> None:
    run = finished("text-classification", tmp_path)
    text = (run.adapter / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert front == {
        "base_model_relation": "adapter",
        "library_name": "dvora",
        "pipeline_tag": "text-classification",
        "tags": ["dvora", "text-classification"],
    }
    record = json.loads((run.folder / "run.json").read_text())
    assert f"{record['metrics']['test']['accuracy']:.4g}" in text
    assert "head alone" in text
    assert "reviews.csv" in text
    assert "bad, good" in text
    assert str(tmp_path) not in text


def test_groups_are_named_where_there_are_several(tmp_path: Path) -> None:
    for settings, named in (({}, "dvora, rank 4\n"), ({"lambda_d_groups": 3}, "dvora, rank 4, lambda_d in 3 groups\n")):
        run = finished("text-classification", tmp_path / str(len(settings)), method="dvora", **settings)
        assert named in (run.adapter / "README.md").read_text(encoding="utf-8").replace("\\", "")


def test_the_head_alone_is_loaded_by_the_program(tmp_path: Path) -> None:
    run = finished("text-classification", tmp_path, method="head")
    assert "dvora predict RUN" in (run.adapter / "README.md").read_text(encoding="utf-8")


def test_names_from_files_are_no_markup(tmp_path: Path) -> None:
    run = finished("text-classification", tmp_path)
    labels = ["<script>", "a|b", "\x1b[2J", "**bold**", "```"]
    text = model_card(run.settings, run.record, labels, load_trained(run)[0].config)
    assert not re.search("[\x00-\x08\x0b-\x1f]", text)
    for label in (r"\<script\>", r"a\|b", r"\\x1b\[2J", r"\*\*bold\*\*"):
        assert label in text
    assert text.count("```") == 2
