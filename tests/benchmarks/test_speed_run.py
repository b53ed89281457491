"""The command from end to end on tiny models, and every method's models at work."""

import json
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt

from benchmarks.speed import cuda, plan
from benchmarks.speed.__main__ import main
from benchmarks.speed.arms import BASE, FULL, Arm, adapted
from benchmarks.speed.plots import decoding, memory, ranks, tokens
from benchmarks.speed.runner import Report, carry_out
from benchmarks.speed.set_up import norm_step
from benchmarks.speed.steps import decode_step, training_step
from benchmarks.speed.workloads import linears, llama

ARMS = [BASE, FULL, *(Arm(m, 4) for m in ("LoRA", "DoRA", "VeRA", "RandLoRA", "dvora dense"))]

# transformers deprecates a property that PEFT still asks for, and its own name for a cache.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_a_training_step_gives_every_gradient(arm: Arm) -> None:
    workload = linears(64, 176)
    base = workload.frozen(torch.float32)
    model = adapted(base, arm, workload.targets)
    x = workload.inputs(1, 8, torch.float32)
    training_step(workload, model, x)()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    assert bool(trained) == (arm != BASE)
    # Values off their start: a method that does nothing yet could take a short cut.
    assert torch.equal(model(x), base(x)) == (arm in (BASE, FULL))


def test_a_decoded_token_is_always_at_the_same_place() -> None:
    workload = llama(64, 176, heads=4)
    model = workload.frozen(torch.float32)
    x = workload.inputs(2, 129, torch.float32)
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["past_key_values"].get_seq_length()), with_kwargs=True
    )
    step = decode_step(model, x)
    step()
    step()
    assert seen == [0, 128, 128]


def test_the_norm_is_timed_with_its_gradients() -> None:
    workload = linears(64, 176)
    model = adapted(workload.frozen(torch.float32), Arm("dvora dense", 4), workload.targets)
    step = norm_step(model)
    step()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_built_is_reported_and_the_rest_measured() -> None:
    report = Report()
    run = plan.Run("training", plan.linears_64, [BASE, Arm("VeRA", 4), Arm("VeRA", -1)], tokens=4, rounds=2)
    carry_out(run, report)
    assert [row["arm"] for row in report.rows] == ["base", "VeRA r=4"]
    assert all(len(row["seconds"]) == 2 for row in report.rows)
    (miss,) = report.not_measured
    assert miss["what"] == "training, linears-64, float32: VeRA r=-1"
    assert miss["reason"].startswith("RuntimeError: Trying to create tensor with negative dimension")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speed.json"
    assert main(["--quick", "--threads", "1", "--output", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert {row["part"] for row in result["rows"]} == {
        "training",
        "prefill",
        "decode",
        "memory",
        "norm",
    }
    assert result["environment"]["threads"] == 1
    assert "dvora dense r=16" in capsys.readouterr().out
    timed = [row for row in result["rows"] if row["part"] in ("training", "decode") and row["arm"] == "VeRA r=16"]
    assert len(timed) == 3
    assert all(second > 0 for row in timed for second in row["seconds"])


def test_a_narrowed_run_measures_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--threads", "1", "--part", "decode", "--arm", "VeRA r=16", "--rounds", "1"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "decode llama-64" in output
    assert "training" not in output
    assert "DoRA" not in output
    with pytest.raises(SystemExit, match="no run of the plan"):
        main([*arguments, "--tokens", "3"])


def test_every_workload_of_the_plan_has_a_base() -> None:
    for run in [*plan.whole(), *plan.quick()]:
        assert run.arms[0] == BASE
        assert len(set(run.arms)) == len(run.arms)


def test_pictures_can_be_drawn_from_any_part_of_the_rows() -> None:
    base = {"part": "training", "workload": "linears-1024", "dtype": "float32", "batch": 1, "tokens": 512}
    rows = [
        {**base, "arm": "base", "method": "base", "rank": 0, "seconds": [1.0, 1.0]},
        {**base, "arm": "VeRA r=256", "method": "VeRA", "rank": 256, "seconds": [2.0, 3.0]},
    ]
    for draw in (ranks, tokens, decoding, memory):
        for figure in (draw(rows), draw([])):
            assert figure.get_size_inches().min() > 0
            plt.close(figure)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_s_script_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda.main(["--output", str(tmp_path / "cuda.json")]) == 1
    assert "no GPU is available" in capsys.readouterr().err
