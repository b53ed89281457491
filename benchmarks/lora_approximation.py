"""Whether LoRA can stand in for DVoRA: scores of trained adapters and of the best low ranks of their updates.

An adapter's W' - W rescales rows of W, which gives it W's own rank. Of all updates of rank k the one with the least
error of a layer's outputs has the k largest singular values of (W' - W) L, where L L^T is the second moment of its
inputs. Scores are of validation rows.

Run from the repository's root: python -m benchmarks.lora_approximation

Dimensions: I in, O out, R rank, T tokens.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import tables
from benchmarks.quality.adapting import adapted
from benchmarks.quality.evaluation import Problem
from benchmarks.quality.grid import Run, read_grid
from benchmarks.quality.labelled import problem
from benchmarks.quality.models import quietly
from benchmarks.quality.summary import NAMES
from benchmarks.quality.training import precision, trained
from benchmarks.results import Row, file_of, load
from benchmarks.running import go_on, options
from dvora.peft.layer import layers_of

ARM, SEED = "structured_r64", 0
RANKS, UNWEIGHTED = (8, 16, 32, 64), (32,)
"""Of approximations that weigh inputs by their second moments, and of those that take them for white."""
ROWS = 256
"""Training rows that the second moments are of."""
SHARE = 0.5
"""Of the grid's steps: an adapter that is trained for longer has larger updates."""
RIDGE = 1e-4
"""Of the mean second moment, for inputs that do not vary in these rows."""


class LowRank(NamedTuple):
    """An update B A, as LoRA has it."""

    B: Tensor  # (O, R)
    A: Tensor  # (R, I)

    def cut(self, rank: int) -> Tensor:
        """The update (O, I) with its first ranks."""
        return self.B[:, :rank] @ self.A[:rank]


def low_rank(update: Tensor, root: Tensor | None, rank: int) -> LowRank:
    """The best approximation of an update, its ranks by how much they matter.

    Args:
        update: (O, I), float64.
        root: (I, I) lower triangular L, with L L^T the second moment of the inputs; None: of inputs that are white.
        rank: at most.
    """
    U, values, V = torch.linalg.svd(update if root is None else update @ root, full_matrices=False)
    A = V[:rank] if root is None else torch.linalg.solve_triangular(root, V[:rank], upper=False, left=False)
    return LowRank(U[:, :rank] * values[:rank], A)


def second_moments(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, Tensor]:
    """The sum of x x^T over the inputs that layers get while a function runs, by name, in float64."""
    moments: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        tokens = x.detach().reshape(-1, x.shape[-1]).double()  # (T, I)
        moments[name] = moments.get(name, 0) + tokens.T @ tokens

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return moments


def cholesky(moment: Tensor) -> Tensor:
    """The root L (I, I) of a second moment."""
    return torch.linalg.cholesky(moment + RIDGE * moment.diagonal().mean() * torch.eye(len(moment)))


def carry_out(run: Run) -> Row:
    """Train an adapter and judge it and what approximates it."""
    start, grid = perf_counter(), read_grid()
    plan = grid.tasks[run.task]
    with quietly():
        task = problem(run.task, plan)
        reader = task.model("float32")
        model: Any = adapted(reader.backbone, grid.arms[run.arm], grid.layers[plan.model], run.seed)
        reader.backbone = model
        assert not trained(grid, run, task, reader)["diverged"]
        outcome = _judged(task, reader.eval(), model)
    return {"key": run.key, "task": run.task, "arm": run.arm, **outcome, "seconds": round(perf_counter() - start, 2)}


@torch.no_grad()
def _judged(task: Problem, reader: Any, model: Any) -> Row:
    layers = {layer.name: layer for layer in layers_of(model, "default")}
    # A row at a time, so that nothing is padding.
    moments = second_moments(layers, lambda: [task.loss(reader, np.array([row])) for row in range(ROWS)])
    roots = {name: cholesky(moment) for name, moment in moments.items()}
    updates = {name: layer.get_delta_weight("default").double() for name, layer in layers.items()}
    outputs = {name: update @ roots[name] for name, update in updates.items()}
    reader.backbone = model.unload()
    weights = {name: reader.backbone.get_submodule(name).weight for name in layers}
    originals = {name: weight.clone() for name, weight in weights.items()}

    def scores(changes: Mapping[str, Tensor]) -> dict[str, float]:
        for name, weight in weights.items():
            weight.copy_(originals[name].double() + changes[name])
        with precision():
            found = task.evaluate(reader, "validation")
        return {"loss": found.loss, "score": found.score}

    def approximated() -> Iterator[Row]:
        for is_weighted, ranks in ((True, RANKS), (False, UNWEIGHTED)):
            parts = {
                name: low_rank(update, roots[name] if is_weighted else None, max(ranks))
                for name, update in updates.items()
            }
            for rank in ranks:
                lost = [
                    float((output - parts[name].cut(rank) @ roots[name]).norm() / output.norm())
                    for name, output in outputs.items()
                ]
                cut = {name: part.cut(rank) for name, part in parts.items()}
                yield {"rank": rank, "weighted": is_weighted, "lost": float(np.mean(lost)), **scores(cut)}

    return {
        "base": scores({name: torch.zeros_like(update) for name, update in updates.items()}),
        "adapter": scores(updates),
        "lora": list(approximated()),
    }


def runs(rows: Mapping[str, Row]) -> Iterator[Run]:
    """An adapter of every task of the grid, with the rates that were tuned there; the longest run is the first."""
    grid, tuned = read_grid(), {row["key"]: row for row in load("equal_bytes")["rows"]}
    for task in reversed(grid.tasks):
        run = grid.final(task, ARM, SEED, tuned)
        assert run is not None
        yield replace(run, steps=int(run.steps * SHARE))


def table(result: dict[str, Any]) -> str:
    """What is lost, by task and rank."""
    head = ("task", "base", "DVoRA", *(f"LoRA r={rank}" for rank in RANKS), f"r={UNWEIGHTED[0]}, without rows")
    rows = {row["task"]: row for row in result["rows"]}
    lines, lost, changes = [], [], []
    for task in (task for task in NAMES if task in rows):
        row, adapter = rows[task], rows[task]["adapter"]["score"]
        changes.append([100 * (each["score"] - adapter) for each in row["lora"]])
        scores = f"{100 * row['base']['score']:.1f}", f"{100 * adapter:.1f}"
        lines.append((NAMES[task], *scores, *(f"{change:+.1f}" for change in changes[-1])))
        lost += [each["lost"] for each in row["lora"] if each["weighted"] and each["rank"] == UNWEIGHTED[0]]
    lines.append(("mean", "", "", *(f"{change:+.1f}" for change in np.mean(changes, axis=0))))
    return tables.text(
        tables.table(head, lines),
        "Points on validation rows (accuracy; Pearson's correlation for ratings), and what they change by with LoRA in "
        f"the adapter's place: DVoRA r=64, structured, one seed, half of the steps of [Results](../results.md), second "
        f"moments of {ROWS} training rows (`benchmarks/results/lora_approximation.json`). At r={UNWEIGHTED[0]}, "
        f"{100 * min(lost):.0f} to {100 * max(lost):.0f} % of what the adapter adds to outputs is missing, on average "
        "over the layers.",
    )


def _said(row: Row) -> str:
    of_lora = ", ".join(f"{each['rank']}{'' if each['weighted'] else '*'}: {each['score']:.4f}" for each in row["lora"])
    return f"base {row['base']['score']:.4f}, adapter {row['adapter']['score']:.4f}; {of_lora}"


if __name__ == "__main__":
    file = file_of("lora_approximation")
    go_on(file, runs, carry_out, _said, options("python -m benchmarks.lora_approximation", __doc__, file).parse_args())
    sys.exit(0)
