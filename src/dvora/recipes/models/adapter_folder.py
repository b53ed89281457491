"""The folder of an adapter of any of PEFT's methods: its files, checked before PEFT or a model sees them."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType

from ...adapter_file.patterns import check_expressions
from ...adapter_file.values_file import LARGEST_SETTINGS, PICKLED, SETTINGS, VALUES, open_values, read_entries
from ...text import did_you_mean
from ..files import check_readable, read_json
from ..run_folder import ADAPTER, RECORD, checked_labels
from .bases import quiet_transformers
from .hub import offline

MOST_HEADS = 256
ELSEWHERE = ("adapters", "megatron_config", "tokenizer_kwargs", "tokenizer_name_or_path")
"""Settings with which PEFT loads or imports what is not in the folder."""
_TYPES: Mapping[str, type] = {
    "base_model_name_or_path": str,
    "task_type": str,
    "auto_mapping": dict,
    "modules_to_save": list,
    "use_dora": bool,
}
"""Of the settings that are used here; null counts as missing."""


@dataclass(frozen=True)
class Adapter:
    """An adapter in its folder.

    Args:
        folder: of the adapter.
        settings: its configuration.
        shapes: of the values in its file.
        labels: names of the classes, where a run of `dvora train` recorded them; else empty.

    Raises:
        ValueError: the head is missing, or not one of as many classes as there are labels.
    """

    folder: Path
    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    labels: tuple[str, ...]

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
        return {key: shape for key, shape in self.shapes.items() if any(f".{head}." in key for head in self.heads)}

    @property
    def label_count(self) -> int | None:
        """The outputs of the head that an adapter brings; None if it brings none."""
        last = [shape for key, shape in self.head_shapes.items() if len(shape) == 2 and key.endswith("weight")]
        # The last layer of a head of several, which has one output a label, is the smallest.
        return min((shape[0] for shape in last), default=None)

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
        ValueError: it holds no adapter, a pickled one, a damaged one, or one that reaches out of its folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; an adapter is a folder with {SETTINGS} and {VALUES}")
    if not (folder / SETTINGS).exists() and (folder / ADAPTER / SETTINGS).exists():
        folder = folder / ADAPTER
    if not (folder / SETTINGS).exists():
        raise ValueError(f"{folder} holds no {SETTINGS}, so it is no adapter folder")
    settings = _checked_settings(folder / SETTINGS)
    if not (folder / VALUES).is_file():
        if (folder / PICKLED).exists():
            raise ValueError(
                f"{folder} holds a pickled {PICKLED}, which can run any code and is never loaded; on a machine that "
                "trusts it, load it with PEFT once and save it again (save_pretrained writes safetensors)"
            )
        raise ValueError(f"{folder} holds no {VALUES}")
    record = folder.parent / RECORD
    labels = checked_labels(read_json(record).get("labels") or [], record) if record.is_file() else ()
    return Adapter(folder, settings, shapes_in(folder / VALUES), labels)


def _checked_settings(file: Path) -> dict[str, Any]:
    settings = read_json(file, LARGEST_SETTINGS)
    if "peft_type" not in settings:
        raise ValueError(f"{file} has no peft_type, so it is not of an adapter")
    method = settings["peft_type"]
    if not isinstance(method, str) or method not in PeftType.__members__:
        meant = did_you_mean(str(method)[:40], PeftType.__members__)
        raise ValueError(f"{file} has the peft_type {method!r}, which is no method of PEFT here; {meant}")
    for name, kind in _TYPES.items():
        if not isinstance(settings.get(name), kind | None):
            raise ValueError(f"{file}: {name} is {settings[name]!r}, expected {kind.__name__} or null")
    heads = settings.get("modules_to_save") or ()
    if len(heads) > MOST_HEADS or not all(isinstance(head, str) for head in heads):
        raise ValueError(f"{file}: expected at most {MOST_HEADS} names in modules_to_save, got {heads!r}")
    if reaching := [name for name in ELSEWHERE if settings.get(name)]:
        raise ValueError(
            f"{file} has the setting {reaching[0]!r}, with which PEFT would load or import what is not in the folder; "
            "such adapters are not read here"
        )
    return settings


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by name; what they hold is as many bytes as the file has.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or a tensor has no values, so that nothing bounds its other sizes.
    """
    check_readable([file])
    try:
        with open_values(file) as opened:
            shapes = {key: shape for key, (_, shape) in read_entries(opened).items()}
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if empty := [key for key, shape in shapes.items() if not prod(shape)]:
        raise ValueError(f"{file}: {empty[0]!r} has the shape {shapes[empty[0]]}, which holds no values")
    return shapes


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


def check_labels(labels: Sequence[str], shapes: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Refuse more or less names of classes than a head can have that is in a file; no larger head is ever made.

    Raises:
        ValueError: no tensor has as many rows as there are labels.
    """
    if labels and not any(shape[:1] == (len(labels),) for shape in shapes.values()):
        raise ValueError(f"{len(labels):,} classes are on record, and nothing in {file} has as many rows")
