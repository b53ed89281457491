"""Layer types: which one a layer is of, and what is particular to single ones."""

import copy
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from dvora import DVoRAConfig
from dvora.peft.layer_types import FORWARD_ONLY, LAYER_TYPES, layer_type_of
from tests.peft.dense_weights import DenseModel
from tests.peft.layer_cases import CASES, Convolution
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import MODELS, dvora_layers, outputs, same_bits, train_vectors

LAYERS = {
    nn.Linear: lambda: nn.Linear(3, 5),
    Conv1D: lambda: Conv1D(5, 3),
    nn.Conv1d: lambda: nn.Conv1d(4, 6, 3, groups=2),
    nn.Conv2d: lambda: nn.Conv2d(4, 6, 3, groups=2),
    nn.Conv3d: lambda: nn.Conv3d(4, 6, 3, groups=2),
    nn.Embedding: lambda: nn.Embedding(9, 4),
}


class Halved(nn.Linear):
    """A linear layer that computes something else than its type does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def test_every_row_of_the_table_is_tried_here() -> None:
    assert LAYERS.keys() == LAYER_TYPES.keys()


@pytest.mark.parametrize("layer_type", LAYERS, ids=lambda t: t.__name__)
def test_a_layer_is_of_the_kind_of_its_type(layer_type: type[nn.Module]) -> None:
    assert layer_type_of(LAYERS[layer_type](), "layer") is LAYER_TYPES[layer_type]


def test_a_subclass_that_computes_the_same_is_of_its_parents_kind() -> None:
    class Named(nn.Linear):
        pass

    assert layer_type_of(Named(3, 5), "layer") is LAYER_TYPES[nn.Linear]
    assert layer_type_of(parametrizations.weight_norm(nn.Linear(3, 5)), "layer") is LAYER_TYPES[nn.Linear]


def test_a_subclass_that_computes_something_else_is_read_through_its_forward() -> None:
    assert layer_type_of(Halved(3, 5), "layer") is FORWARD_ONLY


def test_a_forward_that_was_replaced_is_read_as_it_is() -> None:
    layer = nn.Linear(3, 5)
    layer.forward = Halved(3, 5).forward
    assert layer_type_of(layer, "layer") is FORWARD_ONLY
    assert layer_type_of(add_hook_to_module(nn.Linear(3, 5), ModelHook()), "layer") is LAYER_TYPES[nn.Linear]


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
def test_a_layer_without_values_is_refused_by_name(sizes: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of initializing nothing
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(*sizes))
    with pytest.raises(ValueError, match=r"1: the base weight has shape \(\d, \d\): there is nothing to adapt"):
        get_peft_model(model, DVoRAConfig(r=2, target_modules=["0", "1"]))
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_a_scaled_embedding_is_an_embedding() -> None:
    assert (
        layer_type_of(BartScaledWordEmbedding(9, 4, padding_idx=0, embed_scale=2.0), "layer")
        is LAYER_TYPES[nn.Embedding]
    )


LAYER = {"target_modules": ["layer"]}


def trained(base: nn.Module, **settings: object) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), DVoRAConfig(**{"r": 4, **LAYER, **settings})).eval()
    train_vectors(model)
    return model


# PyTorch says it once a process, of even kernels.
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(
    dimensions=st.sampled_from([1, 2, 3]),
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    mode=st.sampled_from(["zeros", "circular", "replicate", "reflect"]),
    bias=st.booleans(),
    rank=st.integers(1, 9),
    batched=st.booleans(),
)
def test_every_convolution_is_the_dense_one(
    dimensions: int,
    groups: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: int | str,
    mode: str,
    bias: bool,
    rank: int,
    batched: bool,
) -> None:
    make = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = make(
            4,
            8,
            kernel,
            stride=1 if padding == "same" else stride,
            dilation=dilation,
            padding=padding,
            groups=groups,
            bias=bias,
            padding_mode=mode,
            dtype=torch.float64,
        )
        base = nn.Sequential()
        base.add_module("layer", layer)
        x = torch.randn(*([2] if batched else []), 4, *[6] * dimensions, dtype=torch.float64)
    model = trained(base, r=rank)
    assert worst_difference(model(x), DenseModel(base, model)(x)) < 1e-10


def test_channels_last_stays_channels_last_and_starts_as_the_base() -> None:
    base = CASES["Conv2d"].base().to(memory_format=torch.channels_last)
    x = CASES["Conv2d"].inputs().to(memory_format=torch.channels_last)
    model = get_peft_model(copy.deepcopy(base), DVoRAConfig(r=4, **LAYER)).eval()
    adapted, layer = (m.get_submodule("layer") for m in (model.base_model.model, base))
    assert same_bits(adapted(x), layer(x))
    assert adapted(x).stride() == layer(x).stride()
    measured = adapted.adapted("default").w
    train_vectors(model)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert adapted(x).stride() == layer(x).stride()
    assert adapted.adapted("default").w is measured


def test_a_rank_beyond_a_kernel_costs_no_more_than_the_kernel() -> None:
    base = Convolution(nn.Conv2d(32, 32, 3, groups=32)).eval()
    x = torch.randn(2, 32, 12, 12)
    costs = []
    for rank in (9, 90):
        model = trained(base, r=rank)
        with torch.no_grad():
            model(x)  # makes the factors
            with FlopCounterMode(display=False) as counter:
                model(x)
        costs.append(counter.get_total_flops())
    assert costs[1] < 1.5 * costs[0]


@pytest.mark.parametrize("direction", ["unit", "weight"])
@pytest.mark.parametrize("name", ["Embedding", "Conv2d"])
def test_peft_dora_with_the_same_factors_gives_the_same_outputs(name: str, direction: str) -> None:
    base, x = CASES[name].base(), CASES[name].inputs()
    model = trained(base, direction=direction)
    oracle = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, use_dora=True, **LAYER)).eval()
    _, layer = next(dvora_layers(model))
    magnitude, lambda_b, lambda_d = layer.vectors("default")
    adapted = layer.adapted("default")
    beta = lambda_b * adapted.w if direction == "unit" else lambda_b
    A, B = lambda_d[:, None] * adapted.A(lambda_d), beta[:, None] * adapted.B(lambda_d)
    dora = oracle.base_model.model.layer
    factors = (
        (dora.lora_embedding_A["default"], dora.lora_embedding_B["default"])
        if name == "Embedding"
        else (dora.lora_A["default"].weight, dora.lora_B["default"].weight)
    )
    with torch.no_grad():
        for factor, value in zip(
            (*factors, dora.lora_magnitude_vector["default"].weight), (A, B, magnitude), strict=True
        ):
            factor.copy_(value.view_as(factor))
        assert worst_difference(model(x), oracle(x)) < 1e-5


def test_the_padding_entry_of_an_embedding_stays_as_it_is() -> None:
    base = CASES["Embedding, padding"].base()
    model = trained(base)
    found = model.base_model.model.layer(torch.tensor([3, 4]))
    assert not found[0].any()
    assert found[1].any()
    model.merge_adapter()
    assert not model.base_model.model.layer.base_layer.weight[3].any()


def test_a_lookup_makes_no_table_of_the_vocabulary() -> None:
    base = nn.Sequential()
    base.add_module("layer", nn.Embedding(50_000, 8))
    model = trained(base)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not func.is_view:
                largest = max(largest, result.numel())
            return result

    ids = torch.randint(0, 50_000, (4, 6))
    with Largest():
        model(ids).sum().backward()
    assert largest <= 4 * 6 * 8


def test_dropout_of_an_embedding_drops_the_update_of_whole_tokens() -> None:
    layer = trained(CASES["Embedding"].base(), dvora_dropout=0.5).train().base_model.model.layer
    ids = torch.arange(20)
    g1 = layer.adapted("default").factors(layer.vectors("default"), layer.stored()).gain_minus_one
    moved = (layer(ids) - (1 + g1) * layer.base_layer(ids)).abs().amax(1) > 1e-6
    assert 0 < int(moved.sum()) < 20


def test_a_layer_that_was_compiled_before_is_adapted_through_its_forward() -> None:
    base = MODELS["mlp"]()
    base.lin1 = torch.compile(base.lin1, backend="eager")
    model = get_peft_model(base, DVoRAConfig(r=4, target_modules=["lin1"])).eval()
    assert torch.allclose(outputs(model), outputs(MODELS["mlp"]()), atol=1e-6)
    train_vectors(model)
    plain = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin1"])).eval()
    train_vectors(plain)
    assert worst_difference(outputs(model), outputs(plain)) < 1e-4
