"""The tasks of PEFT's method comparison, and what each needs."""

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
EXPERIMENTS = HERE / "experiments"
"""Our folders, in the layout of PEFT's: TASK/METHOD/NAME."""
ROWS = HERE / "rows"
"""Rows of finished runs, as PEFT's script wrote them."""
METHOD = "dvora"


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: of the task's folder in PEFT's `method_comparison`.
        models: read by the script, as the hub names them; the first may ask for a licence to be accepted.
        data: read by the script, likewise.
        metric: the score, as a column of PEFT's own tables, where more is better.
    """

    name: str
    models: tuple[str, ...]
    data: tuple[str, ...]
    metric: str


TASKS = {
    task.name: task
    for task in (
        Task(
            name="MetaMathQA",
            models=("meta-llama/Llama-3.2-3B",),
            data=("meta-math/MetaMathQA", "openai/gsm8k", "HuggingFaceFW/finewiki"),
            metric="test_accuracy",
        ),
        Task(
            name="image-gen",
            models=("black-forest-labs/FLUX.2-klein-base-4B", "facebook/dinov2-base"),
            data=("peft-internal-testing/cat-image-dataset",),
            metric="test_dino_similarity",
        ),
    )
}
