"""What is particular to single layer types, beside what the table of what works tries on all of them."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dvora import DVoRAConfig
from dvora.peft.layer import layers_in
from tests.peft.dense_weights import DenseModel
from tests.peft.layer_cases import CASES, Convolution
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import MODELS, dvora_layers, outputs, same_bits, train_vectors

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
    model(x)
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


def test_experts_have_a_magnitude_for_each_output_of_each_expert() -> None:
    case = CASES["experts (E, out, in)"]
    model = get_peft_model(case.base(), case.config())
    shapes = {layer.name: layer.vectors("default").magnitude.shape for layer in layers_in(model)}
    assert shapes == {"experts.up": (3 * 12,), "experts.down": (3 * 8,)}


def test_adapters_on_different_parameters_of_a_module_are_saved_and_loaded_apart(tmp_path: Path) -> None:
    case = CASES["experts (E, out, in)"]
    model = get_peft_model(case.base(), case.config(target_parameters=["experts.up"])).eval()
    model.add_adapter("second", case.config(target_parameters=["experts.down"]))
    for seed, name in enumerate(("default", "second")):
        train_vectors(model, name, seed)
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        model.base_model.set_adapter(name)
        loaded = PeftModel.from_pretrained(case.base(), folder).eval()
        assert same_bits(loaded(case.inputs()), model(case.inputs()))


def test_attention_reads_adapted_weights_from_outside_too() -> None:
    case = CASES["MultiheadAttention"]
    model = get_peft_model(case.base(), case.config()).eval()
    train_vectors(model)
    attention = model.base_model.model.attn
    assert attention.embed_dim == 16
    assert not torch.equal(attention.in_proj_weight, attention.base_layer.in_proj_weight)
    assert not torch.equal(attention.out_proj.weight, attention.out_proj.base_layer.weight)
    with pytest.raises(AttributeError, match="no_such_name"):
        attention.no_such_name  # noqa: B018


def test_all_linear_adapts_attentions_output_projection_to_effect() -> None:
    base, x = CASES["MultiheadAttention"].base(), CASES["MultiheadAttention"].inputs()
    model = get_peft_model(copy.deepcopy(base), DVoRAConfig(r=4, target_modules="all-linear")).eval()
    train_vectors(model)
    assert "attn.out_proj" in {layer.name for layer in layers_in(model)}
    with torch.no_grad():
        assert worst_difference(model(x), DenseModel(base, model)(x)) < 1e-5
        model.base_model.model.attn.out_proj.dvora_lambda_b["default"].zero_()
        assert worst_difference(model(x), DenseModel(base, model)(x)) < 1e-5


def test_a_layer_that_was_compiled_before_is_adapted_through_its_forward() -> None:
    base = MODELS["mlp"]()
    base.lin1 = torch.compile(base.lin1, backend="eager")
    model = get_peft_model(base, DVoRAConfig(r=4, target_modules=["lin1"])).eval()
    assert torch.allclose(outputs(model), outputs(MODELS["mlp"]()), atol=1e-6)
    train_vectors(model)
    plain = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin1"])).eval()
    train_vectors(plain)
    assert worst_difference(outputs(model), outputs(plain)) < 1e-4


def test_a_saved_adapter_is_loaded_under_other_layer_names_as_peft_maps_them(tmp_path: Path) -> None:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0"])).eval()
    train_vectors(model)
    model.save_pretrained(tmp_path)
    renamed = nn.Sequential()
    renamed.add_module("first", MODELS["mlp"]().lin0)
    config = DVoRAConfig.from_pretrained(tmp_path)
    config.target_modules = {"first"}
    loaded = PeftModel.from_pretrained(renamed, tmp_path, config=config, key_mapping={"lin0": "first"})
    x = torch.randn(3, 10)
    assert same_bits(loaded(x), model.base_model.model.lin0(x))
