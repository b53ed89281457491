"""Servers of the benchmark, each a process with one thread for the model; and PEFT's ways through the same server."""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx2 as httpx
import psutil
import torch
import uvicorn
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dvora.serve import encoder
from dvora.serve.app import make_app
from dvora.serve.base import Base
from dvora.serve.registry import Version
from dvora.serve.requests import Answer, Request
from dvora.serve.run import config_of
from dvora.serve.scheduler import Batch
from dvora.serve.server import Server
from dvora.serve.settings import Settings

TOKEN = "of the benchmark"


@dataclass
class Running:
    """A server's process."""

    address: str
    process: psutil.Process

    def memory(self) -> int:
        """MiB that it and its children hold now."""
        processes = [self.process, *self.process.children(recursive=True)]
        return sum(process.memory_info().rss for process in processes) // 2**20

    def computed(self) -> float:
        """Seconds that its batches have taken; of vLLM it is unknown, and 0."""
        lines = httpx.get(f"{self.address}/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith("dvora_batch_seconds_total"))


@contextmanager
def started(
    command: Sequence[str],
    python: str = sys.executable,
    ready: str = "readyz",
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Running]:
    """A server that answers, until the end; `PORT` in the command is a free one.

    Args:
        command: arguments of the interpreter.
        python: the interpreter.
        ready: what a server answers as soon as it takes requests.
        settings: of its environment.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    everything = {**os.environ, "OMP_NUM_THREADS": "1", "DVORA_SERVE_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1", **settings}
    argv = [python, *(port if word == "PORT" else word for word in command)]
    process = subprocess.Popen(argv, env=everything, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{address}/{ready}").status_code == 200:
                    break
            time.sleep(0.2)
        else:
            raise RuntimeError(f"this server has ended: {' '.join(argv)}")
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


def vllm(base: Path, *arguments: str) -> list[str]:
    """The command of vLLM's server."""
    return [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name", "base"),
        *("--port", "PORT", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8", "--max-model-len", "256"),
        *("--no-enable-prefix-caching", *arguments),
    ]


class OneByOne(encoder.Encoder):
    """An encoder whose adapters PEFT has: those of a batch run one after another, by `set_adapter`."""

    @torch.no_grad()
    def run(self, batch: Batch) -> list[tuple[Request, Answer]]:
        """The answers of a batch."""
        by_name: dict[str, list[Request]] = {}
        for request in batch.requests:
            by_name.setdefault(str(request.adapter), []).append(request)
        answers = []
        for name, requests in by_name.items():
            self.base.model.set_adapter(name)
            logits = self.base.model(**self._padded(requests)).logits
            answers += [(request, Answer(row)) for request, row in zip(requests, logits, strict=True)]
        return answers


def with_names(base: Base, adapted: Any) -> Base:
    """The base with a model by PEFT, which gives each row its adapter in one pass."""
    of_peft, forward = replace(base, model=adapted), adapted.forward
    adapted.forward = lambda **inputs: forward(**inputs, adapter_names=of_peft._names)
    return of_peft


def write_lora(base: Path, folder: Path, rank: int, count: int) -> None:
    """Save LoRA adapters of a language model, with random values."""
    config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    for number in range(count):
        torch.manual_seed(number)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        adapted.save_pretrained(folder / f"tenant-{number:04d}")


def serve_lora(base: Path, empty: Path, rank: int, count: int, how: str, port: int) -> None:
    """Serve LoRA adapters, of an encoder with heads, through the server's own engine and routes."""
    server = Server(Settings(base=str(base), adapters=empty))
    kind = "CAUSAL_LM" if server.base.generates else "SEQ_CLS"
    config = LoraConfig(r=rank, target_modules="all-linear", task_type=kind, init_lora_weights=False)
    adapted = get_peft_model(server.base.model, config, adapter_name="tenant-0000")
    for number in range(1, count):
        adapted.add_adapter(f"tenant-{number:04d}", config)
    adapted.eval().requires_grad_(False)
    server.base.has_own_head = True
    for number in range(count):
        name = f"tenant-{number:04d}"
        server.registry._versions[name] = Version(name, name, digest=name)
    if how == "set_adapter":
        server.engine._encoder = OneByOne(replace(server.base, model=adapted))
    else:
        runner = server.engine._decoder or server.engine._encoder
        assert runner is not None
        runner.base = with_names(server.base, adapted)
    config = config_of(make_app(server), connections=2048)
    config.port = port
    uvicorn.Server(config).run()


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
