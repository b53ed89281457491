"""The commands on adapters' folders: what they show, and errors of one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dvora.adapter_file.packs import FORMAT
from tests.bank.tenants import change_values
from tests.cli.program import assert_ends_with_one_line, run
from tests.recipes import tiny_models
from tests.recipes.saved_adapters import save
from tests.tools.pages.seen import PHONE, seen


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of every method, many of one kind, a pack of these, checkpoints of a trainer, and their base."""
    folder = tmp_path_factory.mktemp("work")
    base = tiny_models.bert(folder / "base")
    for name, method in (("adapter", "dvora"), ("vera", "vera"), ("lora", "lora"), ("dora", "dora")):
        save(base, folder / name, method)
    save(base, folder / "other-adapter", "dvora", projection_seed=1)
    save(base, folder / "adapters" / "customer-1", task_type="SEQ_CLS")
    for number in range(2, 15):
        copy = shutil.copytree(folder / "adapters" / "customer-1", folder / "adapters" / f"customer-{number}")
        change_values(copy, number)
    for step in (5, 10, 100):
        shutil.copytree(folder / "adapter", folder / "trainer-output" / f"checkpoint-{step}")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where the commands run."""
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert run("dvora bank pack adapters --output adapters.dvora --quiet").code == 0
    return tmp_path


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("inspect base", 2, "holds no adapter_config.json"),
        ("inspect nothing", 2, "nothing: no such file or folder"),
        ("count adapter", 2, "holds an adapter, not a model; name its base"),
        ("count no/such-model", 2, "no/such-model"),
        ("count base --targets nothing", 2, "nothing"),
        ("count base --lambda-d-groups 0", 2, "lambda_d_groups must be at least 1, got 0"),
        ("count base --lambda-d-groups 999", 2, "lambda_d_groups=999 cuts the columns of the weight"),
        ("merge adapter --output base", 1, "not an empty folder"),
        ("merge adapter --output merged --dtype int4", 2, "'--dtype': 'int4' is not one of 'auto', 'float32'"),
        ("convert adapter --to lora --output lora", 2, "is no LoRA"),
        ("convert adapter --to ia3 --output ia3", 2, "'--to': 'ia3' is none of dora, dvora"),
        ("convert vera --to dora --output new", 2, "only adapters of dvora are converted to dora"),
        ("bank pack nothing --output a.dvora", 2, "nothing is not a folder"),
        ("bank pack empty --output a.dvora", 2, "has no folders with adapters in it"),
        ("bank pack adapters/customer-1 --output a.dvora", 2, "it is an adapter itself"),
        ("bank pack adapters --output no/folder/a.dvora", 2, "there is no folder"),
        ("bank pack adapters --output base", 2, "it is a folder"),
        ("bank pack adapters --output a.dvora --model base", 2, "No such option --model"),
        ("bank pack adapters", 2, "Missing option '--output'"),
        ("bank unpack adapters.dvora --output base", 1, "is not an empty folder"),
        ("bank unpack base --output out", 2, "is not a file"),
        ("bank inspect base/config.json", 2, "is no pack"),
        ("bank inspect base/model.safetensors", 2, "another safetensors file"),
        ("bank list adapters.dvora", 2, "No such command 'list'"),
        ("analyze adapter vera --model base", 2, "several methods (dvora, vera)"),
        ("analyze adapter --model base -o report.txt", 2, "has to end in .html"),
        ("analyze adapter --model base -o nowhere/report.html", 2, "there is no folder nowhere"),
        ("analyze adapter --model base -o /proc/report.html", 1, "/proc"),
    ],
)
def test_errors_are_one_line_with_what_to_do(command: str, code: int, message: str, work: Path) -> None:
    assert_ends_with_one_line(run(f"dvora {command}"), code, message)


def test_merge_says_nothing_of_what_is_nothing(work: Path) -> None:
    lossless = run("dvora merge adapter --output merged")
    assert not {"lost worst", "lost layer", "warning"} & {*lossless.stdout.replace("  ", "\n").splitlines()}
    lossy = run("dvora merge adapter --output merged-half --dtype bfloat16")
    assert "lost worst" in lossy.stdout
    assert 'from_pretrained("merged-half")' in lossy.stderr


@pytest.mark.parametrize(
    ("options", "columns"),
    [("", ["magnitude", "lambda b", "lambda d"]), (" --model base", ["angle", "widest", "update", "gain"])],
)
def test_inspect_summarises_types_of_layers_and_shows_all_if_asked(
    options: str, columns: list[str], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    layers = json.loads(run(f"dvora inspect adapter{options} --json").stdout)["layers"]
    in_short = run(f"dvora inspect adapter{options}").stdout
    whole = run(f"dvora inspect adapter{options} --all").stdout
    assert not any(row["layer"] in in_short for row in layers)
    assert all(any(line.startswith(row["layer"]) for line in whole.splitlines()) for row in layers)
    key = "angle_mean" if options else "norm_of_magnitude"
    of_queries = sorted(row[key] for row in layers if "query" in row["layer"])
    line = next(line for line in in_short.splitlines() if line.startswith("attention.self.query "))
    spread = [of_queries[0], sum(of_queries) / len(of_queries), of_queries[-1]]
    assert len(of_queries) == 2
    assert line.split()[1:3] == ["2", "/".join(f"{value:.3g}" for value in spread)]
    for column in columns:
        assert any(line.startswith(f"{column} ") for line in in_short.splitlines())


def test_inspect_tells_what_is_in_a_pack_and_shows_the_first(work: Path) -> None:
    packed = json.loads(run("dvora bank inspect adapters.dvora --json").stdout)
    assert (packed["count"], packed["format"]) == (14, FORMAT)
    assert packed["bytes"] == (work / "adapters.dvora").stat().st_size
    (content,) = packed["contents"]
    assert content["saved_whole"] == ["classifier.bias", "classifier.weight"]
    assert [row["name"] for row in packed["adapters"]] == sorted(path.name for path in (work / "adapters").iterdir())
    shown = run("dvora bank inspect adapters.dvora")
    assert "customer-1" in shown.stdout
    assert "customer-9" not in shown.stdout
    assert "2 more adapters are in it" in shown.stderr


def test_the_report_has_figures_and_the_same_as_json(work: Path) -> None:
    result = json.loads(run("dvora analyze adapter other-adapter --model base -o two.html --json").stdout)
    assert (result["report"], result["figures"]) == ("two.html", "two.json")
    content = json.loads((work / "two.json").read_text())
    assert [adapter["name"] for adapter in content["adapters"]] == ["adapter", "other-adapter"]
    assert content["steps"] is None
    assert -1 <= content["similarity"][0][1] <= 1
    page = (work / "two.html").read_text(encoding="utf-8")
    assert "Similarity of adapters" in page
    assert "Along the checkpoints" not in page


def test_checkpoints_are_in_the_order_of_their_steps_on_a_page_that_reads_well(work: Path) -> None:
    assert run("dvora analyze trainer-output --model base -o drift.html").code == 0
    content = json.loads((work / "drift.json").read_text())
    assert content["steps"] == [5, 10, 100]
    names = [adapter["name"] for adapter in content["adapters"]]
    assert names == ["checkpoint-5", "checkpoint-10", "checkpoint-100"]
    assert "Along the checkpoints" in (work / "drift.html").read_text(encoding="utf-8")
    with seen(work / "drift.html", PHONE, "dark") as page:
        assert page.width() == PHONE
        assert page.page.locator("svg").count() == 4
        assert page.page.locator("h2").all_inner_texts()[:2] == ["Overview", "Magnitude and direction"]
        assert page.complaints == []


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_other_methods_are_examined_too(method: str, work: Path) -> None:
    findings: dict[str, Any] = {
        finding["check"]: finding["status"]
        for finding in json.loads(run(f"dvora doctor {method} --model base --json").stdout)["findings"]
    }
    assert findings["outputs"] == "pass"
    assert {*findings.values()} <= {"pass", "skip"}


def test_a_fault_is_reported_with_advice_and_an_exit_code(work: Path) -> None:
    file = work / "adapter" / "adapter_model.safetensors"
    values = load_file(file)
    save_file({name: 3 * value if "magnitude" in name else value for name, value in values.items()}, file)
    ended = run("dvora doctor adapter --model base")
    assert ended.code == 1
    assert "the magnitude ran away" in ended.stdout
    assert "Verdict: 1 of 14 checks failed (movement): do not use this adapter" in ended.stdout
    assert "Next" not in ended.stderr
    assert "lower the magnitude's learning rate" in ended.stdout
    assert json.loads(run("dvora doctor adapter --model base --json").stdout)["healthy"] is False
