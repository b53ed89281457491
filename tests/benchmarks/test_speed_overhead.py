"""Overhead: what is known is counted, and the page says what was not counted."""

import json
from pathlib import Path

import pytest

from benchmarks.speed.metrics import Row, kernels_a_layer, row_of
from benchmarks.speed.overhead import main
from benchmarks.speed.overhead_tables import overhead

# transformers deprecates a property that PEFT still asks for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_the_command_counts_what_can_be_counted_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "overhead.json"
    assert main(["--quick", "--threads", "1", "--output", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert "kernels a layer beyond the base's, cpu, float32" in capsys.readouterr().out
    setting = {"part": "kernels", "dtype": "float32", "arm": "DoRA r=16"}
    for device in ("cpu", "meta"):
        for route, expected in (("training", 30), ("training, few tokens", 30), ("one token", 15), ("prefill", 15)):
            found = kernels_a_layer(row_of(result["rows"], device=device, route=route, **setting))
            assert found is not None
            assert found.median == expected
    timed = [row for row in result["rows"] if row["part"] == "host time"]
    assert {row["dtype"] for row in timed} == {"float32", "bfloat16"}
    assert all(len(row["seconds"]) == len(row["base_seconds"]) == 2 for row in timed)


def rows() -> list[Row]:
    base = {"part": "kernels", "route": "training", "dtype": "bfloat16", "layers": 7, "base_kernels": 70}
    lora = {**base, "arm": "LoRA r=16", "method": "LoRA", "rank": 16, "kernels": 175}
    host = {"part": "host time", "route": "one token", "dtype": "float32", "layers": 2, "base_seconds": [1e-5]}
    return [
        {**base, "device": "cpu", "arm": "base", "method": "base", "rank": 0, "kernels": 70},
        {**lora, "device": "cpu"},
        {**lora, "device": "meta", "kernels": 140},
        {**host, "arm": "VeRA r=16", "seconds": [3e-5]},
        {**host, "arm": "LoRA r=1", "seconds": [2e-5]},
    ]


def test_the_page_shows_counts_and_says_what_is_missing() -> None:
    miss = {"what": "kernels, linears-1024, meta: dvora dense r=256", "reason": "RuntimeError: no"}
    result = {"rows": rows(), "environment": {"torch": "2", "peft": "1"}, "not_measured": [miss]}
    parts = overhead(result)
    assert parts["kernels"].count("| LoRA r=16 | - / 15.0 | - / - | - / - | - / - |") == 1
    assert parts["kernels"].count("| LoRA r=16 | - / 10.0 | - / - | - / - | - / - |") == 1
    assert "- kernels, linears-1024, meta: dvora dense r=256: RuntimeError: no" in parts["kernels"]
    assert "| LoRA r=1 |  |  | 5 | 0.50 |" in parts["host"]
