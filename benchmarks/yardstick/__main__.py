"""PEFT's method comparison with DVoRA: python -m benchmarks.yardstick [--first | --tryout | --rates] [TASK ...]

Runs PEFT's scripts, unchanged, on those of our experiments that have no row yet, keeps their rows in `rows/`, and shows
them beside PEFT's. The exit status is 1 if a run failed. `make yardstick` prepares the environment.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.yardstick import rows
from benchmarks.yardstick.checkout import ROOT, CheckoutError, check_unchanged, checked_out
from benchmarks.yardstick.environment import comparison, is_installed_from
from benchmarks.yardstick.experiments import of_task
from benchmarks.yardstick.needs import check_access, chosen, first_problem
from benchmarks.yardstick.running import finished_row, place, run
from benchmarks.yardstick.tasks import Task

TRIAL = ROOT / "build" / "yardstick" / "tryout"


def measure(task: Task, checkout: Path) -> list[str]:
    """Run what has no row yet, keep the rows, show the table.

    Returns:
        The experiments that failed, each with the reason.

    Raises:
        CheckoutError: a script was changed, before a run or during one, or something lies in the way of the hub.
    """
    folder = comparison(checkout) / task.name
    check_nothing_shadows_the_hub(task, folder)
    failed = []
    for experiment in of_task(task.name):
        place(experiment, folder)
        reason = None
        if finished_row(experiment, folder) is None:
            check_unchanged(checkout)
            reason = run(experiment, folder)
            check_unchanged(checkout)
        if reason is None:
            rows.keep(experiment, folder)
        else:
            failed.append(f"{task.name} {experiment.name}: {reason}")
    print(rows.describe(task, rows.processed(task, comparison(checkout))))
    return failed


def check_nothing_shadows_the_hub(task: Task, folder: Path) -> None:
    """Check that the script finds no folder of a model's or data set's name where it runs: it would read that instead.

    Raises:
        CheckoutError: there is one.
    """
    for name in (*task.models, *task.data):
        if (folder / name).exists():
            raise CheckoutError(
                f"{folder / name} would be read in place of the hub's {name}, and the row would be of something else: "
                "move it away"
            )


def try_out(task: Task, checkout: Path) -> list[str]:
    """Run every experiment for a few steps on stand-ins, on the CPU, and show the table of the trial's rows.

    Returns:
        The experiments that failed, each with the reason.
    """
    from benchmarks.yardstick.tryout.prepare import MODEL, OFFLINE, TINY, check_copies, place_short, prepare

    os.environ |= OFFLINE
    folder = prepare(task, checkout, TRIAL)
    failed = []
    for experiment in of_task(task.name):
        place_short(experiment, folder, {"model_id": MODEL.format(task=task.name), **TINY})
        if reason := run(experiment, folder, ["--on-cpu"]):
            failed.append(f"{task.name} {experiment.name}: {reason}")
    check_copies(task, checkout, TRIAL)
    print(rows.describe(task, rows.processed(task, comparison(TRIAL))))
    print("A trial of stand-ins: a tiny model, data made here, a few steps on a CPU. No figure of it means anything.")
    return failed


def compare_rates(tasks: Sequence[Task]) -> None:
    """Show the rates of our folders beside those that the models' rows ask for."""
    from benchmarks.yardstick.rates import describe

    print("\n".join(map(describe, tasks)))


def ready_checkout() -> Path:
    """PEFT's repository, if this environment's PEFT is it.

    Raises:
        CheckoutError: it could not be fetched, was changed, or is not installed.
    """
    checkout = checked_out()
    if not is_installed_from(checkout):
        raise CheckoutError(
            f"PEFT is not installed from {checkout}: make yardstick does that, in an environment of its own"
        )
    return checkout


def main(arguments: Sequence[str]) -> int:
    """Do what was asked; the exit status."""
    asked = chosen(arguments)
    if problem := first_problem(asked):
        sys.exit(problem)
    if asked.first:
        from benchmarks.yardstick.first import measure_first

        measure_first(asked.first)
        return 0
    if not asked.tryout and (problem := next(filter(None, map(check_access, asked.tasks)), None)):
        sys.exit(problem)
    if asked.rates:
        compare_rates(asked.tasks)
        return 0
    act = try_out if asked.tryout else measure
    try:
        checkout = ready_checkout()
        failed = [line for task in asked.tasks for line in act(task, checkout)]
    except CheckoutError as error:
        sys.exit(str(error))
    for line in failed:
        print(line, file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
