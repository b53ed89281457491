"""The command: `python -m benchmarks.serving` measures `dvora serve` under load; `--quick` shows that it runs.

All servers of a section run at once and are asked in turns, some requests at a time, so that a busy machine slows all
alike; one that is not asked computes nothing. The clients are in this process, on the other core.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.environment import machine
from benchmarks.population import drawn, name_of, perturbed
from benchmarks.results import Row, file_of, read_rows, write
from benchmarks.serving.client import Measured, ask
from benchmarks.serving.servers import Running, dvora, started, vllm, write_lora, write_lora_classifier
from dvora.adapter_file.packs import write_pack
from materials.files import lay_out

COUNTS = (1, 16, 64, 256, 1024)
"""Adapters that requests ask for."""
SLOTS = 256
CLIENTS, WRITERS = 32, 8
"""Requests under way: classified by `dvora serve`, and continued by vLLM."""
TOKENS = 16
PROCESSES = 16


def named(count: int) -> str:
    """A number of adapters."""
    return f"{count} adapter{'s' * (count > 1)}"


def trained(folder: Path, steps: int, rows: int) -> dict[str, Path]:
    """The materials, and an adapter of each kind that `dvora train` has made."""
    bases = {name: folder / name for name in ("minilm", "smollm2", "merged-classifier", "merged-writer")}
    if all(base.exists() for base in bases.values()):
        return bases
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
    return bases


@dataclass
class Load:
    """What is asked under one name: of one server, or of one for each tenant.

    Args:
        servers: to ask.
        models: that the requests name, for all turns; of several servers each has its own, by the number of the tenant.
    """

    servers: Sequence[Running]
    models: Sequence[str]

    def requests(self, turn: int, turns: int) -> list[tuple[str, str]]:
        """Of one turn: where each goes, and the model that it names."""
        part = self.models[turn * len(self.models) // turns : (turn + 1) * len(self.models) // turns]
        if len(self.servers) == 1:
            return [(self.servers[0].address, model) for model in part]
        return [(self.servers[int(model.partition("-")[2])].address, "merged-classifier") for model in part]

    def computed(self) -> float:
        """Seconds in batches."""
        return sum(server.computed() for server in self.servers)

    def memory(self) -> int:
        """MiB."""
        return sum(server.memory() for server in self.servers)


def in_turns(loads: Mapping[str, Load], turns: int, clients: int, tokens: int, console: Console) -> dict[str, Row]:
    """Ask all servers in turns.

    Args:
        loads: by name.
        turns: how many.
        clients: requests under way.
        tokens: to generate; 0 classifies.
        console: for progress.
    """
    total = {name: Measured() for name in loads}
    rates, shares, memory = ({name: list[float]() for name in loads} for _ in range(3))
    for turn in range(turns):
        for name, load in loads.items():
            before = load.computed()
            measured = ask(part := load.requests(turn, turns), clients, tokens, turn)
            shares[name].append((load.computed() - before) / measured.elapsed)
            rates[name].append(len(measured.seconds) / measured.elapsed)
            memory[name].append(load.memory())
            total[name].add(measured)
            if measured.errors:
                raise RuntimeError(f"{name}: {measured.errors} of {len(part)} requests failed")
            console.print(f"turn {turn + 1} of {turns}: {name}: {rates[name][-1]:.1f} requests a second")
    return {
        name: {
            **total[name].row(),
            "rates": [round(rate, 2) for rate in rates[name]],
            "share_in_batches": round(statistics.median(shares[name]), 3),
            "memory_mib": memory[name],
        }
        for name in loads
    }


def packs_of(adapters: Mapping[str, Path], counts: Sequence[int], folder: Path) -> dict[int, Path]:
    """Packs of the first so many adapters, by how many they are."""
    packs = {count: folder / f"{count}.pack" for count in counts}
    for count, pack in packs.items():
        write_pack(pack, dict(islice(adapters.items(), count)))
    return packs


def encoders(folder: Path, bases: Mapping[str, Path], requests: int, turns: int, console: Console) -> dict[str, Row]:
    """Classification by heads of several sizes, beside the merged model and a process for each tenant."""
    adapters = perturbed(folder / "classifier" / "adapter", folder / "classifiers", max(COUNTS))
    packs = packs_of(adapters, COUNTS, folder)
    merged, everyone = bases["merged-classifier"], ["merged-classifier"] * requests
    with ExitStack() as running:
        (empty := folder / "empty").mkdir()
        loads = {"merged model": Load([running.enter_context(started(dvora(merged, empty, 1)))], everyone)}
        for count in COUNTS:
            server = running.enter_context(started(dvora(bases["minilm"], packs[count], SLOTS)))
            loads[named(count)] = Load([server], drawn(count, requests))
        rows = {f"classify: {name}": row for name, row in in_turns(loads, turns, CLIENTS, 0, console).items()}
    with ExitStack() as running:
        servers = []
        for number in range(PROCESSES):
            (empty := folder / f"empty-of-{number}").mkdir()
            servers.append(running.enter_context(started(dvora(merged, empty, 1))))
        for server in servers:
            # Together they have the one core that every other server has.
            server.process.cpu_affinity([0])
        pack = folder / "of-processes.pack"
        shutil.copy(packs[16], pack)
        one = running.enter_context(started(dvora(bases["minilm"], pack, SLOTS)))
        loads = {
            f"{PROCESSES} processes, one a tenant": Load(servers, drawn(PROCESSES, requests)),
            f"one process beside them, {PROCESSES} adapters": Load([one], drawn(PROCESSES, requests)),
        }
        rows |= {f"tenants: {name}": row for name, row in in_turns(loads, turns, CLIENTS, 0, console).items()}
    return rows


def kinds(folder: Path, bases: Mapping[str, Path], requests: int, turns: int, console: Console) -> dict[str, Row]:
    """Classification by 64 adapters of one method, and by as many of both mixed."""
    lora = write_lora_classifier(bases["minilm"], folder / "lora")
    firsts = {"DVoRA r=64": folder / "classifier" / "adapter", "LoRA r=8": lora}
    adapters = {name: perturbed(first, folder / f"64 of {name}", 64) for name, first in firsts.items()}
    in_turn = list(adapters.values())
    adapters["both"] = {name: in_turn[number % 2][name] for number, name in enumerate(in_turn[0])}
    with ExitStack() as running:
        loads = {}
        for number, (name, folders) in enumerate(adapters.items()):
            write_pack(pack := folder / f"kind-{number}.pack", folders)
            server = running.enter_context(started(dvora(bases["minilm"], pack, SLOTS)))
            loads[name] = Load([server], drawn(64, requests))
        return {f"kinds: {name}": row for name, row in in_turns(loads, turns, CLIENTS, 0, console).items()}


def engines(
    folder: Path, bases: Mapping[str, Path], python: str, requests: int, turns: int, console: Console
) -> dict[str, Row]:
    """Generation by vLLM: the merged model, LoRA, and DVoRA by the plug-in."""
    perturbed(folder / "writer" / "adapter", folder / "writers", 16)
    common = ("--enable-lora", "--max-loras", "16", "--max-cpu-loras", "16", "--max-lora-rank")
    of_vllm = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    }
    with ExitStack() as running:

        def start(command: list[str], models: Sequence[str], adapters: Path | None = None) -> Load:
            settings = of_vllm if adapters is None else {**of_vllm, "DVORA_ADAPTERS": str(adapters)}
            return Load([running.enter_context(started(command, python, "health", settings))], models)

        loads = {
            "vLLM, merged model": start(vllm(bases["merged-writer"]), ["base"] * requests),
            "vLLM, dvora r=64, 16 adapters": start(
                vllm(bases["smollm2"], *common, "64"), drawn(16, requests), folder / "writers"
            ),
        }
        for rank in (1, 8):
            write_lora(bases["smollm2"], loras := folder / f"loras-{rank}", rank, 16)
            modules = [f"{name_of(number)}={loras / name_of(number)}" for number in range(16)]
            command = vllm(bases["smollm2"], *common, str(rank), "--lora-modules", *modules)
            loads[f"vLLM, LoRA r={rank}, 16 adapters"] = start(command, drawn(16, requests))
        for load in loads.values():
            # First uses.
            ask([(load.servers[0].address, model) for model in dict.fromkeys(load.models)], WRITERS, 2)
        return {f"engines: {name}": row for name, row in in_turns(loads, turns, WRITERS, TOKENS, console).items()}


def cold(folder: Path, bases: Mapping[str, Path], turns: int, asked: int) -> dict[str, Row]:
    """What first uses of adapters cost those who ask for others: beside as many requests for an adapter in its slot."""
    pack = folder / "1024.pack"
    warm = [name_of(number) for number in range(16)]
    never_used = iter(range(16, max(COUNTS)))
    with started(dvora(bases["minilm"], pack, SLOTS)) as server, ThreadPoolExecutor(1) as pool:

        def of(models: Sequence[str]) -> list[tuple[str, str]]:
            return [(server.address, model) for model in models]

        ask(of(warm * 4), 8)
        measured = {name: Measured() for name in ("first uses", "used ones")}
        for turn in range(turns):
            for name in measured:
                others = [name_of(next(never_used)) if name == "first uses" else warm[0] for _ in range(asked // 8)]
                beside = pool.submit(ask, of(others), 2)
                measured[name].add(ask(of((warm * asked)[:asked]), 14, 0, turn))
                beside.result()
    return {f"others beside {name}": measured[name].row() for name in measured}


def main() -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few requests, nothing is recorded")
    parser.add_argument("--only", choices=("classify", "kinds", "engines"), help="one section")
    parser.add_argument(
        "--vllm", help="an interpreter with vLLM and dvora-vllm, as `make vllm` sets up; else no engines"
    )
    parser.add_argument("--trained", type=Path, help="a folder in which an earlier run has trained")
    given = parser.parse_args()
    console, rows = Console(stderr=True), dict[str, Row]()
    requests, texts, turns = (64, 16, 1) if given.quick else (3000, 240, 6)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if given.trained is not None:
            shutil.copytree(given.trained, folder, dirs_exist_ok=True)
        console.print("training one adapter of each kind")
        bases = trained(folder, *((2, 2) if given.quick else (60, 16)))
        if given.only in (None, "classify"):
            rows |= encoders(folder, bases, requests, turns, console)
            rows |= cold(folder, bases, *((1, 64) if given.quick else (8, 400)))
        if given.only in (None, "kinds"):
            rows |= kinds(folder, bases, requests, turns, console)
        if given.vllm and given.only in (None, "engines"):
            rows |= engines(folder, bases, given.vllm, texts, turns, console)
    for key, row in rows.items():
        console.print(key, row)
    if not given.quick:
        made: dict[str, Any] = {key: {"key": key, "machine": machine(), **row} for key, row in rows.items()}
        others = {key: row for key, row in read_rows(file_of("serving")).items() if key not in made}
        write(file_of("serving"), {**others, **made}.values())


if __name__ == "__main__":
    main()
