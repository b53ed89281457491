"""The command: `python -m benchmarks.serving` measures `dvora serve` under load; `--quick` shows that it runs.

All servers of a section run at once and are asked in turns, some requests at a time, so that a busy machine slows all
alike; one that is not asked computes nothing. The clients are in this process, on the other core.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import torch
from rich.console import Console

from benchmarks.environment import machine
from benchmarks.many_adapters.requests import zipf
from benchmarks.results import Row, file_of, read_rows, write
from benchmarks.serving.client import Measured, ask
from benchmarks.serving.population import name_of, write_packs, write_perturbed
from benchmarks.serving.servers import TOKEN, Running, dvora, lora, started
from dvora.flat import Layout
from transcript.materials import lay_out

COUNTS = (1, 16, 64, 256, 1024)
"""Adapters that requests ask for, by Zipf's law with exponent one."""
OF_TEXTS = (1, 16, 256)
SLOTS = 256
CLIENTS, WRITERS = 32, 8
"""Requests under way: classified, and generated."""
TOKENS = 16
PEFT_COUNTS = (16, 64)


def named(count: int) -> str:
    """A number of adapters."""
    return f"{count} adapter{'s' * (count > 1)}"


def trained(folder: Path, steps: int, rows: int) -> dict[str, Path]:
    """The materials, and an adapter of each kind that `dvora train` has made."""
    lay_out(folder)
    common = ["--max-steps", str(steps), "--batch-size", str(rows)]
    for arguments in (
        ["--task", "text-classification", "--model", "minilm", "--data", "reviews.csv", "--output", "classifier"],
        ["--task", "causal-lm", "--model", "smollm2", "--data", "play.txt", "--output", "writer", "--max-length", "64"],
    ):
        command = [sys.executable, "-m", "dvora.cli", "train", *arguments, "--rank", "64", *common, "--quiet"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    for run, base in (("classifier", "minilm"), ("writer", "smollm2")):
        command = [sys.executable, "-m", "dvora.cli", "merge", run, "--model", base, "--output", f"merged-{run}", "-q"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return {name: folder / name for name in ("minilm", "smollm2", "merged-classifier", "merged-writer")}


def in_turns(
    servers: Mapping[str, tuple[Running, Sequence[str]]], rounds: int, clients: int, tokens: int, console: Console
) -> dict[str, Row]:
    """Ask all servers in turns.

    Args:
        servers: by name, each with the models that its requests name, for all rounds.
        rounds: turns.
        clients: requests under way.
        tokens: to generate; 0 classifies.
        console: for progress.
    """
    total = {name: Measured() for name in servers}
    rates: dict[str, list[float]] = {name: [] for name in servers}
    shares: dict[str, list[float]] = {name: [] for name in servers}
    for turn in range(rounds):
        for name, (server, models) in servers.items():
            part = models[turn * len(models) // rounds : (turn + 1) * len(models) // rounds]
            before = server.computed()
            measured = ask(server.address, part, clients, tokens, turn)
            shares[name].append((server.computed() - before) / measured.elapsed)
            rates[name].append(len(measured.seconds) / measured.elapsed)
            total[name].add(measured)
            console.print(f"turn {turn + 1} of {rounds}: {name}: {rates[name][-1]:.1f} requests a second")
    return {
        name: {
            **total[name].row(),
            "rates": [round(rate, 2) for rate in rates[name]],
            "share_in_batches": round(statistics.median(shares[name]), 3),
            "memory_mib": servers[name][0].memory(),
        }
        for name in servers
    }


def encoders(folder: Path, bases: Mapping[str, Path], requests: int, rounds: int, console: Console) -> dict[str, Row]:
    """Classification by heads of several sizes, beside the merged model and PEFT's LoRA."""
    write_perturbed(folder / "classifier" / "adapter", folder / "classifiers", max(COUNTS))
    packs = write_packs(folder / "classifiers", COUNTS, folder)
    (folder / "empty").mkdir()
    with ExitStack() as running:
        servers: dict[str, tuple[Running, Sequence[str]]] = {}

        def start(name: str, command: list[str], models: Sequence[str]) -> None:
            servers[name] = running.enter_context(started(command)), models

        start("merged model", dvora(bases["merged-classifier"], folder / "empty", 1), ["merged-classifier"] * requests)
        for count in COUNTS:
            models = [name_of(number) for number in zipf(count, requests, 1.0, seed=0)]
            start(
                named(count),
                dvora(bases["minilm"], packs[count], SLOTS),
                models,
            )
        for rank in (1, 8):
            for count in PEFT_COUNTS:
                (empty := folder / f"empty-{rank}-{count}").mkdir()
                command = lora(bases["merged-classifier"], empty, rank, count, "adapter_names")
                models = [name_of(number) for number in zipf(count, requests, 1.0, seed=0)]
                start(f"LoRA r={rank}, {count} by adapter_names", command, models)
        (empty := folder / "empty-set").mkdir()
        command = lora(bases["merged-classifier"], empty, 8, 16, "set_adapter")
        models = [name_of(number) for number in zipf(16, requests, 1.0, seed=0)]
        start("LoRA r=8, 16 by set_adapter", command, models)
        return {f"classify: {name}": row for name, row in in_turns(servers, rounds, CLIENTS, 0, console).items()}


def decoders(folder: Path, bases: Mapping[str, Path], requests: int, rounds: int, console: Console) -> dict[str, Row]:
    """Generation, beside the base alone and the merged model."""
    write_perturbed(folder / "writer" / "adapter", folder / "writers", max(OF_TEXTS))
    packs = write_packs(folder / "writers", OF_TEXTS, folder / "writers")
    (folder / "empty-texts").mkdir()
    (folder / "empty-base").mkdir()
    with ExitStack() as running:
        servers: dict[str, tuple[Running, Sequence[str]]] = {}
        for name, base, empty in (
            ("base", "smollm2", folder / "empty-base"),
            ("merged model", "merged-writer", folder / "empty-texts"),
        ):
            server = running.enter_context(started(dvora(bases[base], empty, 1, WRITERS)))
            servers[name] = server, [base] * requests
        for count in OF_TEXTS:
            models = [name_of(number) for number in zipf(count, requests, 1.0, seed=0)]
            command = dvora(bases["smollm2"], packs[count], 64, WRITERS)
            servers[named(count)] = (
                running.enter_context(started(command)),
                models,
            )
        return {f"generate: {name}": row for name, row in in_turns(servers, rounds, WRITERS, TOKENS, console).items()}


def cold(folder: Path, bases: Mapping[str, Path], rounds: int, asked: int) -> dict[str, Row]:
    """What first uses of adapters cost those who ask for others: beside as many requests for an adapter in its slot."""
    pack = folder / "1024.pack"
    warm = [name_of(number) for number in range(16)]
    never_used = iter(range(16, max(COUNTS)))
    with started(dvora(bases["minilm"], pack, SLOTS)) as server, ThreadPoolExecutor(1) as pool:
        ask(server.address, warm * 4, 8)
        measured = {name: Measured() for name in ("first uses", "used ones")}
        for turn in range(rounds):
            for name in measured:
                others = [name_of(next(never_used)) if name == "first uses" else warm[0] for _ in range(asked // 8)]
                beside = pool.submit(ask, server.address, others, 2)
                measured[name].add(ask(server.address, (warm * asked)[:asked], 14, 0, turn))
                beside.result()
    return {f"others beside {name}": measured[name].row() for name in measured}


def updates(folder: Path, bases: Mapping[str, Path], times: int) -> dict[str, Row]:
    """An adapter replaced by a flat vector in the request's body."""
    adapter = folder / "writer" / "adapter"
    vector = Layout.of(adapter).to_vector(adapter)
    (adapters := folder / "updated").mkdir()
    adapters.joinpath("policy").symlink_to(adapter)
    seconds = []
    with started(dvora(bases["smollm2"], adapters, 16)) as server, httpx.Client(base_url=server.address) as client:
        for number in range(times):
            body = (vector + 1e-4 * torch.randn(len(vector), generator=torch.Generator().manual_seed(number))).numpy()
            before = time.perf_counter()
            answer = client.put(
                "/v1/adapters/policy",
                content=body.tobytes(),
                params={"format": "vector"},
                headers={"Authorization": f"Bearer {TOKEN}"},
            )
            answer.raise_for_status()
            seconds.append(time.perf_counter() - before)
    measured = Measured(seconds, elapsed=sum(seconds))
    return {"update: SmolLM2 by a flat vector": {**measured.row(), "bytes": body.nbytes}}


def main() -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few requests, nothing is recorded")
    parser.add_argument("--only", choices=("classify", "generate", "update"), help="one section")
    given = parser.parse_args()
    console, rows = Console(stderr=True), dict[str, Row]()
    requests, texts, rounds = (64, 16, 1) if given.quick else (3000, 240, 6)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        console.print("training one adapter of each kind")
        bases = trained(folder, *((2, 2) if given.quick else (60, 16)))
        if given.only in (None, "classify"):
            rows |= encoders(folder, bases, requests, rounds, console)
            rows |= cold(folder, bases, *((1, 64) if given.quick else (8, 400)))
        if given.only in (None, "generate"):
            rows |= decoders(folder, bases, texts, rounds, console)
        if given.only in (None, "update"):
            rows |= updates(folder, bases, 5 if given.quick else 100)
    for key, row in rows.items():
        console.print(key, row)
    if not given.quick:
        made: dict[str, Any] = {key: {"key": key, "machine": machine(), **row} for key, row in rows.items()}
        write(file_of("serving"), {**read_rows(file_of("serving")), **made}.values())


if __name__ == "__main__":
    main()
