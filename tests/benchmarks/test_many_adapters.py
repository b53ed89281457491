"""Many adapters: our own LoRA gives PEFT's outputs, the command runs from end to end."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from benchmarks.many_adapters.__main__ import SECTIONS, main
from benchmarks.many_adapters.arms import with_adapters
from benchmarks.many_adapters.gathered_lora import Factors, GatheredLoRA
from benchmarks.many_adapters.results import merge
from benchmarks.speed.arms import Arm, sharing_copy
from benchmarks.speed.runner import Report
from benchmarks.speed.workloads import Workload, bert, linears, llama


def factors_of(model: nn.Module) -> dict[str, Factors]:
    """The factors of all adapters of a PEFT model with LoRA, by the names that layers have in the base."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            A = torch.stack([each.weight.detach() for each in layer.lora_A.values()])
            B = torch.stack([layer.scaling[key] * each.weight.detach().T for key, each in layer.lora_B.items()])
            found[name] = Factors(A, B)
    return found


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("workload", [linears(64, 176), llama(64, 176, heads=4), bert(64, 1)], ids=lambda w: w.name)
def test_gathered_lora_has_the_outputs_of_peft_s(workload: Workload, tokens: int, rank: int) -> None:
    base, x = workload.frozen(torch.float32).eval(), workload.inputs(6, tokens, torch.float32)
    peft, names = with_adapters(base, Arm("LoRA", rank), workload.targets, 6)
    model = sharing_copy(base)
    gathered = GatheredLoRA(model, factors_of(peft))
    # The same model again and again: nothing of a batch may stay for the next one.
    for rows in ([0] * 6, [0, 1, 2, 2, 1, 0], [*range(6)], [5] * 6):
        with torch.no_grad(), gathered.rows(rows):
            for inputs in (x, -2 * x):
                outputs = workload.output(model, inputs)
                expected = workload.output(partial(peft, adapter_names=[names[row] for row in rows]), inputs)
                torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
                assert not torch.allclose(expected, workload.output(base, inputs), atol=1e-3)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "many.json"
    assert main(["--quick", "--threads", "1", "--output", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert {row["section"] for row in result["rows"]} == set(SECTIONS)
    assert result["not_measured"] == []
    assert "gathered, LoRA r=1, 8 of 8" in capsys.readouterr().out


def test_rows_of_another_environment_are_not_put_beside(tmp_path: Path) -> None:
    file = tmp_path / "many.json"
    merge(file, "loading", Report(), 1.0)
    result = json.loads(file.read_text(encoding="utf-8"))
    result["environment"]["torch"] = "1.0"
    file.write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows of loading from another environment .*'torch': \('1.0'"):
        main(["--quick", "--threads", "1", "--part", "resident", "--output", str(file)])
