"""Adapters by the thousand: one that was trained, and noise of another seed for each. Which ones are asked for."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dvora.bank.packs import write_pack

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


def write_perturbed(trained: Path, folder: Path, count: int, heads: Sequence[int] = HEADS) -> None:
    """Folders of adapters, of which the first is the trained one.

    Args:
        trained: the folder of an adapter.
        folder: new.
        count: of adapters.
        heads: their numbers of outputs, in turns.
    """
    values = load_file(trained / VALUES)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        changed = {}
        for name, value in values.items():
            if "classifier" in name:
                rows = torch.arange(heads[number % len(heads)]) % len(value)
                changed[name] = (value[rows] + NOISE * torch.randn(value[rows].shape, generator=generator)).contiguous()
            else:
                changed[name] = value + NOISE * torch.randn(value.shape, generator=generator) * (number > 0)
        target = folder / name_of(number)
        target.mkdir(parents=True)
        shutil.copy(trained / SETTINGS, target)
        save_file(changed, target / VALUES, {"format": "pt"})


def write_packs(folder: Path, counts: tuple[int, ...], target: Path) -> dict[int, Path]:
    """A pack of the first so many adapters of a folder, for each number."""
    packs = {}
    for count in counts:
        packs[count] = target / f"{count}.pack"
        write_pack(packs[count], {name_of(number): folder / name_of(number) for number in range(count)})
    return packs
