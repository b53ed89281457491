"""dvora bank as it is typed: what it shows, and errors of one line."""

import json
import shutil
from pathlib import Path

import pytest

from dvora.adapter_file.packs import FORMAT
from tests.bank.tenants import change_values
from tests.cli.program import assert_ends_with_one_line, run
from tests.recipes import tiny_models
from tests.recipes.saved_adapters import save


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    base = tiny_models.bert(folder / "base")
    save(base, folder / "adapters" / "customer-1", task_type="SEQ_CLS")
    for number in range(2, 15):
        name = f"customer-{number}"
        shutil.copytree(folder / "adapters" / "customer-1", folder / "adapters" / name)
        change_values(folder / "adapters" / name, number)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the base, the adapters and a pack, where the commands run."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("base", "adapters", "empty"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert run("dvora bank pack adapters --output adapters.dvora --quiet").code == 0
    return tmp_path


def test_inspect_tells_what_is_in_it_and_shows_the_first(work: Path) -> None:
    found = json.loads(run("dvora bank inspect adapters.dvora --json").stdout)
    assert found["count"] == 14
    assert found["bytes"] == (work / "adapters.dvora").stat().st_size
    assert found["format"] == FORMAT
    (content,) = found["contents"]
    assert content["saved_whole"] == ["classifier.bias", "classifier.weight"]
    assert [row["name"] for row in found["adapters"]] == sorted(path.name for path in (work / "adapters").iterdir())
    shown = run("dvora bank inspect adapters.dvora")
    assert "customer-1" in shown.stdout
    assert "2 more adapters are in it" in shown.stderr


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("dvora bank pack nothing --output a.dvora", 2, "nothing is not a folder"),
        ("dvora bank pack empty --output a.dvora", 2, "has no folders with adapters in it"),
        ("dvora bank pack adapters/customer-1 --output a.dvora", 2, "it is an adapter itself"),
        ("dvora bank pack adapters --output no/folder/a.dvora", 2, "there is no folder"),
        ("dvora bank pack adapters --output base", 2, "it is a folder"),
        ("dvora bank pack adapters --output a.dvora --model base", 2, "No such option --model"),
        ("dvora bank pack adapters", 2, "Missing option '--output'"),
        ("dvora bank unpack adapters.dvora --output base", 1, "is not an empty folder"),
        ("dvora bank unpack base --output out", 2, "is not a file"),
        ("dvora bank inspect base/config.json", 2, "is no pack"),
        ("dvora bank inspect base/model.safetensors", 2, "another safetensors file"),
        ("dvora bank list adapters.dvora", 2, "No such command 'list'"),
    ],
)
def test_errors_are_one_line_with_what_to_do(command: str, code: int, message: str, work: Path) -> None:
    assert_ends_with_one_line(run(command), code, message)
