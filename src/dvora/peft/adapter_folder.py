"""An adapter's file of values: the names in it, and its names and shapes read from the header alone."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

PEFT_PREFIX = "base_model.model."
VECTOR_PREFIX = ".dvora_"
MATRIX_PREFIX = "base_model.dvora_projections."
Shape = tuple[int, ...]


class AdapterFile(NamedTuple):
    """What is known of the file of values that belongs to a configuration which was read from a folder."""

    shapes: Mapping[str, Shape] | None
    """By name; None where the folder is not on this machine."""
    settings: dict[str, Any]
    """Those of the configuration on which names and shapes depend, as they were read."""


def shapes_in(folder: Path) -> dict[str, Shape] | None:
    """The names and shapes in a folder's file of values, which PEFT reads only after it has changed the model.

    Args:
        folder: of the adapter; None comes back where no file of values is in it.

    Raises:
        SafetensorError: the file is damaged.
        ValueError: there is something else in the file's place.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if file.is_file():
        return shapes_in_header(file)
    if file.exists():
        raise ValueError(f"{file} is not a file")
    return _pickled_shapes(folder / WEIGHTS_NAME) if (folder / WEIGHTS_NAME).exists() else None


def shapes_in_header(file: Path) -> dict[str, Shape]:
    """The names and shapes in a safetensors file; no value is read.

    Raises:
        SafetensorError: it is damaged.
    """
    try:
        with safe_open(file, "pt") as values:
            return {key: tuple(values.get_slice(key).get_shape()) for key in values.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise SafetensorError(f"{file} cannot be read: {error}") from error


def layers_named(keys: Iterable[str]) -> set[str]:
    """The layers that have vectors in a file, by the names that their weights have in the base model."""
    return {plain_name(layer_and_vector(key)[0]) for key in keys if VECTOR_PREFIX in key}


def layer_and_vector(key: str) -> tuple[str, str]:
    """A key of a file as the name of the layer in it, and that of the vector without its prefix."""
    layer, _, vector = key.removeprefix(PEFT_PREFIX).rpartition(VECTOR_PREFIX)
    return layer, vector


def plain_name(layer: str) -> str:
    """A layer's name without the modules that some models have around their layers."""
    for around in ("_orig_mod.", "_fsdp_wrapped_module.", "base_layer."):
        layer = layer.replace(around, "")
    return layer


def _pickled_shapes(file: Path) -> dict[str, Shape]:
    size = file.stat().st_size
    try:
        if zipfile.is_zipfile(file) and sum(entry.file_size for entry in zipfile.ZipFile(file).infolist()) > size:
            raise ValueError(f"{file} is compressed; it could hold any amount of values")
        tensors = torch.load(file, "cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read as tensors: {error}") from error
    if not (isinstance(tensors, dict) and all(type(tensor) is Tensor for tensor in tensors.values())):
        raise ValueError(f"{file} does not hold tensors by name")
    for name, tensor in tensors.items():
        check_dense(str(name), tensor)
    return {str(name): tuple(tensor.shape) for name, tensor in tensors.items()}


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuse a plain tensor that claims more values than it has, or stores them in another format.

    Raises:
        ValueError: it is expanded from fewer values, sparse, quantised or without values.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        return
    dense = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)
    if not dense or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        raise ValueError(f"{name}, of shape {tuple(tensor.shape)}, has not as many values of its own in the adapter")
