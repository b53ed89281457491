"""How base weights are read and recognised: opaque ones by their forward, emptied ones, other bases."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import dvora
from dvora import DVoRAConfig
from dvora.peft.base_weight import CHUNK
from tests.peft.kinds import CONFIG, edit_config, save_bert
from tests.peft.tiny import MODELS, dvora_layers

# A layer that is read through its forward; how exactly: `test_quantised.py`.


class Recording(nn.Module):
    """Linear by its forward; remembers what it was asked."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("values", torch.randn(out_features, in_features))
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return x @ self.values.T


def test_wide_layers_are_read_in_chunks_and_left_as_they_were_whatever_mode_is_on() -> None:
    layer = Recording(2 * CHUNK + 3, 2).eval()
    settings = {name for name in vars(layer) if not name.startswith("_")}
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        model = get_peft_model(nn.Sequential(layer), DVoRAConfig(r=2, target_modules=["0"]))
    magnitude = next(dvora_layers(model))[1].vectors("default").magnitude
    torch.testing.assert_close(magnitude.detach(), layer.values.norm(dim=1), rtol=1e-6, atol=0)
    assert max(layer.batches) == CHUNK
    assert not magnitude.is_inference()
    assert {name for name in vars(layer) if not name.startswith("_")} == settings
    assert not layer.training


# An adapter belongs to the base model that it was trained on.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_bert(tmp_path)


@torch.no_grad()
def changed(change: Callable[[Tensor], Tensor]) -> nn.Module:
    model = MODELS["bert"]()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(change(module.weight))
    return model


def rounded(bits: int) -> Callable[[Tensor], Tensor]:
    """In so many bits, row by row."""

    def change(weight: Tensor) -> Tensor:
        step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (weight / step).round() * step

    return change


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows in another order": lambda weight: weight.flip(0),
    "columns in another order": lambda weight: weight.flip(1),
    "signs": lambda weight: -weight,
    "norms": lambda weight: 1.5 * weight,
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_base_is_refused_unless_the_probes_are_dropped_on_purpose(folder: Path, change: str) -> None:
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(changed(OTHERS[change]), folder)
    edit_config(folder, base_probes=None)
    PeftModel.from_pretrained(changed(OTHERS[change]), folder)


def test_a_norm_alone_tells_bases_apart(folder: Path) -> None:
    probes = json.loads((folder / CONFIG).read_text())["base_probes"]
    edit_config(folder, base_probes={name: [1.1 * norm, *products] for name, (norm, *products) in probes.items()})
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(MODELS["bert"](), folder)


def test_the_same_base_in_another_dtype_or_in_eight_bits_is_accepted_in_silence(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            PeftModel.from_pretrained(MODELS["bert"]().to(dtype), folder)
        PeftModel.from_pretrained(changed(rounded(8)), folder)


def test_another_quantisation_is_reported_and_accepted(folder: Path, tmp_path: Path) -> None:
    message = r"\d+ of 11 adapted weights differ, bert\.\S+ by about \d+% of its norm"
    with pytest.warns(UserWarning, match=message):
        model = PeftModel.from_pretrained(changed(rounded(4)), folder)
    with pytest.warns(UserWarning, match=message):
        model.load_adapter(folder, "second")
    with pytest.warns(UserWarning, match=message):
        dvora.hotswap_adapter(model, folder)
    model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    with pytest.warns(UserWarning, match=message):
        PeftModel.from_pretrained(MODELS["bert"](), tmp_path / "again")
