"""Servers of the benchmark, each a process with one thread for the model; and PEFT's ways through the same server."""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import torch
import uvicorn
from peft import LoraConfig, get_peft_model

from dvora.serve import encoder
from dvora.serve.app import make_app
from dvora.serve.base import Base
from dvora.serve.registry import Version
from dvora.serve.requests import Answer, Request
from dvora.serve.scheduler import Batch, Limits
from dvora.serve.server import Server, Settings

TOKEN = "of the benchmark"


@dataclass
class Running:
    """A server's process."""

    address: str
    process: psutil.Process

    def memory(self) -> int:
        """MiB that it holds now."""
        size: int = self.process.memory_info().rss
        return size // 2**20

    def computed(self) -> float:
        """Seconds that its batches have taken."""
        lines = httpx.get(f"{self.address}/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith("dvora_batch_seconds_total"))


@contextmanager
def started(command: Sequence[str]) -> Iterator[Running]:
    """A server that answers, until the end; `PORT` in the command is a free one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "DVORA_SERVE_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, *(port if word == "PORT" else word for word in command)]
    process = subprocess.Popen(argv, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{address}/readyz").status_code == 200:
                    break
            time.sleep(0.2)
        yield Running(address, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait()


def dvora(base: Path, adapters: Path, slots: int, rows: int = 32) -> list[str]:
    """The command of `dvora serve`."""
    return [
        *("-m", "dvora.cli", "serve", str(base), "--adapters", str(adapters), "--port", "PORT", "--quiet"),
        *("--slots", str(slots), "--batch-rows", str(rows)),
    ]


def lora(base: Path, empty: Path, rank: int, count: int, how: str) -> list[str]:
    """The command of this module, which serves LoRA by PEFT."""
    arguments = (str(base), str(empty), str(rank), str(count), how, "PORT")
    return ["-m", "benchmarks.serving.servers", *arguments]


class ByPeft(encoder.Encoder):
    """An encoder whose adapters PEFT has: by `adapter_names` in one pass, or one after another by `set_adapter`."""

    def __init__(self, base: Base, adapted: Any, how: str) -> None:
        super().__init__(base)
        self.adapted, self.how = adapted, how

    @torch.no_grad()
    def run(self, batch: Batch) -> list[tuple[Request, Answer]]:
        """The answers of a batch."""
        if self.how == "adapter_names":
            names = [str(request.adapter) for request in batch.requests]
            logits = self.adapted(**self._padded(batch.requests), adapter_names=names).logits
            return [(request, Answer(row)) for request, row in zip(batch.requests, logits, strict=True)]
        by_name: dict[str, list[Request]] = {}
        for request in batch.requests:
            by_name.setdefault(str(request.adapter), []).append(request)
        answers = []
        for name, requests in by_name.items():
            self.adapted.set_adapter(name)
            logits = self.adapted(**self._padded(requests)).logits
            answers += [(request, Answer(row)) for request, row in zip(requests, logits, strict=True)]
        return answers


def serve_lora(base: Path, empty: Path, rank: int, count: int, how: str, port: int) -> None:
    """Serve LoRA adapters with heads through the server's own engine and routes."""
    server = Server(Settings(str(base), empty, Limits(batch_rows=32)))
    config = LoraConfig(r=rank, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    adapted = get_peft_model(server.base.model, config, adapter_name="tenant-0000")
    for number in range(1, count):
        adapted.add_adapter(f"tenant-{number:04d}", config)
    adapted.eval().requires_grad_(False)
    server.base.has_own_head = True
    for number in range(count):
        name = f"tenant-{number:04d}"
        server.registry._versions[name] = Version(name, name, digest=name)
    server.engine._encoder = ByPeft(server.base, adapted, how)
    uvicorn.Server(uvicorn.Config(make_app(server), port=port, log_config=None, http="h11")).run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("empty", type=Path)
    parser.add_argument("rank", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("how", choices=("adapter_names", "set_adapter"))
    parser.add_argument("port", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    serve_lora(given.base, given.empty, given.rank, given.count, given.how, given.port)
