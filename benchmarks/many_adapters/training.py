"""A training step on the rows of many tenants at once: forward, backward, and each tenant's own AdamW."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import dvora
from benchmarks.many_adapters.arms import ManyArm
from benchmarks.many_adapters.plan import ROWS
from benchmarks.population import NOISE, name_of
from benchmarks.speed.arms import Arm, adapted
from benchmarks.speed.runner import Report
from benchmarks.speed.timing import Step
from benchmarks.speed.workloads import Workload, random

TOKENS = 16


def measure(report: Report, workload: Workload, arm: Arm, folder: Path, rounds: int) -> None:
    """Add a row for one tenant with all rows, for a tenant a row, and for PEFT's training of one adapter at a time."""
    x, model = workload.inputs(ROWS, TOKENS, torch.float32), workload.frozen(torch.float32).eval()
    of_peft = adapted(model, arm, workload.targets).eval()
    of_peft.save_pretrained(str(folder))
    alone = _alone(workload, of_peft)
    with ExitStack() as banks:
        bank = dvora.AdapterBank(model, like=folder)
        banks.callback(bank.close)
        makers: dict[ManyArm, Callable[[], Step]] = {
            ManyArm("bank", arm, count, ROWS): partial(_of_bank, workload, model, bank, x, count) for count in (1, ROWS)
        }
        makers[ManyArm("alone", arm, 1, ROWS)] = lambda: lambda: alone(x)
        makers[ManyArm("alone", arm, ROWS, ROWS)] = lambda: lambda: [alone(row) for row in x.split(1)]
        setting = {"part": "training", "workload": workload.name, "dtype": "float32", "batch": ROWS, "tokens": TOKENS}
        report.time_in_turns(setting, makers, rounds)


def _of_bank(workload: Workload, model: nn.Module, bank: dvora.AdapterBank, x: Tensor, count: int) -> Step:
    """A step of that many tenants, spread evenly over the rows."""
    tenants = bank.trainable(new=[name_of(number) for number in range(count)])
    with torch.no_grad():
        # They would start as the base, a possible shortcut.
        for number, parameter in enumerate(tenants.parameters()):
            parameter.add_(NOISE * random(*parameter.shape, seed=number))
    optimizer = torch.optim.AdamW(tenants.parameter_groups(), foreach=True)
    names = [tenants.names[row % count] for row in range(len(x))]

    def step() -> None:
        with tenants.rows(names) as rows:
            rows.loss(_losses(workload, model, x)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _alone(workload: Workload, model: nn.Module) -> Callable[[Tensor], None]:
    """A step of the one adapter of a PEFT model on some rows."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def step(x: Tensor) -> None:
        _losses(workload, model, x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _losses(workload: Workload, model: nn.Module, x: Tensor) -> Tensor:
    """One a row."""
    return workload.output(model, x).square().mean((1, 2))
