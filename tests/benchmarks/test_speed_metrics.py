"""Medians, ratios, the cost model and the table of targets, from numbers that can be worked out by hand."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed.cost_model import Product, fast_product, llama_block, norm_share, relative_cost
from benchmarks.speed.metrics import expected_ratio, host_ratio, host_seconds, kernels_a_layer, row_of, time_ratio
from benchmarks.speed.results import write
from benchmarks.speed.runner import Report
from benchmarks.speed.tables import speed, targets
from benchmarks.speed.targets import Target, all_targets, beside_z
from benchmarks.speed.timing import Spread, interleaved, ratios, spread

SETTING = {"part": "training", "workload": "linears-1024", "dtype": "float32", "batch": 1, "tokens": 512}
SQUARE = [Product(1024, 1024, 1)]


def timed(arm: str, seconds: list[float], **setting: object) -> dict[str, Any]:
    method, _, rank = arm.partition(" r=")
    return {**SETTING, "arm": arm, "method": method, "rank": int(rank or 0), "seconds": seconds, **setting}


def test_the_spread_is_median_and_quartiles() -> None:
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(2.0, 3.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="at least one value"):
        spread([])


def test_ratios_are_taken_round_by_round() -> None:
    # The machine is twice as slow in the second round: the ratio of medians would be 2.5 / 1.5.
    assert ratios([2.0, 6.0], [1.0, 2.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="as many rounds"):
        ratios([1.0], [1.0, 2.0])


def test_steps_are_timed_in_turns() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds, repeats = interleaved(steps, rounds=2, warm_ups=1, at_least=0)
    assert repeats == 1
    # The warm-up, the first step once to see how long it takes, then there and back.
    assert "".join(calls) == "abc" + "a" + "abc" + "cba"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_short_steps_are_repeated() -> None:
    calls: list[int] = []
    _, repeats = interleaved({"short": lambda: calls.append(0)}, rounds=3, warm_ups=0, at_least=1e-3)
    assert repeats > 1
    assert len(calls) == 1 + 3 * repeats


def test_a_time_by_operations_and_bytes_is_calibrated_on_one_method() -> None:
    counts = {"base": (10, 100), "LoRA r=16": (11, 210), "VeRA r=4": (15, 300), "dvora dense r=4": (20, 500)}
    seconds = {"base": 1.0, "LoRA r=16": 1.3, "VeRA r=4": 9.0, "dvora dense r=4": 9.0}
    rows = [timed(arm, [seconds[arm]], operations=o, bytes=b) for arm, (o, b) in counts.items()]
    # 1.3 = (1 - s) 1.1 + s 2.1, so bytes have a share of a fifth.
    assert expected_ratio(rows, "VeRA r=4", "base", **SETTING) == pytest.approx(0.8 * 1.5 + 0.2 * 3)
    assert expected_ratio(rows, "dvora dense r=4", "VeRA r=4", **SETTING) == pytest.approx(2.6 / 1.8)
    assert expected_ratio(rows, "LoRA r=16", "base", **SETTING) == pytest.approx(1.3)
    assert expected_ratio(rows, "DoRA r=4", "base", **SETTING) is None
    assert expected_ratio([timed(arm, [1.0]) for arm in counts], "VeRA r=4", "base", **SETTING) is None
    table = speed({"rows": rows, "environment": {"torch": "2", "peft": "0", "threads": 1}, "not_measured": []})
    assert "| LoRA r=16 | 1.10 | 2.10 | 1.30 | 1.30 |" in table


@pytest.mark.parametrize(
    ("method", "rank", "tokens", "expected"),
    [
        ("base", 0, 512, 1.0),
        # dx and y: 4 x 1024^2; dW: 2 x 1024^2.
        ("full fine-tuning", 0, 512, 1.5),
        # 6 x 16 x 2048 / (4 x 1024^2)
        ("LoRA", 16, 512, 1.046875),
        # ... and 2 x 16 x 1024 x 2048 / 512 for the dense update
        ("DoRA", 16, 512, 1.046875 + 0.03125),
        # 4 x 256 x 2048 / (4 x 1024^2)
        ("VeRA", 256, 512, 1.5),
        # 4 x 256 x 1024 + 4 x 256 x 1024, and the norm: (2 x 1024 x 256^2 + 4 x 1024 x 256) / 512
        ("dvora dense", 256, 512, 1.5 + 0.0625 + 0.00048828125),
        ("dvora dense", 512, 1024, 1 + 1.0 + 0.125 + 0.00048828125),
        # More tokens than two a rank: the update is not kept, which makes that 6 x 256 x 1024.
        ("dvora dense", 256, 513, 1.625 + (0.0625 + 0.00048828125) * 512 / 513),
        # Slopes of 4 MiB are not kept: the product with G is made twice.
        ("dvora dense", 1024, 1024, 1 + 2.0 + 1.0 + 0.0009765625),
        # The updated weight: z and grad_output^T z, 2 x 256 x 1024 each, and V' twice, 4 x 1024^2 x 256 / 4096
        # ... and the norm as above
        ("dvora dense", 256, 4096, 1 + 0.25 + 0.0625 + (0.0625 + 0.00048828125) / 8),
        # 32 x 32 x 16 + 32 x 16 x 16 = 24,576 multiply-adds a product; five products; two for q once a step
        ("dvora structured", 256, 512, 1 + 5 * 49152 / 2**22 + (2 * 49152 + 2**20) / 512 / 2**22),
        # 65,536 multiply-adds a product, and 4 x 1024 x 1024 for C
        ("dvora structured", 1024, 512, 1 + 5 * 2**17 / 2**22 + (2 * 2**17 + 4 * 2**20) / 512 / 2**22),
    ],
)
def test_the_cost_model(method: str, rank: int, tokens: int, expected: float) -> None:
    assert relative_cost(method, SQUARE, rank, tokens) == pytest.approx(expected, rel=1e-12)


def test_the_norm_s_share_is_what_a_step_takes_longer_with_it() -> None:
    # (2 x 1024 x 256^2 + 4 x 1024 x 256) / (4 x 1024^2), once a step
    share = norm_share("dvora dense", SQUARE, 256, 512)
    assert share == pytest.approx(32.25 / 512 / relative_cost("dvora dense", SQUARE, 256, 512))


def test_siblings_share_the_products_with_a() -> None:
    # 4 x 256 x 1024 a layer for the products with A, over 4 x 1024^2.
    alone, together = (relative_cost("dvora dense", [Product(1024, 1024, n)] * n, 256, 256) for n in (1, 4))
    assert alone - together == pytest.approx(0.25 * 3 / 4, rel=1e-6)


def test_a_block_has_the_right_number_of_weights() -> None:
    assert sum(p.in_features * p.out_features for p in llama_block(1024, 2816)) == 4 * 1024**2 + 3 * 1024 * 2816


def test_fast_products() -> None:
    # 2816 = 44 x 64, rank 1024 = 32 x 32
    assert fast_product(2816, 1024) == 2 * (44 * 64 * 32 + 44 * 32 * 32)
    # A rank above the size is a second block.
    assert fast_product(64, 80) == fast_product(64, 64) + fast_product(64, 16)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown method 'LoHa'"):
        relative_cost("LoHa", SQUARE, 4, 512)


def test_times_are_compared_within_a_setting() -> None:
    rows = [timed("base", [1.0, 2.0]), timed("VeRA r=256", [2.0, 4.0]), timed("VeRA r=256", [9.0, 9.0], tokens=128)]
    assert time_ratio(rows, "VeRA r=256", "base", tokens=512) == Spread(2.0, 2.0, 2.0)
    assert time_ratio(rows, "VeRA r=256", "base", tokens=128) is None
    with pytest.raises(ValueError, match="found 2"):
        row_of(rows, arm="VeRA r=256")


def counted(arm: str, kernels: int, route: str = "training, few tokens") -> dict[str, Any]:
    method, _, rank = arm.partition(" r=")
    row = {"arm": arm, "method": method, "rank": int(rank or 0), "layers": 7, "kernels": kernels, "base_kernels": 80}
    return {"part": "kernels", "device": "cpu", "dtype": "float32", "route": route, **row}


def hosted(arm: str, seconds: list[float]) -> dict[str, Any]:
    row = {"part": "host time", "dtype": "float32", "route": "training, few tokens", "arm": arm, "layers": 2}
    return {**row, "seconds": seconds, "base_seconds": [1.0, 1.0]}


def test_overhead_is_a_layers_share_of_what_the_base_does_not_need() -> None:
    assert kernels_a_layer(counted("LoRA r=1", 150)) == Spread(10, 10, 10)
    assert kernels_a_layer(None) is None
    rows = [hosted("VeRA r=16", [3.0, 5.0]), hosted("dvora dense r=16", [5.0, 9.0])]
    assert host_seconds(rows[1]) == [2.0, 4.0]
    assert host_ratio(rows, "dvora dense r=16", "VeRA r=16") == Spread(2.0, 2.0, 2.0)
    assert host_ratio(rows, "LoRA r=16", "VeRA r=16") is None


def measured_rows() -> Iterator[dict[str, Any]]:
    """A result file with one figure that is met, one that is not, and one of each kind beside."""
    yield timed("base", [1.0, 1.0, 1.0])
    yield timed("VeRA r=256", [2.0, 2.0, 2.0])
    yield timed("dvora dense r=256", [1.8, 1.9, 2.2])
    yield timed("dvora structured r=256", [1.9, 1.9, 1.9])
    llama = {"workload": "llama-1024", "tokens": 1, "part": "decode"}
    for batch in (1, 16):
        yield timed("base", [1.0], batch=batch, **llama)
        yield timed("DoRA r=16", [9.0], batch=batch, **llama)
        yield timed("dvora dense r=256", [1.5], batch=batch, **llama)
    arm = {"arm": "dvora dense r=256", "method": "dvora dense", "rank": 256}
    structured = {"arm": "dvora structured r=1024", "method": "dvora structured", "rank": 1024}
    layer = {"part": "layer memory", "tokens": 10, "out_features": 4, "z_values": 30, "keeps_input": False, **arm}
    yield {**layer, "in_features": 3, "saved_values": 30, "held_values": 74}
    yield {**layer, "in_features": 5, "saved_values": 78, "held_values": 38}
    memory = {"part": "memory", "workload": "linears-1024", "dtype": "float32", "tokens": 10, **arm}
    yield {**memory, "constant_bytes": 1, "weight_bytes": 5, "held_bytes": 2_000_000, "saved_bytes": 3_000_000}
    yield timed("base", [1.0], workload="smollm2", tokens=128)
    yield timed("VeRA r=256", [1.25], workload="smollm2", tokens=128)
    compiled = {"part": "compile", "workload": "llama-1024"}
    yield timed("base", [2.0], **compiled)
    yield {**timed("base", [1.5], **compiled), "arm": "base compiled"}
    square = {"part": "adapterhub", "workload": "bert-square-1024"}
    versions = {"adapters": "1.3.0", "transformers": "4.57.6"}
    yield timed("base", [1.0], **square, environment=versions)
    yield timed("AdapterHub DVoRA r=256", [3.5], **square, environment=versions)
    yield {"part": "resident", **arm, "before_bytes": 600_000_000, "most_bytes": 1_700_000_000}
    yield {"part": "norm", "workload": "linears-1024", "tokens": 1024, **arm, "seconds": [1.0], "step_seconds": [50.0]}
    yield {
        "part": "norm",
        "workload": "linears-1024",
        "tokens": 512,
        **structured,
        "seconds": [1.0],
        "step_seconds": [10.0],
    }
    yield {**counted("dvora dense r=256", 920), "workload": "llama-1024-8-blocks"}
    yield hosted("VeRA r=16", [3.0, 5.0])
    yield hosted("dvora dense r=16", [5.0, 9.0])
    yield {"part": "set-up", "in_features": 3, **arm, "seconds": [1.0], "forward_seconds": [2.0]}
    yield {"part": "set-up", "in_features": 5, **arm, "seconds": [3.0], "forward_seconds": [2.0]}
    yield {"part": "adapting", "workload": "smollm2", **arm, "seconds": [4.0, 6.0, 5.5]}


def target_of(metric: str) -> Target:
    (found,) = [target for target in all_targets(list(measured_rows())) if target.metric == metric]
    return found


@pytest.mark.parametrize(
    ("metric", "median", "met"),
    [
        ("training, 512 tokens: dvora dense r=256 to VeRA r=256", 0.95, True),
        ("training, 512 tokens: dvora structured r=256 to VeRA r=256", 0.95, False),
        ("kernels a layer, training, few tokens: dvora dense r=256", 120, False),
        ("host time beyond the base's, training, few tokens: dvora dense r=16 to VeRA r=16", 2.0, True),
        ("the norm's share of a step of 512 tokens: dvora structured r=1024", 0.1, False),
        ("decode, batch 1: DoRA r=16 to dvora dense r=256", 6.0, False),
        ("decode, batch 16: dvora dense r=256 to the base", 1.5, False),
        ("kept for backward beside z, in tokens x out, worst layer: dvora dense", 1.2, False),
        ("layers that keep their input, of 2: dvora dense", 0, True),
        ("constants to adapted weights, bytes: dvora dense r=256", 0.2, True),
        ("the norm's share of a step of 1,024 tokens: dvora dense r=256", 0.02, True),
        ("set-up of a layer to 2 x out tokens through it, worst layer: dvora dense r=256", 1.5, False),
        ("adapting a model of 135 million parameters: dvora dense r=256", 5.5, False),
    ],
)
def test_a_target_is_met_by_the_median(metric: str, median: float, met: bool) -> None:
    found = target_of(metric)
    assert found.measured is not None
    assert found.measured.median == pytest.approx(median)
    assert found.met is met


def test_a_target_has_the_value_by_operation_count() -> None:
    blocks = [relative_cost(method, llama_block(1024, 2816), 256, 512) for method in ("dvora dense", "VeRA")]
    assert target_of("training, 512 tokens: dvora dense r=256 to VeRA r=256").model == blocks[0] / blocks[1]
    assert target_of("decode, batch 1: DoRA r=16 to dvora dense r=256").model is None


def test_a_target_that_was_not_measured_is_neither_met_nor_missed() -> None:
    assert target_of("training, 4,096 tokens: dvora dense r=256 to VeRA r=256").met is None
    assert target_of("decode, batch 1: dvora dense r=256 to VeRA r=256").met is None


def test_what_is_kept_is_the_larger_of_two_counts() -> None:
    layer = {"tokens": 2, "out_features": 5, "z_values": 4}
    assert beside_z({**layer, "saved_values": 14, "held_values": 9}) == 1.0
    assert beside_z({**layer, "saved_values": 9, "held_values": 24}) == 2.0


def test_the_tables_of_a_result_file(tmp_path: Path) -> None:
    report = Report()
    for row in measured_rows():
        report.add(row)
    report.miss("training: dvora merged", "not there")
    write(report, tmp_path / "speed.json", seconds=61.4)
    result = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert (result["seconds"], len(result["rows"]), result["rows"][2]["seconds"]) == (61, 28, [1.8, 1.9, 2.2])
    lines, rows = speed(result).splitlines(), targets(result).splitlines()
    assert "| dvora dense r=256 | 1.90 |  |  |  |  | 1.50 | 1.50 | 3 | 1,100 |" in lines
    row = "| training, 512 tokens: dvora dense r=256 to VeRA r=256 | ≤ 1 | 0.95 | 0.925 to 1.02 | 0.995 |  | yes |"
    assert row in rows
    assert "| decode, batch 1: DoRA r=16 to dvora dense r=256 | ≥ 8 | 6 |  |  |  | no |" in rows
    assert (
        "| the norm's share of a step of 1,024 tokens: dvora dense r=256 | ≤ 5.0% | 2.0% |  | 1.8% |  | yes |" in rows
    )
    assert any(line.endswith("| ≤ 0.97 | not measured | | | | |") for line in rows)
    assert "| SmolLM2-135M, 128 tokens |  |  |  | 1.25 |  |  |" in lines
    assert any(line.endswith("in units of eager mode: base 0.75.") for line in lines)
    assert any(line.endswith("layers, 512 tokens: AdapterHub DVoRA r=256 3.50.") for line in lines)
    assert "- training: dvora merged: not there" in lines
