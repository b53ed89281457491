"""What the first GPU tells within an hour: python -m benchmarks.yardstick --first

Kernels and times of steps of models with random weights, which need no network; then short runs of MetaMathQA, where
PEFT's repository and the model hub can be reached. All rows are in one file, written as they come.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.environment import machine
from benchmarks.kernel_count import kernels, launched
from benchmarks.results import Row, write
from benchmarks.speed import plan, workloads
from benchmarks.speed.__main__ import quieten, show
from benchmarks.speed.arms import BASE, Arm
from benchmarks.speed.plan import Run
from benchmarks.speed.runner import Counts, Report, carry_out
from benchmarks.yardstick.checkout import FOLDER, ROOT
from benchmarks.yardstick.environment import is_installed_from
from benchmarks.yardstick.experiments import of_task
from benchmarks.yardstick.needs import check_access, check_python
from benchmarks.yardstick.running import finished_row, run
from benchmarks.yardstick.tasks import ROWS, TASKS
from benchmarks.yardstick.tryout.prepare import copied, place_short

SCRATCH = ROOT / "build" / "yardstick" / "first"
FOLDERS = {"cuda": ROWS / "first", "cpu": SCRATCH}
TASK = TASKS["MetaMathQA"]
EXPERIMENTS = ("lora/llama-3.2-3B-rank1-all-linear", "dvora/llama-3.2-3B-rank256-all-linear-structured")
SHORT = {"max_steps": 500, "eval_steps": 500}
"""A tenth of PEFT's steps. The test set is the whole one, since no setting shortens it."""
COUNTS: Counts = {"kernels": lambda step: kernels(step).total(), "launched": launched}

# The sizes of MiniLM, where starting kernels is the cost, and of Llama-3.2-3B, where computing is.
minilm_sizes = partial(workloads.bert, 384, blocks=6)
llama_sizes = partial(workloads.llama, 3072, 8192, heads=24, blocks=4)
RUNS: dict[str, Sequence[Run]] = {
    "cuda": (
        Run("whole step", minilm_sizes, plan.WHOLE_MODEL, batch=16, tokens=32, rounds=21),
        Run("whole step", llama_sizes, plan.WHOLE_MODEL, "bfloat16", batch=4, tokens=256, rounds=11),
        Run("decode", llama_sizes, plan.WHOLE_MODEL, "bfloat16", tokens=1, rounds=11),
    ),
    "cpu": tuple(
        Run(part, plan.llama_64, [BASE, Arm("LoRA", 1), Arm("dvora structured", 16)], batch=2, tokens=1, rounds=2)
        for part in ("whole step", "decode")
    ),
}


def measure_first(device: str) -> None:
    """Measure, write the file, and say what is in it, what is not, and what to do with it.

    Args:
        device: "cuda"; or "cpu", for tiny sizes that show that everything runs, and no short runs.
    """
    quieten()
    name = torch.cuda.get_device_name() if device == "cuda" else machine()
    file = FOLDERS[device] / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    report = Report()

    def save() -> None:
        rows = [{**row, "machine": machine(), "device": name} for row in report.rows]
        write(file, rows, device=name, cuda=torch.version.cuda, not_measured=report.not_measured)

    for planned in RUNS[device]:
        carry_out(planned, report, device, COUNTS)
        save()
    if device == "cuda":
        # PEFT's script has the device for itself.
        torch.cuda.empty_cache()
        for experiment, outcome in short_runs(FOLDER, SCRATCH):
            if isinstance(outcome, str):
                report.not_measured.append({"what": experiment, "reason": outcome})
            else:
                report.rows.append({"part": TASK.name, "arm": experiment, "row": outcome})
                print(described_short(experiment, outcome))
            save()
    show(report, lambda rows: ())
    print(f"Everything is in {file}: commit that file, or attach it to an issue of the project.")


def short_runs(checkout: Path, folder: Path) -> Iterator[tuple[str, Row | str]]:
    """The names of two experiments, with the rows of PEFT's script for few steps, or why there is none."""
    if not is_installed_from(checkout):
        yield TASK.name, f"PEFT is not installed from {checkout}; what make yardstick said of it is above"
    elif problem := check_python() or check_access(TASK):
        yield TASK.name, problem
    else:
        task_folder = copied(TASK, checkout, folder)
        for experiment in of_task(TASK.name):
            if experiment.full_name in EXPERIMENTS:
                place_short(experiment, task_folder, SHORT)
                reason = run(experiment, task_folder)
                yield experiment.full_name, reason or finished_row(experiment, task_folder) or "no row"


def described_short(experiment: str, row: Row) -> str:
    """A line about a short run: its score, and the time of its training steps alone."""
    first, *_, last = row["train_info"]["metrics"]
    score, seconds = last["test accuracy"], first["train time"]
    return f"{experiment}: {score:.1%} of GSM8K after {last['step']} steps, which took {seconds:.0f} s"
