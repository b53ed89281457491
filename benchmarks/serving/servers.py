"""Servers of the benchmark, each a process with one thread for the model."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import httpx2 as httpx
import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

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


def vllm(base: Path, *arguments: str) -> list[str]:
    """The command of vLLM's server."""
    return [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name", "base"),
        *("--port", "PORT", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8", "--max-model-len", "256"),
        *("--no-enable-prefix-caching", *arguments),
    ]


def write_lora(base: Path, folder: Path, rank: int, count: int) -> None:
    """Save LoRA adapters of a language model, with random values."""
    config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    for number in range(count):
        torch.manual_seed(number)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        adapted.save_pretrained(folder / f"tenant-{number:04d}")


def write_lora_classifier(base: Path, folder: Path) -> Path:
    """Save a classifier of LoRA, with random values; where it is."""
    targets = ["query", "key", "value", "dense"]
    config = LoraConfig(r=8, target_modules=targets, task_type="SEQ_CLS", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config)
    adapted.save_pretrained(folder)
    return folder
