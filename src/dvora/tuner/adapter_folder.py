"""An adapter's folder: what can be found out about its files before a model is touched."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

PEFT_PREFIX = "base_model.model."
VECTOR_PREFIX = ".dvora_"
MATRIX_PREFIX = "base_model.dvora_projections."
Shape = tuple[int, ...]


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
    return {_plain(_split(key)[0]) for key in keys if VECTOR_PREFIX in key}


def check_ranks(shapes: Mapping[str, Shape], rank_of: Callable[[str], int]) -> None:
    """Refuse vectors of another rank than their configuration says, before anything of that rank is made.

    Args:
        shapes: of a file of values.
        rank_of: what the configuration says of a layer.

    Raises:
        ValueError: they differ.
    """
    for key, shape in shapes.items():
        layer, vector = _split(key)
        if vector == "lambda_d" and shape not in ((rank := rank_of(_plain(layer)),), (rank_of(layer),)):
            raise ValueError(
                f"{key} has shape {shape} in the adapter and {(rank,)} in its configuration: another rank than the "
                "configuration says, in its r or rank_pattern"
            )


def check_vectors_held(shapes: Mapping[str, Shape], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a file with other vectors than a model needs.

    Args:
        shapes: of the file.
        sizes: output features and rank of every weight to adapt; without a rank it has a magnitude only.

    Raises:
        ValueError: vectors are missing, of other layers, or of another shape.
    """
    vectors = [key for key in shapes if VECTOR_PREFIX in key and not key.startswith(MATRIX_PREFIX)]
    held = {(_plain(layer), vector): shapes[key] for key in vectors for layer, vector in [_split(key)]}
    needed: dict[tuple[str, str], Shape] = {}
    for layer, (out_features, rank) in sizes.items():
        own = {"magnitude": (out_features,), "lambda_b": (out_features,), "lambda_d": (rank,)}
        needed |= {(_plain(layer), vector): shape for vector, shape in own.items() if rank or vector == "magnitude"}
    if others := sorted(held.keys() - needed.keys()):
        raise ValueError(f"the adapter has vectors for layers that are not adapted here: {_some(others)}")
    if missing := sorted(needed.keys() - held.keys()):
        raise ValueError(f"the adapter lacks vectors of adapted layers: {_some(missing)}")
    for (layer, vector), shape in held.items():
        if shape != (expected := needed[layer, vector]):
            raise ValueError(
                f"{layer}{VECTOR_PREFIX}{vector} has shape {shape} in the adapter and {expected} in the model: another "
                "base model, or another rank than the configuration says; neither can be changed by loading"
            )


def _split(key: str) -> tuple[str, str]:
    layer, _, vector = key.removeprefix(PEFT_PREFIX).rpartition(VECTOR_PREFIX)
    return layer, vector


def _plain(layer: str) -> str:
    """A layer's name without the modules that stand around layers in some models."""
    for around in ("_orig_mod.", "_fsdp_wrapped_module.", "base_layer."):
        layer = layer.replace(around, "")
    return layer


def _some(vectors: list[tuple[str, str]]) -> str:
    shown = ", ".join(f"{layer}{VECTOR_PREFIX}{vector}" for layer, vector in vectors[:3])
    return shown if len(vectors) <= 3 else f"{shown} and {len(vectors) - 3} more"


def check_tokens(keys: Collection[str], tokens: object) -> None:
    """Refuse a file without the tokens that its adapter trains; PEFT would find out with the model half changed.

    Args:
        keys: of a file of values.
        tokens: the setting `trainable_token_indices`.

    Raises:
        ValueError: the file has none.
    """
    if tokens is not None and keys and not any(".trainable_tokens_delta" in key for key in keys):
        raise ValueError(
            f"the adapter's file lacks the tokens that trainable_token_indices={tokens!r:.200} says it trains"
        )


def check_biases(keys: Collection[str], bias: str, modules_to_save: Collection[str]) -> None:
    """Refuse biases of the base model that an adapter does not train: they would overwrite the base's in silence.

    Args:
        keys: of a file of values.
        bias: which biases the adapter trains, "none", "all" or "dvora_only".
        modules_to_save: modules that are trained whole.

    Raises:
        ValueError: the file holds others.
    """
    adapted = {key.rpartition(".dvora_")[0] for key in keys}
    trained = {f"{layer}.base_layer.bias" for layer in adapted} if bias == "dvora_only" else set()
    for key in () if bias == "all" else keys:
        saved_whole = any(f".{module}." in key for module in modules_to_save)
        if key.endswith(".bias") and key not in trained and not saved_whole:
            raise ValueError(f"the adapter's file has {key!r}, which its configuration does not train (bias={bias!r})")


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
    """Refuse a plain tensor that claims more values than it has, or has them in a form of its own.

    Raises:
        ValueError: it is expanded from fewer values, sparse, quantised or without values.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        return
    dense = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)
    if not dense or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        raise ValueError(f"{name}, of shape {tuple(tensor.shape)}, has not as many values of its own in the adapter")
