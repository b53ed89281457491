"""Times are ratios within a round; every method's models work; the command from end to end on tiny models."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.speed.__main__ import main
from benchmarks.speed.arms import BASE, FULL, METHODS, Arm, adapted
from benchmarks.speed.memory import saved_for_backward
from benchmarks.speed.metrics import row_of, time_ratio
from benchmarks.speed.steps import training_step
from benchmarks.speed.timing import Spread, ratios
from benchmarks.speed.workloads import linears, random

# transformers deprecates its own name for a cache.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


def test_ratios_are_taken_round_by_round() -> None:
    # The machine is twice as slow in the second round: the ratio of medians would be 2.5 / 1.5.
    assert ratios([2.0, 6.0], [1.0, 2.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        ratios([1.0], [1.0, 2.0])


def test_times_are_compared_within_a_setting() -> None:
    rows = [
        {"arm": "base", "tokens": 512, "seconds": [1.0, 2.0]},
        {"arm": "VeRA r=256", "tokens": 512, "seconds": [2.0, 4.0]},
        {"arm": "VeRA r=256", "tokens": 128, "seconds": [9.0, 9.0]},
    ]
    assert time_ratio(rows, "VeRA r=256", "base", tokens=512) == Spread(2.0, 2.0, 2.0)
    assert time_ratio(rows, "VeRA r=256", "base", tokens=128) is None
    with pytest.raises(ValueError, match="found 2"):
        row_of(rows, arm="VeRA r=256")


@pytest.mark.parametrize("arm", [BASE, FULL, *(Arm(method, 4) for method in METHODS)], ids=lambda arm: arm.name)
def test_a_training_step_gives_every_gradient(arm: Arm) -> None:
    workload = linears(64, 192)
    base = workload.frozen(torch.float32)
    model = adapted(base, arm, workload.targets)
    x = workload.inputs(1, 8, torch.float32)
    training_step(workload, model, x)()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    assert bool(trained) == (arm != BASE)
    # Values off their start: a method that does nothing yet could take a short cut.
    assert torch.equal(model(x), base(x)) == (arm in (BASE, FULL))


def test_what_is_kept_is_counted_once_and_without_weights() -> None:
    layer, x = nn.Linear(8, 6), random(10, 8).requires_grad_()
    # The input for the weight's gradient, and sigmoid's output.
    assert saved_for_backward(layer, lambda x: layer(x).sigmoid(), x) == 4 * (10 * 8 + 10 * 6)
    # Views of one tensor are one tensor.
    assert saved_for_backward(layer, lambda x: (2 * x).sin() * 3, x) == 4 * 80
    assert saved_for_backward(layer, layer.requires_grad_(False), x) == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speed.json"
    assert main(["--quick", "--threads", "1", "--output", str(file)]) == 0
    content = json.loads(file.read_text(encoding="utf-8"))
    assert {row["part"] for row in content["rows"]} == {"training", "prefill", "decode", "memory"}
    assert content["not_measured"] == []
    assert "dvora dense r=16" in capsys.readouterr().out
    assert main(["--quick", "--threads", "1", "--part", "decode", "--arm", "VeRA r=16", "--rounds", "1"]) == 0
    output = capsys.readouterr().out
    assert "decode llama-64" in output
    assert "training" not in output
    assert "DoRA" not in output
    with pytest.raises(SystemExit, match="no run of the plan"):
        main(["--quick", "--part", "sleeping"])
