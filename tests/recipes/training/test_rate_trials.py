"""A run that finds its learning rate is the run with that rate, to the last bit, and says what it cost and found."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dvora.recipes.run_folder import read_record, read_run
from dvora.recipes.settings import LEARNING_RATES, METHODS, Settings, read_settings
from dvora.recipes.training import rate_trials
from dvora.recipes.training.checkpoints import checkpoints
from dvora.recipes.training.run import InputError, train
from dvora.recipes.training.trainers import steps_of_run
from dvora.recipes.training.watching import Progress
from dvora.training import rate_search
from tests.recipes.training.runs import TASKS, Run, assert_same, signal_after

STEPS = 30
WHOLE = {"dropout": 0.1, "max_steps": 45}


@pytest.fixture(scope="module", autouse=True)
def short_trials() -> Iterator[None]:
    """Two steps are enough for a trial, so that a run of 30 steps has three of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate_search, "LEAST_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def whole(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose three trials have three steps, which nothing stopped; others are compared with it."""
    run = Run(models, tmp_path_factory.mktemp("whole"))
    assert train(auto(run, **WHOLE)).run is not None
    return run.folder / "auto"


def auto(run: Run, output: str = "auto", **changes: Any) -> Settings:
    return run.settings(output, **{"learning_rate": "auto", "max_steps": STEPS, "batch_size": 4, **changes})


def search_in(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    assert record is not None
    search: dict[str, Any] = record["rate_search"]
    return search


def assert_is_the_run_by_hand(run: Run, **changes: Any) -> dict[str, Any]:
    """Train with "auto", then with the rate that it chose; the search."""
    assert train(auto(run, **changes)).run is not None
    search = search_in(run.folder / "auto")
    assert len(search["trials"]) == 3
    train(auto(run, "by hand", **{**changes, "learning_rate": search["rate"]}))
    assert_same(run.folder / "auto", run.folder / "by hand")
    rates = [json.loads((run.folder / name / "run.json").read_text())["learning_rates"] for name in ("auto", "by hand")]
    assert rates[0] == rates[1]
    return search


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_the_one_with_that_rate_by_hand(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    search = assert_is_the_run_by_hand(
        Run(models, tmp_path), method=method, dropout=0.1, rank=None if method in ("full", "head") else 4
    )
    rates, usual = [trial["rate"] for trial in search["trials"]], LEARNING_RATES[method]
    assert rates == pytest.approx([usual / 3, usual, usual * 3], rel=0.05)
    losses = {trial["rate"]: trial["loss"] for trial in search["trials"]}
    assert search["rate"] == rate_search.find_rate(lambda rate, steps: losses[rate], STEPS, center=usual).rate
    assert len({trial["loss"] for trial in search["trials"]}) == 3


@pytest.mark.parametrize("task", [task for task in TASKS if task != "text-classification"])
def test_every_task_finds_a_rate(models: dict[str, Path], tmp_path: Path, task: str) -> None:
    assert_is_the_run_by_hand(Run(models, tmp_path, task))


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16"},
        {"base_dtype": "bfloat16"},
        {"gradient_checkpointing": True},
        {"accumulation": 3, "schedule": "cosine", "warmup_share": 0.5},
        {"learning_rates": {"head": 0.001, "lambda_d": 0.0}, "evaluate_every": 7, "early_stopping": 3},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_whatever_else_is_set(models: dict[str, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    assert_is_the_run_by_hand(Run(models, tmp_path), **changes)


def test_a_trial_is_a_short_run_from_the_same_start(models: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    run, search = Run(models, tmp_path), search_in(whole)
    for number, trial in enumerate(search["trials"]):
        changes = WHOLE | {"max_steps": search["steps"], "learning_rate": trial["rate"], "keep_best": False}
        alone = train(auto(run, f"alone {number}", **changes)).run
        assert alone is not None
        assert trial["loss"] == alone.record["metrics"]["validation"]["loss"]


def test_trials_are_validated_on_validation_rows_and_never_on_test_rows(
    models: dict[str, Path], tmp_path: Path
) -> None:
    run = Run(models, tmp_path)
    lines = run.data.read_text().splitlines()
    header, rows = lines[0], lines[1:]
    parts = {"train": rows[:80], "one": rows[80:100], "other": rows[100:]}
    files = {name: tmp_path / f"{name}.csv" for name in parts}
    for name, part in parts.items():
        files[name].write_text("\n".join([header, *part]) + "\n")
    run.data = files["train"]
    losses = []
    for number, (validation, test) in enumerate([("one", "other"), ("one", "train"), ("other", "one")]):
        # Rows of the training file that are held out are no training rows: the test rows are others here.
        held_out = {"validation_data": str(files[validation])}
        held_out |= {"test_data": str(files[test])} if test != "train" else {"test_share": 0.0}
        train(auto(run, str(number), **held_out))
        losses.append([trial["loss"] for trial in search_in(tmp_path / str(number))["trials"]])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_long_trials_read_more_validation_rows_than_short_ones(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_trials, "LEAST_ROWS", 5)
    run = Run(models, tmp_path)
    for steps, rows in ((30, 8), (60, 12)):
        train(auto(run, str(steps), max_steps=steps, test_share=0.0))
        assert search_in(tmp_path / str(steps))["validation_rows"] == rows


def test_what_it_costs_is_said_first_and_everything_is_on_record(models: dict[str, Path], tmp_path: Path) -> None:
    notes: list[str] = []
    steps: list[tuple[int, int, int, int]] = []

    def on_progress(progress: Progress) -> None:
        if progress.metrics is None:
            steps.append((progress.trial, progress.step, progress.steps, len(notes)))

    train(auto(Run(models, tmp_path)), note=notes.append, on_progress=on_progress)
    search = search_in(tmp_path / "auto")
    assert search.keys() == {"steps", "validation_rows", "trials", "rate"}
    first = next(number for number, note in enumerate(notes) if note.startswith("learning rate"))
    assert notes[first:] == [
        "learning rate: up to 3 trials of 2 steps will find it, 20% of the run's 30 steps; "
        "each is validated on 12 rows",
        *(
            f"trial {number}: learning rate {trial['rate']:g}, validation loss {trial['loss']:.4g}"
            for number, trial in enumerate(search["trials"], 1)
        ),
        f"learning rate: {search['rate']:g}, by the validation losses of 3 trials",
    ]
    assert [step[:3] for step in steps[:7]] == [*((trial, n, 2) for trial in (1, 2, 3) for n in (1, 2)), (0, 1, 30)]
    assert steps[0][3] == first + 1


def test_the_configuration_finds_the_rate_again(whole: Path, tmp_path: Path) -> None:
    assert read_run(whole).settings.learning_rate == "auto"
    assert yaml.safe_load((whole / "config.yaml").read_text())["learning_rate"] == "auto"
    again = train(read_settings(whole / "config.yaml", {"output": str(tmp_path / "again")})).run
    assert again is not None
    assert read_run(tmp_path / "again").settings == again.settings
    assert_same(whole, tmp_path / "again")
    assert search_in(whole) == search_in(tmp_path / "again")


@pytest.mark.parametrize(
    ("trial", "step", "number", "made"),
    [
        (1, 1, signal.SIGINT, 0),
        (2, 1, signal.SIGTERM, 1),
        # Its last step is made after the signal.
        (2, 2, signal.SIGINT, 2),
    ],
)
def test_trials_that_are_stopped_go_on_with_those_that_lack(
    models: dict[str, Path], whole: Path, tmp_path: Path, trial: int, step: int, number: signal.Signals, made: int
) -> None:
    run = Run(models, tmp_path)
    outcome = train(auto(run, "stopped", **WHOLE), on_progress=signal_after(step, number, trial))
    assert (outcome.run, outcome.stopped_at) == (None, 0)
    folder = tmp_path / "stopped"
    assert search_in(folder)["trials"] == search_in(whole)["trials"][:made]
    assert not [*(folder / "checkpoints").iterdir()]
    with pytest.raises(ValueError, match="is not finished"):
        read_run(folder)
    with pytest.raises(InputError, match="holds an unfinished run; --resume goes on"):
        train(auto(run, "stopped", **WHOLE))
    seen: list[int] = []
    # As the command line does it: from the folder's own file.
    again = read_settings(folder / "config.yaml", {})
    assert train(again, resume=True, on_progress=lambda progress: seen.append(progress.trial)).run is not None
    assert sorted({*seen}) == [0, *range(made + 1, 4)]
    assert_same(whole, folder)
    assert search_in(whole) == search_in(folder)


def test_trials_that_were_made_before_an_end_without_warning_are_kept(
    models: dict[str, Path], whole: Path, tmp_path: Path
) -> None:
    run = Run(models, tmp_path)

    def end(progress: Progress) -> None:
        if progress.trial == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(auto(run, "ended", **WHOLE), on_progress=end)
    assert search_in(tmp_path / "ended")["trials"] == search_in(whole)["trials"][:2]
    seen: list[int] = []
    train(auto(run, "ended", **WHOLE), resume=True, on_progress=lambda progress: seen.append(progress.trial))
    assert {*seen} == {0, 3}
    assert_same(whole, tmp_path / "ended")


@pytest.mark.parametrize(("trial", "step", "stopped_at"), [(3, 2, 1), (0, 7, 8)])
def test_a_stopped_run_goes_on_with_the_rate_on_record(
    models: dict[str, Path], whole: Path, tmp_path: Path, trial: int, step: int, stopped_at: int
) -> None:
    settings = auto(Run(models, tmp_path), "stopped", **WHOLE)
    assert train(settings, on_progress=signal_after(step, trial=trial)).stopped_at == stopped_at
    assert [path.name for path in checkpoints(tmp_path / "stopped" / "checkpoints")][-1] == f"checkpoint-{stopped_at}"
    seen: list[int] = []
    notes: list[str] = []
    train(settings, resume=True, on_progress=lambda progress: seen.append(progress.trial), note=notes.append)
    assert {*seen} == {0}
    assert f"learning rate: {search_in(whole)['rate']:g}, found when the run started" in notes
    assert_same(whole, tmp_path / "stopped")
    assert search_in(whole) == search_in(tmp_path / "stopped")


def test_a_rate_on_record_is_not_searched_again(models: dict[str, Path], tmp_path: Path) -> None:
    """Not even if another version would find another one."""
    run = Run(models, tmp_path)
    train(auto(run), on_progress=signal_after(1))
    record = read_record(tmp_path / "auto")
    assert record is not None
    record["rate_search"]["rate"] = 0.002
    (tmp_path / "auto" / "run.json").write_text(json.dumps(record))
    for path in (tmp_path / "auto" / "checkpoints").iterdir():
        (path / "complete.json").unlink()
    train(auto(run), resume=True)
    train(auto(run, "by hand", learning_rate=0.002))
    assert_same(tmp_path / "auto", tmp_path / "by hand")


def test_trials_of_another_length_are_made_again(models: dict[str, Path], tmp_path: Path) -> None:
    """As another version may have planned them."""
    run = Run(models, tmp_path)
    train(auto(run, max_steps=45), on_progress=signal_after(1, trial=2))
    record = read_record(tmp_path / "auto")
    assert record is not None
    assert record["rate_search"]["steps"] == 3
    record["rate_search"]["steps"] = 5
    (tmp_path / "auto" / "run.json").write_text(json.dumps(record))
    seen: list[int] = []
    train(auto(run, max_steps=45), resume=True, on_progress=lambda progress: seen.append(progress.trial))
    assert {*seen} == {0, 1, 2, 3}


@pytest.fixture(scope="module")
def stopped(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Of a run that was stopped in its first trial."""
    settings = auto(Run(models, tmp_path_factory.mktemp("stopped")))
    assert train(settings, on_progress=signal_after(1, trial=1)).stopped_at == 0
    return settings


@pytest.mark.parametrize(
    "search",
    [
        {},
        {"trials": 3},
        {"trials": [{"rate": 0.01}]},
        {"trials": [{"rate": 0.01, "loss": "low"}]},
        {"trials": [{"rate": -1.0, "loss": 0.5}]},
        {"trials": [{"rate": 0.01, "loss": float("nan")}]},
        {"trials": [], "rate": "0.01"},
        {"trials": [], "rate": float("inf")},
        {"trials": [], "rate": 0.0},
    ],
)
def test_a_damaged_record_is_refused(stopped: Settings, search: dict[str, Any]) -> None:
    folder = Path(stopped.output)
    record = read_record(folder)
    assert record is not None
    (folder / "run.json").write_text(json.dumps({**record, "rate_search": search}))
    with pytest.raises(InputError, match="the record of the run is damaged: rate_search is not what"):
        train(stopped, resume=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_steps": 29}, "a run of 29 steps is too short for trials, which take 30 steps or more"),
        ({"validation_share": 0.0}, "without validation rows no trial can be compared with another"),
    ],
)
def test_without_trials_a_run_is_the_usual_one(
    models: dict[str, Path], tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    run = Run(models, tmp_path)
    notes: list[str] = []
    train(auto(run, **changes), note=notes.append)
    usual = LEARNING_RATES["dvora"]
    assert f"learning rate: {usual}, the default of dvora: {reason}" in notes
    assert search_in(tmp_path / "auto") == {"rate": usual, "trials": [], "reason": reason}
    train(auto(run, "usual", learning_rate=None, **changes))
    assert_same(tmp_path / "auto", tmp_path / "usual")
    stopped = auto(run, "stopped", **changes)
    train(stopped, on_progress=signal_after(3))
    train(stopped, resume=True)
    assert_same(tmp_path / "stopped", tmp_path / "usual")


def test_a_run_that_diverges_at_every_rate_fails(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LEARNING_RATES, "full", 1e30)
    notes: list[str] = []
    run = Run(models, tmp_path)
    settings = auto(run, method="full", rank=None)
    with pytest.raises(ValueError, match="diverged in every trial, at learning rates from 3") as refused:
        train(settings, note=notes.append)
    assert not isinstance(refused.value, InputError)
    assert sum(note.endswith("diverged") for note in notes) == 3
    assert [trial["loss"] for trial in search_in(tmp_path / "auto")["trials"]] == [None] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "no_such_layer"}, "no_such_layer"),
        ({"method": "lora", "task": "causal-lm", "learning_rates": {"head": 0.1}}, "names the group 'head'"),
    ],
)
def test_what_does_not_fit_is_reported_before_the_first_trial(
    models: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run, notes = Run(models, tmp_path, str(changes.get("task", "text-classification"))), []
    with pytest.raises(InputError, match=message):
        train(auto(run, **changes), note=notes.append)
    assert not [note for note in notes if note.startswith("learning rate")]
    assert [path.name for path in (tmp_path / "auto").iterdir()] == [".lock"]


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_engines_that_shard_the_model_are_refused(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    usual = rate_trials.make_trial_trainer

    def sharding(*arguments: Any) -> Any:
        trainer = usual(*arguments)
        assert getattr(trainer, engine) is False
        setattr(trainer, engine, True)
        return trainer

    monkeypatch.setattr(rate_trials, "make_trial_trainer", sharding)
    with pytest.raises(InputError, match="learning_rate is auto, but FSDP or DeepSpeed will shard the model"):
        train(auto(Run(models, tmp_path)))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 7, "epochs": None},
        {"epochs": 2},
        {"epochs": 1.3},
        {"epochs": 0.4, "batch_size": 7},
        {"accumulation": 3, "batch_size": 5},
        {"epochs": None, "batch_size": 64},
    ],
    ids=str,
)
def test_the_steps_of_a_run_are_known_before(models: dict[str, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = Run(models, tmp_path).settings("out", **changes)
    outcome = train(settings)
    assert outcome.run is not None
    assert steps_of_run(settings, outcome.run.record["data"]["rows"]["train"]) == outcome.run.record["steps"]
