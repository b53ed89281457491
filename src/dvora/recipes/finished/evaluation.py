"""A finished run judged again: on the rows that it held out, or on the rows of other files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel

from ..data.new_files import labelled_examples
from ..data.run_data import Data, fingerprints, load_data, size_of
from ..models.bases import quiet_transformers
from ..run_folder import Run, load_trained
from ..tasks.evaluation import evaluator, guessed, judged
from ..tasks.task import features, longest, task_parts

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """How good a run's model is.

    Args:
        part: "test", or "files" where files were given.
        rows: that were judged.
        seen: how many of them the model was trained on; None where the run's data is no longer there to compare with.
        metrics: as in run.json: of the part, of the `_simplest_guess` beside it, and of the base, `_before_training`.
    """

    part: str
    rows: int
    seen: int | None
    metrics: dict[str, dict[str, Any]]


def judge(
    run: Run, files: Sequence[str] = (), columns: Mapping[str, str | None] | None = None, with_base: bool = False
) -> Verdict:
    """Judge a run's model.

    Args:
        run: finished.
        files: in the formats of training; none: the rows that the run held out for its test.
        columns: of the files, where they are not those of the run; see `reading_settings`.
        with_base: also judge the base; of a language model, the only task that a base knows.

    Raises:
        ValueError: the run's data has changed, a file is not what the task needs, or the base does not know the task.
    """
    if with_base and run.settings.task != "causal-lm":
        raise ValueError(
            f"the base knows nothing of {run.settings.task}: its last layer is random before training; leave --base out"
        )
    if not files:
        data = unchanged_data(run)
        if not data.test:
            raise ValueError(f"the run in {run.folder} held no rows out for a test; give files to judge it on")
        metrics = _metrics("test", data.test, _guess(run, data, data.test), run, with_base)
        return Verdict("test", len(data.test), 0, metrics)
    examples = labelled_examples(files, run, columns or {})
    own = _data_if_unchanged(run)
    known = {*own.train_keys} if own else ()
    seen = sum(key in known for key in examples.keys) if own else None
    metrics = _metrics("files", examples.rows, _guess(run, own, examples.rows), run, with_base)
    return Verdict("files", len(examples.rows), seen, metrics)


def unchanged_data(run: Run) -> Data:
    """The data of a run, read and divided again.

    Raises:
        ValueError: it is not there any more, or not what it was.
    """
    advice = "so the rows that were held out cannot be told; give files to judge the run on"
    recorded: Mapping[str, Mapping[str, Any]] = run.record["data"]["files"]
    try:
        # A run from elsewhere may name any file here: what has another size is not even read.
        paths = run.settings.all_data
        changed = [path for path in paths if size_of(Path(path)) != recorded.get(path, {}).get("bytes")]
        if not changed:
            changed = [path for path, now in fingerprints(run.settings).items() if recorded.get(path) != now]
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}), {advice}") from None
    if changed:
        raise ValueError(f"{changed[0]} has changed since the run was trained on it, {advice}")
    return load_data(run.settings)


def _data_if_unchanged(run: Run) -> Data | None:
    try:
        return unchanged_data(run)
    except ValueError:
        return None


def _guess(run: Run, data: Data | None, rows: Rows) -> dict[str, Any] | None:
    """What the simplest guess gets; None where there is none, or where nobody knows any more what it would be."""
    if run.settings.task == "causal-lm":
        return None
    if data is not None:
        return guessed(data.train, rows, run.labels)
    recorded = [values["guess"] for name, values in run.record["metrics"].items() if name.endswith("_simplest_guess")]
    if not recorded:
        return None
    label = run.labels.index(recorded[0]) if run.labels else recorded[0]
    return guessed([{"label": label}], rows, run.labels)


def _metrics(
    part: str, rows: Rows, guess: dict[str, Any] | None, run: Run, with_base: bool
) -> dict[str, dict[str, Any]]:
    settings = run.settings
    model, processor = load_trained(run)
    length = 0 if settings.task == "image-classification" else longest(settings, processor, model.config)
    task = task_parts(settings, run.labels, processor)
    found = {}
    with quiet_transformers(), TemporaryDirectory() as folder:
        dataset = features(rows, settings, processor, length)
        if not len(dataset):
            raise ValueError(f"no row has anything to judge within max_length {length}")
        found[part] = judged(evaluator(model, task, settings, Path(folder)), dataset)
        if guess is not None:
            found[f"{part}_simplest_guess"] = guess
        if with_base and isinstance(model, PeftModel):
            with model.disable_adapter():
                found[f"{part}_before_training"] = judged(evaluator(model, task, settings, Path(folder)), dataset)
        elif with_base:
            base, _ = load_trained(run, with_adapter=False)
            found[f"{part}_before_training"] = judged(evaluator(base, task, settings, Path(folder)), dataset)
    return found
