"""The command: `python -m benchmarks.exporting` exports MiniLM with twenty adapters and measures what runtimes do.

The browser is measured where `make web` has brought what the page runs with.
"""

import argparse
import csv
import functools
import http.server
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic
from peft import get_peft_model
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.environment import machine
from benchmarks.results import Row, file_of, write
from benchmarks.serving.population import write_perturbed
from benchmarks.tables import table, text
from dvora import DVoRAConfig
from materials.files import lay_out

ADAPTERS, ROWS, BATCH = 20, 2000, 50
BROWSER = "/usr/bin/chromium"
PACKAGES = Path(__file__).parents[1] / ".web" / "node_modules"


def run(folder: Path, *arguments: str) -> None:
    """A command of dvora in a folder."""
    command = [sys.executable, "-m", "dvora.cli", *arguments, "--quiet"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def logits(graph: Path, inputs: list[Mapping[str, NDArray[Any]]], adapter: NDArray[Any] | None) -> NDArray[Any]:
    """Of all batches, by one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    given = {} if adapter is None else {"adapter": adapter}
    names = {wanted.name for wanted in session.get_inputs()}
    batches = [{**given, **{key: value for key, value in batch.items() if key in names}} for batch in inputs]
    return np.concatenate([session.run(["output"], batch)[0] for batch in batches])


def int8(folder: Path, texts: list[str], labels: list[int]) -> dict[str, Row]:
    """What int8 costs: beside a float adapter, and where the adapter was merged before."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "site")
    padded = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "np"}
    inputs = [dict(tokenizer(texts[start : start + BATCH], **padded)) for start in range(0, len(texts), BATCH)]
    packed = folder / "site" / "adapters"
    adapter = load_file(packed / "tenant-0000.safetensors")["adapter"]
    exact = logits(folder / "site" / "one.onnx", inputs, adapter)
    merged = folder / "merged-site" / "one.onnx"
    options = {"per_channel": True, "weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul"]}
    quantize_dynamic(merged, folder / "merged-int8.onnx", **options)
    null = load_file(folder / "merged-site" / "adapters" / "null.safetensors")["adapter"]
    rows = {}
    for name, graph, vector in (
        ("float32", folder / "site" / "one.onnx", adapter),
        ("int8 base, float adapter", folder / "site" / "one-int8.onnx", adapter),
        ("merged, then int8", folder / "merged-int8.onnx", null),
    ):
        found = logits(graph, inputs, vector)
        rows[f"int8: {name}"] = {
            "rows": len(texts),
            "accuracy": round(100 * float((found.argmax(1) == labels).mean()), 2),
            "same_class": round(100 * float((found.argmax(1) == exact.argmax(1)).mean()), 2),
            "mean_difference": round(float(np.abs(found - exact).mean()), 4),
            "bytes": (graph.with_name("weights.bin") if name == "float32" else graph).stat().st_size,
        }
    return rows


def in_python(site: Path) -> Row:
    """onnxruntime in this process: reading a packed adapter, and a run with it."""
    session = onnxruntime.InferenceSession(site / "one.onnx", providers=["CPUExecutionProvider"])
    inputs = dict(AutoTokenizer.from_pretrained(site)(["A fine, funny and touching film."], return_tensors="np"))
    switch, compute = [], []
    for number in range(ADAPTERS):
        started = time.perf_counter()
        adapter = load_file(site / "adapters" / f"tenant-{number:04d}.safetensors")["adapter"]
        read = time.perf_counter()
        session.run(["output"], {"adapter": adapter, **inputs})
        switch.append(read - started)
        compute.append(time.perf_counter() - read)
    return {"switch_ms": _median(switch), "run_ms": _median(compute)}


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of a folder."""
    handler = functools.partial(_Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def in_browser(site: Path) -> Row:
    """onnxruntime-web in headless Chromium: fetching an adapter, and a run with it."""
    from playwright.sync_api import sync_playwright

    expected = in_python_logits(site)
    (site / "node_modules").symlink_to(PACKAGES)
    with served(site) as address, sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"]).new_page()
        page.goto(f"{address}index.html")
        page.wait_for_function("window.last", timeout=60_000)
        first, again = [], []
        differences = []
        for seen in (first, again):
            for name, wanted in expected.items():
                page.click(f"[data-name={name}]")
                page.wait_for_function(f"window.last.adapter == '{name}'")
                seen.append(page.evaluate("window.last"))
                differences.append(float(np.abs(np.array(seen[-1]["logits"]) - wanted).max()))
        version = page.context.browser.version if page.context.browser is not None else ""
    # The first one was fetched when the page was opened.
    fetched = [row["switch_ms"] / 1000 for row in first[1:]]
    return {
        "switch_ms": _median(fetched),
        "switch_ms_p95": round(1000 * float(np.percentile(fetched, 95)), 2),
        "run_ms": _median([row["run_ms"] / 1000 for row in again]),
        "difference": max(differences),
        "chromium": version,
    }


def in_python_logits(site: Path) -> dict[str, NDArray[Any]]:
    """Of the page's sentence, by adapter."""
    inputs = [dict(AutoTokenizer.from_pretrained(site)(["A fine, funny and touching film."], return_tensors="np"))]
    names = [f"tenant-{number:04d}" for number in range(ADAPTERS)]
    vectors = {name: load_file(site / "adapters" / f"{name}.safetensors")["adapter"] for name in names}
    return {name: logits(site / "one.onnx", inputs, vector)[0] for name, vector in vectors.items()}


def _median(seconds: list[float]) -> float:
    return round(1000 * float(np.median(seconds)), 2)


def main() -> None:
    """Measure, and write the rows."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lay_out(folder)
        console.print("training")
        common = ("--rank", "64", "--max-steps", "200", "--batch-size", "16")
        data = ("--task", "text-classification", "--model", "minilm", "--data", "reviews.csv")
        run(folder, "train", *data, *common, "--output", "run")
        run(folder, "merge", "run", "--model", "minilm", "--output", "merged")
        write_perturbed(folder / "run" / "adapter", folder / "tenants", ADAPTERS, heads=(2,))
        console.print("exporting")
        run(folder, "export", "tenants", "--model", "minilm", "--to", "web", "--int8", "--output", "site")
        # The merged model's graph, with an adapter that changes nothing.
        merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged")
        nothing = get_peft_model(merged, DVoRAConfig(r=1, target_modules=["query"], task_type="SEQ_CLS"))
        nothing.save_pretrained(folder / "nothing")
        run(folder, "export", "nothing", "--model", "merged", "--to", "onnx", "--output", "merged-site")
        with (folder / "reviews.csv").open(newline="") as file:
            read = list(csv.DictReader(file))[:ROWS]
        labels = [int(row["label"] == "good") for row in read]
        rows = int8(folder, [row["text"] for row in read], labels)
        report = json.loads((folder / "site" / "export.json").read_text())
        sizes = {"bytes": report["bytes"], "bytes_an_adapter": report["bytes_an_adapter"]}
        difference = report["differences"]["one.onnx"]
        rows["runtime: onnxruntime"] = {**sizes, **in_python(folder / "site"), "difference": difference}
        if PACKAGES.is_dir():
            rows["runtime: onnxruntime-web"] = {**sizes, **in_browser(folder / "site")}
    for key, row in rows.items():
        console.print(key, row)
    write(file_of("exporting"), [{"key": key, "machine": machine(), **row} for key, row in rows.items()])


def parts(result: Mapping[str, Any]) -> dict[str, str]:
    """The generated part of the page about exporting."""
    rows = {row["key"]: row for row in result["rows"]}
    runtimes = [
        (
            key.partition(": ")[2],
            f"{row['bytes'] / 1e6:.0f} MB + {row['bytes_an_adapter'] / 1e3:.0f} kB an adapter",
            f"{row['switch_ms']:.1f}",
            f"{row['run_ms']:.0f}",
            f"{row['difference']:.0e}",
        )
        for key, row in rows.items()
        if key.startswith("runtime: ")
    ]
    quantised = [
        (
            key.partition(": ")[2],
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['accuracy']:.1f}",
            f"{row['same_class']:.1f}",
            f"{row['mean_difference']:.3f}",
        )
        for key, row in rows.items()
        if key.startswith("int8: ")
    ]
    return {
        "exporting": text(
            table(("runtime", "size", "switch, ms", "run, ms", "largest difference from PyTorch"), runtimes),
            table(("MiniLM", "MB", "accuracy, %", "same class as float32, %", "mean difference of logits"), quantised),
            "`benchmarks/results/exporting.json`; MiniLM, r=64, twenty adapters, one sentence; a switch reads or "
            f"fetches an adapter for the first time. int8: {rows['int8: float32']['rows']:,} rows, those that the "
            "adapter was trained on among them, so only differences count.",
        )
    }


if __name__ == "__main__":
    main()
