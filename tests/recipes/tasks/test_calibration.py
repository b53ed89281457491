"""Temperatures and errors of calibration against their definitions, and a run whose every reader is calibrated."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dvora.recipes.data.run_data import load_data
from dvora.recipes.reports.evaluation import evaluate_run
from dvora.recipes.reports.run_model import RunModel
from dvora.recipes.tasks.calibration import (
    calibration_error,
    calibration_sentence,
    chosen_temperature,
    fitted_temperature,
)
from tests.recipes.finished_runs import finished
from tests.recipes.training.runs import Run
from tests.recipes.training.runs import finished as trained


def outputs(seed: int, rows: int = 400, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are too sure of themselves by the scale, with labels drawn from the right ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 4, generator=generator)
    return scale * logits, torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten()


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_no_other_temperature_is_likelier(scale: float) -> None:
    logits, labels = outputs(0, scale=scale)
    temperature = fitted_temperature(logits, labels)
    assert temperature == pytest.approx(scale, rel=0.3)

    def loss(divisor: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits.double() / divisor, labels))

    grid = np.geomspace(0.01, 100, 2001)
    assert loss(temperature) <= min(map(loss, grid)) + 1e-9


def test_rows_that_have_no_best_temperature() -> None:
    logits, _ = outputs(1)
    assert fitted_temperature(logits, logits.argmax(-1)) == 1.0
    assert fitted_temperature(logits, logits.argmin(-1)) == 100.0


@pytest.mark.parametrize(("rows", "bins"), [(400, 15), (47, 4)])
def test_the_error_is_the_weighted_gap_of_bins_that_are_all_as_full(rows: int, bins: int) -> None:
    logits, labels = outputs(2, rows)
    probabilities = logits.double().softmax(-1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    parts = np.array_split(np.argsort(confidence, kind="stable"), bins)
    expected = sum(len(part) / rows * abs(right[part].mean() - confidence[part].mean()) for part in parts)
    assert calibration_error(logits, labels) == pytest.approx(expected)


def test_the_error_of_certain_rows_and_of_few() -> None:
    certain = torch.tensor([[0.0, 200.0]] * 40)
    assert [calibration_error(certain, torch.full((40,), label)) for label in (0, 1)] == [1.0, 0.0]
    assert calibration_error(certain[:29], torch.ones(29, dtype=torch.long)) is None


def test_a_temperature_is_one_unless_rows_that_it_has_not_seen_prefer_another() -> None:
    temperature, fell = chosen_temperature(*outputs(0, 150))
    assert temperature == fitted_temperature(*outputs(0, 150))
    assert fell > 0
    # Fourteen rows of a good model, of which one has a wrong label; three rows that are all wrong.
    sure = torch.tensor([[4.0, -4.0], [-4.0, 4.0]])[torch.arange(14) % 2]
    flipped = (torch.arange(14) % 2).index_fill(0, torch.tensor([3]), 0)
    assert fitted_temperature(sure, flipped) > 3
    assert chosen_temperature(sure, flipped) == (1.0, 0.0)
    assert chosen_temperature(sure[:3], 1 - torch.arange(3) % 2) == (1.0, 0.0)
    # Rows enough, of a model that is as sure as it should be.
    calibrated = [chosen_temperature(*outputs(seed, 100, scale=1.0)) for seed in range(10)]
    assert sum(temperature == 1.0 for temperature, _ in calibrated) >= 3
    assert all((temperature == 1.0) == (fell <= 0) for temperature, fell in calibrated)


def test_what_was_done_is_said() -> None:
    assert calibration_sentence({"temperature": 1.0, "validation_rows": 14, "loss_fell_by": 0.0}) == (
        "Not calibrated: a temperature is fitted to 20 validation rows or more, here are 14"
    )
    assert "no temperature lowers the loss" in calibration_sentence({"temperature": 1.0, "validation_rows": 50})
    errors = {"test_rows": 1200, "test_calibration_error_before": 0.15, "test_calibration_error_after": 0.03}
    assert calibration_sentence({"temperature": 1.5, "validation_rows": 50, **errors}) == (
        "Calibrated by a temperature of 1.5; calibration error of 1,200 test rows: 0.150, now 0.030"
    )


def test_whoever_reads_a_calibrated_run_gets_calibrated_logits(tmp_path: Path) -> None:
    """Also PEFT alone, since the temperature is in the head."""
    shares = {"validation_share": 0.4, "test_share": 0.3}
    plain, run = (
        finished("text-classification", tmp_path / name, max_steps=1, learning_rate=1e-6, **shares, **given)
        for name, given in (("plain", {}), ("calibrated", {"calibrate": True}))
    )
    temperature = run.record["calibration"]["temperature"]
    assert temperature != 1.0
    data = load_data(plain.settings)
    model = RunModel(plain)

    def logits_of(rows: list[dict[str, object]]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = model.batch(rows)
        with torch.no_grad():
            return model.model(**batch).logits, batch["labels"]

    assert temperature == pytest.approx(fitted_temperature(*logits_of(data.validation)), rel=1e-3)
    logits, labels = logits_of(data.test)
    for name, divisor in (("before", 1.0), ("after", temperature)):
        expected = calibration_error(logits / divisor, labels)
        assert run.record["calibration"][f"test_calibration_error_{name}"] == pytest.approx(expected, abs=1e-5)
    base = AutoModelForSequenceClassification.from_pretrained(run.settings.model, num_labels=2)
    by_peft = PeftModel.from_pretrained(base, run.adapter).eval()
    texts = [row["text"] for row in data.test]
    inputs = AutoTokenizer.from_pretrained(run.settings.model)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(by_peft(**inputs).logits, logits / temperature, atol=1e-5, rtol=1e-5)
    assert evaluate_run(run).metrics["test"] == run.record["metrics"]["test"]
    assert "Calibration: Calibrated by a temperature" in (run.adapter / "README.md").read_text()


@pytest.mark.parametrize(
    ("task", "changes"),
    [("regression", {}), ("causal-lm", {}), ("text-classification", {"validation_share": 0.0})],
)
def test_what_has_no_temperature_is_refused(
    models: dict[str, Path], tmp_path: Path, task: str, changes: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match="calibrate fits a temperature to validation rows with classes"):
        trained(Run(models, tmp_path, task).settings("run", calibrate=True, **changes))
