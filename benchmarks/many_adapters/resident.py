"""The memory of a process that holds thousands of adapters, each measured in a process of its own."""

import json
import sys
from pathlib import Path

import torch

import dvora
from benchmarks.speed.memory import in_a_process, process_bytes
from benchmarks.speed.runner import Report
from benchmarks.speed.workloads import Workload, bert, minilm

ENCODERS = {workload.name: workload for workload in (minilm(), bert(64, 1))}
AT_ONCE = 64
"""Adapters that are put into slots together."""


def measure(report: Report, workload: Workload, pack: Path, known: int, slots: int, host_bytes: int) -> None:
    """Add a row: a bank with every adapter of a pack used once."""
    given = workload.name, str(pack), str(slots), str(host_bytes)
    sizes = in_a_process("benchmarks.many_adapters.resident", *given)
    setting = {"part": "resident", "workload": workload.name, "known": known, "slots": slots, "host_bytes": host_bytes}
    report.rows.append({**setting, "dtype": "float16", **sizes})


@torch.no_grad()
def _sizes(workload: Workload, pack: Path, slots: int, host_bytes: int) -> dict[str, int]:
    """Bytes of this process with the model at work, and when every adapter has been in a slot."""
    base = workload.frozen(torch.float32).eval()
    x = workload.inputs(1, 8, torch.float32)
    workload.output(base, x)
    before = process_bytes("VmRSS")
    bank = dvora.AdapterBank(base, like=pack, slots=slots, host_bytes=host_bytes, dtype=torch.float16)
    names = bank.add_pack(pack)
    added = process_bytes("VmRSS")
    for start in range(0, len(names), min(slots, AT_ONCE)):
        with bank.rows(names[start : start + min(slots, AT_ONCE)]):
            pass
    with bank.rows(names[-1:]):
        workload.output(base, x)
    return {"before_bytes": before, "added_bytes": added, "after_bytes": process_bytes("VmRSS")}


if __name__ == "__main__":
    name, file, slots, host_bytes = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps(_sizes(ENCODERS[name], Path(file), int(slots), int(host_bytes))))
