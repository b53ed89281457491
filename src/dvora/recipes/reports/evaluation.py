"""A finished run evaluated: on the rows that it held out, or on the rows of other files."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]
from peft import PeftModel
from torch import Tensor, nn

from ..data.run_data import Data, fingerprints, labelled_examples, load_data, size_of
from ..data.tables import Note
from ..models.bases import quiet_transformers
from ..run_folder import HEAD_ALONE, Run
from ..tasks.comparison import comparisons
from ..tasks.evaluation import Evaluated, evaluated, evaluated_outputs, evaluator, simplest_guess_on
from ..tasks.head_alone import last_features, read_head_alone
from ..tasks.metrics import answered, limits_of
from ..tasks.task import Task, Truncation
from .run_model import Rows, RunModel, check_can_abstain, load_trained


@dataclass(frozen=True)
class Evaluation:
    """How good a run's model is.

    Args:
        part: "test", or "files" where files were given.
        rows: that were evaluated.
        seen: how many of them the model was trained on; None where the run's data is no longer there to compare with.
        metrics: as in run.json, with those of what it is compared with.
        comparisons: with these, as in run.json.
        limits: of classes, how many rows are answered, and how many of those right, by the least probability.
        truncation: of the rows' texts.
        max_length: tokens to which texts are cut; 0 for images.
    """

    part: str
    rows: int
    seen: int | None
    metrics: dict[str, dict[str, Any]]
    comparisons: dict[str, dict[str, Any]]
    limits: list[dict[str, float | None]]
    truncation: Truncation
    max_length: int


def evaluate_run(
    run: Run,
    files: Sequence[str] = (),
    columns: Mapping[str, str | None] | None = None,
    with_base: bool = False,
    note: Note = lambda _: None,
    abstain_below: float | None = None,
) -> Evaluation:
    """Evaluate a run's model.

    Args:
        run: finished.
        files: in the formats of training; none: the rows that the run held out for its test.
        columns: of the files, where they are not those of the run; see `reading_settings`.
        with_base: also evaluate the base: a language model's as it is, that of another task with the head alone.
        note: called with what had to be assumed to read the files.
        abstain_below: also how many rows have a class of this probability or more, and how many of these are right.

    Raises:
        ValueError: the run's data has changed, a file is not what the task needs, or the run kept no head alone or has
            no classes.
    """
    check_can_abstain(run, abstain_below)
    evaluation = partial(_evaluation, run=run, with_base=with_base, least=abstain_below)
    if not files:
        data = unchanged_data(run)
        if not data.test:
            raise ValueError(f"the run in {run.folder} held no rows out for a test; give files to evaluate it on")
        return evaluation("test", data.test, _guess_from(run, data), 0)
    examples = labelled_examples(files, run, columns or {}, note)
    rows = [example.row for example in examples]
    try:
        data = unchanged_data(run)
    except ValueError:
        return evaluation("files", rows, _guess_from(run, None), None)
    train = {*data.train_keys}
    seen = sum(example.key in train for example in examples)
    return evaluation("files", rows, _guess_from(run, data), seen)


def head_alone_of(run: Run) -> nn.Linear | None:
    """The head that the run fitted to the frozen base; None where it fitted none."""
    file = run.folder / HEAD_ALONE
    return read_head_alone(file) if file.is_file() else None


def head_alone_outputs(run: Run, head: nn.Linear, dataset: Dataset, task: Task) -> Tensor:
    """Outputs of the base with the head alone, (rows, outputs)."""
    base, _ = load_trained(run, with_adapter=False)
    outputs: Tensor = head(last_features(base, dataset, task.collator, run.settings))
    return outputs


def unchanged_data(run: Run) -> Data:
    """The data of a run, read and split again.

    Raises:
        ValueError: it is not there any more, or not what it was.
    """
    advice = "so the rows that were held out are not known; give files to evaluate the run on"
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


def _guess_from(run: Run, data: Data | None) -> Rows | None:
    """Rows of which the simplest guess is that of the run; None where there is none, or nobody knows it any more."""
    if run.settings.task in ("causal-lm", "token-classification"):
        return None
    if data is not None:
        return data.train
    recorded = [values["guess"] for name, values in run.record["metrics"].items() if name.endswith("_simplest_guess")]
    return [{"label": run.labels.index(guess) if run.labels else guess} for guess in recorded[:1]] or None


def _evaluation(
    part: str,
    rows: Rows,
    guess_from: Rows | None,
    seen: int | None,
    *,
    run: Run,
    with_base: bool,
    least: float | None,
) -> Evaluation:
    settings, of_text = run.settings, run.settings.task == "causal-lm"
    head = head_alone_of(run) if with_base and not of_text else None
    if with_base and not of_text and head is None:
        raise ValueError(f"the run in {run.folder} kept no head for its base alone ({HEAD_ALONE}); leave --base out")
    trained = RunModel(run)
    task, recorded = trained.task, {}
    with quiet_transformers(), TemporaryDirectory() as folder:
        dataset, truncation = trained.features(rows)
        if not len(dataset):
            raise ValueError(f"no row has anything to evaluate within max_length {trained.length}")

        def evaluation_of(model: Any) -> Evaluated:
            return evaluated(evaluator(model, task, settings, Path(folder)), task, dataset)

        evaluations = {part: evaluation_of(trained.model)}
        if head is not None:
            outputs = head_alone_outputs(run, head, dataset, task)
            evaluations[f"{part}_head_alone"] = evaluated_outputs(task, outputs, dataset)
        elif (key := f"{part}_head_alone") in run.record["metrics"]:
            recorded[key] = run.record["metrics"][key]
        if guess_from is not None:
            evaluations[f"{part}_simplest_guess"] = simplest_guess_on(task, guess_from, rows, run.labels)
        if with_base and of_text:
            adapted = isinstance(trained.model, PeftModel)
            base = trained.model if adapted else load_trained(run, with_adapter=False)[0]
            with base.disable_adapter() if adapted else nullcontext():
                evaluations[f"{part}_before_training"] = evaluation_of(base)
    metrics = {
        part: evaluations[part].metrics,
        **recorded,
        **{key: result.metrics for key, result in evaluations.items()},
    }
    compared = comparisons(task.best, {key: result.rows for key, result in evaluations.items()})
    if recorded and "saved" not in run.record:
        compared |= {key: value for key, value in run.record.get("comparisons", {}).items() if key in recorded}
    if least is not None:
        metrics[part] |= answered(evaluations[part].rows, least)
    limits = limits_of(evaluations[part].rows) if task.best == "accuracy" else []
    return Evaluation(part, len(rows), seen, metrics, compared, limits, truncation, trained.length)
