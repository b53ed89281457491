"""An adapter's folder: what can be found out about its files before a model is touched."""

from __future__ import annotations

import pickle
from collections.abc import Collection
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor


def keys_in(folder: Path) -> Collection[str]:
    """The names in a folder's file of values. PEFT reads it only after it has put the adapter into the model.

    Args:
        folder: of the adapter; without a file of values in it, they are elsewhere.

    Raises:
        SafetensorError: the file is damaged.
        ValueError: there is something else in the file's place.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if file.is_file():
        try:
            with safe_open(file, "pt") as values:
                return list(values.keys())
        except SafetensorError as error:
            raise SafetensorError(f"{file} cannot be read: {error}") from error
    if file.exists():
        raise ValueError(f"{file} is not a file")
    return _pickled_keys(folder / WEIGHTS_NAME) if (folder / WEIGHTS_NAME).exists() else ()


def check_tokens(keys: Collection[str], tokens: object) -> None:
    """Refuse a file without the tokens that its adapter trains; PEFT would find out with the model half changed.

    Args:
        keys: of a file of values.
        tokens: the setting `trainable_token_indices`.

    Raises:
        ValueError: the file has none.
    """
    if tokens is not None and keys and not any(".trainable_tokens_delta" in key for key in keys):
        raise ValueError(f"the adapter's file lacks the tokens that trainable_token_indices={tokens!r} says it trains")


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


def _pickled_keys(file: Path) -> Collection[str]:
    try:
        tensors = torch.load(file, "cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read as tensors: {error}") from error
    if not (isinstance(tensors, dict) and all(type(tensor) is Tensor for tensor in tensors.values())):
        raise ValueError(f"{file} does not hold tensors by name")
    return list(map(str, tensors))
