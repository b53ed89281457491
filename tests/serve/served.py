"""Tiny bases with adapters, a server of them on a port of its own, and what each merged model answers alone."""

import functools
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
import uvicorn
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dvora.serve.app import make_app
from dvora.serve.run import config_of
from dvora.serve.server import Server
from dvora.serve.settings import Settings
from tests.recipes.saved_adapters import save

TOKEN = "a secret of the tests"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
Serving = tuple[httpx.Client, Server]
CLASSES = {"two": 2, "three": 3, "five": 5, "one": 1}
TEXTS = ("good movie", "a", "the book was very bad", "it is not great", "poor " * 12, "fine ? movie")


def save_trained(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """An adapter with values of its own."""
    save(base, folder, **settings)
    file = folder / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator) for name, value in load_file(file).items()
    }
    save_file(values, file, metadata={"format": "pt"})
    return folder


def save_critics(base: Path, folder: Path, count: int, **settings: Any) -> Path:
    """Adapters a0, a1, ... with heads of three outputs."""
    for number in range(count):
        save_classifier(base, folder / f"a{number}", number, 3, **settings)
    return folder


def save_classifiers(base: Path, folder: Path) -> Path:
    """Adapters with heads of the numbers of outputs in `CLASSES`."""
    for number, (name, outputs) in enumerate(CLASSES.items()):
        save_classifier(base, folder / name, number, outputs)
    return folder


def save_classifier(
    base: Path, folder: Path, seed: int, outputs: int, task_type: str = "SEQ_CLS", **settings: Any
) -> Path:
    """An adapter with a head."""
    # PEFT leaves out the head of itself for SEQ_CLS only.
    save_trained(base, folder, seed, task_type=task_type, modules_to_save=["classifier"], **settings)
    file = folder / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: torch.randn(outputs, *value.shape[1:], generator=generator) if "classifier" in name else value
        for name, value in load_file(file).items()
    }
    save_file(values, file, metadata={"format": "pt"})
    return folder


@contextmanager
def serving(
    base: Path,
    adapters: Path,
    *,
    port: int = 0,
    connections: int = 1000,
    is_shared: bool = False,
    **settings: Any,
) -> Iterator[tuple[httpx.Client, Server]]:
    """A server, on a free port if none is given, and a client of it."""
    settings = {"token": TOKEN, "batch_rows": 6, "slots": 16, **settings}
    server = Server(Settings(base=str(base), adapters=adapters, **settings), is_shared)
    config = config_of(make_app(server), connections)
    config.port = port
    process = uvicorn.Server(config)
    thread = threading.Thread(target=process.run)
    thread.start()
    try:
        while not process.started:
            time.sleep(0.005)
        port = process.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client, server
    finally:
        process.should_exit = True
        thread.join()


@contextmanager
def process(
    base: Path, adapters: Path, *options: str, port: int = 0
) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """The program itself, on a free port if none is given."""
    with socket.create_server(("127.0.0.1", port)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dvora.cli", "serve", str(base), "--adapters", str(adapters), "--port", str(port)]
    environment = {**os.environ, "DVORA_SERVE_TOKEN": TOKEN}
    running = subprocess.Popen([*command, *options], env=environment, stderr=subprocess.DEVNULL)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        try:
            until = time.monotonic() + 60
            while time.monotonic() < until and running.poll() is None:
                with suppress(httpx.HTTPError):
                    if client.get("/readyz").status_code == 200:
                        break
                time.sleep(0.1)
            yield running, client
        finally:
            running.kill()
            running.wait()


def ask(client: httpx.Client, model: str, text: str | list[str] = TEXTS[0]) -> httpx.Response:
    """Have a text classified, or several."""
    return client.post("/v1/classify", json={"model": model, "input": text})


def answer_of(client: httpx.Client, model: str) -> list[float]:
    """The probabilities that a model gives the first text's classes."""
    return probabilities(ask(client, model))


def probabilities(answer: httpx.Response) -> list[float]:
    """Of the classes of the one text that was asked for."""
    (row,) = answer.json()["data"]
    values: list[float] = row["probs"]
    return values


def put(client: httpx.Client, name: str, source: Path, **query: object) -> httpx.Response:
    """Put the adapter of a folder, or a file."""
    content = (source / "adapter_model.safetensors" if source.is_dir() else source).read_bytes()
    return client.put(f"/v1/adapters/{name}", content=content, params=query, headers=ADMIN)  # type: ignore[arg-type]


class Alone:
    """Merged models, each alone and without a server."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.merged = functools.cache(self._merged)
        self.continued = functools.cache(self._continued)
        self.answer = functools.cache(self._answer)

    def _merged(self, adapter: Path | None, outputs: int | None) -> Any:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            kind = AutoModelForCausalLM if outputs is None else AutoModelForSequenceClassification
            model = kind.from_pretrained(self.base, **({} if outputs is None else {"num_labels": outputs}))
            if adapter is not None:
                model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        return model.eval()

    def _continued(self, adapter: Path | None, prompt: str, tokens: int) -> str:
        ids = self.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            whole = self.merged(adapter, None).generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        text: str = self.tokenizer.decode(whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        return text

    def _answer(self, adapter: Path | None, text: str = TEXTS[0]) -> Any:
        """What `probabilities` are to be, of three classes; without an adapter by the base's own head."""
        return pytest.approx(self.logits(adapter, 3, text).softmax(-1).tolist(), abs=1e-5)

    def logits(self, adapter: Path | None, outputs: int, *texts: str) -> torch.Tensor:
        """Of a classifier."""
        with torch.no_grad():
            logits: torch.Tensor = self.merged(adapter, outputs)(**self.tokenizer(*texts, return_tensors="pt")).logits[
                0
            ]
        return logits


def copied(folder: Path, target: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(folder, target))
