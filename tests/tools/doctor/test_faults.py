"""The doctor finds faults that are planted, each by its name, and real ones of other libraries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dvora.tools.doctor import Finding, examine
from dvora.training import parameter_groups, recommended_rates
from tests.peft import tiny
from tests.tools.doctor.models import METHODS, adapted, four_bits, inputs, small_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
]


def finding(model: PeftModel, check: str, batch: Any = None, **more: Any) -> Finding:
    return examine(model, inputs() if batch is None else batch, **{"fresh_process": False, **more}).of(check)


def layer(model: PeftModel, name: str = "lin1") -> Any:
    return model.base_model.model.get_submodule(name)


@pytest.mark.parametrize(("method", "option"), [("dvora", "init_weights"), ("lora", "init_lora_weights")])
def test_a_start_that_is_not_the_base(method: str, option: str) -> None:
    found = finding(small_model(method, **{option: False}), "identity at the start")
    assert found.status == "fail"
    assert option in found.advice


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_computes_something_else(method: str) -> None:
    model = small_model(method)
    broken, right = layer(model), layer(model).forward
    broken.forward = lambda x, *rest, **more: right(x, *rest, **more) + 1e-3 * x[..., :1]
    found = finding(model, "outputs")
    assert (found.status, found.layers) == ("fail", ("lin1",))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [lambda g: 1.01 * g, lambda g: torch.where(g > 0, g, 0)], ids=["longer", "cut"])
def test_a_gradient_that_is_not_one(method: str, wrong: Callable[[Tensor], Tensor]) -> None:
    model = small_model(method)
    next(each for each in layer(model).parameters() if each.requires_grad).register_hook(wrong)
    found = finding(model, "gradients")
    assert (found.status, found.layers) == ("fail", ("lin1",))


OF_NORMS: dict[str, dict[str, int]] = {
    "one group": {},
    "groups with a constant": {"r": 1, "lambda_d_groups": 2},
    "groups that read the weight": {"lambda_d_groups": 3},
}


@pytest.mark.parametrize("settings", OF_NORMS.values(), ids=OF_NORMS)
def test_norms_of_a_base_that_was_changed_behind_its_back(settings: dict[str, int]) -> None:
    model = small_model(**settings)
    # Through NumPy, which bypasses autograd's count of changes.
    layer(model).base_layer.weight.detach().numpy()[:] *= 1.1
    found = examine(model, inputs(), fresh_process=False)
    for check in ("norm constants", "outputs"):
        assert (found.of(check).status, found.of(check).layers) == ("fail", ("lin1",))


@pytest.mark.parametrize("settings", OF_NORMS.values(), ids=OF_NORMS)
def test_rows_that_were_turned_behind_the_base_s_back(settings: dict[str, int]) -> None:
    """Their norms are what they were: only what reads the weight in every pass sees what it is now."""
    model = small_model(moved=0.3, **settings)
    weight = layer(model).base_layer.weight.detach().numpy()
    weight[:, ::2] *= -1
    examined = examine(model, inputs(), fresh_process=False)
    for check in ("norm constants", "outputs"):
        found = examined.of(check)
        expected = ("pass", ()) if settings == {"lambda_d_groups": 3} else ("fail", ("lin1",))
        assert (found.status, found.layers) == expected


def test_rows_that_the_update_cancels() -> None:
    model = small_model("dora", r=10, lora_alpha=10)
    first = layer(model, "lin0")
    with torch.no_grad():
        first.lora_A["default"].weight.copy_(torch.eye(10))
        first.lora_B["default"].weight.copy_(-0.95 * first.base_layer.weight)
    found = finding(model, "cancelled rows")
    assert (found.status, found.layers, found.figures["worst"]) == ("warn", ("lin0",), 1.0)


class WithSpare(tiny.MLP):
    """Has a layer that nobody calls, one that no gradient reaches, and one whose gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.idle = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.lin0(x)).detach()
        return self.lin2(torch.tanh(self.lin1(hidden + 0 * self.idle(hidden))))


@pytest.mark.parametrize("method", ["dvora", "lora", "vera"])
def test_layers_that_are_not_called_and_values_that_no_gradient_reaches(method: str) -> None:
    model = adapted(WithSpare(), method, ["lin0", "lin1", "spare", "idle"])
    called = finding(model, "calls")
    assert (called.status, called.layers) == ("fail", ("spare",))
    received = finding(model, "gradients received")
    assert received.status == "fail"
    assert {name.split(".")[0] for name in received.layers} == {"lin0", "spare", "idle"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(method: str, value: float) -> None:
    model = small_model(method)
    with torch.no_grad():
        next(each for each in layer(model).parameters() if each.requires_grad).flatten()[0] = value
    examined = examine(model, inputs(), fresh_process=False)
    found = examined.of("values")
    assert found.status == "fail"
    assert all(name.startswith("lin1") for name in found.layers)
    # Nothing that is no number is below a limit.
    assert examined.of("outputs").status == "fail"


@pytest.mark.parametrize("method", ["dvora", "magnitude", "dora"])
def test_a_magnitude_that_ran_away(method: str) -> None:
    model = small_model(method)
    vector = next(each for name, each in layer(model).named_parameters() if "magnitude" in name)
    with torch.no_grad():
        vector.mul_(2)
    found = finding(model, "movement")
    assert (found.status, found.layers) == ("fail", ("lin1",))


def test_learning_rates_that_look_wrong() -> None:
    model = small_model()

    def finding_of(groups: Any) -> Finding:
        return finding(model, "learning rates", optimizer=torch.optim.AdamW(groups))

    rates = recommended_rates(model)
    assert finding_of(parameter_groups(model, 0.01, learning_rates=rates)).status == "pass"
    assert finding_of(parameter_groups(model, 0.01, learning_rates={"magnitude": 0.5})).status == "warn"
    assert "rate of zero" in finding_of(parameter_groups(model, 0.01, learning_rates={**rates, "lambda_d": 0.0})).found
    few = parameter_groups(model, 0.01, learning_rates=rates)[:1]
    found = finding_of(few)
    assert (found.status, len(found.layers)) == ("fail", 6)


def test_a_merge_that_rounds_the_update_away() -> None:
    base = tiny.bert().to(torch.bfloat16)
    found = finding(adapted(base, "dvora", "all-linear", moved=1e-3), "merge rounding", tiny.inputs(base))
    assert found.status == "warn"
    assert "float32" in found.advice


@pytest.mark.parametrize("method", ["dvora", "lora", "dora", "vera"])
def test_a_merge_that_is_not_the_forward_pass(method: str) -> None:
    model = small_model(method)
    broken, name = layer(model), "merge_quietly" if method == "dvora" else "merge"
    right = getattr(broken, name)

    def merge(*arguments: Any, **more: Any) -> Any:
        found = right(*arguments, **more)
        broken.base_layer.weight.data[0] *= 1.05
        return found

    setattr(broken, name, merge)
    assert finding(model, "merge").status == "fail"


def test_rows_of_a_batch_that_get_another_adapter() -> None:
    model = small_model()
    broken, right = layer(model), layer(model).forward
    broken.forward = lambda x, adapter_names=None: right(x)
    assert finding(model, "mixed batch").status == "fail"


def test_a_file_that_is_not_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, right = small_model(), PeftModel.save_pretrained

    def rounded(self: PeftModel, folder: str, **more: Any) -> None:
        right(self, folder, **more)
        file = Path(folder) / "adapter_model.safetensors"
        save_file({name: value.bfloat16().float() for name, value in load_file(file).items()}, file)

    monkeypatch.setattr(PeftModel, "save_pretrained", rounded)
    found = examine(model, inputs()).of("save and load")
    assert found.status == "fail"


def test_peft_s_vera_ignores_which_row_has_which_adapter() -> None:
    """A real one: VeRA's layers take `adapter_names` and give every row the active adapter, without a word."""
    found = finding(small_model("vera"), "mixed batch")
    assert found.status == "fail"
    assert found.figures["worst"] > 1e-3


def test_a_merge_into_an_embedding_that_is_the_head_too() -> None:
    """A real one: LoRA on a tied embedding is merged into the head as well, which the adapted model leaves alone."""
    base = tiny.gpt2()
    found = finding(adapted(base, "lora", ["wte"]), "merge", tiny.inputs(base))
    assert (found.status, found.figures["worst"] > 0.1) == ("fail", True)
    refused = finding(adapted(tiny.gpt2(), "dvora", ["wte"]), "merge", tiny.inputs(base))
    assert refused.status == "skip"
    assert "lm_head" in refused.found


def test_peft_s_dora_on_a_four_bit_base_that_has_answered_once() -> None:
    """A real one: bitsandbytes repacks its weight in the first evaluation on a CPU, and PEFT measures what is left.

    It does so with AVX-512 bf16 only; elsewhere there is nothing to find.
    """
    batch, base = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), four_bits()
    repacks = base[0].support_avx512bf16_for_cpu
    examined = examine(adapted(base, "dora", ["0", "2"]), batch, fresh_process=False)
    status = "fail" if repacks else "pass"
    assert (examined.of("outputs").status, examined.of("outputs").figures["worst"] > 0.05) == (status, repacks)
    assert ("gemv_4bit" in examined.of("gradients received").found) == repacks
    healthy = examine(adapted(four_bits(), "dvora", ["0", "2"]), batch, fresh_process=False)
    assert healthy.healthy, str(healthy)


def test_rows_that_are_tiny_beside_their_bias() -> None:
    base = tiny.mlp()
    with torch.no_grad():
        base.lin1.weight[::5] *= 1e-6
    found = finding(adapted(base, "dvora", ["lin0", "lin1"]), "small rows")
    assert (found.status, found.layers) == ("warn", ("lin1",))
