"""Adapters of one method as adapters of another, where that is exact."""

from pathlib import Path
from typing import Any

from ...adapter_file.values_file import VALUES
from ...peft.conversion import from_vera, to_dora
from ...whole_files import new_folder
from ..models.adapters import load_adapted, read_adapter
from ..models.inputs import difference, example_output
from . import TARGETS, TO_LORA

_MAGNITUDES = ("dvora_magnitude", "lora_magnitude_vector")
"""One a layer, by the ends of their names."""


_NOTES = {
    "dora": "trained further it is another method: PEFT's DoRA trains A and B too, without the norm's gradient",
    "dvora": "its matrices are drawn again from PEFT's seed when it is loaded, in the size of the largest layer",
}


def convert(folder: Path, to: str, output: Path, model: str | None = None) -> dict[str, Any]:
    """Convert an adapter into a new folder, and compare the outputs of both before the folder takes its name.

    Args:
        folder: of the adapter, or of a run of `dvora train`.
        to: "dora" of a DVoRA adapter, "dvora" of one of PEFT's VeRA.
        output: that must not exist, or be empty.
        model: the base, a folder or a name on the hub; None takes the one that the adapter names.

    Returns:
        Of both: folder and method; of the new one: layers, bytes, and the `difference`, the largest relative one of
        the adapted models' outputs on a fixed input.

    Raises:
        FileExistsError: there is something in the output folder.
        TypeError, ValueError: the conversion would not be exact, or something cannot be read.
    """
    adapter = read_adapter(folder)
    _check_pair(adapter.method, to)
    base = adapter.base(model)
    adapted = load_adapted(adapter, model)
    with new_folder(output) as filling:
        converted = from_vera(adapted) if to == "dvora" else to_dora(adapted)
        converted.config.base_model_name_or_path = base
        converted.save(filling)
        again = load_adapted(read_adapter(filling), model)
        changed = difference(example_output(again), example_output(adapted))
        size = (filling / VALUES).stat().st_size
    return {
        "source": str(adapter.folder),
        "output": str(output),
        "from_method": adapter.method,
        "to_method": to,
        "base_model": base,
        "layers": sum(key.endswith(_MAGNITUDES) for key in converted.values),
        "bytes": size,
        "difference": changed,
        "note": _NOTES[to],
    }


def _check_pair(method: str, to: str) -> None:
    if to == "lora":
        raise ValueError(TO_LORA)
    if to not in TARGETS:
        raise ValueError(f"unknown target {to!r}, expected one of {', '.join(TARGETS)}")
    needed = "vera" if to == "dvora" else "dvora"
    if method != needed:
        raise ValueError(f"only adapters of {needed} are converted to {to}, and this is one of {method}")
