"""Predictions of a run's model, in batches and in order, of as many rows as there are; and beside another model's."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.examples import Input
from ..models.bases import computing, device_of, quiet_transformers
from ..run_folder import Run
from ..tasks.entities import entities_in
from ..tasks.task import Truncation
from .evaluation import head_alone_of, head_alone_outputs
from .run_model import Rows, RunModel, check_can_abstain

DIGITS = 7
"""Decimal digits that a number in single precision has."""
BATCH = 32


class Predicted(NamedTuple):
    """A row as it was read, and the columns that are added to it.

    These are the `prediction`, a class's name, a number or a list of entities; of classes its `probability`, and on
    request `abstained`, where the prediction may be None, and `probability_NAME` of each.
    """

    input: Input
    columns: dict[str, Any]

    @property
    def row(self) -> dict[str, Any]:
        """The row as it was read, with the prediction at its end."""
        return {**self.input.values, **self.columns}


class Predictor(RunModel):
    """The model of a run of any task but causal-lm, ready to predict; its `truncation` is that of all texts so far.

    Raises:
        ValueError: the run is of causal-lm, or its model cannot be read.
    """

    def __init__(self, run: Run) -> None:
        if run.settings.task == "causal-lm":
            raise ValueError(
                f"the run in {run.folder} is of a language model; `dvora generate` continues texts with it"
            )
        super().__init__(run)
        self.device = device_of(run.settings)
        self.model.to(self.device)
        self.truncation = Truncation()

    def predict(
        self, inputs: Iterable[Input], batch_size: int, every_class: bool = False, abstain_below: float | None = None
    ) -> Iterator[Predicted]:
        """Predict for rows in their order, in batches; no more than a batch of them is held.

        Args:
            inputs: rows.
            batch_size: rows that the model sees at once.
            every_class: also give the probability of every class.
            abstain_below: name no class with a lower probability; None: always name the likeliest.

        Raises:
            ValueError: a row has a column with the name of one that is added, or what has no classes should abstain.
        """
        check_can_abstain(self.run, abstain_below)
        rest = iter(inputs)
        while batch := list(islice(rest, batch_size)):
            for row, columns in zip(batch, self._columns(batch, every_class, abstain_below), strict=True):
                if taken := columns.keys() & row.values.keys():
                    raise ValueError(f"the rows have a column {min(taken)!r} already; rename it, to keep both")
                yield Predicted(row, columns)

    def _columns(self, batch: Sequence[Input], every_class: bool, abstain_below: float | None) -> list[dict[str, Any]]:
        logits = self._logits([row.row for row in batch])
        if self.run.settings.task == "token-classification":
            texts = [row.row["text"] for row in batch]
            read = self.processor(texts, truncation=True, max_length=self.length, return_offsets_mapping=True)
            text_logits = [*logits]
            if self.processor.padding_side == "left":
                text_logits = [values[-len(ids) :] for values, ids in zip(logits, read["input_ids"], strict=True)]
            rows_of = zip(texts, read["offset_mapping"], text_logits, strict=True)
            return [{"prediction": entities_in(*row, self.run.labels)} for row in rows_of]
        if not self.run.labels:
            return [{"prediction": _rounded(value)} for value in logits.reshape(-1).tolist()]
        rows: list[dict[str, Any]] = []
        for values in logits.softmax(-1).tolist():
            probabilities = dict(zip(self.run.labels, values, strict=True))
            best = max(probabilities, key=probabilities.__getitem__)
            rows.append({"prediction": best, "probability": _rounded(probabilities[best])})
            if abstain_below is not None:
                abstains = _rounded(probabilities[best]) < abstain_below
                rows[-1] |= {"prediction": None if abstains else best, "abstained": abstains}
            if every_class:
                rows[-1] |= {f"probability_{name}": _rounded(value) for name, value in probabilities.items()}
        return rows

    def _logits(self, rows: Rows) -> Tensor:
        with quiet_transformers():
            dataset, truncation = self.features(rows)
            self.truncation += truncation
            # Equal texts are computed once.
            first: dict[Any, int] = {}
            keys = [(row["text"], row.get("text2")) if "text" in row else index for index, row in enumerate(rows)]
            like = [first.setdefault(key, index) for index, key in enumerate(keys)]
            distinct = sorted({*like})
            batch = self.task.collator([dataset[index] for index in distinct])
        with computing(self.run.settings):
            outputs = self.model(**{name: values.to(self.device) for name, values in batch.items()})
        logits = torch.as_tensor(outputs.logits, device="cpu", dtype=torch.float32)
        return logits[[distinct.index(index) for index in like]]


def _rounded(value: float) -> float:
    """Without digits that single precision does not have."""
    return float(f"{value:.{DIGITS}g}")


class Compared(NamedTuple):
    """A held-out row, its label, what the run's model and the other one predict (None: there is no other), and the
    probability of the first, if it is of a class."""

    row: dict[str, Any]
    label: str | float
    predicted: str | float
    other: str | float | None
    probability: float | None


def compared(run: Run, rows: Sequence[dict[str, Any]], against: Run | None = None) -> list[Compared]:
    """Predictions for rows with labels.

    Args:
        run: finished, of any task but causal-lm.
        rows: with their `label`, as `load_data` gives them.
        against: another run of the same task and classes; None: the head alone on the frozen base, if the run kept it.

    Raises:
        ValueError: the other run has other classes.
    """
    if against is not None and (against.settings.task, against.labels) != (run.settings.task, run.labels):
        raise ValueError(f"the run in {against.folder} predicts other classes than the one in {run.folder}")
    predictor = Predictor(run)
    predicted, probabilities = _predictions(predictor, rows)
    others: Sequence[Any] = [None] * len(rows)
    if against is not None:
        others, _ = _predictions(Predictor(against), rows)
    elif (head := head_alone_of(run)) is not None:
        outputs = head_alone_outputs(run, head, predictor.features(rows).dataset, predictor.task)
        others = [run.labels[best] for best in outputs.argmax(-1)] if run.labels else outputs.flatten().tolist()
    return [
        Compared(row, run.labels[row["label"]] if run.labels else float(row["label"]), *found)
        for row, *found in zip(rows, predicted, others, probabilities, strict=True)
    ]


def _predictions(predictor: Predictor, rows: Sequence[dict[str, Any]]) -> tuple[list[str | float], list[float | None]]:
    unlabelled = [Input({}, {name: value for name, value in row.items() if name != "label"}) for row in rows]
    columns = [predicted.columns for predicted in predictor.predict(unlabelled, BATCH)]
    return [found["prediction"] for found in columns], [found.get("probability") for found in columns]
