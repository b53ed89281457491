"""An adapter's folder: what can be found out about its files before a model is touched."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor


def check_readable(folder: Path) -> None:
    """Refuse a damaged file of values. PEFT reads the values only after it has put the adapter into the model.

    Args:
        folder: of the adapter; without a file of values in it, they are elsewhere.

    Raises:
        SafetensorError: the file is damaged.
        ValueError: there is something else in the file's place.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if file.is_file():
        try:
            with safe_open(file, "pt"):
                return
        except SafetensorError as error:
            raise SafetensorError(f"{file} cannot be read: {error}") from error
    if file.exists():
        raise ValueError(f"{file} is not a file")
    if (folder / WEIGHTS_NAME).exists():
        _check_pickle(folder / WEIGHTS_NAME)


def _check_pickle(file: Path) -> None:
    try:
        tensors = torch.load(file, "cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read as tensors: {error}") from error
    if not (isinstance(tensors, dict) and all(type(tensor) is Tensor for tensor in tensors.values())):
        raise ValueError(f"{file} does not hold tensors by name")
