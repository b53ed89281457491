"""What a run's model predicts for held-out rows, beside what another model or the base does."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from ..data.new_files import Input
from ..run_folder import Run
from .evaluation import head_alone_of, head_alone_outputs
from .generation import Continuation, Generator, Sampling
from .prediction import Predictor

BATCH = 32
PROMPT_WORDS = 24


class Compared(NamedTuple):
    """A held-out row, its label, and what the run's model and the other one predict; None where there is no other."""

    row: dict[str, Any]
    label: str | float
    predicted: str | float
    other: str | float | None


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
    predicted = _predictions(predictor, rows)
    others: Sequence[Any] = [None] * len(rows)
    if against is not None:
        others = _predictions(Predictor(against), rows)
    elif (head := head_alone_of(run)) is not None:
        outputs = head_alone_outputs(run, head, predictor.features(rows).dataset, predictor.task)
        others = [run.labels[best] for best in outputs.argmax(-1)] if run.labels else outputs.flatten().tolist()
    return [
        Compared(row, run.labels[row["label"]] if run.labels else float(row["label"]), *both)
        for row, *both in zip(rows, predicted, others, strict=True)
    ]


def continuations(run: Run, rows: Sequence[dict[str, Any]], count: int, tokens: int) -> list[Continuation]:
    """Beginnings of held-out rows, continued by a language model with and without its adapter."""
    generator, sampling = Generator(run), Sampling(max_new_tokens=tokens)
    prompts = islice(filter(None, map(_prompt, rows)), count)
    return [generator.continued(text, sampling, is_chat, system) for text, is_chat, system in prompts]


def _predictions(predictor: Predictor, rows: Sequence[dict[str, Any]]) -> list[str | float]:
    unlabelled = [Input({}, {name: value for name, value in row.items() if name != "label"}) for row in rows]
    return [predicted.columns["prediction"] for predicted in predictor.predict(unlabelled, BATCH)]


def _prompt(row: dict[str, Any]) -> tuple[str, bool, str | None] | None:
    """A prompt, whether it is of a chat, and the chat's system message."""
    if "messages" not in row:
        text = row.get("text") or row.get("passage") or ""
        words = text.split(" ")
        return (" ".join(words[:PROMPT_WORDS]), False, None) if len(words) > PROMPT_WORDS else None
    user = [message["content"] for message in row["messages"] if message["role"] == "user"]
    system = [message["content"] for message in row["messages"] if message["role"] == "system"]
    return (user[0], True, system[0] if system else None) if user else None
