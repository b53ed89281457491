"""The memory of a process that holds thousands of adapters, each measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.speed.footprint import ROOT, process_bytes
from benchmarks.speed.runner import Report
from benchmarks.speed.workloads import Workload, bert_square, minilm

ENCODERS = {workload.name: workload for workload in (minilm(), bert_square(64))}
AT_ONCE = 64
"""Adapters that are put into slots together."""


def measure(report: Report, workload: Workload, pack: Path, known: int, slots: int, host_bytes: int) -> None:
    """Add a row: a bank with every adapter of a pack used once.

    Args:
        report: gets the row.
        workload: one of `ENCODERS`.
        pack: of adapters.
        known: how many are in it.
        slots, host_bytes: of the bank.
    """
    arguments = [workload.name, str(pack), str(slots), str(host_bytes)]
    command = [sys.executable, "-m", "benchmarks.many_adapters.resident", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(process.stderr.strip().splitlines()[-1])
    sizes = json.loads(process.stdout.splitlines()[-1])
    setting = {"part": "resident", "workload": workload.name, "known": known, "slots": slots, "host_bytes": host_bytes}
    report.rows.append({**setting, "dtype": "float16", **sizes})


@torch.no_grad()
def sizes(workload: Workload, pack: Path, slots: int, host_bytes: int) -> dict[str, int]:
    """Bytes of this process with the model at work, and when every adapter has been in a slot."""
    import dvora

    base = workload.frozen(torch.float32).eval()
    x = workload.inputs(1, 8, torch.float32)
    workload.output(base, x)
    before = process_bytes("VmRSS")
    bank = dvora.AdapterBank(base, slots=slots, host_bytes=host_bytes, dtype=torch.float16)
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
    print(json.dumps(sizes(ENCODERS[name], Path(file), int(slots), int(host_bytes))))
