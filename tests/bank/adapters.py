"""Many saved adapters of one content, made fast: one is saved by PEFT, the others are it with other values."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dvora.bank.adapters import SETTINGS, VALUES
from tests.bank.tenants import HEADED
from tests.peft.kinds import Kind, saved

WIDE = Kind(lambda: nn.Sequential(nn.Linear(4, 8192)), {"r": 2, "target_modules": ["0"]})


def change_values(folder: Path, seed: int) -> None:
    """Give a saved adapter other values, in a new file of its name."""
    values = load_file(folder / VALUES)
    generator = torch.Generator().manual_seed(seed)
    changed = {key: value + torch.rand(value.shape, generator=generator) for key, value in values.items()}
    save_file(changed, folder / "new", metadata={"format": "pt"})
    (folder / "new").replace(folder / VALUES)


def many(folder: Path, count: int, kind: Kind = HEADED) -> dict[str, Path]:
    """The folders of so many adapters, by name."""
    first = saved(kind.trained(), folder / "0000")
    (first / "README.md").unlink()
    for number in range(1, count):
        shutil.copytree(first, folder / f"{number:04}")
        change_values(folder / f"{number:04}", number)
    return {f"{number:04}": folder / f"{number:04}" for number in range(count)}


def contents(folder: Path) -> dict[str, bytes]:
    """Both files of every adapter in a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name in (SETTINGS, VALUES)
    }
