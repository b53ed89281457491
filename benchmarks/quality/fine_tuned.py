"""A base that was itself fine-tuned before it is adapted: all of MiniLM, on WordNet's topics."""

from pathlib import Path

from benchmarks.quality.backbones import FINE_TUNED
from benchmarks.quality.grid import Grid, Rates, Run
from benchmarks.quality.problems import problem
from benchmarks.quality.training import trained
from materials.fetch import build_once

TASK = "wordnet_topics"
RATE = 1e-4


def fine_tuned_minilm(grid: Grid) -> Path:
    """The folder of the fine-tuned backbone, trained on the first call."""

    def build(folder: Path) -> None:
        plan = grid.tasks[TASK]
        task = problem(TASK, plan)
        reader = task.model("float32")
        reader.backbone.requires_grad_(True)
        run = Run(TASK, "full", "trial", grid.training["tuning_seed"], plan.steps, Rates(RATE, None, 1e-3))
        assert not trained(grid, run, task, reader)["diverged"]
        reader.backbone.save_pretrained(folder)  # type: ignore[operator]

    return build_once(FINE_TUNED, build)
