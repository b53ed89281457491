"""The model of a run, or of a language model's adapter that no run made, with all that rows need to go through it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ..models.adapters import adapter_on, check_labels, of_base, read_adapter, read_values
from ..models.bases import Base, load_base, load_processor, quiet_transformers
from ..run_folder import HEAD_FILE, Run
from ..settings import NOTHING, Settings, Trust
from ..tasks.task import Features, features, longest, task_parts, without_bytes

Rows = Sequence[dict[str, Any]]


def as_run(adapter: Path, base: str | None, trust: Trust = NOTHING) -> Run:
    """A language model's adapter that no run made, as if one had.

    Args:
        adapter: a folder that PEFT reads.
        base: the model, which may be fetched; None: the one that the adapter names.
        trust: what is allowed when it is loaded.

    Raises:
        ValueError: it holds no adapter, or names no base.
    """
    read = read_adapter(adapter)
    # It has no data, but settings want some.
    settings = Settings(task="causal-lm", model=read.base(base), data=(str(adapter),))
    return Run(read.folder, settings, (), read.folder, {}, of_base(base, trust))


def load_trained(run: Run, with_adapter: bool = True) -> tuple[Any, Any]:
    """The model of a run, in evaluation mode, and its tokenizer or image processor.

    Args:
        run: finished.
        with_adapter: False: the base, whose new layers, if its task needs some, have not been trained.

    Raises:
        ValueError: the base or the adapter cannot be read, or they do not fit.
    """
    settings, adapter = run.settings, None
    # What was trained is checked before a model with the record's number of classes is made.
    if settings.method not in ("full", "head"):
        adapter = read_adapter(run.adapter)
    else:
        shapes = {
            key: shape for file in run.adapter.glob("*.safetensors") for key, shape in read_values(file)[1].items()
        }
        check_labels(run.labels, shapes, run.adapter)
    with quiet_transformers():
        processor = load_processor(settings, run.trust)
        if with_adapter and settings.method == "full":
            settings = settings.model_copy(update={"model": str(run.adapter)})
        base = load_base(settings, run.labels, getattr(processor, "pad_token_id", None), run.trust)
        model = base.model
        if with_adapter and adapter is not None:
            model = adapter_on(model, adapter)
        elif with_adapter and settings.method == "head":
            _load_head(base, run)
    return model.eval(), processor


def _load_head(base: Base, run: Run) -> None:
    file = run.adapter / HEAD_FILE
    missing, unexpected = base.model.load_state_dict(load_file(file), strict=False)
    if unexpected:
        raise ValueError(f"{file} has {unexpected[0]}, which {run.settings.model} has not")
    if lacking := [name for name in missing if name.startswith(tuple(f"{head}." for head in base.heads))]:
        raise ValueError(f"{file} lacks {lacking[0]}, which the run trained")


def check_can_abstain(run: Run, abstain_below: float | None) -> None:
    """Refuse a least probability, which is None where there is none, for a run that predicts no classes.

    Raises:
        ValueError: it predicts something else.
    """
    if abstain_below is not None and (not run.labels or run.settings.task == "token-classification"):
        raise ValueError(f"abstain_below is for classes, and the run in {run.folder} is of {run.settings.task}")


class RunModel:
    """The model of a finished run, ready for rows, with its tokenizer or image processor.

    Attributes:
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
