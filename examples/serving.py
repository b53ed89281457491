"""`dvora serve` in a process of its own, and its answers."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from examples.checks import require

TOKEN = "of whoever may change adapters"


@contextmanager
def server(base: Path, adapters: Path) -> Iterator[str]:
    """The address of a server, which ends with the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dvora.cli", "serve", base, "--adapters", adapters, "--port", str(port), "--quiet"]
    environment = {**os.environ, "DVORA_SERVE_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                with suppress(OSError), urllib.request.urlopen(f"{address}/readyz"):
                    break
                time.sleep(0.2)
            require(process.poll() is None, "the server runs")
            yield address
        finally:
            process.terminate()


def classify(address: str, models: Sequence[str], texts: Sequence[str]) -> list[dict[str, Any]]:
    """The answers of each classifier to each text, text by text."""
    body = json.dumps({"model": [*models], "input": [*texts]}).encode()
    request = urllib.request.Request(f"{address}/v1/classify", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["data"]


def replace(address: str, name: str, run: Path) -> None:
    """Have a server that runs answer with another version."""
    labels = "&".join(f"labels={word}" for word in json.loads((run / "run.json").read_text())["labels"])
    request = urllib.request.Request(
        f"{address}/v1/adapters/{name}?{labels}",
        (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        {"Authorization": f"Bearer {TOKEN}"},
        method="PUT",
    )
    urllib.request.urlopen(request).close()
