"""The command: `python -m benchmarks.exporting RUNTIME` measures a runtime, and keeps the rows of the others.

onnxruntime: MiniLM with twenty adapters, also in the browser where `make web` has brought what the page runs with.
llama.cpp: SmolLM2 with an adapter merged; in the environment of `make gguf`.
"""

import argparse
import csv
import functools
import http.server
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft import get_peft_model
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.environment import machine
from benchmarks.population import perturbed
from benchmarks.results import Row, file_of, read_rows, write
from benchmarks.tables import table, text
from dvora import DVoRAConfig
from materials.files import lay_out

ADAPTERS, ROWS, BATCH = 20, 2000, 50
BROWSER = shutil.which("chromium")
SENTENCE = "A fine, funny and touching film."
PACKAGES = Path(__file__).parents[1] / ".web" / "node_modules"
VENDOR = PACKAGES.with_name("vendor")
"""What a page fetches of the packages."""


def run(folder: Path, *arguments: str) -> None:
    """A command of dvora in a folder."""
    command = [sys.executable, "-m", "dvora.cli", *arguments, "--quiet"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def graph_of(folder: Path, name: str) -> Path:
    """A graph of an export."""
    return folder / str(json.loads((folder / "layout.json").read_text())["graphs"][name]["file"])


def logits(graph: Path, inputs: list[Mapping[str, NDArray[Any]]], adapter: NDArray[Any] | None) -> NDArray[Any]:
    """Of all batches, by one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    given = {} if adapter is None else {"adapter": adapter}
    names = {wanted.name for wanted in session.get_inputs()}
    batches = [{**given, **{key: value for key, value in batch.items() if key in names}} for batch in inputs]
    return np.concatenate([session.run(["output"], batch)[0] for batch in batches])


def int8(folder: Path, texts: list[str], labels: list[int]) -> dict[str, Row]:
    """What int8 costs: beside a float adapter, and where the adapter was merged before."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    tokenizer = AutoTokenizer.from_pretrained(folder / "site")
    padded = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "np"}
    inputs = [dict(tokenizer(texts[start : start + BATCH], **padded)) for start in range(0, len(texts), BATCH)]
    packed = folder / "site" / "adapters"
    adapter = load_file(packed / "tenant-0000.safetensors")["adapter"]
    one = graph_of(folder / "site", "one")
    exact = logits(one, inputs, adapter)
    merged = graph_of(folder / "merged-site", "one")
    options = {"per_channel": True, "weight_type": QuantType.QUInt8, "op_types_to_quantize": ["MatMul"]}
    quantize_dynamic(merged, folder / "merged-int8.onnx", **options)
    null = load_file(folder / "merged-site" / "adapters" / "null.safetensors")["adapter"]
    rows = {}
    for name, graph, vector in (
        ("float32", one, adapter),
        ("int8 base, float adapter", graph_of(folder / "site", "one-int8"), adapter),
        ("merged, then int8", folder / "merged-int8.onnx", null),
    ):
        found = logits(graph, inputs, vector)
        rows[f"int8: {name}"] = {
            "rows": len(texts),
            "accuracy": round(100 * float((found.argmax(1) == labels).mean()), 2),
            "same_class": round(100 * float((found.argmax(1) == exact.argmax(1)).mean()), 2),
            "mean_difference": round(float(np.abs(found - exact).mean()), 4),
            "bytes": (next(graph.parent.glob("weights-*.bin")) if name == "float32" else graph).stat().st_size,
        }
    return rows


def in_python(site: Path) -> Row:
    """onnxruntime in this process: reading a packed adapter, and a run with it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph_of(site, "one"), providers=["CPUExecutionProvider"])
    inputs = dict(AutoTokenizer.from_pretrained(site)([SENTENCE], return_tensors="np"))
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
def served(site: Path, headers: Mapping[str, str] = MappingProxyType({})) -> Iterator[str]:
    """The address of a folder; headers are added to each answer."""
    handler = functools.partial(_Quiet, headers, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def __init__(self, added: Mapping[str, str], *args: Any, **options: Any) -> None:
        self.added = added
        super().__init__(*args, **options)

    def end_headers(self) -> None:
        """With those that are added."""
        for header in self.added.items():
            self.send_header(*header)
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def in_browser(site: Path) -> Row:
    """onnxruntime-web in headless Chromium: fetching an adapter, and a run with it."""
    from playwright.sync_api import sync_playwright

    expected = in_python_logits(site)
    (site / "vendor").symlink_to(VENDOR)
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
    inputs = [dict(AutoTokenizer.from_pretrained(site)([SENTENCE], return_tensors="np"))]
    names = [f"tenant-{number:04d}" for number in range(ADAPTERS)]
    vectors = {name: load_file(site / "adapters" / f"{name}.safetensors")["adapter"] for name in names}
    return {name: logits(graph_of(site, "one"), inputs, vector)[0] for name, vector in vectors.items()}


def _median(seconds: list[float]) -> float:
    return round(1000 * float(np.median(seconds)), 2)


def write_adapters(folder: Path) -> None:
    """Train one on movie reviews, and make twenty of it."""
    common = ("--rank", "64", "--max-steps", "200", "--batch-size", "16")
    data = ("--task", "text-classification", "--model", "minilm", "--data", "reviews.csv")
    run(folder, "train", *data, *common, "--output", "run")
    perturbed(folder / "run" / "adapter", folder / "tenants", ADAPTERS, heads=(2,))


def exported(folder: Path) -> Row:
    """Export them to `site`; sizes, and the largest difference."""
    run(folder, "export", "tenants", "--model", "minilm", "--to", "web", "--output", "site", "--int8")
    report = json.loads((folder / "site" / "export.json").read_text())
    sizes = {"bytes": report["bytes"], "bytes_an_adapter": report["bytes_an_adapter"]}
    return {**sizes, "difference": report["differences"]["one.onnx"]}


def of_onnxruntime(folder: Path) -> dict[str, Row]:
    """The rows of onnxruntime, also in the browser, and of int8."""
    write_adapters(folder)
    run(folder, "merge", "run", "--model", "minilm", "--output", "merged")
    sizes = exported(folder)
    # The merged model's graph, with an adapter that changes nothing.
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged")
    nothing = get_peft_model(merged, DVoRAConfig(r=1, target_modules=["query"], task_type="SEQ_CLS"))
    nothing.save_pretrained(folder / "nothing")
    run(folder, "export", "nothing", "--model", "merged", "--to", "onnx", "--output", "merged-site")
    with (folder / "reviews.csv").open(newline="") as file:
        read = list(csv.DictReader(file))[:ROWS]
    labels = [int(row["label"] == "good") for row in read]
    rows = int8(folder, [row["text"] for row in read], labels)
    versions = {"version": version("onnxruntime")}
    rows["runtime: onnxruntime"] = {**versions, **sizes, **in_python(folder / "site")}
    if VENDOR.is_dir():
        package = json.loads((VENDOR / "onnxruntime-web" / "package.json").read_text())
        rows["runtime: onnxruntime-web"] = {"version": package["version"], **sizes, **in_browser(folder / "site")}
    return rows


def of_llama_cpp(folder: Path) -> dict[str, Row]:
    """The row of llama.cpp."""
    from benchmarks import llama_cpp

    llama_cpp.run_page(folder)
    return {"runtime: llama.cpp": {"version": version("llama-cpp-py-sync"), **llama_cpp.measured(folder)}}


MEASURES = {"onnxruntime": of_onnxruntime, "llama.cpp": of_llama_cpp}
WORKS = {
    "onnxruntime": "adapters switch; encoders, images, language models",
    "onnxruntime-web": "adapters switch; encoders, language models",
    "llama.cpp": "merged only; language models",
}
"""What tests/export/ runs."""


def main() -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=MEASURES)
    measure = MEASURES[parser.parse_args().runtime]
    with tempfile.TemporaryDirectory() as scratch:
        lay_out(Path(scratch))
        rows = measure(Path(scratch))
    file = file_of("exporting")
    made = {key: {"key": key, "machine": machine(), **row} for key, row in rows.items()}
    Console(stderr=True).print(made)
    write(file, {**read_rows(file), **made}.values())


def _of_runtime(name: str, row: Row) -> tuple[str, ...]:
    if "equal_answers" in row:
        sizes = " or ".join(f"{size / 1e6:.0f} MB ({kind})" for kind, size in row["bytes"].items())
        loading = f"{' or '.join(f'{ms:.0f}' for ms in row['load_ms'].values())}, another file"
        equal = f"{min(row['equal_answers'].values())} of {row['answers']} greedy answers equal"
        return name, WORKS[name], f"{sizes} an adapter", loading, "", equal
    return (
        *(name, WORKS[name]),
        f"{row['bytes'] / 1e6:.0f} MB + {row['bytes_an_adapter'] / 1e3:.0f} kB an adapter",
        *(f"{row['switch_ms']:.1f}", f"{row['run_ms']:.0f}", f"{row['difference']:.0e}"),
    )


def parts(result: Mapping[str, Any]) -> dict[str, str]:
    """The generated part of the page about exporting."""
    rows = {row["key"]: row for row in result["rows"]}
    runtimes = [_of_runtime(name, rows[key]) for name in WORKS if (key := f"runtime: {name}") in rows]
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
            table(("runtime", "works", "size", "switch, ms", "run, ms", "largest difference from PyTorch"), runtimes),
            table(("MiniLM", "MB", "accuracy, %", "same class as float32, %", "mean difference of logits"), quantised),
            "`benchmarks/results/exporting.json`; MiniLM, r=64, twenty adapters, one sentence; a switch reads an "
            "adapter for the first time. llama.cpp: SmolLM2-135M, [merged](export-merged.md). "
            f"int8: {rows['int8: float32']['rows']:,} rows, some of which the adapter was trained on, so only "
            "differences count.",
        )
    }


if __name__ == "__main__":
    main()
