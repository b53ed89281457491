"""Adapters of any of PEFT's methods: in their folders, checked before PEFT or a model sees them, and on their base."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

import dvora

from ...adapter_file.content import head_of
from ...adapter_file.patterns import check_expressions
from ...adapter_file.settings import DVoRAConfig
from ...adapter_file.values import described, errors_of
from ...adapter_file.values_file import (
    LARGEST_SETTINGS,
    SETTINGS,
    VALUES,
    check_not_pickled,
    check_size,
    data_size,
    header_entries,
    open_values,
    plain_key,
    read_header,
    tensors_of,
)
from ...text import did_you_mean
from ..files import parsed_json, read_bounded
from ..run_folder import ADAPTER, labels_beside
from ..settings import NOTHING, Trust
from .bases import (
    TOKENIZER_FILES,
    config_of,
    lacks,
    load_model,
    load_tokenizer,
    model_class,
    quiet_transformers,
    set_labels,
    without_memory,
)
from .hub import offline

ELSEWHERE = ("adapters", "megatron_config", "tokenizer_kwargs", "tokenizer_name_or_path")
"""Settings with which PEFT loads or imports what is not in the folder."""


class _Settings(BaseModel):
    """Of an adapter's settings those that are used here; null counts as missing."""

    model_config = ConfigDict(strict=True, extra="allow")
    peft_type: str
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    modules_to_save: list[str] | None = Field(None, max_length=256)
    use_dora: bool | None = None

    @model_validator(mode="after")
    def _stays_in_its_folder(self) -> "_Settings":
        if self.peft_type not in PeftType.__members__:
            meant = did_you_mean(self.peft_type[:40], PeftType.__members__)
            raise ValueError(f"it has the peft_type {self.peft_type!r:.60}, which is no method of PEFT here; {meant}")
        if reaching := [name for name in ELSEWHERE if (self.model_extra or {}).get(name)]:
            raise ValueError(
                f"it has the setting {reaching[0]!r}, with which PEFT would load or import what is not in the folder; "
                "such adapters are not read here"
            )
        return self


@dataclass(frozen=True)
class Adapter:
    """An adapter in its folder.

    Args:
        folder: of the adapter.
        settings: its configuration.
        shapes: of the values in its file.
        labels: names of the classes, where a run of `dvora train` recorded them; else empty.
        config: of one of DVoRA, where it was read with its values.
        values: likewise.

    Raises:
        ValueError: the head is missing, or not one of as many classes as there are labels.
    """

    folder: Path
    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    labels: tuple[str, ...]
    config: DVoRAConfig | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # PEFT names heads that a model may have; no model has all of them.
        if self.heads and not self.head_shapes:
            raise ValueError(f"{self.file} lacks the modules that the adapter trains whole ({', '.join(self.heads)})")
        check_labels(self.labels, self.shapes, self.file)

    @property
    def heads(self) -> list[str]:
        """Names of the modules that are trained and saved whole, among them names that the model may not have."""
        return list(dict.fromkeys(self.settings.get("modules_to_save") or ()))

    @property
    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of these modules' values, by name."""
        return {key: shape for key, shape in self.shapes.items() if head_of(plain_key(key), self.heads)}

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


def read_adapter(folder: Path, with_values: bool = False) -> Adapter:
    """An adapter's configuration, and the names and shapes of its values, from one reading of its files.

    Args:
        folder: of an adapter, or of a run of `dvora train` with the adapter in it.
        with_values: read the values too, if it is of DVoRA.

    Raises:
        ValueError: it holds no adapter, a pickled one, a damaged one, or one that reaches out of its folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; an adapter is a folder with {SETTINGS} and {VALUES}")
    if not (folder / SETTINGS).exists() and (folder / ADAPTER / SETTINGS).exists():
        folder = folder / ADAPTER
    if not (folder / SETTINGS).exists():
        raise ValueError(f"{folder} holds no {SETTINGS}, so it is no adapter folder")
    text = read_bounded(folder / SETTINGS, LARGEST_SETTINGS)
    settings = parsed_json(text, folder / SETTINGS, _Settings)
    file = folder / VALUES
    if not file.is_file():
        with errors_of(folder):
            check_not_pickled(folder)
        raise ValueError(f"{folder} holds no {VALUES}")
    header, shapes, values = read_values(file, with_values and settings["peft_type"] == "DVORA")
    with errors_of(folder):
        config = described(text, header).config if values else None
    return Adapter(folder, settings, shapes, labels_beside(folder), config, values)


def read_values(file: Path, with_tensors: bool = False) -> tuple[bytes, dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """The header of a safetensors file, the shapes of its tensors by name, and the tensors where they are wanted.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or a tensor has no values, so that nothing bounds its other sizes.
    """
    try:
        with open_values(file) as opened:
            header, size = read_header(opened)
            entries = header_entries(header)
            check_size(data_size(entries), size)
            values = tensors_of(entries, bytearray(opened.read())) if with_tensors else {}
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    shapes = {key: shape for key, (_, shape) in entries.items()}
    if empty := [key for key, shape in shapes.items() if not prod(shape)]:
        raise ValueError(f"{file}: {empty[0]!r} has the shape {shapes[empty[0]]}, which holds no values")
    return header, shapes, values


def check_labels(labels: Sequence[str], shapes: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Refuse more or less names of classes than a head can have that is in a file; no larger head is ever made.

    Raises:
        ValueError: no tensor has as many rows as there are labels.
    """
    if labels and not any(shape[:1] == (len(labels),) for shape in shapes.values()):
        raise ValueError(f"{len(labels):,} classes are on record, and nothing in {file} has as many rows")


def load_adapted(
    adapter: Adapter, model: str | None, trust: Trust = NOTHING, dtype: torch.dtype | str = "auto"
) -> PeftModel:
    """The base model with the adapter, in evaluation mode.

    Args:
        adapter: of `read_adapter`.
        model: the base, a folder or a name on the hub, which may be fetched; None takes the one that the adapter names.
        trust: what is allowed to get the base.
        dtype: of the base's weights; "auto" means as they are stored.

    Raises:
        ValueError: the base cannot be read, or the adapter does not fit.
    """
    assert dvora.__version__  # importing it makes the method known to PEFT
    trust = of_base(model, trust)
    base = adapter.base(model)
    loaded, _ = load_model(base, *base_class(adapter, base, trust), dtype, trust=trust)
    return adapter_on(loaded.requires_grad_(False), adapter)


def adapter_on(model: Any, adapter: Adapter, name: str = "default") -> PeftModel:
    """A base with an adapter, or an adapted model with another one beside those that it has.

    Raises:
        ValueError: the adapter's file lacks something that the adapter trains, does not fit the base, or has an
            expression that would match the base's names without end.
    """
    check_expressions(adapter.settings, [module for module, _ in model.named_modules()])
    folder = str(adapter.folder)
    with offline(), quiet_transformers():
        if isinstance(model, PeftModel):
            lacking = ", ".join(model.load_adapter(folder, adapter_name=name).missing_keys)
        else:
            # PEFT goes on with random values.
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            try:
                model, lacking = PeftModel.from_pretrained(model, folder, name), ""
            except UserWarning as warning:
                lacking = str(warning).partition("[")[2].partition("]")[0]
    if lacking:
        raise ValueError(f"{adapter.file} lacks values that the adapter trains: {lacking}")
    adapted: PeftModel = model.eval()
    return adapted


def of_base(model: str | None, trust: Trust) -> Trust:
    """What is allowed for the base: to fetch it, if the caller names it."""
    return replace(trust, download=trust.download or model is not None)


def base_class(adapter: Adapter, base: str, trust: Trust) -> tuple[Any, Any]:
    """The class of an adapter's base model, and its configuration with as many labels as the adapter's head has."""
    config = config_of(base, trust)
    mapping = adapter.settings.get("auto_mapping") or {}
    make = model_class(config, adapter.settings.get("task_type"), mapping.get("base_model_class"))
    if adapter.heads and (count := label_count(adapter, without_memory(make, config, trust))) is not None:
        if adapter.labels and len(adapter.labels) != count:
            raise ValueError(
                f"{len(adapter.labels):,} classes are on record, and the head in {adapter.file} has {count:,} outputs"
            )
        config.num_labels = count
    set_labels(config, adapter.labels)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = _padding(base, config, trust)
    return make, config


def label_count(adapter: Adapter, model: Any) -> int | None:
    """The outputs of the head that an adapter brings; None if it brings none.

    Args:
        adapter: the adapter.
        model: its base with a head of any number of outputs, which may be without memory.

    Raises:
        ValueError: with no number of outputs it has such a head.
    """
    shapes = {plain_key(key): shape for key, shape in adapter.head_shapes.items()}
    here = {name: tuple(value.shape) for name, value in model.state_dict().items()} if shapes else {}
    # What differs has a row for each output; a layer before that one may have more, fewer or as many.
    others = {name: shape for name, shape in shapes.items() if here.get(name) != shape}
    counts = {shape[0] for shape in others.values() if shape}
    if len(counts) > 1 or any(name not in here or here[name][1:] != others[name][1:] for name in others):
        raise ValueError(
            f"{adapter.file} has a head of the shapes {others!s:.200}, and {type(model).__name__} of this base has no "
            "such head, with any number of outputs; was it trained on another base, or for another task?"
        )
    return counts.pop() if counts else int(model.config.num_labels) if shapes else None


def _padding(base: str, config: Any, trust: Trust) -> int | None:
    """The token by which classifiers of decoders find the end of a text: that with which `dvora train` pads."""
    # None for images, which have no tokenizer on the hub either.
    if (words := getattr(config.get_text_config(), "vocab_size", None)) and not lacks(base, TOKENIZER_FILES):
        token: int | None = load_tokenizer(base, trust).pad_token_id
        # An embedding takes no other for padding.
        if token in range(words):
            return token
    ends = getattr(config, "eos_token_id", None)
    return ends[0] if isinstance(ends, list) else ends
