"""The doctor on runs of every task."""

from pathlib import Path

import pytest

from dvora.recipes.finished.evaluation import unchanged_data
from dvora.recipes.finished.examination import EXAMINED, batch_of
from dvora.recipes.run_folder import load_trained
from dvora.tools.doctor import examine
from tests.recipes.finished_runs import DATA, finished


@pytest.mark.parametrize("task", DATA)
def test_runs_of_every_task_are_healthy(task: str, tmp_path: Path) -> None:
    run = finished(task, tmp_path)
    model, processor = load_trained(run)
    batch = batch_of(run, model, processor, unchanged_data(run).test[:EXAMINED])
    found = examine(model, batch, fresh_process=False)
    assert found.healthy, str(found)
    assert found.of("outputs").status == "pass"
