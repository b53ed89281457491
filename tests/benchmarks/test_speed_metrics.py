"""Medians, ratios and the table of targets, from numbers that can be worked out by hand."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed.metrics import host_ratio, host_seconds, kernels_a_layer, row_of, time_ratio
from benchmarks.speed.results import write
from benchmarks.speed.runner import Report
from benchmarks.speed.tables import speed, targets
from benchmarks.speed.targets import Target, all_targets, beside_z
from benchmarks.speed.timing import Spread, interleaved, ratios, spread

SETTING = {"part": "training", "workload": "linears-1024", "dtype": "float32", "batch": 1, "tokens": 512}


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
    assert (result["seconds"], len(result["rows"]), result["rows"][2]["seconds"]) == (61, 26, [1.8, 1.9, 2.2])
    lines, rows = speed(result).splitlines(), targets(result["rows"]).splitlines()
    assert "| dvora dense r=256 | 1.90 |  |  |  |  | 1.50 | 1.50 | 3 | 1,100 |" in lines
    row = "| training, 512 tokens: dvora dense r=256 to VeRA r=256 | ≤ 1 | 0.95 | 0.925 to 1.02 | yes |"
    assert row in rows
    assert "| decode, batch 1: DoRA r=16 to dvora dense r=256 | ≥ 8 | 6 |  | no |" in rows
    assert "| the norm's share of a step of 1,024 tokens: dvora dense r=256 | ≤ 5.0% | 2.0% |  | yes |" in rows
    assert any(line.endswith("| ≤ 0.97 | not measured | | |") for line in rows)
    assert "| SmolLM2-135M, 128 tokens |  |  |  | 1.25 |  |  |  |" in lines
    assert any(line.endswith("layers, 512 tokens: AdapterHub DVoRA r=256 3.50.") for line in lines)
    assert "- training: dvora merged: not there" in lines
