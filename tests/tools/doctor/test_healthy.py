"""The doctor finds nothing on healthy models, and leaves them as they were."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from dvora.tools.doctor import Examination, examine
from dvora.tools.doctor.checks import CHECKS
from tests.peft import tiny
from tests.tools.doctor.models import METHODS, Convolved, adapted, inputs, small_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
]

TARGETS: dict[str, Any] = {
    "bert": "all-linear",
    "llama": "all-linear",
    "gpt2": ["c_attn", "c_proj", "wte"],
    "t5": ["q", "v", "wo"],
}
# PEFT's VeRA knows no embeddings, and has one size of A for all layers.
VERA_TARGETS = {**TARGETS, "gpt2": ["c_attn"]}


def findings(examination: Examination) -> dict[str, str]:
    return {each.check: each.found for each in examination.findings if each.status not in ("pass", "skip")}


def examined(model: PeftModel, batch: Any, **more: Any) -> Examination:
    return examine(model, batch, **{"fresh_process": False, **more})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TARGETS)
def test_healthy_models_pass(name: str, method: str) -> None:
    targets = (VERA_TARGETS if method == "vera" else TARGETS)[name]
    if method in ("lora", "dora") and name == "gpt2":
        # See test_a_merge_into_an_embedding_that_is_the_head_too.
        targets = ["c_attn", "c_proj"]
    base = tiny.MODELS[name]()
    batch = tiny.inputs(base)
    found = findings(examined(adapted(base, method, targets), batch))
    if method == "vera":
        # PEFT's VeRA takes `adapter_names` and does not look at it: every row gets the adapter.
        assert found.pop("mixed batch")
    assert found == {}


@pytest.mark.parametrize("method", ["dvora", "lora", "dora"])
def test_healthy_convolutions_pass(method: str) -> None:
    batch = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    assert findings(examined(adapted(Convolved(), method, ["conv", "out"]), batch)) == {}


class Rounded(nn.Module):
    """Linear, of which nothing but its forward pass is known."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 12, 7
        self.register_buffer("whole", torch.arange(84).reshape(7, 12) % 17 - 8)
        self.register_buffer("scale", torch.full((7,), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.whole.to(x.dtype).T * self.scale


def test_layers_that_show_their_forward_pass_only() -> None:
    batch = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    base = nn.Sequential()
    base.add_module("first", Rounded())
    base.add_module("second", nn.utils.parametrizations.weight_norm(nn.Linear(7, 5)))
    found = examined(adapted(base, "dvora", ["first", "second"]), batch)
    assert found.of("outputs").figures["layers"] == 2
    assert findings(found) == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["dvora", "lora", "dora"])
def test_healthy_models_of_other_dtypes_pass(method: str, dtype: torch.dtype) -> None:
    base = tiny.bert().to(dtype)
    found = findings(examined(adapted(base, method, "all-linear", moved=0.2), tiny.inputs(base)))
    if dtype != torch.float64:
        found.pop("merge rounding", None)
    assert found == {}


@pytest.mark.parametrize("method", METHODS)
def test_a_file_loads_in_a_fresh_process_bit_for_bit(method: str) -> None:
    finding = examine(small_model(method), inputs()).of("save and load")
    assert (finding.status, finding.figures["worst"]) == ("pass", 0.0)


def test_an_untrained_adapter_is_reported_to_do_nothing() -> None:
    found = findings(examined(small_model(moved=0.0), inputs()))
    assert list(found) == ["movement"]


def test_an_adapter_that_was_loaded_to_be_used_is_examined_too() -> None:
    model = small_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert findings(examined(model, inputs())) == {}


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(method: str) -> None:
    model = small_model(method).train()
    before = copy.deepcopy(model.state_dict())
    switches = {name: each.requires_grad for name, each in model.named_parameters()}
    model.base_model.model.lin0.eval()
    modes = {name: each.training for name, each in model.named_modules()}
    gradients = {name: each.grad for name, each in model.named_parameters()}
    hooks = [list(module._forward_pre_hooks) for module in model.modules()]
    examined(model, inputs())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: each.requires_grad for name, each in model.named_parameters()} == switches
    assert {name: each.training for name, each in model.named_modules()} == modes
    assert {name: each.grad for name, each in model.named_parameters()} == gradients
    assert model.active_adapters == ["default"]
    assert [list(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_its_own_loss_and_labels_are_used() -> None:
    base = tiny.bert()
    model = adapted(base, "dvora", "all-linear")
    batch = {**tiny.inputs(base), "labels": torch.tensor([0, 1, 2, 0])}
    assert findings(examined(model, batch)) == {}
    losses: list[Any] = []

    def loss(outputs: Any) -> torch.Tensor:
        losses.append(outputs.logits.square().sum())
        return losses[-1]

    assert findings(examined(model, batch, loss=loss)) == {}
    assert losses


@pytest.mark.parametrize("method", ["dvora", "lora"])
def test_rows_of_zeros_are_healthy(method: str) -> None:
    base = tiny.mlp()
    with torch.no_grad():
        base.lin1.weight[3:5] = 0
    assert findings(examined(adapted(base, method, ["lin0", "lin1"]), inputs())) == {}


def test_some_layers_stand_for_all() -> None:
    found = examined(adapted(tiny.bert(), "dvora", "all-linear"), tiny.inputs(tiny.bert()), layers=3)
    assert (found.layers, found.looked_at) == (14, 3)
    assert found.of("outputs").figures["layers"] == 3
    assert found.of("calls").figures["layers"] == 14
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        examined(small_model(), inputs(), layers=0)


def test_what_cannot_be_examined_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a PeftModel, got MLP"):
        examine(tiny.mlp(), inputs())  # type: ignore[arg-type]
    model = small_model()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge it first"):
        examine(model, inputs())
    model.unmerge_adapter()
    model.base_model.model.lin2 = nn.Sequential(model.base_model.model.lin2, Nothing())
    with pytest.raises(TypeError, match="without a tensor of numbers"):
        examine(model, inputs())


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> list[int]:
        return [1]


def test_every_check_is_explained_on_its_page_and_made() -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "doctor.md").read_text(encoding="utf-8")
    table = re.search(r"^\| check \|.*?\n\n", page, flags=re.MULTILINE | re.DOTALL)
    assert table is not None
    assert [row.split("|")[1].strip() for row in table[0].splitlines()[2:] if row] == list(CHECKS)
    model = small_model()
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    found = examine(model, inputs(), optimizer=optimizer)
    assert [finding.check for finding in found.findings] == list(CHECKS)
