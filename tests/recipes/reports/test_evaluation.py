"""Evaluating again: the recorded metrics from the held-out rows, and honest ones from other files."""

import csv
from pathlib import Path
from typing import Any

import pytest

from dvora.recipes.data.run_data import load_data
from dvora.recipes.reports.evaluation import evaluate_run
from dvora.recipes.run_folder import Run, read_run, write_record
from tests.recipes.finished_runs import DATA, finished


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished("text-classification", tmp_path_factory.mktemp("classified"))


def named(run: Run) -> list[dict[str, str]]:
    """The rows that a run held out, as a file has them."""
    rows = load_data(run.settings).test
    return [{"text": row["text"], "label": run.labels[row["label"]]} for row in rows]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("task", DATA)
def test_the_held_out_rows_give_the_record_s_metrics_bit_for_bit(task: str, tmp_path: Path) -> None:
    run = read_run(finished(task, tmp_path).folder)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    verdict = evaluate_run(run, with_base=True)
    assert verdict.part == "test"
    assert verdict.seen == 0
    assert verdict.rows == run.record["data"]["rows"]["test"]
    recorded = {name: values for name, values in run.record["metrics"].items() if name.startswith("test")}
    assert len(recorded) == (2 if task in ("causal-lm", "token-classification") else 3)
    assert verdict.metrics == recorded
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("method", ["full", "head"])
def test_runs_without_an_adapter(method: str, tmp_path: Path) -> None:
    run = finished("text-classification", tmp_path, method=method)
    assert evaluate_run(run).metrics["test"] == run.record["metrics"]["test"]


def test_the_base_of_a_run_that_trained_everything(tmp_path: Path) -> None:
    run = finished("causal-lm", tmp_path, method="full", learning_rate=0.003)
    found = evaluate_run(run, with_base=True).metrics
    assert found["test"] == run.record["metrics"]["test"]
    assert found["test_before_training"]["loss"] > found["test"]["loss"]


def test_a_file_of_the_held_out_rows_gives_their_metrics(classified: Run, tmp_path: Path) -> None:
    own = evaluate_run(classified)
    path = write_csv(
        tmp_path / "new.csv", [{"id": "1", "verdict": r["label"], "words": r["text"]} for r in named(classified)]
    )
    found = evaluate_run(classified, [path], {"text_column": "words", "label_column": "verdict"}, with_base=True)
    assert (found.part, found.rows, found.seen) == ("files", own.rows, 0)
    assert [*found.metrics.values()] == [*own.metrics.values()]


def test_rows_that_were_trained_on_are_reported(classified: Run) -> None:
    found = evaluate_run(classified, classified.settings.data)
    assert (found.rows, found.seen) == (120, classified.record["data"]["rows"]["train"])


def test_a_label_that_is_none_of_the_run_s_is_reported(classified: Run, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "new.csv", [{"text": "good", "label": "great"}])
    with pytest.raises(ValueError, match="row 1: the class 'great' does not occur in the training data"):
        evaluate_run(classified, [file])


def test_what_was_assumed_of_a_file_is_told(classified: Run, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text;label\nschön good;good\n".encode("cp1252"))
    notes: list[str] = []
    evaluate_run(classified, [str(tmp_path / "a.csv")], note=notes.append)
    assert len(notes) == 2
    assert "read as windows-1252" in notes[0]
    assert "read as separated by ';'" in notes[1]


def test_data_that_changed_is_not_taken_for_held_out(tmp_path: Path) -> None:
    run = finished("text-classification", tmp_path)
    expected = evaluate_run(run).metrics
    file = write_csv(tmp_path / "kept.csv", named(run))
    data = tmp_path / "reviews.csv"
    with data.open("a") as changed:
        changed.write("good a a a a a,bad\n")
    with pytest.raises(ValueError, match=r"reviews\.csv has changed since .*give files"):
        evaluate_run(run)
    data.unlink()
    with pytest.raises(ValueError, match=r"reviews\.csv cannot be read \(No such file.*give files"):
        evaluate_run(run)
    found = evaluate_run(run, [file])
    assert found.seen is None
    # The simplest guess is on record; the head alone is evaluated on files where that is asked for.
    kept = [values for name, values in expected.items() if name != "test_head_alone"]
    assert [*found.metrics.values()] == kept


def test_a_run_that_cannot_be_evaluated_is_refused(classified: Run, tmp_path: Path) -> None:
    run = finished("text-classification", tmp_path, test_share=0)
    with pytest.raises(ValueError, match="held no rows out for a test; give files"):
        evaluate_run(run)
    record = {**run.record, "metrics": {}}
    (tmp_path / "reviews.csv").unlink()
    write_record(run.folder, record)
    # Without data and record the simplest guess is not known.
    files = [write_csv(tmp_path / "a.csv", named(classified))]
    assert [*evaluate_run(read_run(run.folder), files).metrics] == ["files"]
    (run.folder / "head_alone.safetensors").unlink()
    with pytest.raises(ValueError, match=r"kept no head for its base alone .*leave --base out"):
        evaluate_run(run, files, with_base=True)
