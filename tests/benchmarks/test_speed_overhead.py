"""Overhead: what is known is counted, the estimate is its arithmetic, and the page says what was not counted."""

import json
from pathlib import Path

import pytest

from benchmarks.speed.estimate import Assumptions, step
from benchmarks.speed.metrics import Row, kernels_a_layer, row_of
from benchmarks.speed.overhead import main
from benchmarks.speed.overhead_tables import overhead, with_overhead

# transformers deprecates a property that PEFT still asks for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SMALL = Assumptions(hidden=10, intermediate=20, blocks=3, tokens=100, launch_seconds=2.0, operations=1000.0)


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


def test_a_step_takes_at_least_its_launches_and_its_products() -> None:
    # Four layers of 10 x 10 and three of 10 x 20, in each of three blocks.
    assert (SMALL.layers, SMALL.weights) == (21, 3000)
    assert SMALL.base_seconds == 4 * 3000 * 100 / 1000
    of_base = step("base", 0, 0, 3, SMALL)
    assert (of_base.launches, of_base.host_seconds, of_base.compute_seconds, of_base.seconds) == (63, 126, 1200, 1200)
    # 6 x 5 x (4 x 20 + 3 x 30) operations a token in a block, beside 4 x 1000.
    lora = step("LoRA", 5, 27, 3, SMALL)
    assert lora.compute_seconds == pytest.approx(1200 * (1 + 30 * 170 / 4000))
    assert lora.seconds == lora.compute_seconds
    assert step("LoRA", 5, 197, 3, SMALL).seconds == 21 * 200 * 2


def test_the_assumed_model_has_seven_billion_parameters_in_224_layers() -> None:
    assert Assumptions().layers == 224
    assert Assumptions().weights == 32 * (4 * 4096**2 + 3 * 4096 * 11008)


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
    # 224 x (10 + 10) launches of 5 µs; products as the cost model says.
    assert "| LoRA r=16 | 10.0 | 4,480 | 22 | 33 | 33 |" in parts["estimate"]
    assert "| dvora dense r=256 | not counted |" in parts["estimate"]


def test_the_overheads_own_file_goes_before_the_rows_of_the_whole_benchmark() -> None:
    speed = {"rows": [{"part": "training"}, {"part": "kernels", "kernels": 1}], "environment": {}}
    joined = with_overhead(speed, {"rows": [{"part": "kernels", "kernels": 2}], "environment": {}})
    assert joined["rows"] == [{"part": "training"}, {"part": "kernels", "kernels": 2}]
