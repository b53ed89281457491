"""The folder of a training run: what is in it, who may write to it, and how its model is loaded again."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bases import load_base, load_processor, quiet_transformers
from .files import write_atomically
from .settings import Settings, checked_settings, commented

RECORD, CONFIG, ADAPTER, CHECKPOINTS, LOCK = "run.json", "config.yaml", "adapter", "checkpoints", ".lock"
HEAD_FILE = "head.safetensors"
"""What the method "head" saves in the adapter's folder."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: of the run.
        settings: resolved: paths are absolute, what the method decides is written out.
        labels: names of the classes 0, 1, ...; empty where numbers or tokens are told.
        adapter: the folder that PEFT reads; for the method "full" a whole model, for "head" its `head.safetensors`.
        record: everything in run.json: versions, data hashes, split sizes, columns, metrics, trained values, seconds.
    """

    folder: Path
    settings: Settings
    labels: tuple[str, ...]
    adapter: Path
    record: Mapping[str, Any]

    @property
    def base(self) -> str:
        """The base model: a folder or a name on the hub."""
        return self.settings.model


def read_run(folder: Path) -> Run:
    """A finished run.

    Raises:
        ValueError: there is no run, it is not finished, or its record is damaged.
    """
    record = read_record(folder)
    if record is None:
        raise ValueError(f"{folder} holds no {RECORD}, so it is not the folder of a run of `dvora train`")
    if record["state"] != "finished":
        raise ValueError(f"the run in {folder} is not finished; go on with `dvora train {folder / CONFIG} --resume`")
    settings = checked_settings(record["settings"], str(folder / RECORD))
    return Run(folder, settings, tuple(record["labels"]), folder / ADAPTER, record)


def as_run(adapter: Path, base: str | None) -> Run:
    """A language model's adapter that no run made, as if one had.

    Args:
        adapter: a folder that PEFT reads.
        base: the model; None: the one that the adapter names.

    Raises:
        ValueError: it holds no adapter, or names no base.
    """
    file = adapter / "adapter_config.json"
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except FileNotFoundError:
        raise ValueError(f"{adapter} holds no {file.name}, so it is not the folder of an adapter") from None
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not (base or named):
        raise ValueError(f"{file} does not name the base; say with --model which it is")
    # It has no data, but settings want some.
    settings = Settings(task="causal-lm", model=base or named, data=(str(adapter),))
    return Run(adapter, settings, (), adapter, {})


def load_trained(run: Run, with_adapter: bool = True) -> tuple[Any, Any]:
    """The model of a run, in evaluation mode, and its tokenizer or image processor.

    Args:
        run: finished.
        with_adapter: False: the base, whose new layers, if its task needs some, have not been trained.

    Raises:
        ValueError: the base or the adapter cannot be read, or they do not fit.
    """
    with quiet_transformers():
        processor = load_processor(run.settings)
        pad_token_id = getattr(processor, "pad_token_id", None)
        if not with_adapter or run.settings.method != "full":
            model = load_base(run.settings, run.labels, pad_token_id).model
            return (_with_adapter(model, run) if with_adapter else model).eval(), processor
        whole = run.settings.model_copy(update={"model": str(run.adapter)})
        return load_base(whole, run.labels, pad_token_id).model.eval(), processor


def _with_adapter(model: Any, run: Run) -> Any:
    """The base with the trained adapter, or with the trained head."""
    from peft import PeftModel
    from safetensors.torch import load_file

    if run.settings.method == "head":
        _, unexpected = model.load_state_dict(load_file(run.adapter / HEAD_FILE), strict=False)
        if unexpected:
            raise ValueError(f"{run.adapter / HEAD_FILE} has {unexpected[0]}, which {run.base} has not")
        return model
    if not (run.adapter / "adapter_model.safetensors").exists():
        raise ValueError(f"{run.adapter} holds no adapter_model.safetensors; pickled adapters are never loaded")
    return PeftModel.from_pretrained(model, run.adapter)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What run.json says, finished or not; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(record, dict) or not {"state", "settings", "labels"} <= record.keys():
        raise ValueError(f"{path} is not the record of a run of `dvora train`")
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
        if is_leftover(path.name) and path.is_dir():
            shutil.rmtree(path)
        elif is_leftover(path.name):
            path.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made; however this process ends, the system opens the lock then.

    Raises:
        ValueError: another process works in it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"another run works in {folder}; wait for it, or choose another folder") from None
    try:
        yield
    finally:
        lock.release()
