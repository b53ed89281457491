"""A classifier in seconds: from `dvora train` on a few labelled rows to its first answer by a server that runs already.

`python -m benchmarks.serving.first_classifier` writes the row "first classifier"; `--quick` shows that it runs. The
server, which has another classifier, and the training have one thread each, on two cores.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx

from benchmarks.environment import machine
from benchmarks.results import file_of, read_rows, write
from benchmarks.serving.client import SENTENCES
from benchmarks.serving.servers import TOKEN, Running, dvora, started
from materials.files import lay_out

ROWS = 64
"""Labelled ones, of which a tenth each is held out to choose the step and for the test."""
IMPORTS = "import dvora.recipes.training.run"


def timed(arguments: list[str], folder: Path) -> float:
    """Seconds that a process of Python takes."""
    before = time.perf_counter()
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, *arguments], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    return time.perf_counter() - before


def train(folder: Path, output: str, data: str) -> float:
    """Seconds that `dvora train` takes, as a user types it."""
    given = ["--task", "text-classification", "--model", "minilm", "--data", data, "--blocks", "last:2"]
    return timed(["-m", "dvora.cli", "train", *given, "--output", output, "--quiet"], folder)


def first_answer(server: Running, folder: Path, name: str) -> dict[str, float]:
    """Train a classifier, put it, ask it: seconds by stage."""
    command = train(folder, name, "few.csv")
    record = json.loads((folder / name / "run.json").read_text(encoding="utf-8"))
    before = time.perf_counter()
    body, labels = (folder / name / "adapter" / "adapter_model.safetensors").read_bytes(), {"labels": record["labels"]}
    with httpx.Client(base_url=server.address, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        client.put(f"/v1/adapters/{name}", content=body, params=labels).raise_for_status()
        put = time.perf_counter() - before
        answer = client.post("/v1/classify", json={"model": name, "input": SENTENCES[0]})
        answer.raise_for_status()
    asked = time.perf_counter() - before - put
    # That of the imports by another process: no line of the command says when they end.
    imports = timed(["-c", IMPORTS], folder)
    stages = {"imports": imports, "training": record["seconds"], "put": put, "first_answer": asked}
    return {"all": command + put + asked, "data_head_saving": command - imports - record["seconds"], **stages}


def main() -> None:
    """Measure, and write the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="once, nothing is recorded")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lay_out(folder)
        with (folder / "reviews.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[: ROWS + 1]
        with (folder / "few.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        # By which the server knows that it classifies.
        train(folder, "adapters/first", "few.csv")
        with started(dvora(folder / "minilm", folder / "adapters", 16)) as server:
            runs = [first_answer(server, folder, f"run-{number}") for number in range(1 if given.quick else 7)]
    row: dict[str, Any] = {"key": "first classifier", "machine": machine(), "rows": ROWS, "runs": len(runs)}
    row |= {f"{stage}_s": round(statistics.median(run[stage] for run in runs), 2) for stage in runs[0]}
    row["slowest_s"] = round(max(run["all"] for run in runs), 2)
    print(json.dumps(row, indent=1))
    if not given.quick:
        write(file_of("serving"), {**read_rows(file_of("serving")), row["key"]: row}.values())


if __name__ == "__main__":
    main()
