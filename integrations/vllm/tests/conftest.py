"""Small bases with adapters, and vLLM's server of them as a process of its own."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dvora import DVoRAConfig

TOKENS = 16
VALUES = "adapter_model.safetensors"


def save_base(folder: Path, seed: int = 0) -> Path:
    """A language model of 96 tokens, with biases, and with fewer keys than queries."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=96,
        max_position_embeddings=512,
        initializer_range=0.3,
        attention_bias=True,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def save_adapters(base: Path, folder: Path, count: int, size: float = 0.2, **settings: Any) -> Path:
    """Adapters a0, a1, ... with random values, as if they had been trained."""
    settings = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), DVoRAConfig(**settings))
    for number in range(count):
        model.save_pretrained(folder / f"a{number}")
        perturb(folder / f"a{number}", number, size)
    return folder


def perturb(adapter: Path, seed: int, size: float = 0.2) -> None:
    """Give an adapter other values, in place."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: value + size * torch.randn(value.shape, generator=generator)
        for name, value in load_file(adapter / VALUES).items()
    }
    save_file(values, adapter / VALUES, metadata={"format": "pt"})


class Merged:
    """Merged models, each alone."""

    def __init__(self, base: Path, adapters: Path) -> None:
        self.base, self.adapters = base, adapters

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def model(self, name: str | None) -> Any:
        """In float32; None is the base."""
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        if name is not None:
            model = PeftModel.from_pretrained(model, self.adapters / name).merge_and_unload()
        return model.eval()

    def answer(self, name: str | None, prompt: list[int], answer: list[int]) -> list[int]:
        """The best token after the prompt, and after each of an answer: the answer itself if that is greedy."""
        with torch.no_grad():
            logits = self.model(name)(torch.tensor([prompt + answer])).logits[0]
        best: list[int] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        return best

    def answers(self, names: list[str | None], prompts: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
        """Of many, adapter by adapter."""
        order = sorted(range(len(names)), key=lambda number: names[number] or "")
        best = {number: self.answer(names[number], prompts[number], answers[number]) for number in order}
        return [best[number] for number in range(len(names))]


@dataclass
class Client:
    """Of one server."""

    url: str
    log: Path

    def post(self, route: str, **body: Any) -> tuple[int, str]:
        """Status and text."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def get(self, route: str) -> str:
        """The text."""
        with urllib.request.urlopen(self.url + route, timeout=20) as response:
            text: str = response.read().decode()
            return text

    def answer(self, name: str | None, prompt: list[int]) -> list[int]:
        """The tokens of a greedy answer; None is the base."""
        status, text = self.post(
            "/v1/completions",
            model=name or "base",
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )
        assert status == 200, text
        answer: list[int] = json.loads(text)["choices"][0]["token_ids"]
        return answer

    def answers(self, names: list[str | None], prompts: list[list[int]]) -> list[list[int]]:
        """Of requests that come together."""
        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(self.answer, names, prompts))


@contextmanager
def serving(base: Path, adapters: Path, *options: str, **environment: str) -> Iterator[Client]:
    """vLLM's server, ready, with four slots."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = adapters.parent / f"server-{port}.log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)),
        *("--served-model-name", "base", "--dtype", "float32", "--skip-tokenizer-init", "--host", "127.0.0.1"),
        *("--enable-lora", "--max-loras", "4", "--max-cpu-loras", "8", "--max-model-len", "512"),
        *("--max-num-seqs", "32", *options),
    ]
    environment = {
        **os.environ,
        "DVORA_ADAPTERS": str(adapters),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    with log.open("w") as output:
        # A session of its own, so that its workers end with it.
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    client = Client(f"http://127.0.0.1:{port}", log)
    try:
        wait_until_ready(process, client)
        yield client
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(process: "subprocess.Popen[bytes]", client: Client) -> None:
    """Until the server answers; with what it said if it ends instead."""
    for _ in range(240):
        if process.poll() is not None:
            raise RuntimeError(client.log.read_text()[-20_000:])
        try:
            client.get("/health")
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(client.log.read_text()[-20_000:])


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapters(base, tmp_path_factory.mktemp("served") / "adapters", 16)


@pytest.fixture(scope="session")
def merged(base: Path, adapters: Path) -> Merged:
    return Merged(base, adapters)


@pytest.fixture(scope="session")
def client(base: Path, adapters: Path) -> Iterator[Client]:
    with serving(base, adapters) as client:
        yield client
