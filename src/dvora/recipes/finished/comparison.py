"""What a run's model tells of the rows that it held out, beside what another model told of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from ..data.new_files import Input
from ..run_folder import Run
from .generation import Continuation, Generator, Sampling
from .prediction import Predictor

BATCH = 32
PROMPT_WORDS = 24


@dataclass(frozen=True)
class Outcome:
    """One held-out row.

    Args:
        row: as the model reads it.
        label: the class's name, or the number, that is right.
        told: what the run's model says.
        before: what the other model says; None without one.
    """

    row: dict[str, Any]
    label: str | float
    told: str | float
    before: str | float | None


def outcomes(run: Run, rows: Sequence[dict[str, Any]], against: Run | None = None) -> list[Outcome]:
    """What the model tells of rows with labels.

    Args:
        run: finished, of any task but causal-lm.
        rows: with their `label`, as `load_data` gives them.
        against: another run of the same task, whose model is asked too; None: the run's own model before training,
            whose new layers know nothing.

    Raises:
        ValueError: the other run has other classes.
    """
    if against is not None and (against.settings.task, against.labels) != (run.settings.task, run.labels):
        raise ValueError(f"the run in {against.folder} tells other classes than the one in {run.folder}")
    predictor = Predictor(run)
    told = _told(predictor, rows)
    if against is not None:
        before: list[Any] = _told(Predictor(against), rows)
    elif isinstance(predictor.model, PeftModel):
        with predictor.model.disable_adapter():
            before = _told(predictor, rows)
    else:
        before = [None] * len(rows)
    return [
        Outcome(row, run.labels[row["label"]] if run.labels else float(row["label"]), *both)
        for row, *both in zip(rows, told, before, strict=True)
    ]


def continuations(run: Run, rows: Sequence[dict[str, Any]], count: int, tokens: int) -> list[Continuation]:
    """What a language model goes on with after the beginnings of held-out rows, with and without its adapter."""
    generator = Generator(run)
    found: list[Continuation] = []
    for row in rows:
        if len(found) == count:
            break
        if (prompt := _prompt(row)) is not None:
            text, is_chat, system = prompt
            found.append(generator.continued(text, Sampling(max_new_tokens=tokens), is_chat, system))
    return found


def _told(predictor: Predictor, rows: Sequence[dict[str, Any]]) -> list[str | float]:
    unlabelled = [Input({}, {name: value for name, value in row.items() if name != "label"}) for row in rows]
    return [each.told["prediction"] for each in predictor.predict(unlabelled, BATCH)]


def _prompt(row: dict[str, Any]) -> tuple[str, bool, str | None] | None:
    """A prompt, whether it is a chat's, and what the chat's system message says."""
    if "messages" not in row:
        text = row.get("text") or row.get("passage") or ""
        words = text.split(" ")
        return (" ".join(words[:PROMPT_WORDS]), False, None) if len(words) > PROMPT_WORDS else None
    said = [message["content"] for message in row["messages"] if message["role"] == "user"]
    system = [message["content"] for message in row["messages"] if message["role"] == "system"]
    return (said[0], True, system[0] if system else None) if said else None
