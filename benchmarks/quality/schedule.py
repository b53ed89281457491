"""What runs next: tuning first, then the final runs, one seed of every arm before the next seed of any."""

from dataclasses import replace

from benchmarks.quality.grid import BASELINES, Arm, Grid, Run
from benchmarks.quality.tuning import Rows, chosen, trial_count, trials

ALONE_STEPS = 12


def ready(grid: Grid, rows: Rows, tasks: list[str], arms: list[str]) -> list[Run]:
    """Runs without a row that can start now, the most important first."""
    wanted = [run for task in tasks for name in arms for run in _tuning(grid, task, name, rows)]
    seeds = sorted({seed for name in arms for seed in grid.seeds_of(grid.arms[name])})
    for seed in seeds:
        for task in tasks:
            for name in arms:
                if name in grid.arms_of(task) and seed in grid.seeds_of(grid.arms[name]):
                    wanted += final(grid, task, name, seed, rows)
    return [run for run in wanted if run.key not in rows]


def final(grid: Grid, task: str, name: str, seed: int, rows: Rows) -> list[Run]:
    """The run that is evaluated on the test split; none until its rates are chosen."""
    if grid.arms[name].method in (*BASELINES, "untrained"):
        return [Run(task, name, "final", seed, 0, None)]
    rates = chosen(grid, task, name, rows)
    steps = grid.tasks[task].steps * grid.arms[name].steps_factor
    return [Run(task, name, "final", seed, steps, rates)] if rates else []


def foreign(grid: Grid, rows: Rows) -> list[str]:
    """Keys of rows that the grid would not make: of other rates, steps, tasks or arms than it has now."""
    own: set[str] = set()
    for task in grid.tasks:
        for name, arm in grid.arms_of(task).items():
            own |= {run.key for run in _tuning(grid, task, name, rows)}
            for seed in grid.seeds_of(arm):
                own |= {run.key for run in final(grid, task, name, seed, rows)}
    own |= {run.key for run in _alone(grid, rows, list(grid.tasks), list(grid.arms))}
    return [key for key in rows if key not in own]


def alone(grid: Grid, rows: Rows, tasks: list[str], arms: list[str]) -> list[Run]:
    """A few steps of each arm in each model, on the model's first task, without a row."""
    return [run for run in _alone(grid, rows, tasks, arms) if run.key not in rows]


def _alone(grid: Grid, rows: Rows, tasks: list[str], arms: list[str]) -> list[Run]:
    firsts = {plan.model: task for task, plan in reversed(grid.tasks.items())}
    return [
        replace(run, stage="alone", steps=ALONE_STEPS)
        for task in tasks
        if task in firsts.values()
        for name in arms
        if name in grid.arms_of(task)
        for run in final(grid, task, name, 0, rows)
        if run.rates is not None
    ]


def remaining(grid: Grid, rows: Rows, tasks: list[str], arms: list[str]) -> int:
    """How many runs are missing, those that wait for others among them."""
    count = 0
    for task in tasks:
        for name in (name for name in arms if name in grid.arms_of(task)):
            arm = grid.arms[name]
            have = [row for row in rows.values() if row["task"] == task and row["arm"] == name]
            final_rows = sum(row["stage"] == "final" for row in have)
            count += len(grid.seeds_of(arm)) - final_rows
            if _is_tuned(grid, task, arm):
                count += trial_count(grid, task, name) - sum(row["stage"] == "trial" for row in have)
    return count


def _tuning(grid: Grid, task: str, name: str, rows: Rows) -> list[Run]:
    tuned = name in grid.arms_of(task) and _is_tuned(grid, task, grid.arms[name])
    return trials(grid, task, name, rows) if tuned else []


def _is_tuned(grid: Grid, task: str, arm: Arm) -> bool:
    return bool(arm.rates) and grid.tasks[task].tuned_on is None
