"""Layer types: which one a layer is of, and what is particular to single ones."""

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from dvora import DVoRAConfig
from dvora.factors import factors_of
from dvora.peft.layer_types import FORWARD_ONLY, LAYER_TYPES, LayerType, layer_type_of
from tests.census import Census
from tests.peft.dense_weights import DenseModel, gradients_by_parameter
from tests.peft.layer_cases import CASES, Convolution
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import MODELS, outputs, same_bits, train_vectors


class Halved(nn.Linear):
    """A linear layer that computes something else than its type does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Named(nn.Linear):
    """A subclass that computes what a linear layer does."""


def with_another_forward() -> nn.Linear:
    layer = nn.Linear(3, 5)
    layer.forward = Halved(3, 5).forward
    return layer


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Named(3, 5), LAYER_TYPES[nn.Linear]),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 5)), LAYER_TYPES[nn.Linear]),
        (lambda: add_hook_to_module(nn.Linear(3, 5), ModelHook()), LAYER_TYPES[nn.Linear]),
        (lambda: Halved(3, 5), FORWARD_ONLY),
        (with_another_forward, FORWARD_ONLY),
    ],
)
def test_a_layer_that_computes_something_else_than_its_type_is_read_through_its_forward(
    make: Callable[[], nn.Module], expected: LayerType
) -> None:
    assert layer_type_of(make(), "layer") is expected


LAYER = {"target_modules": ["layer"]}


def trained(base: nn.Module, **settings: object) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), DVoRAConfig(**{"r": 4, **LAYER, **settings})).eval()
    train_vectors(model)
    return model


CONVOLUTIONS = st.fixed_dictionaries(
    {
        "kernel_size": st.integers(1, 3),
        "stride": st.integers(1, 2),
        "dilation": st.integers(1, 2),
        "padding": st.sampled_from([0, 1, "same", "valid"]),
        "groups": st.sampled_from([1, 2, 4]),
        "bias": st.booleans(),
        "padding_mode": st.sampled_from(["zeros", "circular", "replicate", "reflect"]),
    }
)


# PyTorch says it once a process, of even kernels.
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(
    make=st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d]),
    settings=CONVOLUTIONS,
    rank=st.integers(1, 9),
    lambda_d_groups=st.integers(1, 4),
    batched=st.booleans(),
)
def test_every_convolution_is_the_dense_one(
    make: type[nn.Module], settings: dict[str, object], rank: int, lambda_d_groups: int, batched: bool
) -> None:
    if settings["padding"] == "same":
        settings["stride"] = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Sequential(OrderedDict(layer=make(4, 8, **settings, dtype=torch.float64)))
        dimensions = len(base.layer.kernel_size)
        x = torch.randn(*([2] if batched else []), 4, *[6] * dimensions, dtype=torch.float64)
    columns = base.layer.weight[0].numel()
    model = trained(base, r=rank, lambda_d_groups=min(lambda_d_groups, columns))
    y, dense = model(x), DenseModel(base, model)
    assert worst_difference(y, dense(x)) < 1e-10
    for each in (y, dense(x)):
        each.square().sum().backward()
    expected = dense.gradients()
    for name, gradient in gradients_by_parameter(model).items():
        # Rows of one column have no direction to turn: their gradients are zero but for rounding.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [2, 3, 7, 10])
@pytest.mark.parametrize(
    "name", ["Linear", "transformers Conv1D", "Conv2d", "Embedding, padding", "experts (E, in, out)"]
)
def test_any_number_of_groups_is_the_dense_weight_with_gradients(name: str, groups: int) -> None:
    case, dtype = CASES[name], torch.float64
    model = get_peft_model(case.base(dtype), case.config(lambda_d_groups=groups)).eval()
    train_vectors(model)
    dense = DenseModel(case.base(dtype), model)
    for each in (model(case.inputs(dtype)), dense(case.inputs(dtype))):
        each.square().sum().backward()
    expected, found = dense.gradients(), gradients_by_parameter(model)
    for parameter, gradient in found.items():
        assert gradient.shape[-1] == 5 or "lambda_d" not in parameter
        assert worst_difference(gradient, expected[parameter]) < 1e-11, parameter


COLUMNS = {
    "Linear": ("layer", 10),
    "transformers Conv1D": ("layer", 10),
    "Conv2d, depthwise": ("layer", 4),
    "Embedding": ("layer", 20),
    "MultiheadAttention, kdim and vdim": (r"attn\.k_proj_weight", 10),
    "experts (E, out, in)": (r"experts\.down", 12),
}
"""A weight with the fewest columns of each, and how many those are."""


@pytest.mark.parametrize("name", COLUMNS)
def test_as_many_groups_as_columns_work_and_more_are_refused_with_the_layers_name(name: str) -> None:
    case, (layer, columns) = CASES[name], COLUMNS[name]
    model = get_peft_model(case.base(), case.config(lambda_d_groups=columns)).eval()
    train_vectors(model)
    x = case.inputs()
    assert worst_difference(model(x), DenseModel(case.base(), model)(x)) < 1e-5
    base = case.base()
    before = snapshot(base)
    message = f"{layer}: lambda_d_groups={columns + 1} cuts the columns of the weight, of which it has {columns}; use"
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, case.config(lambda_d_groups=columns + 1))
    assert_unchanged(base, before)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rank", [4, 400])
@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_no_rows_has_outputs_and_gradients_as_in_the_base(name: str, rank: int, groups: int) -> None:
    x, config = CASES[name].inputs()[:0], CASES[name].config(r=rank, lambda_d_groups=groups)
    expected, model = CASES[name].base()(x), get_peft_model(CASES[name].base(), config)
    y = model(x)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    # Of a mixture no expert runs.
    if y.requires_grad:
        y.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert bool(gradients) == y.requires_grad
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    with torch.no_grad():
        assert model.eval()(x).shape == model(x, adapter_names=[]).shape == expected.shape


@pytest.mark.parametrize("groups", [1, 3])
def test_channels_last_stays_channels_last_and_starts_as_the_base(groups: int) -> None:
    base = CASES["Conv2d"].base().to(memory_format=torch.channels_last)
    x = CASES["Conv2d"].inputs().to(memory_format=torch.channels_last)
    model = get_peft_model(copy.deepcopy(base), DVoRAConfig(r=4, lambda_d_groups=groups, **LAYER)).eval()
    adapted, layer = (m.get_submodule("layer") for m in (model.base_model.model, base))
    assert same_bits(adapted(x), layer(x))
    assert adapted(x).stride() == layer(x).stride()
    train_vectors(model)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert adapted(x).stride() == layer(x).stride()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_rank_beyond_a_kernel_costs_no_more_than_the_kernel(groups: int) -> None:
    base = Convolution(nn.Conv2d(32, 32, 3, groups=32)).eval()
    x = torch.randn(2, 32, 12, 12)
    costs = []
    for rank in (9, 90):
        model = trained(base, r=rank, lambda_d_groups=groups)
        with torch.no_grad():
            model(x)  # makes the factors
            with FlopCounterMode(display=False) as counter:
                model(x)
        costs.append(counter.get_total_flops())
    assert costs[1] < 1.5 * costs[0]


def test_a_lookup_makes_no_table_of_the_vocabulary() -> None:
    base = nn.Sequential()
    base.add_module("layer", nn.Embedding(50_000, 8))
    model, ids = trained(base), torch.randint(0, 50_000, (4, 6))
    with Census() as census:
        model(ids).sum().backward()
    assert census.largest() <= 4 * 6 * 8 * ids.itemsize
    # By groups the norm, which is kept in evaluation, takes all columns of A; the lookup does not.
    by_groups = trained(base, lambda_d_groups=7)
    with torch.no_grad():
        by_groups(ids)
        with Census() as census:
            by_groups(ids)
    assert census.largest() <= 4 * 6 * 8 * ids.itemsize


@pytest.mark.parametrize("groups", [1, 3])
def test_dropout_of_an_embedding_drops_the_update_of_whole_tokens(groups: int) -> None:
    model = trained(CASES["Embedding"].base(), dvora_dropout=0.5, lambda_d_groups=groups)
    layer = model.base_model.model.layer
    ids = torch.arange(20)
    g1 = factors_of(layer.adapted("default"), layer.vectors("default"), layer.stored()).gain_minus_one
    rescaled = (1 + g1) * layer.base_layer(ids)
    whole, dropped = layer(ids) - rescaled, layer.train()(ids) - rescaled
    kept = dropped.abs().amax(1, keepdim=True) > 1e-6
    assert 0 < int(kept.sum()) < 20
    torch.testing.assert_close(dropped, 2 * kept * whole, rtol=1e-5, atol=1e-5)


def test_a_layer_that_was_compiled_before_is_adapted_through_its_forward() -> None:
    base = MODELS["mlp"]()
    base.lin1 = torch.compile(base.lin1, backend="eager")
    model = get_peft_model(base, DVoRAConfig(r=4, target_modules=["lin1"])).eval()
    assert torch.allclose(outputs(model), outputs(MODELS["mlp"]()), atol=1e-6)
    train_vectors(model)
    plain = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin1"])).eval()
    train_vectors(plain)
    assert worst_difference(outputs(model), outputs(plain)) < 1e-4
