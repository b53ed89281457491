"""A run folder: read back as it was written, locked, loaded again."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dvora.recipes.models.bases import load_base
from dvora.recipes.run_folder import is_first, locked, read_record, read_run, world_size, write_record
from dvora.recipes.settings import Settings, resolved
from tests.recipes import tiny_models

HOLDER = """
import sys, pathlib
from dvora.recipes.run_folder import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.bert(tmp_path_factory.mktemp("models") / "bert")


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another run works in"), locked(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with locked(tmp_path):
        pass


def test_a_run_that_is_not_finished_is_not_read(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run\.json"):
        read_run(tmp_path)
    settings = Settings(task="regression", model=str(bert), data=("x.csv",))
    write_record(tmp_path, {"state": "started", "settings": settings.model_dump(mode="json"), "labels": []})
    with pytest.raises(ValueError, match=r"not finished; go on with .*--resume"):
        read_run(tmp_path)
    write_record(tmp_path, {"state": "finished", "settings": settings.model_dump(mode="json"), "labels": []})
    assert read_run(tmp_path).settings == settings


@pytest.mark.parametrize("content", [b"", b"[]", b'{"state": "finished"}', b'{"state": "fin', b"\xff"])
def test_a_damaged_record_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json"):
        read_record(tmp_path)


def test_new_layers_come_from_the_seed_alone(bert: Path) -> None:
    settings = resolved(Settings(task="text-classification", model=str(bert), data=("x",), seed=3))
    first, second = (load_base(settings, ["bad", "good"], 0) for _ in range(2))
    assert first.heads == ("classifier",)
    assert first.notes == ("new layers: classifier",)
    assert first.model.config.id2label == {0: "bad", 1: "good"}
    assert (first.model.classifier.weight == second.model.classifier.weight).all()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"adapter_config.json": {}}, "an adapter, not a model"),
        ({"config.json": {"model_type": "bert"}, "pytorch_model.bin": {}}, "pickled ones .* are never loaded"),
        ({"config.json": {"model_type": "no"}, "model.safetensors": {}}, "cannot be read"),
    ],
)
def test_a_folder_without_a_model_is_refused(tmp_path: Path, files: dict[str, object], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        load_base(Settings(task="regression", model=str(tmp_path), data=("x",)), [], 0)
    assert "\n" not in str(error.value)


def test_a_name_on_the_hub_that_is_not_reached_is_refused() -> None:
    with pytest.raises(ValueError, match="'nobody/nothing' is no folder here") as error:
        load_base(Settings(task="regression", model="nobody/nothing", data=("x",)), [], 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("variable", "ask"), [("RANK", is_first), ("WORLD_SIZE", world_size)])
def test_a_launcher_s_variable_that_is_no_number_is_named(
    variable: str, ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "two")
    with pytest.raises(ValueError, match=f"the environment variable {variable} is 'two', expected a whole number"):
        ask()
