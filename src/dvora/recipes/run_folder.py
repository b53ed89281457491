"""The folder of a training run: what is in it, which process may write to it, and how its model is loaded."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..whole_files import remove, write_atomically
from .files import check_no_links, read_json
from .models.adapter_folder import adapter_on, check_labels, checked_labels, read_adapter, shapes_in
from .models.bases import Base, load_base, load_processor, quiet_transformers
from .models.hub import NOTHING, Trust
from .settings import Settings, checked_settings, commented

RECORD, CONFIG, ADAPTER, CHECKPOINTS, LOCK = "run.json", "config.yaml", "adapter", "checkpoints", ".lock"
HEAD_FILE = "head.safetensors"
"""What the method "head" saves in the adapter's folder."""
HEAD_ALONE = "head_alone.safetensors"
"""The baseline: a linear layer fitted to the frozen base, see `tasks.head_alone`."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: of the run.
        settings: resolved: paths are absolute, what the method decides is written out.
        labels: names of the classes 0, 1, ...; empty where numbers or tokens are predicted.
        adapter: the folder that PEFT reads; for the method "full" a whole model, for "head" its `head.safetensors`.
        record: everything in run.json: versions, data hashes, split sizes, what was cut, metrics, seconds.
        trust: what the reader allows when the run's model is loaded.
    """

    folder: Path
    settings: Settings
    labels: tuple[str, ...]
    adapter: Path
    record: Mapping[str, Any]
    trust: Trust = NOTHING

    @property
    def base(self) -> str:
        """The base model: a folder or a name on the hub."""
        return self.settings.model


_FINISHED: Mapping[str, type | tuple[type, ...]] = {
    "data": dict, "metrics": dict, "history": list, "steps": int, "best_step": int, "trained_parameters": int,
    "seconds": (int, float), "truncation": dict, "max_length": int,
}  # fmt: skip
"""What the record of a finished run may have beside its state, settings and labels."""
_DATA: Mapping[str, type] = {"files": dict, "columns": dict, "rows": dict}


def read_run(folder: Path, trust: Trust = NOTHING) -> Run:
    """A finished run.

    Args:
        folder: of the run.
        trust: what is allowed when its model is loaded; its record can allow nothing.

    Raises:
        ValueError: there is no run, it is not finished, or its record is damaged.
    """
    record = read_record(folder)
    if record is None:
        raise ValueError(f"{folder} holds no {RECORD}, so it is not the folder of a run of `dvora train`")
    if record["state"] != "finished":
        raise ValueError(f"the run in {folder} is not finished; go on with `dvora train {folder / CONFIG} --resume`")
    _check_kinds(record, _FINISHED, folder / RECORD)
    _check_kinds(record.get("data", {}), _DATA, folder / RECORD)
    settings = checked_settings(record["settings"], str(folder / RECORD))
    return Run(folder, settings, checked_labels(record["labels"], folder / RECORD), folder / ADAPTER, record, trust)


def _check_kinds(values: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]], file: Path) -> None:
    for name, kind in kinds.items():
        if name in values and not isinstance(values[name], kind):
            raise ValueError(f"{file} is damaged: {name} is not what `dvora train` writes")


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
    from safetensors.torch import load_file

    if run.settings.method != "head":
        return adapter_on(base.model, run.adapter)
    file = run.adapter / HEAD_FILE
    missing, unexpected = base.model.load_state_dict(load_file(file), strict=False)
    if unexpected:
        raise ValueError(f"{file} has {unexpected[0]}, which {run.base} has not")
    if lacking := [name for name in missing if name.startswith(tuple(f"{head}." for head in base.heads))]:
        raise ValueError(f"{file} lacks {lacking[0]}, which the run trained")
    return base.model


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of run.json, finished or not; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    record = read_json(path)
    if not {"state", "settings", "labels"} <= record.keys():
        raise ValueError(f"{path} is not the record of a run of `dvora train`")
    if not isinstance(record["settings"], dict):
        raise ValueError(f"{path} is damaged: settings is no table of names and values")
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write run.json, whole or not at all; with the state "finished" this is what ends a run."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_atomically(folder / RECORD, (text + "\n").encode())


def write_config(folder: Path, settings: Settings) -> None:
    """Write config.yaml, with which the run can be repeated."""
    write_atomically(folder / CONFIG, commented(settings).encode())


def is_leftover(name: str) -> bool:
    """Whether a run that was killed while it wrote a file or the adapter left this behind."""
    return name.startswith(tuple(f".{written}." for written in (RECORD, CONFIG, ADAPTER)))


def remove_leftovers(folder: Path) -> None:
    """Remove what is left of such a run; only while the folder is locked."""
    for path in folder.iterdir():
        if is_leftover(path.name):
            remove(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made; however this process ends, the system opens the lock then.

    Raises:
        ValueError: another process works in it, or it holds what no run makes.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    check_no_links(folder, lambda name: name in (ADAPTER, CHECKPOINTS) or is_leftover(name))
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"another run works in {folder}; wait for it, or choose another folder") from None
    try:
        yield
    finally:
        lock.release()


def world_size() -> int:
    """How many processes train together, as accelerate launch and torchrun set it."""
    return _number_in("WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return _number_in("RANK", 0) == 0


def _number_in(variable: str, default: int) -> int:
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise ValueError(
            f"the environment variable {variable} is {value!r}, expected a whole number as accelerate launch and "
            "torchrun set it; unset it to train in one process"
        )
    return int(value)
