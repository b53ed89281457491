"""What `torch.compile` takes and gives: python -m benchmarks.compiling

Each method is compiled in a process of its own, with an empty cache and a time limit, whole and block by block. The
rows are the part "compile" of `results/gate.json`; its other parts were measured before and after the core was rebuilt.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from itertools import product
from time import perf_counter
from typing import Any

import torch
from torch import nn

from benchmarks.environment import environment, machine
from benchmarks.results import Row, file_of
from benchmarks.speed.arms import Arm, adapted
from benchmarks.speed.plan import llama_1024
from benchmarks.speed.steps import training_step
from benchmarks.speed.timing import Step, interleaved, ratios, spread
from benchmarks.speed.workloads import bert
from benchmarks.tables import table, text

ARMS = (Arm("LoRA", 1), Arm("VeRA", 256), Arm("dvora dense", 64), Arm("dvora dense", 256))
MODELS = {"BERT": "BERT of six blocks", "llama": "a Llama block"}
KINDS = {
    "seconds to compile": "seconds to compile the model",
    "seconds to compile by block": "... block by block",
    "compiled to eager": "a compiled step, eager = 1",
}
LIMIT_SECONDS = 600
THREADS = 2


def measure(model: str, arm: Arm) -> list[Row]:
    """The rows of one model and method, in this process."""
    torch.set_num_threads(THREADS)
    workload = bert(384, 6) if model == "BERT" else llama_1024()
    base, x = workload.frozen(torch.float32), workload.inputs(16, 32, torch.float32)

    def first_step(adapted_model: nn.Module) -> tuple[Step, float]:
        """A step of a model that is compiled when it is first called, and the seconds of the first call."""
        start = perf_counter()
        step = training_step(workload, adapted_model, x)
        step()
        return step, perf_counter() - start

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        by_block = adapted(base, arm, workload.targets)
        blocks = next(module for module in by_block.modules() if isinstance(module, nn.ModuleList))
        for block in blocks:
            block.compile()
        _, block_seconds = first_step(by_block)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        torch._dynamo.reset()
        eager = training_step(workload, adapted(base, arm, workload.targets), x)
        compiled, seconds = first_step(adapted(base, arm._replace(compiled=True), workload.targets))
        timed, _ = interleaved({"eager": eager, "compiled": compiled}, 15, warm_ups=2, at_least=0.1)
    medians = {
        "seconds to compile": seconds,
        "seconds to compile by block": block_seconds,
        "compiled to eager": spread(ratios(timed["compiled"], timed["eager"])).median,
    }
    return [
        {"measure": f"{kind}, {model}, 512 tokens, {arm.name}", "median": float(f"{median:.4g}")}
        for kind, median in medians.items()
    ]


def compiling(content: Mapping[str, Any]) -> str:
    """What compiling takes and gives, as a table of the documentation."""
    medians = {row["measure"]: row["median"] for row in content["rows"] if row["label"] == "after"}
    rows = []
    for (model, name), (kind, label) in product(MODELS.items(), KINDS.items()):
        found = (medians.get(f"{kind}, {model}, 512 tokens, {arm.name}") for arm in ARMS)
        rows.append((f"{name}: {label}", *("" if value is None else f"{value:.3g}" for value in found)))
    return text(
        table(("", *(arm.name for arm in ARMS)), rows),
        "Medians (`benchmarks/results/gate.json`), with an empty cache.",
    )


def main() -> int:
    """Measure every model and method; the rows replace the earlier ones of this part."""
    new: list[Row] = []
    for model, arm in product(MODELS, ARMS):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows = pool.apply_async(measure, (model, arm)).get(LIMIT_SECONDS)
        for row in rows:
            new.append({"label": "after", "part": "compile", "machine": machine(), **row})
            print(f"{row['measure']}: {row['median']}", flush=True)
    content = json.loads(file_of("gate").read_text(encoding="utf-8"))
    content["rows"] = [row for row in content["rows"] if (row["label"], row["part"]) != ("after", "compile")] + new
    content["environment"]["compile"] = environment()
    file_of("gate").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
