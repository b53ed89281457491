"""Training as a whole: every task and method, the same again, stopped and gone on with, and folders that are in use."""

import json
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import dvora.recipes
from dvora import AdapterBank
from dvora.recipes.data.labels import LARGEST
from dvora.recipes.data.run_data import load_data
from dvora.recipes.models.adapters import read_adapter
from dvora.recipes.reports.run_model import load_trained
from dvora.recipes.run_folder import HEAD_ALONE, HEAD_AT_START, read_run
from dvora.recipes.settings import LEARNING_RATES, METHODS, checked_settings, read_settings
from dvora.recipes.tasks.head_alone import last_layer, read_head_alone
from dvora.recipes.tasks.task import features
from dvora.recipes.training.callbacks import Progress
from dvora.recipes.training.checkpoints import checkpoints
from dvora.recipes.training.run import train
from dvora.recipes.training.trainers import length_of_run
from dvora.training import MAGNITUDE_SHARE
from tests.recipes import tiny_data
from tests.recipes.finished_runs import DATA
from tests.recipes.training.runs import Run, assert_same, finished, signal_after, trained_parameters


@pytest.mark.parametrize("task", DATA)
def test_every_task_is_trained_and_evaluated(models: dict[str, Path], tmp_path: Path, task: str) -> None:
    run = Run(models, tmp_path, task)
    record = finished(run.settings("out", learning_rate=0.02, epochs=4)).record
    assert read_run(tmp_path / "out").record == json.loads(json.dumps(record))
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    evaluated = [entry["step"] for entry in record["history"] if "eval_loss" in entry]
    assert len(evaluated) == len(set(evaluated)) == 4
    if task == "causal-lm":
        # The others start from a head that is fitted already.
        assert sum(losses[-3:]) < sum(losses[:3])
    expected = {
        "regression": {"loss", "pearson", "rmse"},
        "causal-lm": {"loss", "perplexity", "bits_per_byte"},
        "token-classification": {"loss", "f1", "precision", "recall"},
    }.get(task, {"loss", "accuracy", "macro_f1"})
    assert record["metrics"]["test"].keys() == expected
    baselines = {"causal-lm": ["before_training"], "token-classification": ["head_alone"]}.get(
        task, ["head_alone", "simplest_guess"]
    )
    for baseline in baselines:
        assert record["metrics"][f"test_{baseline}"].keys() >= expected - {"loss"}
    alone = ["head_alone.safetensors"] if task != "causal-lm" else []
    files = [".lock", "adapter", "config.yaml", *alone, "run.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files


@pytest.mark.parametrize(("method", "changes"), [*((m, {}) for m in METHODS), ("dvora", {"lambda_d_groups": 4})])
def test_the_loaded_adapter_is_the_evaluated_one(
    models: dict[str, Path], tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    run = Run(models, tmp_path)
    settings = run.settings("out", method=method, learning_rate=0.01, **changes)
    finished(settings)
    found = read_run(tmp_path / "out")
    model, tokenizer = load_trained(found)
    assert model.config.id2label == {0: "bad", 1: "good"}
    test = load_data(settings).test
    inputs = features(test, settings, tokenizer, 32).dataset
    batch = tokenizer.pad(inputs.remove_columns("label")[:], return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(inputs["label"]))
    assert loss.item() == pytest.approx(found.record["metrics"]["test"]["loss"], rel=1e-5)
    if method == "head":
        assert found.record["trained_parameters"] == 34
    elif method != "full":
        assert read_adapter(found.adapter).method == method
    if changes:
        assert {v.shape for n, v in trained_parameters(tmp_path / "out").items() if "lambda_d" in n} == {(4, 4)}


def test_chats_are_trained_on_and_compared_with_the_base(models: dict[str, Path], tmp_path: Path) -> None:
    run = Run(models, tmp_path, "causal-lm")
    run.data = tiny_data.chats(tmp_path / "chats.jsonl")
    metrics = finished(run.settings("out", learning_rate=0.05)).record["metrics"]
    assert metrics["test"]["bits_per_byte"] > 0
    assert metrics["test"]["loss"] < metrics["test_before_training"]["loss"]
    assert metrics["test"]["perplexity"] == pytest.approx(torch.tensor(metrics["test"]["loss"]).exp().item(), rel=1e-5)


def test_the_largest_numbers_are_trained_on(models: dict[str, Path], tmp_path: Path) -> None:
    run = Run(models, tmp_path, "regression")
    head, *rows = [line.rsplit(",", 1) for line in run.data.read_text().splitlines()]
    most = max(float(rating) for _, rating in rows)
    lines = [f"{text},{float(rating) / most * LARGEST}" for text, rating in rows]
    run.data.write_text("\n".join([",".join(head), *lines]))
    metrics = finished(run.settings("out", epochs=4)).record["metrics"]
    assert metrics["test"]["rmse"] < 0.99 * metrics["test_head_alone"]["rmse"]


@pytest.mark.parametrize("method", ["dvora", "lora"])
def test_the_same_seed_gives_the_same_run_and_another_another(
    models: dict[str, Path], tmp_path: Path, method: str
) -> None:
    run = Run(models, tmp_path)
    train(run.settings("one", method=method, dropout=0.1))
    torch.manual_seed(123)
    again = read_settings(tmp_path / "one" / "config.yaml", {"output": str(tmp_path / "two")})
    train(again)
    assert_same(tmp_path / "one", tmp_path / "two")
    train(run.settings("three", method=method, dropout=0.1, seed=1))
    one, three = trained_parameters(tmp_path / "one"), trained_parameters(tmp_path / "three")
    assert any(not torch.equal(one[name], three[name]) for name in one)


def test_a_stopped_run_is_refused_unless_it_is_resumed(models: dict[str, Path], tmp_path: Path) -> None:
    settings = Run(models, tmp_path).settings("stopped")
    outcome = train(settings, on_progress=signal_after(7, signal.SIGTERM))
    # The signal came when the seventh step was over.
    assert (outcome.run, outcome.stopped_at) == (None, 8)
    with pytest.raises(ValueError, match="is not finished"):
        read_run(tmp_path / "stopped")
    with pytest.raises(ValueError, match="holds an unfinished run; --resume goes on"):
        train(settings)
    steps: list[int] = []
    finished(settings, resume=True, on_progress=lambda progress: steps.append(progress.step))
    assert min(steps) == 9


@pytest.mark.parametrize(
    ("changes", "steps"), [({}, range(1, 5)), ({"evaluate_every": 2}, range(1, 3))], ids=["epochs", "steps"]
)
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(
    models: dict[str, Path], tmp_path: Path, changes: dict[str, Any], steps: range
) -> None:
    run = Run(models, tmp_path)
    settings = {"dropout": 0.1, "batch_size": 32, **changes}
    whole = finished(run.settings("whole", **settings))
    assert whole.record["steps"] == 6
    for step in steps:
        stopped = run.settings(f"stopped {step}", **settings)
        assert train(stopped, on_progress=signal_after(step)).stopped_at == step + 1
        train(stopped, resume=True)
        assert_same(tmp_path / "whole", tmp_path / f"stopped {step}")


def test_a_half_written_checkpoint_is_never_gone_on_with(models: dict[str, Path], tmp_path: Path) -> None:
    run = Run(models, tmp_path)
    train(run.settings("whole"))
    settings = run.settings("killed")
    train(settings, on_progress=signal_after(7))
    folder = tmp_path / "killed" / "checkpoints"
    shutil.copytree(folder / "checkpoint-8", folder / "checkpoint-10")
    (folder / "checkpoint-10" / "adapter_model.safetensors").write_bytes(b"half")
    shutil.copytree(folder / "checkpoint-8", folder / "checkpoint-11")
    (folder / "checkpoint-11" / "optimizer.pt").unlink()
    shutil.copytree(folder / "checkpoint-8", folder / "checkpoint-12")
    (folder / "checkpoint-12" / "complete.json").unlink()
    (tmp_path / "killed" / ".adapter.x").mkdir()
    (tmp_path / "killed" / ".run.json.x").touch()
    assert [path.name for path in checkpoints(folder)][-1] == "checkpoint-8"
    finished(settings, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "killed")
    names = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("whole", "killed")]
    assert names[0] == names[1]


def test_a_resumed_run_starts_from_the_head_that_was_fitted(models: dict[str, Path], tmp_path: Path) -> None:
    run = Run(models, tmp_path)
    train(run.settings("whole"))
    settings, notes = run.settings("killed"), list[str]()
    train(settings, on_progress=signal_after(2))
    # As if killed before the first checkpoint.
    for checkpoint in (tmp_path / "killed" / "checkpoints").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    finished(settings, resume=True, note=notes.append)
    assert not any("fitting the head alone" in note for note in notes)
    assert_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("changes", [{}, {"evaluate_every": 5}], ids=["an epoch", "steps"])
def test_a_run_that_failed_after_its_last_step_only_has_to_be_saved(
    models: dict[str, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    run = Run(models, tmp_path)
    train(run.settings("whole", **changes))
    settings = run.settings("failed", **changes)
    in_the_way = tmp_path / "failed" / "adapter"
    with pytest.raises(FileExistsError):
        train(settings, on_progress=lambda _: in_the_way.touch())
    in_the_way.unlink()
    steps: list[int] = []
    finished(settings, resume=True, on_progress=lambda progress: steps.append(progress.step))
    assert not steps
    assert_same(tmp_path / "whole", tmp_path / "failed")


@pytest.mark.parametrize("task", ["text-classification", "regression", "causal-lm"])
def test_batches_that_are_accumulated_are_one_batch(models: dict[str, Path], tmp_path: Path, task: str) -> None:
    without_dropout = shutil.copytree(models[DATA[task][0]], tmp_path / "model")
    config = json.loads((without_dropout / "config.json").read_text())
    config |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    (without_dropout / "config.json").write_text(json.dumps(config))
    run = Run({DATA[task][0]: without_dropout}, tmp_path, task)
    histories = []
    for output, changes in (("whole", {"batch_size": 4}), ("parts", {"batch_size": 2, "accumulation": 2})):
        train(run.settings(output, max_steps=3, max_gradient_norm=0, keep_best=False, **changes))
        histories.append(json.loads((tmp_path / output / "run.json").read_text())["history"])
    for whole, parts in zip(*histories, strict=True):
        assert parts == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(("targets", "layers"), [("all-linear", 6), (".*(query|output.dense)", 3)], ids=str)
@pytest.mark.parametrize("method", ["dvora", "vera", "lora", "dora"])
def test_the_last_blocks_alone_are_adapted(
    models: dict[str, Path], tmp_path: Path, method: str, targets: str, layers: int
) -> None:
    settings = {"method": method, "blocks": "last:1", "targets": targets, "epochs": 1}
    found = finished(Run(models, tmp_path).settings("out", **settings))
    adapter = read_adapter(found.adapter)
    assert (adapter.settings["layers_to_transform"], adapter.settings["layers_pattern"]) == ([1], "layer")
    model, _ = load_trained(found)
    wrapped = {name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith(".base_layer")}
    assert len(wrapped) == layers
    assert all(".layer.1." in name for name in wrapped)


def test_a_run_of_the_last_blocks_goes_on_bit_for_bit(models: dict[str, Path], tmp_path: Path) -> None:
    run, settings = Run(models, tmp_path), {"dropout": 0.1, "blocks": "last:1"}
    train(run.settings("whole", **settings))
    stopped = run.settings("stopped", **settings)
    train(stopped, on_progress=signal_after(7))
    train(stopped, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("method", ["dvora", "vera", "lora", "dora"])
def test_an_adapter_that_is_no_better_than_the_head_alone_is_not_saved(
    models: dict[str, Path], tmp_path: Path, method: str
) -> None:
    settings = {"method": method, "max_steps": 2, "learning_rate": 1e-9, "if_no_better": "head"}
    found = finished(Run(models, tmp_path).settings("out", **settings))
    metrics = found.record["metrics"]
    assert found.record["saved"] == "head"
    assert found.record["verdict"][-1].startswith("Saved: the head alone over the base")
    assert "Saved: the head alone" in (found.adapter / "README.md").read_text()
    assert metrics["test"]["accuracy"] == metrics["test_head_alone"]["accuracy"]
    assert metrics["test_not_saved"].keys() == metrics["test"].keys()
    head = read_head_alone(tmp_path / "out" / "head_alone.safetensors")
    saved, start = trained_parameters(tmp_path / "out"), head.state_dict()
    for name in ("weight", "bias"):
        assert torch.equal(saved[f"base_model.model.classifier.{name}"], start[name])
    # It is the base to the bit, also as PEFT and a bank load it.
    model, tokenizer = load_trained(found)
    base, _ = load_trained(found, with_adapter=False)
    last_layer(base).load_state_dict(start)
    inputs = tokenizer(["good movie", "bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = base(**inputs).logits
        assert torch.equal(model(**inputs).logits, expected)
        if method == "dvora":
            other, _ = load_trained(found, with_adapter=False)
            bank = AdapterBank(other, like=found.adapter)
            bank.add("none", found.adapter)
            with bank.rows(["none", "none"]):
                torch.testing.assert_close(other(**inputs).logits, expected)


def test_an_adapter_that_is_better_is_saved(models: dict[str, Path], tmp_path: Path) -> None:
    settings = {"epochs": 4, "learning_rate": 0.05, "if_no_better": "head", "test_share": 0.3}
    found = finished(Run(models, tmp_path, "regression").settings("out", **settings))
    assert found.record["metrics"]["test"]["rmse"] < found.record["metrics"]["test_head_alone"]["rmse"]
    assert "saved" not in found.record
    assert any(value.any() for name, value in trained_parameters(tmp_path / "out").items() if "lambda_b" in name)


def test_a_folder_is_not_trained_over(models: dict[str, Path], tmp_path: Path) -> None:
    run = Run(models, tmp_path)
    first = finished(run.settings("out"))
    with pytest.raises(ValueError, match="holds a finished run; --resume shows it, --output NAME starts another"):
        train(run.settings("out"))
    steps: list[Progress] = []
    again = finished(run.settings("out"), resume=True, on_progress=steps.append)
    assert again.record == json.loads(json.dumps(first.record))
    assert not steps
    with pytest.raises(ValueError, match=r"started with other settings .epochs 2.0 is now 3.0."):
        train(run.settings("out", epochs=3), resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"is not empty \(it holds thesis.txt\)"):
        train(run.settings("mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    run.data.unlink()
    with pytest.raises(ValueError, match=r"reviews\.csv: no such file or folder"):
        train(run.settings("new"))
    assert not (tmp_path / "new").exists()


def test_what_a_run_starts_from_is_worked_out_once(models: dict[str, Path], tmp_path: Path) -> None:
    settings, calls = Run(models, tmp_path).settings("out", epochs=1), Counter[str]()
    recipes = str(Path(dvora.recipes.__file__).parent)

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(recipes):
            calls[frame.f_code.co_name] += 1

    sys.setprofile(count)
    finished(settings, on_progress=lambda _: sys.setprofile(None))
    once = ("resolved", "read_record", "load_data", "load_processor", "load_base", "learning_rates", "checkpoints")
    assert {name: calls[name] for name in once} == dict.fromkeys(once, 1)


def test_a_run_does_not_go_on_with_other_data(models: dict[str, Path], tmp_path: Path) -> None:
    run = Run(models, tmp_path)
    train(run.settings("out"), on_progress=signal_after(2))
    with run.data.open("a") as file:
        file.write("one more,good\n")
    with pytest.raises(ValueError, match=r"reviews\.csv has changed since the run started"):
        train(run.settings("out"), resume=True)


def test_training_ends_early_with_the_best_step(models: dict[str, Path], tmp_path: Path) -> None:
    run = Run(models, tmp_path)
    rates = {"learning_rate": 1e-9, "learning_rates": {"head": 1e-9}}
    record = finished(run.settings("out", **rates, epochs=50, early_stopping=3)).record
    # Nothing gets better than after the first epoch of six steps.
    assert (record["best_step"], record["steps"]) == (6, 24)


@pytest.mark.parametrize(("base", "method"), [*(("bert", method) for method in METHODS), ("llama", "dvora")], ids=str)
def test_every_method_can_leave_the_head_alone_as_it_is(
    models: dict[str, Path], tmp_path: Path, base: str, method: str
) -> None:
    # The last layer of the second base has no bias.
    changes = {"model": str(models[base]), "method": method, "max_steps": 1, "learning_rates": {"head": 0.0}}
    found = finished(Run(models, tmp_path).settings("out", **changes))
    metrics = found.record["metrics"]
    # The method head is the head alone, and not compared with itself.
    assert ("validation_head_alone" in metrics) == (method != "head")
    for metric in ("accuracy", "macro_f1") if method != "head" else ():
        assert metrics["validation"][metric] == pytest.approx(metrics["validation_head_alone"][metric])
    assert found.record["verdict"]


def test_the_method_head_is_the_fit_that_others_are_compared_with(models: dict[str, Path], tmp_path: Path) -> None:
    run, notes = Run(models, tmp_path), list[str]()
    other = finished(run.settings("other", epochs=1)).record["metrics"]
    # Whatever the settings of training are.
    found = finished(run.settings("out", method="head", max_steps=1, learning_rate=100.0), note=notes.append)
    for part in ("validation", "test"):
        for metric in ("accuracy", "macro_f1"):
            assert found.record["metrics"][part][metric] == other[f"{part}_head_alone"][metric]
    assert (found.record["steps"], found.record["history"]) == (0, [])
    assert "the head is fitted in closed form: rates, schedule, epochs and steps have no part in it" in notes
    assert not any("head alone" in sentence and "BETTER" in sentence for sentence in found.record["verdict"])
    model, _ = load_trained(found)
    last, alone = last_layer(model), read_head_alone(tmp_path / "out" / HEAD_ALONE)
    assert last is not None
    assert torch.equal(last.weight, alone.weight)
    assert found.record["trained_parameters"] == last.weight.numel() + last.bias.numel()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "head"])
def test_training_starts_from_a_head_of_half_of_the_rows(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    changes = {"method": method, "learning_rate": 1e-12, "learning_rates": {"head": 1e-12}, "refit_head": False}
    settings = Run(models, tmp_path).settings("out", **changes)
    train(settings, on_progress=signal_after(2))
    alone, start = (read_head_alone(tmp_path / "out" / name) for name in (HEAD_ALONE, HEAD_AT_START))
    assert not torch.equal(alone.weight, start.weight)
    model, _ = load_trained(finished(settings, resume=True))
    last = last_layer(model)
    assert last is not None
    torch.testing.assert_close(last.weight, start.weight, atol=1e-6, rtol=0)
    assert not (tmp_path / "out" / HEAD_AT_START).exists()


def test_a_head_that_the_model_brings_trained_is_not_replaced(models: dict[str, Path], tmp_path: Path) -> None:
    run = Run(models, tmp_path)
    first = finished(run.settings("first", method="full"))
    trained = Run({DATA["text-classification"][0]: first.adapter}, tmp_path)
    again = finished(trained.settings("again", tokenizer=first.settings.model, max_steps=1, learning_rate=1e-12))
    metrics = [run_of_two.record["metrics"]["test"]["loss"] for run_of_two in (first, again)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)


@pytest.mark.parametrize("method", ["dvora", "lora", "full"])
def test_a_head_that_training_spoiled_is_fitted_again(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    run, losses = Run(models, tmp_path), []
    for refit in (True, False):
        changes = {"method": method, "learning_rates": {"head": 100.0}, "max_steps": 3, "refit_head": refit}
        found = finished(run.settings(f"{refit}", **changes))
        assert found.record.get("head_fitted_again", False) is refit
        assert ("fitted again" in (found.adapter / "README.md").read_text()) is refit
        losses.append(found.record["metrics"]["validation"]["loss"])
        # What is saved is what was evaluated.
        model, tokenizer = load_trained(found)
        inputs = features(load_data(found.settings).validation, found.settings, tokenizer, 32).dataset
        with torch.no_grad():
            logits = model(**tokenizer.pad(inputs.remove_columns("label")[:], return_tensors="pt")).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(inputs["label"]))
        assert loss.item() == pytest.approx(losses[-1], rel=1e-5)
    assert losses[0] < losses[1]


def test_learning_rates_of_groups_are_obeyed(models: dict[str, Path], tmp_path: Path) -> None:
    run = Run(models, tmp_path)
    rates = {"magnitude": 0.0, "lambda_b": 0.01, "head": 0.0}
    steps = {"keep_best": False, "max_steps": 12}
    train(run.settings("out", learning_rates=rates, **steps))
    train(run.settings("start", learning_rate=1e-12, learning_rates={"head": 0.0}, **steps))
    ends, starts = trained_parameters(tmp_path / "out"), trained_parameters(tmp_path / "start")
    changed = " ".join(name for name in ends if not torch.equal(ends[name], starts[name]))
    assert "lambda_b" in changed
    assert "magnitude" not in changed
    assert "classifier" not in changed


def test_the_magnitude_s_rate_goes_with_the_others_and_with_the_rows(models: dict[str, Path], tmp_path: Path) -> None:
    run, usual = Run(models, tmp_path), LEARNING_RATES["dvora"]
    rates = [
        finished(run.settings(f"{factor}", max_steps=1, learning_rate=factor * usual)).record["learning_rates"]
        for factor in (3, 1)
    ]
    rows = [value for name, value in trained_parameters(tmp_path / "3").items() if "magnitude" in name]
    median = torch.cat(rows).median().item()
    assert rates[0]["magnitude"] == pytest.approx(MAGNITUDE_SHARE * 3 * usual * median, rel=0.02)
    assert rates[1] == {"magnitude": pytest.approx(rates[0]["magnitude"] / 3), "head": 1e-3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"targets": "no_such_layer"}, "no_such_layer"),
        ({"method": "vera", "alpha": 2.0}, "vera has none"),
        ({"blocks": "last:3"}, "blocks is last:3, and the model has 2 blocks"),
        ({"blocks": "last:1", "targets": ".*pooler.*"}, "name no layer in the blocks last:1"),
        ({"method": "lora", "task": "causal-lm", "learning_rates": {"head": 0.1}}, "names the group 'head'"),
    ],
)
def test_a_mismatch_is_reported_before_anything_is_written(
    models: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run = Run(models, tmp_path, str(changes.get("task", "text-classification")))
    with pytest.raises(ValueError, match=message):
        train(run.settings("out", **changes))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16", "evaluate_every": 2, "save_every": 4},
        {"gradient_checkpointing": True, "accumulation": 3, "keep_best": False, "save_every": 5},
        {"validation_share": 0.0, "test_share": 0.0, "base_dtype": "bfloat16"},
        {"max_steps": 3, "schedule": "cosine"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_settings_that_change_how_is_trained(models: dict[str, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    finished(Run(models, tmp_path).settings("out", **changes))


def test_what_is_cut_is_on_record_and_noted(models: dict[str, Path], tmp_path: Path) -> None:
    notes: list[str] = []
    settings = Run(models, tmp_path).settings("out", max_length=5, epochs=1)
    record = finished(settings, note=notes.append).record
    assert record["max_length"] == 5
    assert {part: found["cut"] for part, found in record["truncation"].items()} == record["data"]["rows"]
    assert any("120 of 120 texts (100.0%) are longer than 5 tokens and were cut" in note for note in notes)


@pytest.mark.parametrize(
    ("given", "rows", "expected"),
    [
        ({}, 1000, (3.0, None)),
        ({}, 16 * 1000, (3.0, 1000)),
        ({"batch_size": 64}, 16 * 1000, (3.0, None)),
        ({"accumulation": 4}, 16 * 1000, (3.0, None)),
        ({"epochs": 5.0}, 16 * 1000, (5.0, None)),
        ({"max_steps": 7}, 16 * 1000, (3.0, 7)),
    ],
)
def test_a_run_that_sets_no_length_ends_soon(given: dict[str, Any], rows: int, expected: object) -> None:
    settings = checked_settings({"task": "regression", "model": "m", "data": "d.csv", **given}, "")
    assert length_of_run(settings, rows) == expected
