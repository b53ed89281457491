"""An adapter belongs to the base model that it was trained on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import dvora
from dvora.peft import base_weight
from dvora.peft.layer import layers_in
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.state.adapter_files import edit_config, save_bert
from tests.peft.tiny import MODELS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_bert(tmp_path)


@torch.no_grad()
def scale(model: torch.nn.Module, factor: float) -> torch.nn.Module:
    model.bert.encoder.layer[1].output.dense.weight.mul_(factor)
    return model


def test_another_base_of_the_same_shapes_is_refused_by_layer(folder: Path) -> None:
    other = scale(MODELS["bert"](), 1.5)
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"1\.output\.dense: .*another base model"):
        PeftModel.from_pretrained(other, folder)
    assert_unchanged(other, before)


def test_another_random_base_of_the_same_shapes_and_scale_is_refused(folder: Path) -> None:
    other = MODELS["bert"]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() == 2:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(other, folder)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda weight: weight.flip(0), id="rows in another order"),
        pytest.param(lambda weight: weight.flip(1), id="columns in another order"),
        pytest.param(lambda weight: -weight, id="signs"),
    ],
)
def test_another_base_of_the_same_shapes_and_norms_is_refused(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    other = MODELS["bert"]()
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(change(module.weight))
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(other, folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_same_base_in_another_dtype_is_accepted(folder: Path, dtype: torch.dtype) -> None:
    PeftModel.from_pretrained(MODELS["bert"]().to(dtype), folder)


@torch.no_grad()
def rounded(model: torch.nn.Module, bits: int) -> torch.nn.Module:
    """Weights in so many bits, row by row."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            step = module.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            module.weight.copy_((module.weight / step).round() * step)
    return model


def test_another_quantisation_is_reported_and_accepted(folder: Path, tmp_path: Path) -> None:
    message = r"\d+ of 11 adapted weights differ, bert\.\S+ by about \d+% of its norm"
    with pytest.warns(UserWarning, match=message):
        model = PeftModel.from_pretrained(rounded(MODELS["bert"](), 4), folder)
    with pytest.warns(UserWarning, match=message):
        model.load_adapter(folder, "second")
    with pytest.warns(UserWarning, match=message):
        dvora.hotswap_adapter(model, folder)
    model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    with pytest.warns(UserWarning, match=message):
        PeftModel.from_pretrained(MODELS["bert"](), tmp_path / "again")


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_base_in_eight_bits_is_near_enough(folder: Path) -> None:
    PeftModel.from_pretrained(rounded(MODELS["bert"](), 8), folder)


def test_probes_are_taken_anew_when_memory_is_used_again(folder: Path) -> None:
    """A weight of the address and the number of writes that the old one had is another weight all the same."""
    model = PeftModel.from_pretrained(MODELS["bert"](), folder)
    layer = layers_in(model)[0]
    linear = layer.base_layer
    values = -linear.weight.detach()
    for _ in range(50):
        address, version = linear.weight.data_ptr(), linear.weight._version
        del linear.weight
        linear.weight = torch.nn.Parameter(values.clone(), requires_grad=False)
        if (linear.weight.data_ptr(), linear.weight._version) == (address, version):
            break
    else:
        pytest.skip("the allocator did not use the memory again")
    expected = base_weight.fingerprint_of(values, values.norm(dim=1))
    assert layer.present_fingerprint() == expected


def test_another_base_is_accepted_if_the_probes_are_dropped_on_purpose(folder: Path) -> None:
    edit_config(folder, base_probes=None)
    PeftModel.from_pretrained(scale(MODELS["bert"](), 1.5), folder)


def test_a_base_of_other_shapes_is_refused(folder: Path) -> None:
    config = MODELS["bert"]().config
    config.intermediate_size = 64
    with torch.random.fork_rng(devices=[]):
        other = type(MODELS["bert"]())(config)
    edit_config(folder, base_probes=None)
    with pytest.raises(ValueError, match=r"0\.intermediate\.dense\.dvora_\S+ has shape \(48,\).* \(64,\)"):
        PeftModel.from_pretrained(other, folder)
