"""The command: `python -m benchmarks.tenants.times` times training and serving with every method, in turns.

A step of training is one step of every tenant: of eight at once in a bank, else one after another. A batch that is
served has a row of each tenant, with its own adapter.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

import dvora
from benchmarks.environment import machine
from benchmarks.parts import PartsLinear
from benchmarks.quality.grid import Grid, Rates, Run
from benchmarks.quality.labelled import Labelled
from benchmarks.quality.models import SentenceReader, load_minilm, quietly
from benchmarks.quality.page import YARDSTICK
from benchmarks.quality.training import steps
from benchmarks.results import Row, file_of, read_rows, write
from benchmarks.speed.timing import Step, interleaved, ratios, spread
from benchmarks.tenants.training import (
    ARMS,
    IN_BANK,
    TASK,
    TOGETHER,
    all_tenants,
    bank_of,
    grid_of_tenants,
    reader_of,
    steps_together,
)
from materials.batches import Sentences

TIMED = [arm for arm in ARMS if arm != "frozen"]
ROUNDS = 8


def timed(every: Sequence[Labelled], rounds: int = ROUNDS) -> list[Row]:
    """A row for each method: training beside LoRA r=1's, serving beside the frozen base's; in float32."""
    grid = grid_of_tenants()
    runs = {
        arm: Run(TASK, arm, "trial", 0, 1 + rounds, Rates(1e-4, 1e-4 if grid.arms[arm].magnitude else None, 1e-4))
        for arm in TIMED
    }
    with quietly():
        groups = [every[first : first + TOGETHER] for first in range(0, len(every), TOGETHER)]
        taken = [_trained(grid, runs, group, rounds) for group in groups]
        training = {arm: np.sum([each[arm] for each in taken], axis=0) for arm in TIMED}
        serving = _served(grid, runs, every, rounds)
    rows = []
    for arm in TIMED:
        row = {"key": f"{TASK} times {arm}", "task": TASK, "arm": arm, "stage": "times", "machine": machine()}
        for name, of, to in (("training", training, YARDSTICK), ("serving", serving, "base")):
            row[name] = [round(float(value), 4) for value in spread(ratios(of[arm], of[to]))]
            row[f"{name}_seconds"] = round(float(np.median(of[arm])), 3)
        rows.append(row)
    return rows


def _trained(grid: Grid, runs: Mapping[str, Run], some: Sequence[Labelled], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each of some tenants, in every round."""
    with ExitStack() as stack:
        training: dict[str, Step] = {}
        for arm, run in runs.items():
            if arm in IN_BANK:
                together = steps_together(grid, run, *stack.enter_context(bank_of(grid, run, some)), some, nullcontext)
                training[arm] = partial(next, together)
            else:
                training[arm] = _one_after_another(grid, run, some)
        return interleaved(training, rounds, at_least=0)[0]


def _one_after_another(grid: Grid, run: Run, some: Sequence[Labelled]) -> Step:
    each = [steps(grid, run, tenant, reader_of(grid, run, tenant), nullcontext) for tenant in some]
    return lambda: [next(one) for one in each]


def _served(grid: Grid, runs: Mapping[str, Run], every: Sequence[Labelled], rounds: int) -> dict[str, list[float]]:
    """Seconds of a batch with a row of each tenant, in every round."""
    batch = _one_row_of_each(every)
    with ExitStack() as stack:
        serving = {"base": _features(load_minilm("float32"), batch)}
        for arm, run in runs.items():
            if arm in IN_BANK:
                bank, model = stack.enter_context(bank_of(grid, run, every))
                serving[arm] = _in_bank(bank, model, [tenant.name for tenant in every], batch)
            else:
                backbone = reader_of(grid, run, every[0]).backbone
                serving[arm] = _features(_one_adapter_a_row(backbone, len(every)), batch)
        return interleaved(serving, rounds, at_least=0)[0]


def _in_bank(bank: dvora.AdapterBank, model: SentenceReader, names: Sequence[str], batch: dict[str, Tensor]) -> Step:
    @torch.no_grad()
    def step() -> object:
        with bank.rows(names):
            return model(batch)

    return step


def _features(backbone: Callable[..., Any], batch: dict[str, Tensor]) -> Step:
    """A pass up to where a head begins."""
    return torch.no_grad()(partial(SentenceReader(backbone, nn.Identity()).features, batch))


def _one_adapter_a_row(model: nn.Module, count: int) -> Callable[..., Any]:
    """The adapted backbone with so many copies of its adapter, one for each row: PEFT's, or of `benchmarks.parts`."""
    if isinstance(model, PeftModel):
        names = ["default", *(f"{number}" for number in range(1, count))]
        for name in names[1:]:
            model.add_adapter(name, model.peft_config["default"])
        return partial(model.requires_grad_(False).eval(), adapter_names=names)
    for layer in model.modules():
        if isinstance(layer, PartsLinear):
            for name, values in [*layer.named_parameters(recurse=False)]:
                # Broadcast over the tokens of a row.
                setattr(layer, name, nn.Parameter(values.detach().repeat(count, 1, 1)))
    return model


def _one_row_of_each(some: Sequence[Labelled]) -> dict[str, Tensor]:
    sentences = [tenant.parts["test"].sentences for tenant in some]
    first = Sentences(tuple(each.ids[0] for each in sentences), torch.zeros(len(some)), sentences[0].padding)
    ids, mask = first.batch(np.arange(len(some)))
    return {"ids": ids, "mask": mask}


def main() -> None:
    """Time everything on this machine, in place of what was timed before."""
    torch.set_num_threads(1)
    file, rows = file_of("tenants"), timed(all_tenants(2))
    write(file, {**read_rows(file), **{row["key"]: row for row in rows}}.values())


if __name__ == "__main__":
    main()
