"""Memory: what a training step keeps for its backward pass, and how much a process grows that trains."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.speed.arms import BASE, Arm, adapted
from benchmarks.speed.runner import Report
from benchmarks.speed.steps import training_step
from benchmarks.speed.workloads import Workload, linears

ROOT = Path(__file__).parent.parent.parent
TOKENS, RESIDENT_TOKENS = 2048, 4096


def measure_kept(report: Report, workload: Workload, arms: Sequence[Arm]) -> None:
    """Bytes that a forward pass of each method keeps."""
    base = workload.frozen(torch.float32)
    x = workload.inputs(1, TOKENS, torch.float32).requires_grad_()

    def measure(arm: Arm) -> None:
        model = adapted(base, arm, workload.targets)
        forward = partial(workload.output, model)
        # What is made at first use and kept is a constant.
        torch.autograd.backward(output := forward(x), torch.ones_like(output))
        setting = {"part": "memory", "workload": workload.name, "dtype": "float32", "tokens": TOKENS}
        report.rows.append({**setting, **arm.described(), "saved_bytes": saved_for_backward(model, forward, x)})

    for arm in arms:
        report.attempt(f"memory, {workload.name}: {arm.name}", partial(measure, arm))


def saved_for_backward(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, without the model's own tensors."""
    known = {_address(tensor) for tensor in _tensors_of(model)}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.detach()) or tensor, lambda t: t):
        forward(x)
    kept = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in saved if tensor.numel()}
    return sum(size for address, size in kept.items() if address not in known)


def measure_resident(report: Report, arms: Sequence[Arm]) -> None:
    """The largest resident size of a process that does two steps with one method, each in a process of its own."""

    def measure(arm: Arm) -> None:
        given = [arm.method, str(arm.rank), str(torch.get_num_threads())]
        sizes = in_a_process("benchmarks.speed.memory", *given)
        report.rows.append({"part": "resident", "tokens": RESIDENT_TOKENS, **arm.described(), **sizes})

    for arm in arms:
        report.attempt(f"resident size: {arm.name}", partial(measure, arm))


def in_a_process(module: str, *arguments: str) -> dict[str, int]:
    """What a module of ours prints last, as JSON, when it is run.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(ended.stderr.strip().splitlines()[-1])
    sizes: dict[str, int] = json.loads(ended.stdout.splitlines()[-1])
    return sizes


def process_bytes(name: str) -> int:
    """A size of this process, from Linux. `getrusage` would give the parent's if that was larger."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _resident_sizes(arm: Arm) -> dict[str, int]:
    """Bytes of this process before the model is adapted, and at most in two training steps after that."""
    workload = linears(1024, 2816)
    base = workload.frozen(torch.float32)
    x = workload.inputs(1, RESIDENT_TOKENS, torch.float32)
    before = process_bytes("VmRSS")
    step = training_step(workload, adapted(base, arm, workload.targets), x)
    step()
    step()
    return {"before_bytes": before, "most_bytes": process_bytes("VmHWM")}


def _tensors_of(model: nn.Module) -> Iterable[Tensor]:
    """Parameters, buffers, and tensors that modules keep as attributes or in dictionaries, lists and tuples of them."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        plain = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        yield from (leaf for leaf in tree_leaves(plain) if isinstance(leaf, Tensor))


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


if __name__ == "__main__":
    method, rank, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(_resident_sizes(Arm(method, int(rank)) if int(rank) else BASE._replace(method=method))))
