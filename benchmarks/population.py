"""Adapters by the thousand: a given one, and noise of another seed for each other. Which ones are asked for."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

NOISE = 0.01
SETTINGS, VALUES = "adapter_config.json", "adapter_model.safetensors"
HEADS = (2, 3, 5, 8)


def name_of(number: int) -> str:
    """Of an adapter."""
    return f"tenant-{number:04d}"


def drawn(count: int, requests: int) -> list[str]:
    """The adapters that requests ask for, of the first so many: number k in proportion to 1 / (k + 1), Zipf's law."""
    weights = 1 / np.arange(1, count + 1)
    numbers = np.random.default_rng(0).choice(count, requests, p=weights / weights.sum())
    return [name_of(number) for number in numbers]


def perturbed(first: Path, folder: Path, count: int, heads: Sequence[int] = HEADS) -> dict[str, Path]:
    """Folders of adapters by their names, of which the first has the values of a given one.

    Args:
        first: the folder of an adapter.
        folder: of all folders, new.
        count: of adapters.
        heads: their numbers of outputs, in turns, if the adapter has a head.
    """
    values, folders = load_file(first / VALUES), {name_of(number): folder / name_of(number) for number in range(count)}
    for number, target in enumerate(folders.values()):
        generator = torch.Generator().manual_seed(number)
        changed = {}
        for name, value in values.items():
            if "classifier" in name:
                rows = torch.arange(heads[number % len(heads)]) % len(value)
                changed[name] = (value[rows] + NOISE * torch.randn(value[rows].shape, generator=generator)).contiguous()
            else:
                changed[name] = value + NOISE * torch.randn(value.shape, generator=generator) * (number > 0)
        target.mkdir(parents=True)
        shutil.copy(first / SETTINGS, target)
        save_file(changed, target / VALUES, {"format": "pt"})
    return folders
