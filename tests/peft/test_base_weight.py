"""How base weights are read and recognised: opaque ones by their forward, emptied ones, other bases."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

import dvora
from dvora import DVoRAConfig
from dvora.peft import base_weight
from dvora.peft.base_weight import CHUNK, device_of, input_dtype, read_bias, read_operating_weight
from dvora.peft.layer import layers_in
from tests.peft.adapter_files import edit_config, save_bert
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, gradients, outputs, same_bits, train_vectors


class Recording(nn.Module):
    """A layer that is read through its forward, and remembers what it was asked."""

    def __init__(self, in_features: int, out_features: int, bias: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("values", torch.randn(out_features, in_features, dtype=torch.float64).to(dtype))
        self.offset = bias
        self.batches: list[int] = []
        self.seen_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        self.seen_dtype = x.dtype
        return x @ self.values.T + self.offset


class Precision(NamedTuple):
    dtype: torch.dtype
    error: float


@pytest.mark.parametrize(
    "precision",
    [Precision(torch.float32, 1e-6), Precision(torch.bfloat16, 0.01), Precision(torch.float16, 2e-3)],
    ids=lambda precision: str(precision.dtype),
)
@pytest.mark.parametrize("bias", [0.0, 1.0, 50.0])
def test_the_weight_is_read_whatever_the_bias(precision: Precision, bias: float) -> None:
    layer = Recording(40, 30, bias, precision.dtype)
    found = read_operating_weight(layer, "layer")
    assert found.dtype == torch.float32
    assert (found - layer.values.float()).norm() <= precision.error * layer.values.float().norm()


def test_wide_layers_are_read_in_chunks() -> None:
    layer = Recording(2 * CHUNK + 3, 2, 0.0)
    assert torch.allclose(read_operating_weight(layer, "layer"), layer.values, atol=1e-6)
    assert max(layer.batches) == CHUNK


def test_a_hidden_bias_is_read_and_an_absent_one_is_none() -> None:
    assert torch.allclose(read_bias(Recording(4, 3, 0.5)), torch.full((3,), 0.5))
    assert read_bias(Recording(4, 3, 0.0)) is None


def test_reading_leaves_mode_and_settings_alone() -> None:
    layer = Recording(4, 3, 0.0).eval()
    before = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    read_operating_weight(layer, "layer")
    after = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    assert not layer.training
    assert after == before


def test_reading_works_in_inference_mode_and_under_autocast() -> None:
    layer = Recording(4, 3, 0.0)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = read_operating_weight(layer, "layer")
    assert not found.is_inference()
    assert torch.allclose(found, layer.values, atol=1e-6)


def test_a_declared_compute_dtype_comes_before_that_of_the_tensors() -> None:
    layer = Recording(4, 3, 0.0)
    assert input_dtype(layer) == torch.float32
    layer.compute_dtype = torch.float16
    assert input_dtype(layer) == torch.float16
    assert input_dtype(nn.Identity()) == torch.float32


def test_a_layer_without_tensors_is_on_the_cpu() -> None:
    assert device_of(nn.Identity()) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"


# Weights that an engine takes away between passes, and brings for the base layer's own: no DeepSpeed needed.


def adapted(**settings: object) -> nn.Module:
    model = get_peft_model(MODELS["llama"](), DVoRAConfig(**{"r": 6, "target_modules": LAYERS["llama"], **settings}))
    train_vectors(model)
    return model


def take_away(layer: nn.Linear, left: Tensor) -> None:
    """Leave other values in place of a weight's, as ZeRO-3 does, and bring its own for the layer's passes only."""
    weight, own = layer.weight, layer.weight.data
    weight.ds_id = 0

    def bring(*_: object) -> None:
        weight.data = own.clone()

    def remove(*_: object) -> None:
        weight.data = left

    remove()
    layer.register_forward_pre_hook(bring)
    layer.register_forward_hook(remove)
    layer.register_full_backward_pre_hook(bring)


@pytest.mark.parametrize("left", [(0,), None], ids=["nothing", "values on their way"])
def test_a_weight_that_is_not_at_hand_is_never_measured(left: tuple[int] | None) -> None:
    model = adapted()
    expected, expected_gradients = outputs(model), gradients(model)
    for _, layer in dvora_layers(model):
        weight = layer.base_layer.weight
        take_away(layer.base_layer, torch.full(weight.shape if left is None else left, 7.0))
    norms = [layer.adapted("default").w for _, layer in dvora_layers(model)]
    assert same_bits(outputs(model), expected)
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name])
    assert all(layer.adapted("default").w is w for (_, layer), w in zip(dvora_layers(model), norms, strict=True))


def test_nothing_is_merged_into_a_weight_that_is_not_there() -> None:
    model = adapted()
    for _, layer in dvora_layers(model):
        take_away(layer.base_layer, torch.empty(0))
    with pytest.raises(ValueError, match=r"q_proj: DeepSpeed ZeRO-3 has partitioned the weight.*GatheredParameters"):
        model.merge_adapter()
    assert not any(layer.merged for _, layer in dvora_layers(model))


def test_what_recognises_the_base_is_kept_from_when_it_was_whole() -> None:
    model = adapted()
    before = {name: list(layer.fingerprint) for name, layer in dvora_layers(model)}
    for _, layer in dvora_layers(model):
        take_away(layer.base_layer, torch.empty(0))
    get_peft_model_state_dict(model)
    assert model.peft_config["default"].fingerprints_to_save == before


# An adapter belongs to the base model that it was trained on.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_bert(tmp_path)


@torch.no_grad()
def scale(model: torch.nn.Module, factor: float) -> torch.nn.Module:
    model.bert.encoder.layer[1].output.dense.weight.mul_(factor)
    return model


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
