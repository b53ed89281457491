"""dvora train as it is typed: its options, its errors and exit codes, signals, and several processes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from dvora.cli.app import app
from dvora.recipes.reports.evaluation import evaluate_run
from dvora.recipes.run_folder import read_run
from dvora.recipes.settings import Settings, default_of
from tests.recipes import tiny_data, tiny_models

ROOT = Path(__file__).parent.parent.parent
GIVEN = ["--task", "text-classification", "-m", "minilm", "--data", "reviews.csv"]
TRAINED = [*GIVEN, "--epochs", "1", "--rank", "4", "--cpu", "--if-no-better", "adapter"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models and data that the examples name, with a space and an umlaut in its name."""
    folder = tmp_path_factory.mktemp("my dësk")
    tiny_models.bert(folder / "minilm")
    tiny_data.reviews(folder / "reviews.csv")
    return folder


@pytest.fixture(autouse=True)
def at_the_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)


def typed(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments])


def test_a_run_as_json(desk: Path) -> None:
    result = typed(*TRAINED, "-o", "out", "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["run"] == str(desk / "out")
    assert [(row["part"], row["model"]) for row in shown["metrics"]] == [
        ("validation", "trained"),
        ("validation", "head alone, base frozen"),
        ("validation", "always bad"),
        ("test", "trained"),
        ("test", "head alone, base frozen"),
        ("test", "always bad"),
    ]
    assert "step 2 of 6: training" in result.stderr
    assert "s a step, about 0:" in result.stderr
    assert "step 6 of 6, validation: loss" in result.stderr
    assert typed("out", "--resume", "--quiet", "--json").stderr == ""
    assert json.loads(typed("out", "--resume", "--json").stdout) == shown
    assert "always bad" in typed("out", "--resume").stdout


def test_a_run_with_groups_is_inspected(desk: Path) -> None:
    result = typed(*TRAINED, "--lambda-d-groups", "4", "-o", "grouped", "--json")
    assert result.exit_code == 0, result.output
    shown = CliRunner().invoke(app, ["inspect", str(desk / "grouped" / "adapter"), "--json"])
    found = json.loads(shown.stdout)
    assert found["settings"]["lambda_d_groups"] == 4
    assert set(found["ranks"]) == {"4"}
    counted = json.loads(
        CliRunner().invoke(app, ["count", "minilm", "--rank", "4", "--lambda-d-groups", "4", "--json"]).stdout
    )
    assert found["trained_parameters"] - found["head_values"] == counted["counts"][0]["trained"]
    more = typed(*TRAINED, "--lambda-d-groups", "17", "-o", "more")
    assert (more.exit_code, more.stderr.splitlines()[-1][:6]) == (2, "Error:")
    assert "lambda_d_groups=17 cuts the columns of the weight, of which it has 16" in more.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "task is missing"),
        (["no.yaml"], "no.yaml: no such file; --print-config writes one"),
        ([*GIVEN, "--data", "no.csv", "-o", "e"], "no.csv: no such file"),
        ([*GIVEN, "-m", "nobody/nothing", "-o", "e"], "is no folder here"),
        ([*GIVEN, "--task", "text-clasification"], "did you mean 'text-classification'"),
        (["--lr", "1"], "No such option --lr, did you mean --learning-rate; dvora train --help"),
        (["--bs", "1"], "did you mean --batch-size"),
        (["--steps", "1"], "did you mean --max-steps"),
        (["--weight_decai", "1"], "did you mean --weight-decay"),
        ([*GIVEN, "--learning-rate", "fast"], "'--learning-rate': Input should be a valid number"),
        ([*GIVEN, "--method", "lora", "--lambda-d-groups", "4"], "lambda_d_groups is 4, which only the method dvora"),
        ([*GIVEN, "--method", "full", "--lambda-d-groups", "4"], "lambda_d_groups is 4, which only the method dvora"),
        ([*GIVEN, "--method", "head", "--lambda-d-groups", "4"], "lambda_d_groups is 4, which only the method dvora"),
        ([*GIVEN, "--lambda-d-groups", "0"], "lambda_d_groups is 0: input should be greater than or equal to 1"),
        (["--zzz"], "No such option --zzz; dvora train --help"),
        (["--learning-rates", "head: ["], "learning_rates is 'head: ['"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = typed(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = typed("--task", "text-classification", "--model", "m", "--data", "a.csv")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: the folder that this command was started in is gone; change to one that is there\n"
    )


def test_print_config_is_a_config(desk: Path) -> None:
    printed = typed("--print-config", "--task", "regression", "--learning-rate", "1e-5", "--split-seed", "3").stdout
    (desk / "printed.yaml").write_text(printed)
    assert "learning_rate: 1.0e-05\n" in printed
    assert typed("printed.yaml", "--print-config").stdout == printed


def test_every_setting_is_an_option_and_the_help_shows_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shown = typed("--help").stdout
    for name, field in Settings.model_fields.items():
        extra: Any = field.json_schema_extra
        assert (f"│ --{name.replace('_', '-')} " in shown) != extra["rare"]
        assert extra["rare"] or f"({default_of(field)})" in shown or not default_of(field)
    given = ["--weight-decay", "0.5", "--no-keep-best", "--cpu", "--learning-rates", "head: 0.5, magnitude: 0.25"]
    printed = typed("--print-config", *given, "--validation-data", "a.csv", "--validation-data", "b.csv").stdout
    expected = ["weight_decay: 0.5", "keep_best: false", "cpu: true", "learning_rates: {head: 0.5, magnitude: 0.25}"]
    for line in (*expected, "validation_data: [a.csv, b.csv]"):
        assert f"{line}\n" in printed


def process(*arguments: str, launcher: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "dvora.cli", "train", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes, **options)


def wait_for(running: subprocess.Popen[str], start: str) -> str:
    """The second word of the first line on stderr that starts so."""
    assert running.stderr
    return next(line.split()[1] for line in running.stderr if line.startswith(start))


def test_a_killed_run_goes_on_and_a_signal_stops_it_with_a_checkpoint(desk: Path) -> None:
    running = process(*TRAINED, "-o", "killed", "--epochs", "100000")
    # The first epoch's checkpoint is whole when the second epoch has been evaluated.
    wait_for(running, "step 12 ")
    running.kill()
    running.communicate()
    folder = desk / "killed" / "checkpoints"
    going = process("killed", "--resume")
    assert int(wait_for(going, "step ")) >= 12
    going.send_signal(signal.SIGINT)
    _, errors = going.communicate(timeout=60)
    assert going.returncode == 130, errors
    last = errors.splitlines()[-1]
    assert last.startswith("stopped after step ")
    again = ["dvora", "train", str(desk / "killed" / "config.yaml"), "--resume"]
    assert shlex.split(last.partition("go on with: ")[2]) == again
    steps = [int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")]
    assert max(steps) == int(last.split()[3].rstrip(";"))


def test_two_processes_train_as_one(desk: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    options = ["-o", "together", "--epochs", "10", "--json", "--seed", "3", "--batch-size", "4"]
    running = process(*TRAINED, *options, launcher=launcher)
    results, errors = running.communicate(timeout=240)
    assert running.returncode == 0, errors
    # One of them writes. Two batches of 4 rows a step of 96 rows.
    assert [json.loads(line)["steps"] for line in results.splitlines()] == [120]
    record = json.loads((desk / "together" / "run.json").read_text())
    assert record["processes"] == 2
    again, recorded = evaluate_run(read_run(desk / "together")).metrics["test"], record["metrics"]["test"]
    assert again["accuracy"] == recorded["accuracy"]
    # Two processes fill their last batch with rows that they have had, which weighs on a mean over so few.
    assert again["loss"] == pytest.approx(recorded["loss"], rel=0.4)
