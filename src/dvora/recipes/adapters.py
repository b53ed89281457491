"""The folder of an adapter of any of PEFT's methods: what its files say, and the adapter on its base model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open

import dvora

from .architectures import config_of, load_base, model_class, quietly
from .files import check_readable

SETTINGS, VALUES, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True)
class Adapter:
    """An adapter in its folder.

    Args:
        folder: of the adapter.
        settings: its configuration.
        shapes: of the values in its file.
        labels: names of the classes, where a run of `dvora train` tells them; empty elsewhere.
    """

    folder: Path
    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    labels: tuple[str, ...]

    @property
    def method(self) -> str:
        """In lower case: dvora, lora, dora, vera ..."""
        return "dora" if self.settings.get("use_dora") else str(self.settings["peft_type"]).lower()

    @property
    def file(self) -> Path:
        """The file of values."""
        return self.folder / VALUES

    def base(self, given: str | None) -> str:
        """The base model: the given one, or the one that the adapter names.

        Raises:
            ValueError: it names none.
        """
        base = given or self.settings.get("base_model_name_or_path")
        if not base:
            raise ValueError(f"{self.folder} does not name its base model; give it with --model")
        return str(base)


def read_adapter(folder: Path) -> Adapter:
    """An adapter's configuration, and the names and shapes of its values; no value is read.

    Args:
        folder: of an adapter, or of a run of `dvora train` with the adapter in it.

    Raises:
        ValueError: it holds no adapter, a pickled one, or a damaged one.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; an adapter is a folder with {SETTINGS} and {VALUES}")
    if not (folder / SETTINGS).is_file() and (folder / "adapter" / SETTINGS).is_file():
        folder = folder / "adapter"
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder} holds no {SETTINGS}, so it is no adapter folder")
    settings = _json(folder / SETTINGS)
    if "peft_type" not in settings:
        raise ValueError(f"{folder / SETTINGS} has no peft_type, so it is not of an adapter")
    if not (folder / VALUES).is_file():
        if (folder / PICKLED).exists():
            raise ValueError(
                f"{folder} holds a pickled {PICKLED}, which can run any code and is never loaded; on a machine that "
                "trusts it, load it with PEFT once and save it again (save_pretrained writes safetensors)"
            )
        raise ValueError(f"{folder} holds no {VALUES}")
    check_readable([folder / VALUES])
    try:
        with safe_open(folder / VALUES, "pt") as values:
            shapes = {key: tuple(values.get_slice(key).get_shape()) for key in values.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{folder / VALUES} cannot be read: {error}") from error
    return Adapter(folder, settings, shapes, _labels(folder.parent / "run.json"))


def load_adapted(adapter: Adapter, base: str, dtype: torch.dtype | str = "auto") -> PeftModel:
    """The base model with the adapter, in evaluation mode.

    Args:
        adapter: of `read_adapter`.
        base: a folder, or the name of a model on the hub.
        dtype: of the base's weights; "auto" means as they are stored.

    Raises:
        ValueError: the base cannot be read, or the adapter does not fit.
    """
    assert dvora.__version__  # importing it makes the method known to PEFT
    model = load_base(base, *base_class(adapter, base), dtype)
    with quietly():
        adapted: PeftModel = PeftModel.from_pretrained(model, str(adapter.folder))
    return adapted.eval()


def base_class(adapter: Adapter, base: str) -> tuple[Any, Any]:
    """The class of an adapter's base model, and its configuration with as many labels as the adapter's head has."""
    config = config_of(base)
    mapping = adapter.settings.get("auto_mapping") or {}
    found = model_class(config, adapter.settings.get("task_type"), mapping.get("base_model_class"))
    if (count := _label_count(adapter)) is not None:
        config.num_labels = count
    if adapter.labels:
        config.id2label = dict(enumerate(adapter.labels))
        config.label2id = {label: index for index, label in enumerate(adapter.labels)}
    if getattr(config, "pad_token_id", None) is None:
        # Classifiers of decoders look for the end of a text by it; `dvora train` pads with this token too.
        ends = getattr(config, "eos_token_id", None)
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    return found, config


def config_of_adapter(adapter: Adapter) -> PeftConfig:
    """The configuration as PEFT has it, checked.

    Raises:
        TypeError, ValueError: a setting is wrong.
    """
    config: PeftConfig = PeftConfig.from_pretrained(str(adapter.folder))
    return config


def _label_count(adapter: Adapter) -> int | None:
    """The outputs of the head that an adapter brings; None if it brings none."""
    heads = adapter.settings.get("modules_to_save") or ()
    last = [
        shape
        for key, shape in adapter.shapes.items()
        if len(shape) == 2 and any(f".{head}." in key for head in heads) and key.endswith("weight")
    ]
    # Of a head of several layers, the one that tells the labels is the smallest.
    return min((shape[0] for shape in last), default=None)


def _labels(record: Path) -> tuple[str, ...]:
    """The names of the classes that a run of `dvora train` notes beside its adapter."""
    return tuple(_json(record).get("labels") or ()) if record.is_file() else ()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it is no table of settings")
    return found
