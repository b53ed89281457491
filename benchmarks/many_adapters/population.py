"""Adapters by the thousand: one vector, and noise of another seed for each; as vectors, as folders, as a pack."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.speed.arms import Arm, adapted
from dvora import DVoRAConfig
from dvora.bank.packs import write_pack
from dvora.flat import Layout
from dvora.peft.saving import PEFT_PREFIX, VECTOR_PREFIX

NOISE = 0.01


class Population:
    """Adapters of one method for one base; number 5 is the same whenever it is made.

    Args:
        base: the frozen model.
        arm: method and rank.
        targets: names of the adapted layers.
    """

    def __init__(self, base: nn.Module, arm: Arm, targets: Sequence[str]) -> None:
        self.base, self.arm = base, arm
        self.model = adapted(base, arm, targets).eval()
        self.config: DVoRAConfig = self.model.peft_config["default"]
        self.layout = Layout.of(self.model)
        self._start = self.layout.to_vector(self.model)

    def vector(self, number: int) -> Tensor:
        """An adapter as one flat vector, in the order of its layout."""
        generator = torch.Generator().manual_seed(number)
        return self._start + NOISE * torch.randn(len(self._start), generator=generator)

    def save(self, parent: Path, count: int) -> dict[str, Path]:
        """A folder for each adapter, as `save_pretrained` writes it; by the adapter's name."""
        first = parent / "first"
        self.model.save_pretrained(str(first))
        folders = {name_of(number): parent / name_of(number) for number in range(count)}
        for number, folder in enumerate(folders.values()):
            folder.mkdir()
            shutil.copy(first / "adapter_config.json", folder)
            save_file(self._named(self.vector(number)), folder / "adapter_model.safetensors", {"format": "pt"})
        shutil.rmtree(first)
        return folders

    def _named(self, vector: Tensor) -> dict[str, Tensor]:
        """The values by their names in files."""
        return {
            f"{PEFT_PREFIX}{layer}{VECTOR_PREFIX}{name}": value.contiguous()
            for layer, vectors in self.layout.views(vector).items()
            for name, value in vectors._asdict().items()
        }


def name_of(number: int) -> str:
    """Of an adapter, in banks and as a folder."""
    return f"adapter-{number:05d}"


def packed(population: Population, count: int, folder: Path) -> Path:
    """A pack of the first so many adapters, whose own folders are gone afterwards."""
    file = folder / "adapters.dvora"
    with TemporaryDirectory(dir=folder) as unpacked:
        write_pack(file, population.save(Path(unpacked) / "adapters", count))
    return file
