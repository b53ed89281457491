"""A basis that has learned: A and B of every layer, fitted together with the vectors of other tasks, then frozen.

`python -m benchmarks.quality.basis` fits one for each task of `basis.yaml`, to the other tasks.
"""

import argparse
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.quality.grid import Grid, read_grid
from benchmarks.quality.labelled import Labelled, problem
from benchmarks.quality.models import SentenceReader, quietly
from benchmarks.quality.training import FALLS, rate_at
from dvora import SharedProjections
from dvora.functional import Vectors, dvora_linear, row_norm
from materials.fetch import build_once, cache_folder

RANK, D_INITIAL = 64, 0.1
STEPS = 500
"""Each reads a batch of every task."""
RATES = {"basis": 1e-3, "rows": 9e-3, "vectors": 0.02, "head": 1e-3}
Kind = Literal["random", "fitted"]
Basis = Mapping[str, tuple[Tensor, Tensor]]
"""A (r, in) and B (out, r) by the name of the layer."""


class BasisLinear(nn.Module):
    """A layer of DVoRA with A and B of its own, which are trained if they are parameters."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.base, self.A, self.B = base, A, B
        self.rows = nn.Parameter(row_norm(base.weight.detach()))
        self.lambda_b = nn.Parameter(torch.zeros(base.out_features))
        self.lambda_d = nn.Parameter(torch.full((len(A),), D_INITIAL))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        vectors = Vectors(self.rows, self.lambda_b, self.lambda_d)
        return dvora_linear(x, self.base.weight, cast("Tensor | None", self.base.bias), self.A, self.B, vectors)


def with_basis(model: nn.Module, basis: Basis) -> nn.Module:
    """The model, frozen, with all of its linear layers adapted, in place."""
    model.requires_grad_(False)
    for name, layer in _linear_layers(model):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, BasisLinear(layer, *basis[name]))
    return model


def basis_of(kind: Kind, model: nn.Module, task: str, seed: int) -> Basis:
    """The basis of an arm.

    Args:
        task: the one that a fitted basis has not seen.
        seed: of random ones, of which every layer has another.
    """
    if kind == "fitted":
        tensors = load_file(cache_folder() / _name(task) / "basis.safetensors")
        return {name[:-2]: (tensors[name], tensors[f"{name[:-2]}.B"]) for name in tensors if name.endswith(".A")}
    basis = {}
    for place, (name, layer) in enumerate(_linear_layers(model)):
        shared = SharedProjections(1000 * seed + place, "kaiming_uniform")
        basis[name] = (shared.A(RANK, layer.in_features), shared.B(RANK, layer.out_features))
    return basis


def fit(grid: Grid, without: str, folder: Path) -> None:
    """Fit a basis to all tasks but one, and say what they come to on their validation rows."""
    seed, tasks = grid.training["tuning_seed"], dict[str, Labelled]()
    with quietly():
        for name, plan in grid.tasks.items():
            if name != without:
                tasks[name] = cast("Labelled", problem(name, plan))
        readers = {name: task.model("float32") for name, task in tasks.items()}
    start = basis_of("random", next(iter(readers.values())).backbone, without, seed)
    basis = {name: (nn.Parameter(A.clone()), nn.Parameter(B.clone())) for name, (A, B) in start.items()}
    for reader in readers.values():
        with_basis(reader.backbone, basis)
    of_all = [matrix for pair in basis.values() for matrix in pair]
    groups = [{"params": of_all, "lr": RATES["basis"]}]
    for reader in readers.values():
        groups += [{"params": [each], "lr": rate} for each, rate in _of_the_task(reader)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at(STEPS, grid.training["warmup"], FALLS["cosine"]))
    batches = {name: task.batches(seed, STEPS) for name, task in tasks.items()}
    most = grid.training["max_gradient_norm"]
    for step in track(range(STEPS), f"a basis without {without}"):
        for name, task in tasks.items():
            task.loss(readers[name].train(), batches[name][step]).backward()
            nn.utils.clip_grad_norm_([each for each, _ in _of_the_task(readers[name])], most)
        nn.utils.clip_grad_norm_(of_all, most)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for name, task in tasks.items():
        Console().print(f"{name}: validation loss {task.evaluate(readers[name].eval(), 'validation').loss:.4f}")
    named = {
        f"{name}.{which}": matrix for name, pair in basis.items() for which, matrix in zip("AB", pair, strict=True)
    }
    save_file({name: matrix.detach().contiguous() for name, matrix in named.items()}, folder / "basis.safetensors")


def _of_the_task(reader: SentenceReader) -> Iterable[tuple[nn.Parameter, float]]:
    """What is trained of one task alone, with its rate."""
    for name, parameter in reader.named_parameters():
        if parameter.requires_grad and not name.endswith((".A", ".B")):
            kind = "head" if name.startswith("head.") else "rows" if name.endswith(".rows") else "vectors"
            yield parameter, RATES[kind]


def _linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]


def _name(without: str) -> str:
    return f"quality-basis-without-{without}"


def main() -> None:
    """Fit the bases that are not there yet, for all tasks of the grid or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.basis", description=main.__doc__)
    grid = read_grid(Path(__file__).parent / "basis.yaml")
    parser.add_argument("tasks", nargs="*", default=[*grid.tasks])
    torch.set_num_threads(1)
    for task in parser.parse_args().tasks:
        build_once(_name(task), partial(fit, grid, task))


if __name__ == "__main__":
    main()
