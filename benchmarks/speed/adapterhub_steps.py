"""Runs inside the environment that `adapterhub.py` makes: times, as JSON on the last line of the output."""

import json
import sys
from functools import partial
from importlib.metadata import version
from typing import Any

rounds, threads, *sources = sys.argv[1:]
# The folder of this file comes first on the path otherwise, where `timing` and others are no top-level modules.
sys.path[0:1] = sources

import adapters  # type: ignore[import-not-found] # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.speed.arms import BASE, Arm, adapted, moved, sharing_copy  # noqa: E402
from benchmarks.speed.plan import at_rank  # noqa: E402
from benchmarks.speed.runner import Report  # noqa: E402
from benchmarks.speed.steps import training_step  # noqa: E402
from benchmarks.speed.timing import Step, interleaved  # noqa: E402
from benchmarks.speed.workloads import bert_square  # noqa: E402

TOKENS = 512
ADAPTERHUB = Arm("AdapterHub DVoRA", 256)


def adapterhub(base: nn.Module, rank: int) -> nn.Module:
    """All layers that it can adapt: query, key, value and the feed-forward pair; alpha = rank scales by one."""
    model: Any = sharing_copy(base)
    adapters.init(model)
    config = adapters.DvoRAConfig(
        r=rank, alpha=rank, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
    )
    model.add_adapter("dvora", config=config)
    model.train_adapter("dvora")
    return moved(model)


def main() -> None:
    """Time the steps in turns and print the rows."""
    torch.set_num_threads(int(threads))
    report, workload = Report(), bert_square(1024)
    base = workload.frozen(torch.float32)
    x = workload.inputs(1, TOKENS, torch.float32)
    steps: dict[str, Step] = {}

    def prepare(arm: Arm) -> None:
        model = adapterhub(base, arm.rank) if arm == ADAPTERHUB else adapted(base, arm, workload.targets)
        steps[arm.name] = training_step(workload, model, x)
        steps[arm.name]()

    arms = [BASE, *at_rank(256), ADAPTERHUB]
    for arm in arms:
        report.attempt(f"beside AdapterHub: {arm.name}", partial(prepare, arm))
    seconds, repeats = interleaved(steps, int(rounds), warm_ups=0)
    versions = {
        package: version(package).partition("+")[0] for package in ("adapters", "transformers", "peft", "torch")
    }
    for arm in arms:
        if arm.name in seconds:
            setting = {"part": "adapterhub", "workload": workload.name, "dtype": "float32", "tokens": TOKENS}
            measured = {"repeats": repeats, "seconds": seconds[arm.name], "environment": versions}
            report.add({**setting, "batch": 1, **arm.described(), **measured})
    print(json.dumps({"rows": report.rows, "not_measured": report.not_measured}))


main()
