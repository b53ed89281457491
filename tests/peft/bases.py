"""Quantised bases: how to make each from a linear layer, and the weight that it multiplies by."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter, methodcaller
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.peft.dense_weights import DenseModel

GROUP = 64
"""Weights that share a scale, where the format has groups; bitsandbytes' 4-bit kernels need such sizes too."""


class PackedLinear(nn.Module):
    """What GPTQ and AWQ layers are to their users: codes and scales in buffers, sizes, and a forward; no weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def dequantised(self) -> Tensor:
        return self.qweight.to(self.scales.dtype) * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantised(), self.bias)


class HiddenBiasLinear(PackedLinear):
    """A layer that keeps its bias under a name of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.register_buffer("offset", self._buffers.pop("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantised(), self.offset)


class InferenceOnlyLinear(PackedLinear):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Base(NamedTuple):
    """One way of storing the weight of a linear layer."""

    make: Callable[[nn.Linear], nn.Module]
    """From a layer in `dtype`, which is not used afterwards."""
    weight: Callable[[nn.Module], Tensor]
    """The weight of a layer fresh from `make`, by the backend's own dequantisation."""
    dtype: torch.dtype = torch.float32
    """Of inputs, outputs and biases."""
    compute: torch.dtype = torch.float32
    """What the layer rounds its weight and its inputs to."""
    tolerance: float = 2e-5
    """Of outputs and gradients in training mode, relative to their largest value."""
    eval_tolerance: float = 2e-5
    norm_tolerance: float = 1e-5
    """Of the norms of the weight's rows, relative to each."""
    differentiable: bool = True


def _bnb_int8(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
    )
    return _filled(layer, linear)


def _bnb_4bit(linear: nn.Linear, quant_type: str, compute: torch.dtype = torch.float32) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute,
        quant_type=quant_type,
    )
    return _filled(layer, linear)


def _filled(layer: nn.Module, linear: nn.Linear) -> nn.Module:
    layer.to(linear.weight.dtype).load_state_dict(linear.state_dict())
    # bitsandbytes quantises when a layer is moved, even to where it is.
    return layer.requires_grad_(False).to("cpu")


def _torchao(linear: nn.Linear, config: str) -> nn.Module:
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    configs = {
        "int8": ao.Int8WeightOnlyConfig,
        "int8 dynamic": ao.Int8DynamicActivationInt8WeightConfig,
        # The int4 that is called so needs a GPU or further packages.
        "int4": partial(ao.IntxWeightOnlyConfig, weight_dtype=torch.int4, granularity=ao.PerGroup(GROUP)),
    }
    holder = nn.Sequential(linear)
    ao.quantize_(holder, configs[config]())
    return holder[0]


def _hqq(linear: nn.Linear, bits: int, compute: torch.dtype = torch.float32) -> nn.Module:
    hqq = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=GROUP)
    return hqq.HQQLinear(linear, config, compute_dtype=compute, device="cpu")


def _bnb_int8_weight(layer: nn.Module) -> Tensor:
    return layer.weight.CB * layer.weight.SCB[:, None] / 127


def _bnb_4bit_weight(layer: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


_BFLOAT16 = {"dtype": torch.bfloat16, "compute": torch.bfloat16, "tolerance": 0.03, "eval_tolerance": 0.03}
_BFLOAT16 |= {"norm_tolerance": 2e-3}
_FLOAT16 = {"dtype": torch.float16, "compute": torch.float16, "tolerance": 4e-3, "eval_tolerance": 4e-3}
_FLOAT16 |= {"norm_tolerance": 3e-4}
# On some CPUs, bitsandbytes rounds activations and products to bfloat16 in eval mode.
_EVAL_4BIT = 0.02
_EVAL_INT8_ACTIVATIONS = 0.02

BASES: dict[str, Base] = {
    "bfloat16": Base(lambda linear: linear, attrgetter("weight"), **_BFLOAT16),
    "float16": Base(lambda linear: linear, attrgetter("weight"), **_FLOAT16),
    "bnb_int8": Base(_bnb_int8, _bnb_int8_weight, eval_tolerance=_EVAL_INT8_ACTIVATIONS),
    "bnb_nf4": Base(partial(_bnb_4bit, quant_type="nf4"), _bnb_4bit_weight, eval_tolerance=_EVAL_4BIT),
    "bnb_fp4": Base(partial(_bnb_4bit, quant_type="fp4"), _bnb_4bit_weight, eval_tolerance=_EVAL_4BIT),
    "bnb_nf4_bfloat16": Base(
        partial(_bnb_4bit, quant_type="nf4", compute=torch.bfloat16), _bnb_4bit_weight, **_BFLOAT16
    ),
    "torchao_int8": Base(partial(_torchao, config="int8"), lambda layer: layer.weight.dequantize()),
    "torchao_int4": Base(partial(_torchao, config="int4"), lambda layer: layer.weight.dequantize()),
    "torchao_int8_bfloat16": Base(
        partial(_torchao, config="int8"), lambda layer: layer.weight.dequantize(), **_BFLOAT16
    ),
    # Its kernels round one-hot inputs, the largest there are, to 127 / 127.5 of their value.
    "torchao_int8_dynamic": Base(
        partial(_torchao, config="int8 dynamic"),
        lambda layer: layer.weight.dequantize(),
        tolerance=_EVAL_INT8_ACTIVATIONS,
        eval_tolerance=_EVAL_INT8_ACTIVATIONS,
        norm_tolerance=5e-3,
        differentiable=False,
    ),
    "hqq_8bit": Base(partial(_hqq, bits=8), methodcaller("dequantize")),
    "hqq_4bit": Base(partial(_hqq, bits=4), methodcaller("dequantize")),
    "hqq_4bit_bfloat16": Base(partial(_hqq, bits=4, compute=torch.bfloat16), methodcaller("dequantize"), **_BFLOAT16),
    "forward_only": Base(PackedLinear, PackedLinear.dequantised),
    "forward_only_float16": Base(PackedLinear, PackedLinear.dequantised, **_FLOAT16),
    "forward_only_hidden_bias": Base(HiddenBiasLinear, PackedLinear.dequantised),
    "inference_only": Base(InferenceOnlyLinear, PackedLinear.dequantised, differentiable=False),
}
PLAIN = ("bfloat16", "float16")
"""Those whose weight is a tensor of numbers."""
QUANTISED = [name for name in BASES if name not in PLAIN]
FAMILIES = ["bnb_int8", "bnb_nf4", "torchao_int8", "hqq_4bit", "forward_only_hidden_bias"]
"""One of each library and way of holding a weight, where further formats meet the same code; `test_support.py` tries
saving, merging, copying, gradients and adapters by row with every format."""
TRAINABLE = [name for name, base in BASES.items() if base.differentiable]


class Wide(nn.Module):
    """Three layers of sizes that every format takes; their biases are far larger than a weight, as in real models."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(64, 128)
        self.lin1 = nn.Linear(128, 64)
        self.lin2 = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(torch.tanh(self.lin1(torch.tanh(self.lin0(x)))))


@torch.no_grad()
def wide(seed: int = 0) -> Wide:
    """The same values each time."""
    generator = torch.Generator().manual_seed(seed)
    model = Wide().eval().requires_grad_(False)
    for layer in (model.lin0, model.lin1, model.lin2):
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
    return model


def quantised(model: nn.Module, kind: str) -> nn.Module:
    """The model in the base's dtype with all its linear layers quantised; the model itself stays as it is."""
    base = BASES[kind]
    model = copy.deepcopy(model).to(base.dtype).requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            model.set_submodule(name, base.make(layer).train(layer.training))
    return model


@torch.no_grad()
def operating_weight(linear: nn.Linear, kind: str) -> Tensor:
    """The weight that the layer multiplies by once it is quantised, in float64."""
    base = BASES[kind]
    fresh = base.make(copy.deepcopy(linear).to(base.dtype).requires_grad_(False))
    return base.weight(fresh).to(base.compute).double()


def dense_twin(
    adapted: PeftModel, model: nn.Module, kind: str, adapter_names: Sequence[str] = ("default",)
) -> DenseModel:
    """`quantised(model, kind)` with the adapters of `adapted`, in float64 and with dense matrices only."""
    base = copy.deepcopy(model).to(BASES[kind].dtype).double()
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear:
            base.get_submodule(name).weight.data = operating_weight(layer, kind)
    return DenseModel(base, adapted, adapter_names)
