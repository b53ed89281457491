"""The model of a run, or of a language model's adapter that no run made, with its tokenizer or image processor."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ..run_folder import HEAD_FILE, Run
from ..settings import NOTHING, Settings, Trust
from .adapter_folder import adapter_on, check_labels, read_adapter, shapes_in
from .bases import Base, load_base, load_processor, quiet_transformers


def as_run(adapter: Path, base: str | None, trust: Trust = NOTHING) -> Run:
    """A language model's adapter that no run made, as if one had.

    Args:
        adapter: a folder that PEFT reads.
        base: the model; None: the one that the adapter names.
        trust: what is allowed when it is loaded; a base that is given may be fetched.

    Raises:
        ValueError: it holds no adapter, or names no base.
    """
    found = read_adapter(adapter)
    # It has no data, but settings want some.
    settings = Settings(task="causal-lm", model=found.base(base), data=(str(adapter),))
    trust = replace(trust, download=trust.download or base is not None)
    return Run(found.folder, settings, (), found.folder, {}, trust)


def load_trained(run: Run, with_adapter: bool = True) -> tuple[Any, Any]:
    """The model of a run, in evaluation mode, and its tokenizer or image processor.

    Args:
        run: finished.
        with_adapter: False: the base, whose new layers, if its task needs some, have not been trained.

    Raises:
        ValueError: the base or the adapter cannot be read, or they do not fit.
    """
    _check_trained(run)
    with quiet_transformers():
        processor = load_processor(run.settings, run.trust)
        pad_token_id = getattr(processor, "pad_token_id", None)
        if not with_adapter or run.settings.method != "full":
            base = load_base(run.settings, run.labels, pad_token_id, run.trust)
            return (_with_adapter(base, run) if with_adapter else base.model).eval(), processor
        whole = run.settings.model_copy(update={"model": str(run.adapter)})
        return load_base(whole, run.labels, pad_token_id, run.trust).model.eval(), processor


def _check_trained(run: Run) -> None:
    """Check what was trained before a model with the record's number of classes is made."""
    if run.settings.method not in ("full", "head"):
        read_adapter(run.adapter)
        return
    files = sorted(run.adapter.glob("*.safetensors"))
    shapes = {key: shape for file in files for key, shape in shapes_in(file).items()}
    check_labels(run.labels, shapes, run.adapter)


def _with_adapter(base: Base, run: Run) -> Any:
    """The base with the trained adapter, or with the trained head."""
    if run.settings.method != "head":
        return adapter_on(base.model, run.adapter)
    file = run.adapter / HEAD_FILE
    missing, unexpected = base.model.load_state_dict(load_file(file), strict=False)
    if unexpected:
        raise ValueError(f"{file} has {unexpected[0]}, which {run.base} has not")
    if lacking := [name for name in missing if name.startswith(tuple(f"{head}." for head in base.heads))]:
        raise ValueError(f"{file} lacks {lacking[0]}, which the run trained")
    return base.model
