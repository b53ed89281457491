"""Adapters of one content on one base: saved, served by a bank, and each merged into a float64 model of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dvora
from dvora.adapter_file.values_file import SETTINGS, VALUES
from dvora.flat import Layout
from tests.peft.kinds import Kind, saved
from tests.peft.tiny import LAYERS, MODELS, outputs

MLP = Kind(MODELS["mlp"], {"r": 4, "target_modules": LAYERS["mlp"]})
HEADED = Kind(MODELS["mlp"], {"r": 4, "target_modules": ["lin0", "lin1"], "modules_to_save": ["lin2"]})
BERT = Kind(MODELS["bert"], {"r": 3, "target_modules": LAYERS["bert"], "modules_to_save": ["classifier"]})
LLAMA = Kind(MODELS["llama"], {"r": 6, "target_modules": LAYERS["llama"]})
NO_MERGE = ("embedding and lm_head, tied", "Linear, weight_norm")
"""Layers that no adapter is merged into: there the adapter alone is what rows are compared with."""


class Tenants(NamedTuple):
    """Adapters of one kind, by name, the base's in whichever dtype."""

    kind: Kind
    folder: Path
    names: list[str]
    dtype: torch.dtype

    def base(self) -> nn.Module:
        return self.kind.base().to(self.dtype).eval().requires_grad_(False)

    def path(self, name: str) -> Path:
        return self.folder / name

    def alone(self, name: str | None, merge: bool = True) -> nn.Module:
        """The float64 model of one adapter, merged; that of the base for None."""
        model = self.base().double()
        if name is None:
            return model
        model = PeftModel.from_pretrained(model, self.path(name)).eval()
        return model.merge_and_unload() if merge else model

    @contextmanager
    def bank(self, **settings: Any) -> Iterator[Served]:
        model = self.base()
        with dvora.AdapterBank(model, like=self.path(self.names[0]), **settings) as bank:
            bank.add_folder(self.folder)
            yield Served(model, bank)


class Served(NamedTuple):
    model: nn.Module
    bank: dvora.AdapterBank

    @torch.no_grad()
    def __call__(self, names: Sequence[str | None], *args: Tensor) -> Tensor:
        """The outputs of one batch, on given inputs or those of `tiny.inputs`."""
        with self.bank.rows(names):
            return self.model(*args) if args else outputs(self.model, len(names))


def tenants(kind: Kind, folder: Path, count: int = 3, dtype: torch.dtype = torch.float32, **settings: Any) -> Tenants:
    """Adapters "a", "b", ... that were trained in different ways, saved."""
    names = [chr(ord("a") + number) for number in range(count)]
    typed = kind._replace(base=lambda: kind.base().to(dtype))
    for seed, name in enumerate(names):
        values = saved(typed.trained(seed, **settings), folder / name) / VALUES
        if dtype == torch.float64:
            # No bank takes vectors that are wider than float32.
            save_file({key: value.float() for key, value in load_file(values).items()}, values)
    return Tenants(kind, folder, names, dtype)


def row_by_row(outputs_of: Callable[[str | None], Tensor], names: Sequence[str | None]) -> Tensor:
    alone = {name: outputs_of(name) for name in set(names)}
    return torch.stack([alone[name][row] for row, name in enumerate(names)])


def vectors_of(kind: Kind, count: int) -> list[Tensor]:
    model = kind.trained()
    layout = Layout.of(model)
    start = layout.to_vector(model)
    generator = torch.Generator().manual_seed(0)
    return [start + 0.3 * torch.randn(len(start), generator=generator) for _ in range(count)]


WIDE = Kind(lambda: nn.Sequential(nn.Linear(4, 8192)), {"r": 2, "target_modules": ["0"]})


def change_values(folder: Path, seed: int) -> None:
    """Give a saved adapter other values, in a new file of its name."""
    values = load_file(folder / VALUES)
    generator = torch.Generator().manual_seed(seed)
    changed = {key: value + torch.rand(value.shape, generator=generator) for key, value in values.items()}
    save_file(changed, folder / "new", metadata={"format": "pt"})
    (folder / "new").replace(folder / VALUES)


def many(folder: Path, count: int, kind: Kind = HEADED) -> dict[str, Path]:
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
