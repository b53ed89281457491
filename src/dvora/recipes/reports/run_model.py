"""The model of a run, with all that rows need on their way through it."""

from collections.abc import Sequence
from typing import Any

from ..models.trained import load_trained
from ..run_folder import Run
from ..tasks.task import Features, features, longest, task_parts, without_bytes

Rows = Sequence[dict[str, Any]]


class RunModel:
    """The model of a run, ready for rows.

    Args:
        run: finished.

    Attributes:
        model, processor: the trained one, and its tokenizer or image processor.
        length: tokens to which texts are cut; 0 for images.
        task: collator and metrics.

    Raises:
        ValueError: the model cannot be read.
    """

    def __init__(self, run: Run) -> None:
        self.run, settings = run, run.settings
        self.model, self.processor = load_trained(run)
        images = settings.task == "image-classification"
        self.length = 0 if images else longest(settings, self.processor, self.model.config)
        self.task = task_parts(settings, run.labels, self.processor)

    def features(self, rows: Rows) -> Features:
        """The model's inputs for rows, as `load_data` gives them, with labels or without."""
        return features(rows, self.run.settings, self.processor, self.length)

    def batch(self, rows: Rows) -> dict[str, Any]:
        """All of them at once, as arguments of the model's forward."""
        dataset = without_bytes(self.features(rows).dataset)
        return dict(self.task.collator([dataset[row] for row in range(len(dataset))]))
