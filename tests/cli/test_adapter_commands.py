"""inspect, count, merge and convert: what they show, and errors of one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.program import assert_ends_with_one_line, run
from tests.recipes import tiny_models
from tests.recipes.saved_adapters import save

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    base = tiny_models.bert(folder / "base")
    save(base, folder / "adapter", "dvora")
    save(base, folder / "vera-adapter", "vera")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the base and the adapters of the examples, where the commands run."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("base", "adapter", "vera-adapter"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("dvora inspect base", 2, "holds no adapter_config.json"),
        ("dvora inspect nothing", 2, "nothing: no such file or folder"),
        ("dvora count adapter", 2, "holds an adapter, not a model; name its base"),
        ("dvora count no/such-model", 2, "no/such-model"),
        ("dvora count base --targets nothing", 2, "nothing"),
        ("dvora merge adapter --output base", 1, "not an empty folder"),
        ("dvora merge adapter --output merged --dtype int4", 2, "'--dtype': 'int4' is not one of 'auto', 'float32'"),
        ("dvora convert adapter --to lora --output lora", 2, "is no LoRA"),
        ("dvora convert adapter --to ia3 --output ia3", 2, "'--to': 'ia3' is none of dora, dvora"),
        ("dvora convert vera-adapter --to dora --output new", 2, "only adapters of dvora are converted to dora"),
    ],
)
def test_errors_are_one_line_with_what_to_do(command: str, code: int, message: str, work: Path) -> None:
    assert_ends_with_one_line(run(command), code, message)


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
    of_queries = sorted(
        row["angle_mean" if options else "norm_of_magnitude"] for row in layers if "query" in row["layer"]
    )
    line = next(line for line in in_short.splitlines() if line.startswith("attention.self.query "))
    spread = [of_queries[0], sum(of_queries) / len(of_queries), of_queries[-1]]
    assert len(of_queries) == 2
    assert line.split()[1:3] == ["2", "/".join(f"{value:.3g}" for value in spread)]
    for column in columns:
        assert any(line.startswith(f"{column} ") for line in in_short.splitlines())


def test_help_and_cheap_mistakes_need_none_of_the_heavy_packages() -> None:
    mistakes = [
        *(f"dvora {name} nowhere" for name in ("inspect", "doctor", "analyze", "report")),
        "dvora merge nowhere -o new",
        "dvora merge docs -o new --dtype int4",
        "dvora convert nowhere --to dora -o new",
        "dvora convert docs --to peft-dora -o new",
    ]
    code = (
        "import sys; from tests.cli.program import run\n"
        f"for name in ('inspect', 'count', 'merge', 'convert'): assert run(f'dvora {{name}} --help').code == 0\n"
        f"for command in {mistakes!r}: assert run(command).code == 2, command\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
