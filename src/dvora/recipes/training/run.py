"""Training: from settings to a finished run folder, or to a checkpoint that training goes on from."""

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from ...heads import last_layer
from ...whole_files import new_folder, remove, write_atomically
from ..data.run_data import Data, load_data
from ..models.bases import device_of, load_base, load_processor, quiet_transformers
from ..run_folder import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG,
    HEAD_ALONE,
    HEAD_AT_START,
    HEAD_OUTPUTS,
    Place,
    Run,
    entered,
    is_first,
    read_run,
    remove_leftovers,
    world_size,
    write_record,
)
from ..settings import NAMED, Settings, Trust, commented
from ..tasks.calibration import calibrate, calibration_sentence
from ..tasks.comparison import comparisons, is_preferred
from ..tasks.evaluation import Evaluated, evaluated_outputs
from ..tasks.head_alone import fit_head_again, fitted_head, read_head_alone, save_head_alone
from ..tasks.task import Truncation, features, longest, task_parts
from ..tasks.verdict import head_saved, verdict
from .callbacks import OnProgress, StopRequest
from .card import model_card
from .checkpoints import checkpoints, errors_of_damage, remove_all_but
from .methods import adapt, back_to_head_alone, learning_rates, save_trained, trained_parameters, values_at_start
from .trainers import Prepared, final_results, length_of_run, make_trainer

Note = Callable[[str], None]
PACKAGES = ("dvora", "torch", "peft", "transformers", "accelerate", "datasets", "tokenizers", "numpy")


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Args:
        run: finished, and as it lies in its folder; None if training was stopped.
        stopped_at: the step whose checkpoint training goes on from; None if it is finished.
    """

    run: Run | None
    stopped_at: int | None


def train(
    settings: Settings,
    resume: bool = False,
    on_progress: OnProgress | None = None,
    note: Note = lambda _: None,
    trust: Trust = NAMED,
) -> Outcome:
    """Train, or resume a run that was stopped.

    With several processes (accelerate launch, torchrun) every one of them calls this; the first one alone writes.

    Args:
        settings: of the run; they are resolved first.
        resume: go on in a folder that holds an unfinished run; a finished one is returned as it is.
        on_progress: called after every step and evaluation.
        note: called with what was guessed, assumed, removed and cut.
        trust: what is allowed to get the model, which the settings name.

    Raises:
        ValueError: the settings, the data, the model or the folder are not what the run needs.
        OSError: a file cannot be read or written.
    """
    with entered(settings, resume) as place:
        return train_in(place, on_progress, note, trust)


def train_in(
    place: Place, on_progress: OnProgress | None, note: Note, trust: Trust, data: Data | None = None
) -> Outcome:
    """`train` in a folder that was entered, with its data if that was read."""
    settings, folder, earlier = place.settings, place.folder, place.record
    if earlier is not None and earlier["state"] == "finished":
        if is_first():
            _clear(folder)
        return Outcome(read_run(folder, trust), None)
    with quiet_transformers():
        if settings.mixed_precision == "fp16" and device_of(settings).type != "cuda":
            raise ValueError("mixed_precision fp16 needs a GPU; take bf16 or no on a CPU")
        data = data or load_data(settings)
        if settings.calibrate and not (data.labels and data.validation and settings.task != "token-classification"):
            raise ValueError(
                f"calibrate fits a temperature to validation rows with classes, got {len(data.validation)} rows of "
                f"{settings.task}; leave it out, or set validation_share"
            )
        record = _start_record(settings, data, earlier)
        return _trained(_prepared(settings, data, record, note, trust), record, on_progress, note)


def _trained(prepared: Prepared, record: dict[str, Any], on_progress: OnProgress | None, note: Note) -> Outcome:
    folder = Path(prepared.settings.output)
    stop, start = StopRequest(), time.monotonic()
    trainer, callback = make_trainer(prepared, stop, on_progress)
    complete = checkpoints(folder / CHECKPOINTS)
    last = complete[-1] if complete else None
    if is_first():
        # What an earlier start left half-written goes; what makes the folder that of a run comes.
        remove_leftovers(folder)
        write_atomically(folder / CONFIG, commented(prepared.settings).encode())
        # First: what it names is a run, which can be resumed if the disk is full now.
        write_record(folder, record)
        if prepared.head_alone is not None:
            save_head_alone(prepared.head_alone, folder / HEAD_ALONE)
            (folder / CHECKPOINTS).mkdir(exist_ok=True)
            save_head_alone(prepared.head_at_start or prepared.head_alone, folder / HEAD_AT_START)
            write_atomically(folder / HEAD_OUTPUTS, save(dict(prepared.head_outputs)))
        remove_all_but(complete, folder / CHECKPOINTS)
    # The head alone is fitted already.
    if prepared.settings.method != "head":
        with stop.listening(), errors_of_damage(last):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    record["seconds"] += time.monotonic() - start
    if callback.was_stopped:
        if is_first():
            write_record(folder, record)
        return Outcome(None, trainer.state.global_step)
    record |= {
        "state": "finished",
        "trained_parameters": trained_parameters(prepared.model),
        "steps": trainer.state.global_step,
        "best_step": (trainer.args.load_best_model_at_end and trainer.state.best_global_step)
        or trainer.state.global_step,
        # Before the final evaluations, which the trainer logs as if they were of this step.
        "history": _history(trainer.state.log_history),
    }
    if _may_be_fitted_again(prepared):
        note("fitting the head again, to what the trained model gives")
        settings, labels, datasets = prepared.settings, prepared.data.labels, prepared.datasets
        record["head_fitted_again"] = fit_head_again(
            prepared.base.model, datasets, prepared.task.collator, settings, labels, note
        )
    task, datasets, outputs = prepared.task, prepared.datasets, prepared.head_outputs
    head_results = {f"{part}_head_alone": evaluated_outputs(task, outputs[part], datasets[part]) for part in outputs}
    results = _evaluate(trainer, prepared, record, head_results)
    rows = {key: result.rows for key, result in results.items()}
    record["comparisons"] = comparisons(task.best, rows)
    record["verdict"] = verdict(record["metrics"], record["comparisons"], record)
    if prepared.start and not is_preferred(task.best, rows):
        record["verdict"].append(head_saved(record["metrics"]))
        not_saved = {f"{part}_not_saved": results[part] for part in prepared.datasets if part != "train"}
        back_to_head_alone(prepared.model, prepared.base, prepared.start, prepared.head_alone)
        _evaluate(trainer, prepared, record, {**not_saved, **head_results})
        record |= {"saved": "head", "head_fitted_again": False}
    if "calibration" in record:
        note(calibration_sentence(record["calibration"]))
    if is_first():
        _finish(folder, prepared, record)
    return Outcome(Run(folder, prepared.settings, prepared.data.labels, folder / ADAPTER, record), None)


def _may_be_fitted_again(prepared: Prepared) -> bool:
    """Whether features changed under a head that was fitted and is trained, and validation rows can compare two."""
    settings = prepared.settings
    is_asked = settings.refit_head and settings.method != "head" and prepared.rates.get("head") != 0
    return is_asked and prepared.head_at_start is not None and "validation" in prepared.datasets and world_size() == 1


def _evaluate(
    trainer: Any, prepared: Prepared, record: dict[str, Any], baselines: Mapping[str, Evaluated]
) -> dict[str, Evaluated]:
    """Put the final metrics of what the model is now into the record, calibrated before, if that is set."""
    if prepared.settings.calibrate:
        layer = last_layer(prepared.base.model)
        assert layer is not None, "checked when it was prepared"
        record["calibration"] = calibrate(trainer, layer, prepared.datasets)
    results = final_results(trainer, prepared, baselines)
    record["metrics"] = {key: result.metrics for key, result in results.items()}
    return results


def _prepared(settings: Settings, data: Data, record: dict[str, Any], note: Note, trust: Trust) -> Prepared:
    """What a run trains; what its texts lose at `max_length`, and the head alone, go into the record."""
    processor = load_processor(settings, trust)
    base = load_base(settings, data.labels, getattr(processor, "pad_token_id", None), trust)
    notes = [*data.notes, *base.notes]
    length = 0
    if settings.task != "image-classification":
        length = longest(settings, processor, base.model.config)
        if length < (settings.max_length or 0):
            notes.append(f"max_length: {length}, which is all that the model can take")
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    inputs = {part: features(rows, settings, processor, length) for part, rows in parts.items() if rows}
    datasets = {part: dataset for part, (dataset, _) in inputs.items()}
    if empty := [part for part, dataset in datasets.items() if not len(dataset)]:
        raise ValueError(f"no row of the part {empty[0]} has anything to learn within max_length {length}")
    record["max_length"] = length
    record["truncation"] = {part: asdict(truncation) for part, (_, truncation) in inputs.items()}
    if cut := sum((truncation for _, truncation in inputs.values()), Truncation()).sentence(length):
        notes.append(f"{cut}; set max_length to keep more")
    task = task_parts(settings, data.labels, processor)
    # After all checks of the input: an error is then the only line that is printed.
    for text in notes:
        note(text)
    head, start_head, outputs = None, None, dict[str, Tensor]()
    last = None if settings.task == "causal-lm" else last_layer(base.model)
    if settings.method == "head" and last is None:
        raise ValueError(
            f"method head fits the last linear layer, and the head of {type(base.model).__name__} does not end in one; "
            "take another method"
        )
    if last is not None:
        files = [Path(settings.output) / name for name in (HEAD_ALONE, HEAD_AT_START, HEAD_OUTPUTS)]
        if all(file.is_file() for file in files):
            # Of the run that is resumed, with the same settings and data.
            head, start_head = map(read_head_alone, files[:2])
            outputs = load_file(files[2])
        else:
            compared = "to compare with; and to half of the rows, to start from" * (settings.method != "head")
            note(f"fitting the head alone to the frozen base{compared and f', {compared}'}")
            head, start_head, outputs = fitted_head(base.model, datasets, task.collator, settings, data.labels, note)
        if settings.method == "head":
            # It is what is trained, and no baseline.
            start_head, outputs = head, {}
        elif settings.learning_rates.get("head") == 0:
            start_head = head
        if settings.method == "head" or any(base.model.get_submodule(name) is last for name in base.new):
            # The same start for every method.
            last.load_state_dict(start_head.state_dict(), strict=last.bias is not None)
        else:
            start_head = None
    model = adapt(base, settings)
    if settings.calibrate and ((layer := last_layer(base.model)) is None or not layer.weight.requires_grad):
        raise ValueError(
            f"calibrate divides the last layer, and the head of {type(base.model).__name__} does not end in a linear "
            "layer that is trained; leave it out"
        )
    record["learning_rates"] = learning_rates(model, settings)
    rows = ", ".join(f"{part} {len(of_part):,}" for part, of_part in parts.items())
    note(f"rows: {rows}; {trained_parameters(model):,} parameters are trained")
    epochs, max_steps = length_of_run(settings, len(datasets["train"]))
    if settings.method == "head":
        note("the head is fitted in closed form: rates, schedule, epochs and steps have no part in it")
    elif max_steps is not None and settings.max_steps is None:
        note(f"{max_steps:,} steps, fewer than {epochs:g} epochs; set epochs or max_steps to train longer")
    may_be_saved = settings.if_no_better == "head" and head is not None and world_size() == 1
    start = values_at_start(model) if may_be_saved else {}
    rates = record["learning_rates"]
    return Prepared(settings, data, base, model, task, datasets, rates, head, outputs, start_head, start)


def _start_record(settings: Settings, data: Data, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """What is known when training starts or resumes.

    Raises:
        ValueError: a data file is not what it was when the run started.
    """
    record = {
        "state": "started",
        "settings": settings.model_dump(mode="json"),
        "labels": list(data.labels),
        "data": data.record,
        "notes": list(data.notes),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "processes": world_size(),
        "seconds": earlier["seconds"] if earlier else 0.0,
        "metrics": earlier.get("metrics", {}) if earlier else {},
    }
    if earlier and earlier["data"]["files"] != data.record["files"]:
        changed = [path for path, now in data.record["files"].items() if earlier["data"]["files"].get(path) != now]
        raise ValueError(f"{changed[0]} has changed since the run started; start another one, into another folder")
    return record


def _history(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses and evaluations by step, without times, so that equal runs have equal histories."""
    times = ("_runtime", "_per_second", "_time")
    return [
        {
            name: value
            for name, value in entry.items()
            if name == "step" or (name.startswith(("loss", "eval_")) and not name.endswith(times))
        }
        for entry in log
        if "loss" in entry or "eval_loss" in entry
    ]


def _finish(folder: Path, prepared: Prepared, record: dict[str, Any]) -> None:
    """Save what was trained, then mark the run as finished; killed in between, it is unfinished."""
    if (folder / ADAPTER).is_dir():
        remove(folder / ADAPTER)
    with new_folder(folder / ADAPTER) as filled:
        save_trained(prepared.model, prepared.settings, prepared.base.heads, filled)
        text = model_card(prepared.settings, record, prepared.data.labels, prepared.base.model.config)
        (filled / "README.md").write_text(text, encoding="utf-8")
    write_record(folder, record)
    _clear(folder)


def _clear(folder: Path) -> None:
    """Remove what a finished run no longer needs; it may have been killed before it did."""
    remove_leftovers(folder)
    if (folder / CHECKPOINTS).is_dir():
        remove(folder / CHECKPOINTS)
