"""Predictions of a run's model, in batches and in order, of as many rows as there are."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..data.new_files import Input
from ..models.bases import computing, device_of, quiet_transformers
from ..models.trained import load_trained
from ..run_folder import Run
from ..tasks.task import Task, Truncation, features, longest, task_parts

DIGITS = 7
"""Decimal digits that a number in single precision has."""


@dataclass(frozen=True)
class Predicted:
    """What a model predicts for a row.

    Args:
        input: as it was read.
        columns: `prediction`: a class's name or a number; of classes its `probability`, and on request
            `probability_NAME` of each.
    """

    input: Input
    columns: dict[str, str | float]

    @property
    def row(self) -> dict[str, Any]:
        """The row as it was read, with the prediction at its end."""
        return {**self.input.values, **self.columns}


class Predictor:
    """The model of a run, ready to predict.

    Args:
        run: finished; of any task but causal-lm.

    Attributes:
        truncation: of the texts that were predicted for so far.

    Raises:
        ValueError: the run is of causal-lm, or its model cannot be read.
    """

    def __init__(self, run: Run) -> None:
        if run.settings.task == "causal-lm":
            raise ValueError(
                f"the run in {run.folder} is of a language model; `dvora generate` continues texts with it"
            )
        self.run = run
        self.device = device_of(run.settings)
        model, self.processor = load_trained(run)
        self.model = model.to(self.device)
        images = run.settings.task == "image-classification"
        self.length = 0 if images else longest(run.settings, self.processor, model.config)
        self.task: Task = task_parts(run.settings, run.labels, self.processor)
        self.truncation = Truncation()

    def predict(self, inputs: Iterable[Input], batch_size: int, every_class: bool = False) -> Iterator[Predicted]:
        """Predict for rows in their order; no more than a batch of them is held.

        Args:
            inputs: rows.
            batch_size: rows that the model sees at once.
            every_class: also give the probability of every class.

        Raises:
            ValueError: a row has a column with the name of one that is added.
        """
        rest = iter(inputs)
        while batch := list(islice(rest, batch_size)):
            for found, columns in zip(batch, self._columns(batch, every_class), strict=True):
                if taken := columns.keys() & found.values.keys():
                    raise ValueError(f"the rows have a column {min(taken)!r} already; rename it, to keep both")
                yield Predicted(found, columns)

    def _columns(self, batch: Sequence[Input], every_class: bool) -> list[dict[str, str | float]]:
        logits = self._logits([found.row for found in batch])
        if not self.run.labels:
            return [{"prediction": _rounded(value)} for value in logits.reshape(-1).tolist()]
        found = []
        for probabilities in logits.softmax(-1).tolist():
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            row: dict[str, str | float] = {
                "prediction": self.run.labels[best],
                "probability": _rounded(probabilities[best]),
            }
            if every_class:
                named = zip(self.run.labels, probabilities, strict=True)
                row |= {f"probability_{name}": _rounded(probability) for name, probability in named}
            found.append(row)
        return found

    def _logits(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        settings = self.run.settings
        with quiet_transformers():
            dataset, truncation = features(rows, settings, self.processor, self.length)
            self.truncation += truncation
            batch = self.task.collator([dataset[index] for index in range(len(dataset))])
        with computing(settings):
            outputs = self.model(**{name: values.to(self.device) for name, values in batch.items()})
        logits: Tensor = outputs.logits
        return logits.to("cpu", torch.float32)


def _rounded(value: float) -> float:
    """Without digits that single precision does not have."""
    return float(f"{value:.{DIGITS}g}")
