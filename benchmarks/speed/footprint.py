"""Memory: what layers and models keep for the backward pass, their constants, and the resident size of a process."""

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.speed.arms import BASE, Arm, adapted
from benchmarks.speed.memory import constants, live_memory, saved_for_backward
from benchmarks.speed.plan import COMPARED
from benchmarks.speed.runner import Report
from benchmarks.speed.set_up import LAYERS, frozen_layer
from benchmarks.speed.steps import training_step
from benchmarks.speed.workloads import Workload, linears, random

ROOT = Path(__file__).parent.parent.parent
TOKENS = 2048
LAYER_TOKENS = 1000
"""Unlike any size of a layer."""
RESIDENT_TOKENS = 4096


def measure_model(report: Report, workload: Workload, arms: Sequence[Arm]) -> None:
    """One training step of every method."""
    base = workload.frozen(torch.float32)
    x = workload.inputs(1, TOKENS, torch.float32).requires_grad_()
    for arm in arms:
        what = f"memory, {workload.name}, float32: {arm.name}"
        report.attempt(what, partial(_measure_model, report, workload, base, arm, x))


def _measure_model(report: Report, workload: Workload, base: nn.Module, arm: Arm, x: Tensor) -> None:
    model = adapted(base, arm, workload.targets)
    forward = partial(workload.output, model)
    # What is made at first use and kept is a constant.
    torch.autograd.backward(output := forward(x), torch.ones_like(output))
    saved, live, kept = (
        saved_for_backward(model, forward, x),
        live_memory(model, forward, x),
        constants(base, model, workload.targets),
    )
    weights = [p for name, p in base.named_parameters() if name.removesuffix(".weight").endswith(workload.targets)]
    report.rows.append(
        {
            **{"part": "memory", "workload": workload.name, "dtype": "float32", "tokens": x.shape[1]},
            **arm.described(),
            **{"saved_bytes": saved.bytes, "keeps_input": saved.keeps_input},
            **{"held_bytes": live.after_forward, "peak_bytes": live.at_most},
            **{"constant_bytes": kept.per_layer, "shared_bytes": kept.shared, "trained_bytes": kept.trained},
            "weight_bytes": sum(weight.nbytes for weight in weights),
        }
    )


def measure_layers(report: Report, arms: Sequence[Arm]) -> None:
    """What single layers save: elements besides z in units of tokens x out, and whether they keep their input."""
    for sizes in LAYERS:
        base = nn.Sequential()
        base.add_module("proj", frozen_layer(*sizes))
        for arm in arms:
            what = f"layer memory, {sizes[0]} x {sizes[1]}: {arm.name}"
            report.attempt(what, partial(_measure_layer, report, base, arm, sizes))


def _measure_layer(report: Report, base: nn.Module, arm: Arm, sizes: tuple[int, int]) -> None:
    model = adapted(base, arm, ["proj"])
    x = random(LAYER_TOKENS, sizes[0]).requires_grad_()
    torch.autograd.backward(output := model(x), torch.ones_like(output))
    saved = saved_for_backward(model, model, x)
    held = live_memory(model, model, x).after_forward // x.element_size()
    z = LAYER_TOKENS * arm.rank
    report.rows.append(
        {
            **{"part": "layer memory", "in_features": sizes[0], "out_features": sizes[1], "tokens": LAYER_TOKENS},
            **{**arm.described(), "saved_values": saved.values, "keeps_input": saved.keeps_input, "z_values": z},
            "held_values": held,
        }
    )


def measure_resident(report: Report, arms: Sequence[Arm] = COMPARED) -> None:
    """The largest resident size of a process that does two steps with one method, each in a process of its own."""
    for arm in arms:
        report.attempt(f"resident size: {arm.name}", partial(_measure_resident, report, arm))


def _measure_resident(report: Report, arm: Arm) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.footprint",
        arm.method,
        str(arm.rank),
        str(torch.get_num_threads()),
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(process.stderr.strip().splitlines()[-1])
    sizes = json.loads(process.stdout.splitlines()[-1])
    report.rows.append({"part": "resident", "tokens": RESIDENT_TOKENS, **arm.described(), **sizes})


def resident_sizes(arm: Arm) -> dict[str, int]:
    """Bytes of this process before the model is adapted, and at most in two training steps after that."""
    workload = linears(1024, 2816)
    base = workload.frozen(torch.float32)
    x = workload.inputs(1, RESIDENT_TOKENS, torch.float32)
    before = process_bytes("VmRSS")
    step = training_step(workload, adapted(base, arm, workload.targets), x)
    step()
    step()
    return {"before_bytes": before, "most_bytes": process_bytes("VmHWM")}


def process_bytes(name: str) -> int:
    """A size of this process, from Linux. `getrusage` would give the parent's if that was larger."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    method, rank, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(resident_sizes(Arm(method, int(rank)) if int(rank) else BASE._replace(method=method))))
