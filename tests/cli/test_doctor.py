"""dvora doctor as it is typed: on runs of every task and on adapters, healthy and not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.program import Ended, run
from tests.recipes import tiny_data, tiny_models
from tests.recipes.finished_runs import DATA, finished
from tests.recipes.saved_adapters import save


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, an adapter of each method, their base, and more rows."""
    folder = tmp_path_factory.mktemp("work")
    base = tiny_models.bert(folder / "base")
    for method in ("dvora", "lora", "dora"):
        save(base, folder / ("adapter" if method == "dvora" else method), method)
    shutil.move(finished("text-classification", folder).folder, folder / "dvora-run")
    tiny_data.reviews(folder / "new.csv")
    return folder


@pytest.fixture(autouse=True)
def at_work(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(made)


def findings(ended: Ended) -> dict[str, Any]:
    return {finding["check"]: finding for finding in json.loads(ended.stdout)["findings"]}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_other_methods_are_examined_too(method: str) -> None:
    found = findings(run(f"dvora doctor {method} --model base --json"))
    assert found["outputs"]["status"] == "pass"
    assert {finding["status"] for finding in found.values()} <= {"pass", "skip"}


def test_a_fault_is_reported_with_advice_and_an_exit_code(made: Path) -> None:
    shutil.copytree(made / "adapter", made / "broken")
    file = made / "broken" / "adapter_model.safetensors"
    values = load_file(file)
    save_file({name: 3 * value if "magnitude" in name else value for name, value in values.items()}, file)
    ended = run("dvora doctor broken --model base")
    assert ended.code == 1
    assert "the magnitude ran away" in ended.stdout
    assert "Verdict: 1 of 14 checks failed (movement): do not use this adapter" in ended.stdout
    assert "Next" not in ended.stderr
    assert "lower the magnitude's learning rate" in ended.stdout
    assert json.loads(run("dvora doctor broken --model base --json").stdout)["healthy"] is False


@pytest.mark.parametrize("task", DATA)
def test_runs_of_every_task_are_healthy(task: str, tmp_path: Path) -> None:
    trained = finished(task, tmp_path)
    ended = run(f"dvora doctor {trained.folder} --json")
    assert ended.code == 0, ended.stdout + ended.stderr
    content = json.loads(ended.stdout)
    assert (content["healthy"], content["verdict"]) == (True, "all 14 checks passed")


def test_what_has_no_adapter_is_refused(tmp_path: Path) -> None:
    trained = finished("text-classification", tmp_path, method="head")
    ended = run(f"dvora doctor {trained.folder}")
    assert "makes no adapter" in ended.stderr
