"""dvora bank pack, unpack and inspect: their examples run, their errors are one line, their JSON is whole."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dvora.bank.factors import FactorRows
from dvora.bank.pack import Pack
from dvora.bank.sources import FolderSource
from dvora.cli import bank
from tests.bank.adapters import change_values, contents
from tests.cli.program import assert_ends_with_one_line, run
from tests.recipes import tiny_models
from tests.recipes.saved_adapters import CLASSES, save

EXAMPLES = {
    name: [line.strip() for line in text.splitlines() if line.strip().startswith("dvora ")]
    for name, text in {
        "pack": bank.PACK_EXAMPLES,
        "unpack": bank.UNPACK_EXAMPLES,
        "inspect": bank.INSPECT_EXAMPLES,
    }.items()
}
LINES = [line for lines in EXAMPLES.values() for line in lines]


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


@pytest.mark.parametrize("command", LINES)
def test_every_example_runs_and_names_the_next_command(command: str, work: Path) -> None:
    result = run(command)
    assert result.code == 0, result.stderr
    assert result.stdout
    assert "--json" in command or result.stderr.splitlines()[-1].startswith("Next: dvora ")
    shutil.rmtree("unpacked", ignore_errors=True)
    assert run(f"{command} --quiet").stderr == ""


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_help_text_shows_its_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run(f"dvora bank {name} --help")
    assert result.code == 0
    assert all(line in result.stdout for line in EXAMPLES[name])


@pytest.mark.parametrize("command", LINES)
def test_json_is_one_object_and_nothing_else(command: str, work: Path) -> None:
    result = run(command if "--json" in command else f"{command} --json")
    assert result.code == 0, result.stderr
    assert json.loads(result.stdout)["count"] == 14
    assert result.stdout.count("\n") == 1


def test_unpacked_are_the_adapters_that_were_packed(work: Path) -> None:
    assert run("dvora bank unpack adapters.dvora --output unpacked").code == 0
    assert contents(work / "unpacked") == contents(work / "adapters")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_with_a_base_the_rows_are_those_that_a_bank_computes(dtype: str, work: Path) -> None:
    result = run(f"dvora bank pack adapters --output served.dvora --model base --dtype {dtype} --json")
    assert result.code == 0, result.stderr
    base = CLASSES["SEQ_CLS"].from_pretrained(work / "base", num_labels=3).eval()
    values = FolderSource(work / "adapters" / "customer-7").read()
    rows = FactorRows.of_model(base, values.config, values.content, getattr(torch, dtype))
    assert json.loads(result.stdout)["factors"]["key"] == rows.key
    with Pack.open(work / "served.dvora") as pack:
        found = pack.source("customer-7").factors(rows.key)
    assert found is not None
    expected = rows.of(values)
    assert torch.equal(found[0], expected.row)
    assert torch.equal(found[1], expected.heads)
    assert found[1].numel()


def test_a_base_of_another_kind_is_refused_and_nothing_is_written(work: Path) -> None:
    tiny_models.llama(work / "other")
    before = (work / "adapters.dvora").read_bytes()
    result = run("dvora bank pack adapters --output adapters.dvora --model other")
    assert result.code == 1
    assert result.stderr.count("\n") == 1
    assert (work / "adapters.dvora").read_bytes() == before


def test_inspect_tells_what_is_in_it_and_shows_the_first(work: Path) -> None:
    found = json.loads(run("dvora bank inspect adapters.dvora --json").stdout)
    assert found["count"] == 14
    assert found["bytes"] == (work / "adapters.dvora").stat().st_size
    assert found["factors"] is None
    (content,) = found["contents"]
    assert content["saved_whole"] == ["classifier.bias", "classifier.weight"]
    assert [row["name"] for row in found["adapters"]] == sorted(path.name for path in (work / "adapters").iterdir())
    shown = run("dvora bank inspect adapters.dvora")
    assert "customer-1" in shown.stdout
    assert "2 more adapters are in it" in shown.stderr


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("dvora bank pack nothing --output a.dvora", 1, "nothing is not a folder"),
        ("dvora bank pack empty --output a.dvora", 1, "has no folders with adapters in it"),
        ("dvora bank pack adapters/customer-1 --output a.dvora", 1, "it is an adapter itself"),
        ("dvora bank pack adapters --output no/folder/a.dvora", 2, "there is no folder"),
        ("dvora bank pack adapters --output base", 2, "it is a folder"),
        ("dvora bank pack adapters --output a.dvora --dtype int4", 2, "unknown --dtype 'int4'"),
        ("dvora bank pack adapters --output a.dvora --model nothing", 1, "nothing"),
        ("dvora bank pack adapters", 2, "Missing option '--output'"),
        ("dvora bank unpack adapters.dvora --output base", 1, "is not an empty folder"),
        ("dvora bank unpack base --output out", 1, "is not a file"),
        ("dvora bank inspect base/config.json", 1, "is no pack"),
        ("dvora bank inspect base/model.safetensors", 1, "another safetensors file"),
        ("dvora bank list adapters.dvora", 2, "No such command 'list'"),
    ],
)
def test_errors_are_one_line_with_what_to_do(command: str, code: int, message: str, work: Path) -> None:
    assert_ends_with_one_line(run(command), code, message)


def test_a_truncated_pack_is_refused_in_one_line(work: Path) -> None:
    whole = (work / "adapters.dvora").read_bytes()
    (work / "adapters.dvora").write_bytes(whole[:-1])
    for command in ("unpack adapters.dvora --output out", "inspect adapters.dvora"):
        result = run(f"dvora bank {command}")
        assert result.code == 1
        assert "adapters.dvora is truncated" in result.stderr
    assert not (work / "out").exists()
