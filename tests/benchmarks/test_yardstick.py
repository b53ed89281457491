"""PEFT's method comparison with DVoRA: our folders, what a run needs, how it goes on, and what is shown."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.yardstick import __main__ as command
from benchmarks.yardstick import environment, first, needs, rows
from benchmarks.yardstick.checkout import CheckoutError, check_unchanged, checked_out
from benchmarks.yardstick.experiments import (
    ADAPTER_FILE,
    CATALOGUE,
    TRAINING_FILE,
    Experiment,
    adapter_config,
    folder_of,
    training_params,
)
from benchmarks.yardstick.rates import compare
from benchmarks.yardstick.running import finished_row, place, row_file, run
from benchmarks.yardstick.sizes import LAYERS, trained_parameters
from benchmarks.yardstick.tasks import METHOD, TASKS
from dvora import DVoRAConfig
from dvora.training import Group, parameter_groups

ROOT = Path(__file__).parent.parent.parent
WIDTH, INNER, KEYS, BLOCKS = 24, 40, 8, 2
IMAGES = next(experiment for experiment in CATALOGUE if experiment.task == "image-gen")
LANGUAGE = [experiment for experiment in CATALOGUE if experiment.task == "MetaMathQA"]
COPIES_THE_SETTINGS = """
import json, pathlib, sys
# PEFT, which takes seconds to import, would get the method from it.
assert "dvora" in sys.modules
folder = pathlib.Path(sys.argv[-1])
files = (folder / f"{name}.json" for name in ("adapter_config", "training_params"))
settings, training = (json.loads(file.read_text()) for file in files)
# PEFT writes a set.
settings["target_modules"].reverse()
metrics = [{"train time": 8.0}, {"step": training.get("max_steps"), "test accuracy": 0.25}]
told = {"status": "success", "metrics": metrics}
row = {"run_info": {"peft_config": settings, "train_config": training}, "train_info": told}
pathlib.Path("results", f"{folder.parent.name}--{folder.name}.json").write_text(json.dumps(row))
print("ran", folder.name, file=sys.stderr, flush=True)
"""
IS_CANCELED = """
import json, pathlib, sys
row = {"run_info": {"error_msg": "out of memory"}}
name = pathlib.Path(sys.argv[-1]).name
pathlib.Path("cancelled_results", f"dvora--{name}--now.json").write_text(json.dumps(row))
"""
"""Do with rows what PEFT's scripts do."""


def name(experiment: Experiment) -> str:
    return experiment.name


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=BLOCKS,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
    )


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A folder like PEFT's of a task."""
    for folder in ("results", "cancelled_results"):
        (tmp_path / folder).mkdir()
    return tmp_path


@pytest.mark.parametrize("experiment", CATALOGUE, ids=name)
def test_a_folder_is_read_as_its_method_and_is_what_the_catalogue_writes(experiment: Experiment) -> None:
    folder = folder_of(experiment)
    config = PeftConfig.from_pretrained(str(folder))
    if experiment.method == METHOD:
        assert isinstance(config, DVoRAConfig)
        assert config.projection_init == experiment.projection_init
    else:
        assert isinstance(config, LoraConfig)
        assert (config.r, config.lora_alpha) == (1, 2)
    assert config.target_modules == set(experiment.target_modules)
    assert json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8")) == adapter_config(experiment)
    assert json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8")) == training_params(experiment)


def losses(config: PeftConfig, rate: float, rates: dict[Group, float]) -> list[float]:
    """The course of a tiny model's loss, with ten times the rates, so that few steps show much."""
    model = get_peft_model(llama(), config)
    rates = {group: 10 * value for group, value in rates.items()}
    # Gradients of plain vectors are smaller, and must not vanish beside AdamW's epsilon.
    optimizer = torch.optim.AdamW(parameter_groups(model, 10 * rate, learning_rates=rates), eps=1e-12)
    tokens = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    course = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    return course


def test_one_rate_for_a_folder_is_two_rates_for_a_plain_adapter() -> None:
    """What alpha and d_initial of our folders are for: PEFT's scripts have one rate."""
    experiment = LANGUAGE[2]
    rate = training_params(experiment)["optimizer_kwargs"]["lr"]
    plain = DVoRAConfig(
        r=256,
        target_modules=[*experiment.target_modules],
        projection_init=experiment.projection_init,
        task_type="CAUSAL_LM",
    )
    one = losses(PeftConfig.from_pretrained(str(folder_of(experiment))), rate, {})
    two = losses(plain, rate, {"lambda_b": experiment.rate, "lambda_d": experiment.rate})
    assert one == pytest.approx(two, abs=1e-3)
    assert abs(losses(plain, rate, {})[-1] - one[-1]) > 0.02


@pytest.mark.parametrize("experiment", LANGUAGE, ids=name)
def test_parameters_are_counted_as_peft_counts_them(experiment: Experiment) -> None:
    model = llama()
    sizes = {name.rpartition(".")[2]: layer for name, layer in model.model.named_modules() if name.endswith("_proj")}
    layers = {name: (sizes[name].in_features, sizes[name].out_features, BLOCKS) for name in LAYERS["MetaMathQA"]}
    model = get_peft_model(model, PeftConfig.from_pretrained(str(folder_of(experiment))))
    assert trained_parameters(experiment, layers) == model.get_nb_trainable_parameters()[0]


def test_lora_of_rank_1_is_a_32nd_of_the_row_that_peft_publishes() -> None:
    counts = {trained_parameters(experiment) for experiment in CATALOGUE if experiment.method == "lora"}
    assert {9_175_040 // 32, 38_338_560 // 32} <= counts


def test_the_page_has_every_folder_with_its_parameters() -> None:
    page = (ROOT / "benchmarks" / "yardstick" / "README.md").read_text(encoding="utf-8")
    for experiment in CATALOGUE:
        assert re.search(rf"\| `{experiment.name}` \|.*\| {trained_parameters(experiment):,} \|", page), experiment.name


def test_rates_are_compared_with_the_rows_of_a_model() -> None:
    model = llama()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.constant_(layer.weight, 2 / layer.in_features**0.5)
    line = compare(LANGUAGE[0], model)
    assert "median norm 2; recommended for the magnitude 0.007, in the folder 0.0035" in line
    with pytest.raises(ValueError, match="no layer named to_q"):
        compare(IMAGES, model)


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "OLDEST_PYTHON", (3, 10))
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "is_available", lambda: False)


@pytest.mark.usefixtures("no_device")
def test_without_a_gpu_nothing_starts_and_the_message_says_what_to_do() -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main([])
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        command.main(["--first"])
    assert re.search(r"^no GPU: torch .* no CUDA or XPU .*make yardstick ARGS=--tryout", str(stopped.value))


@pytest.mark.usefixtures("no_device")
def test_a_model_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("403 Client Error\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(SystemExit, match=r"model meta-llama/Llama-3\.2-3B, .* had \(OSError: 403 Client Error\)"):
        command.main(["--rates"])


@pytest.fixture
def repository(tmp_path: Path) -> tuple[str, str]:
    """A repository with one file, and its commit."""
    folder = tmp_path / "origin"
    folder.mkdir()
    (folder / "run.py").write_text("print(1)\n", encoding="utf-8")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    return str(folder), found.stdout.strip()


def test_the_repository_is_fetched_once_and_a_changed_script_is_refused(
    repository: tuple[str, str], tmp_path: Path
) -> None:
    url, commit = repository
    folder = checked_out(tmp_path / "peft", url, commit)
    assert checked_out(folder, "no such place", commit) == folder
    (folder / "experiment.json").touch()
    check_unchanged(folder, commit)
    (folder / "run.py").write_text("print(2)\n", encoding="utf-8")
    with pytest.raises(CheckoutError, match=r"not as PEFT has it: run\.py was changed; delete .*peft and start again"):
        check_unchanged(folder, commit)


def test_a_row_of_other_settings_or_of_no_success_is_run_again(task_folder: Path) -> None:
    experiment = LANGUAGE[0]
    place(experiment, task_folder)
    row: dict[str, Any] = {
        "run_info": {"peft_config": adapter_config(experiment), "train_config": training_params(experiment)},
        "train_info": {"status": "success"},
    }
    file = row_file(experiment, task_folder)
    file.write_text(json.dumps(row), encoding="utf-8")
    assert finished_row(experiment, task_folder) == row
    other = training_params(replace(experiment, rate=0.5))
    for change in ({"run_info": {**row["run_info"], "train_config": other}}, {"train_info": {"status": "canceled"}}):
        file.write_text(json.dumps(row | change), encoding="utf-8")
        assert finished_row(experiment, task_folder) is None


def test_a_run_that_did_not_end_well_says_why(task_folder: Path) -> None:
    experiment = LANGUAGE[0]
    place(experiment, task_folder)
    (task_folder / "run.py").write_text(IS_CANCELED, encoding="utf-8")
    assert run(experiment, task_folder) == "canceled: out of memory"
    (task_folder / "run.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    assert run(experiment, task_folder) == "PEFT's script ended with status 3 and without a row; what it said is above"


READS_ROWS = """
import pandas, pathlib
def load_df(path, task_name, print_fn):
    names = [file.stem.replace("--", "/") for file in pathlib.Path(path).glob("*.json")]
    row = {"num_trainable_params": 9, "test_accuracy": 0.5, "peft_type": "DVORA", "model_id": "m", "peft_version": "v",
           "created_at": pandas.Timestamp("2026-01-02")}
    return pandas.DataFrame([{"experiment_name": name, **row} for name in names])
"""


def test_what_has_a_row_is_skipped_and_rows_are_kept_and_shown(
    task_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = task_folder / "method_comparison" / "MetaMathQA"
    (folder / "results").mkdir(parents=True)
    (folder / "run.py").write_text(COPIES_THE_SETTINGS, encoding="utf-8")
    (folder.parent / "processing.py").write_text(READS_ROWS, encoding="utf-8")
    kept = task_folder / "kept"
    monkeypatch.setattr(command, "of_task", lambda _: LANGUAGE[:2])
    monkeypatch.setattr(command, "check_unchanged", lambda _: None)
    monkeypatch.setattr(rows, "ROWS", kept)
    for runs in (2, 0):
        assert command.measure(TASKS["MetaMathQA"], task_folder) == []
        said = capfd.readouterr()
        assert said.err.count("ran llama") == runs
        assert f"*  50.0%          9  dvora/{LANGUAGE[0].name}  (m, PEFT v, 2026-01-02)" in said.out
    assert {file.name for file in kept.rglob("*.json")} == {row_file(each, folder).name for each in LANGUAGE[:2]}


def test_a_folder_in_the_way_of_the_hub_is_refused(task_folder: Path) -> None:
    (task_folder / "openai" / "gsm8k").mkdir(parents=True)
    with pytest.raises(CheckoutError, match=r"gsm8k would be read in place of the hub's openai/gsm8k, .* move it away"):
        command.check_nothing_shadows_the_hub(TASKS["MetaMathQA"], task_folder)


def test_an_hour_on_a_gpu_is_tried_on_the_cpu_in_tiny_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(first.FOLDERS, "cpu", tmp_path)
    assert command.main(["--first=cpu"]) == 0
    said = capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    assert {(row["part"], row["arm"]) for row in content["rows"]} == {
        (part, arm) for part in ("whole step", "decode") for arm in ("base", "LoRA r=1", "dvora structured r=16")
    }
    for row in content["rows"]:
        assert row["kernels"] > 0
        assert len(row["seconds"]) == 2
        assert row["device"] == content["device"]
    # Two products, a strength and a sum.
    assert re.search(r"LoRA r=1 .* 1\.000 +│ 4\.0 ", said)
    assert content["not_measured"] == []
    assert f"Everything is in {file}" in said


def test_a_task_beside_the_hours_own_runs_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["MetaMathQA", "--first=cpu"])
    assert "name no TASK with it" in capsys.readouterr().err


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository like PEFT's, with the task's folder and nothing in it that runs, on a machine that can run it."""
    for check in ("check_python", "check_access"):
        monkeypatch.setattr(first, check, lambda *_: None)
    monkeypatch.setattr(first, "is_installed_from", lambda _: True)
    folder = tmp_path / "peft" / "method_comparison" / "MetaMathQA"
    for name in ("results", "cancelled_results"):
        (folder / name).mkdir(parents=True)
        (folder / name / ".gitkeep").touch()
    (folder.parent / "processing.py").touch()
    return tmp_path / "peft"


def test_short_runs_are_of_few_steps_and_not_among_the_whole_ones(checkout: Path, tmp_path: Path) -> None:
    folder = checkout / "method_comparison" / "MetaMathQA"
    (folder / "run.py").write_text(COPIES_THE_SETTINGS, encoding="utf-8")
    outcomes = dict(first.short_runs(checkout, tmp_path / "short"))
    assert set(outcomes) == set(first.EXPERIMENTS)
    for experiment, row in outcomes.items():
        assert isinstance(row, dict)
        assert row["run_info"]["train_config"]["max_steps"] == 500
        said = first.described_short(experiment, row)
        assert said == f"{experiment}: 25.0% of GSM8K after 500 steps, which took 8 s"
    assert not [*(folder / "results").glob("*.json")]


def test_a_short_run_that_fails_says_why_and_the_next_one_runs(checkout: Path, tmp_path: Path) -> None:
    fails_first = f"import sys\nif 'lora' in sys.argv[-1]: sys.exit(3)\n{COPIES_THE_SETTINGS}"
    (checkout / "method_comparison" / "MetaMathQA" / "run.py").write_text(fails_first, encoding="utf-8")
    lora, dvora = (dict(first.short_runs(checkout, tmp_path / "short"))[name] for name in first.EXPERIMENTS)
    assert str(lora).startswith("PEFT's script ended with status 3")
    assert isinstance(dvora, dict)


def test_without_pefts_repository_there_are_no_short_runs_and_the_reason_is_given(tmp_path: Path) -> None:
    ((name, reason),) = first.short_runs(tmp_path / "nothing", tmp_path)
    assert name == "MetaMathQA"
    assert str(reason).startswith(f"PEFT is not installed from {tmp_path / 'nothing'}")


def test_without_the_repository_the_hour_goes_on_and_a_comparison_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "checked_out", lambda: checked_out(tmp_path / "peft", "no such place"))
    monkeypatch.setattr(environment, "first_problem", lambda _: None)
    environment.main(["--first"])
    assert "--first goes on without PEFT's repository" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="git fetch failed"):
        environment.main([])
