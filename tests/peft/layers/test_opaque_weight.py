"""The weight of a layer read through its forward pass."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dvora.peft.base_weight import CHUNK, device_of, input_dtype, read_bias, read_operating_weight


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
