"""The benchmark of many adapters: our own LoRA gives PEFT's outputs, and the command runs from end to end."""

import json
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt

from benchmarks.many_adapters import plan
from benchmarks.many_adapters.__main__ import SECTIONS, main
from benchmarks.many_adapters.arms import ManyArm, Models, adapters_of_rows
from benchmarks.many_adapters.plots import PICTURES
from benchmarks.many_adapters.results import merge
from benchmarks.many_adapters.tables import parts
from benchmarks.many_adapters.targets import all_targets
from benchmarks.speed.arms import Arm
from benchmarks.speed.runner import Report
from benchmarks.speed.workloads import Workload, bert_square, linears, llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
EMPTY = {"environment": {"torch": "2", "peft": "0", "threads": 1}, "left_out": [], "not_measured": [], "rows": []}


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("workload", [linears(64, 176), llama(64, 176, heads=4), bert_square(64)], ids=lambda w: w.name)
def test_gathered_lora_has_the_outputs_of_peft_s(workload: Workload, tokens: int, rank: int) -> None:
    x = workload.inputs(6, tokens, torch.float32)
    with Models(workload, torch.float32, rows=6) as models, torch.no_grad():
        of_base = workload.output(models.base, x)
        # The same model again and again: nothing of a batch may stay for the next one.
        for distinct in (1, 3, 6, 1):
            outputs = []
            for way in ("adapter_names", "gathered"):
                with models.chosen(ManyArm(way, Arm("LoRA", rank), distinct, known=6))() as model:
                    outputs.append(workload.output(model, x))
            torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(outputs[0], of_base, atol=1e-3)


def test_outside_of_a_batch_gathered_lora_is_the_base() -> None:
    workload = linears(64, 176)
    x = workload.inputs(2, 1, torch.float32)
    with Models(workload, torch.float32, rows=2) as models, torch.no_grad():
        with models.chosen(ManyArm("gathered", Arm("LoRA", 1), 2, known=2))() as model:
            assert not torch.equal(workload.output(model, x), workload.output(models.base, x))
        assert torch.equal(workload.output(model, x), workload.output(models.base, x))


@pytest.mark.parametrize(("distinct", "known"), [(1, 64), (16, 64), (64, 64), (64, 10_000), (5, 7)])
def test_a_batch_has_as_many_adapters_as_it_should(distinct: int, known: int) -> None:
    rows = adapters_of_rows(ManyArm("bank", Arm("LoRA", 1), distinct, known), 64)
    assert len(set(rows)) == distinct
    assert (len(rows), min(rows)) == (64, 0)
    assert max(rows) < known


def test_every_model_of_the_plan_has_a_base_and_no_arm_twice() -> None:
    for ground in [*plan.whole().grounds, *plan.quick().grounds]:
        assert ground.arms[0] == plan.BASE
        assert len({arm.name for arm in ground.arms}) == len(ground.arms)


def test_every_target_is_of_something_that_the_plan_measures() -> None:
    rows = [
        {
            **{"part": phase.part, "workload": ground.workload.name, "dtype": ground.dtype, "layers": 1},
            **{**arm.described(), "passes": phase.passes, "kernels": 1, "seconds": [1.0]},
        }
        for ground in plan.whole().grounds
        for phase in ground.phases
        for arm in ground.arms
    ]
    of_batches = [target for target in all_targets(rows) if "64 adapters" in target.metric]
    assert len(of_batches) == 6 + 4 + 1 + 6
    assert all(target.measured is not None for target in of_batches)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "many.json"
    assert main(["--quick", "--threads", "1", "--output", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert {row["section"] for row in result["rows"]} == set(SECTIONS)
    assert result["not_measured"] == []
    assert "gathered, LoRA r=1, 8 of 8" in capsys.readouterr().out
    # A part is measured again: its rows are new, all others stay.
    assert main(["--quick", "--threads", "1", "--part", "storage", "--output", str(file)]) == 0
    again = json.loads(file.read_text(encoding="utf-8"))
    assert len(again["rows"]) == len(result["rows"])
    for section in SECTIONS:
        kept, old = ([r for r in each["rows"] if r["section"] == section] for each in (again, result))
        assert kept == old or section == "storage"
    assert set(parts(again)) == set(parts(EMPTY))


def test_rows_of_another_environment_are_not_put_beside(tmp_path: Path) -> None:
    file = tmp_path / "many.json"
    merge(file, "stream", Report(), 1.0)
    result = json.loads(file.read_text(encoding="utf-8"))
    result["environment"]["torch"] = "1.0"
    file.write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows of stream from another environment .*'torch': \('1.0'"):
        main(["--quick", "--threads", "1", "--part", "storage", "--output", str(file)])


def test_pictures_and_tables_can_be_made_of_any_part_of_the_rows() -> None:
    setting = {"part": "decode", "workload": "linears-1024-2-blocks", "dtype": "float32", "layers": 14, "passes": 4}
    arms = [plan.BASE, *plan.gathered()]
    rows = [{**setting, **arm.described(), "kernels": 9, "seconds": [1.0, 2.0]} for arm in arms]
    for draw in PICTURES.values():
        for some in (rows, []):
            figure = draw(some)
            assert figure.get_size_inches().min() > 0
            plt.close(figure)
    assert "| gathered, LoRA r=1 | 1.00 / 1.00 |" in parts({**EMPTY, "rows": rows})["many-batches"]
    assert parts(EMPTY)["many-stream"] == "\n"
