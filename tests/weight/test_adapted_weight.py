"""The norm constants follow the weight: compared, after each change, with a new layer that cannot be stale."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dvora import DVoRAAdapter, SharedProjections
from dvora.method import norm
from dvora.method.functional import Vectors
from dvora.weight.adapted_weight import MAGNITUDE_ONLY, AdaptedWeight
from dvora.weight.factors import factors_of
from dvora.weight.layouts import COLUMNS
from tests.cases import DTYPES, SHARED, fresh_copy, linear, randn, trained_layer
from tests.reference import DenseDVoRA, worst_error

IN, OUT, RANK = 6, 5, 3


def new_weight(layer: DVoRAAdapter, seed: int = 11) -> Tensor:
    return 3 * randn(OUT, IN, seed=seed, dtype=layer.base_layer.weight.dtype)


def assert_not_stale(layer: DVoRAAdapter) -> None:
    x = randn(4, IN, seed=8, dtype=layer.base_layer.weight.dtype)
    fresh = fresh_copy(layer)
    assert torch.equal(layer(x), fresh(x))
    assert torch.equal(layer.merge_to_original_layer().weight, fresh.merge_to_original_layer().weight)
    assert torch.equal(layer.adapted.w, fresh.adapted.w)


@torch.no_grad()
def write_in_place(layer: DVoRAAdapter) -> None:
    layer.base_layer.weight.copy_(new_weight(layer))


@torch.no_grad()
def write_one_row(layer: DVoRAAdapter) -> None:
    layer.base_layer.weight[2] *= 4


def assign_data(layer: DVoRAAdapter) -> None:
    layer.base_layer.weight.data = new_weight(layer)


def assign_data_until_the_address_returns(layer: DVoRAAdapter) -> None:
    # An address alone does not identify a weight: freed memory is allocated again.
    weight = layer.base_layer.weight
    address = weight.data_ptr()
    for seed in range(11, 111):
        weight.data = new_weight(layer, seed)
        if weight.data_ptr() == address:
            break


def assign_parameter(layer: DVoRAAdapter) -> None:
    layer.base_layer.weight = nn.Parameter(new_weight(layer), requires_grad=False)


def replace_the_base_layer(layer: DVoRAAdapter) -> None:
    layer.base_layer = linear(IN, OUT).requires_grad_(False)
    write_in_place(layer)


def load_the_base(layer: DVoRAAdapter) -> None:
    layer.base_layer.load_state_dict({"weight": new_weight(layer), "bias": randn(OUT, seed=12)})


def load_the_base_by_assignment(layer: DVoRAAdapter) -> None:
    layer.base_layer.load_state_dict({"weight": new_weight(layer), "bias": randn(OUT, seed=12)}, assign=True)


def load_everything(layer: DVoRAAdapter) -> None:
    values = layer.state_dict()
    layer.load_state_dict({**values, "base_layer.weight": new_weight(layer)})


CHANGES = [
    write_in_place,
    write_one_row,
    assign_data,
    assign_data_until_the_address_returns,
    assign_parameter,
    replace_the_base_layer,
    load_the_base,
    load_the_base_by_assignment,
    load_everything,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_constants_follow(change: Callable[[DVoRAAdapter], None], training: bool) -> None:
    layer = trained_layer(IN, OUT, RANK).train(training)
    with torch.set_grad_enabled(training):
        layer(randn(1, IN, seed=0))
        change(layer)
        assert_not_stale(layer)


def test_a_refresh_follows_a_write_that_torch_does_not_count() -> None:
    layer = trained_layer(IN, OUT, RANK)
    layer(randn(1, IN, seed=0))
    layer.base_layer.weight.data.mul_(2)  # neither the address nor the version of the weight changes
    layer.adapted.refresh(layer.base_layer.weight)
    assert_not_stale(layer)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "one by one"])
def test_constants_follow_an_optimizer_of_the_base(optimizer: type[torch.optim.Optimizer], foreach: bool) -> None:
    layer = trained_layer(IN, OUT, RANK, freeze_base_layer=False)
    stepper = optimizer(layer.parameters(), lr=0.1, foreach=foreach)
    for step in range(3):
        stepper.zero_grad()
        layer(randn(4, IN, seed=step)).square().sum().backward()
        stepper.step()
        with torch.no_grad():
            assert_not_stale(layer)


def test_constants_follow_casts_of_the_model() -> None:
    layer = trained_layer(IN, OUT, RANK)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        layer.to(dtype)
        x = randn(4, IN, seed=8, dtype=dtype)
        tolerance = 1e-5 if dtype.itemsize >= 4 else 2e-2
        assert worst_error(layer(x), DenseDVoRA.of(layer)(x)) < tolerance


def test_a_cast_to_float64_measures_the_norm_in_float64() -> None:
    layer = trained_layer(IN, OUT, RANK).double()
    x = randn(4, IN, seed=8, dtype=torch.float64)
    assert worst_error(layer(x), DenseDVoRA.of(layer)(x)) < 1e-12


def test_a_deep_copy_follows_its_own_weight_only() -> None:
    layer = trained_layer(IN, OUT, RANK)
    copied = copy.deepcopy(layer)
    write_in_place(copied)
    for each in (layer, copied):
        assert_not_stale(each)


def test_constants_are_made_once_for_a_weight_that_does_not_change() -> None:
    layer = trained_layer(IN, OUT, RANK)
    w = layer.adapted.w
    for _ in range(3):
        layer(randn(2, IN, seed=0)).sum().backward()
    assert layer.adapted.w is w


def test_a_trained_base_passes_its_gradient_through_the_constants() -> None:
    layer = trained_layer(IN, OUT, RANK, freeze_base_layer=False)
    norm = layer.adapted.norm(layer.base_layer.weight)
    assert norm.w.requires_grad
    assert norm.C.requires_grad
    with torch.no_grad():
        norm = layer.adapted.norm(layer.base_layer.weight)
    assert not norm.w.requires_grad
    assert not norm.C.requires_grad


def test_a_weight_that_became_nan_is_refused_by_name_until_it_is_repaired() -> None:
    layer = trained_layer(IN, OUT, RANK)
    x, expected = randn(4, IN, seed=8), layer(randn(4, IN, seed=8))
    value = float(layer.base_layer.weight[1, 2])
    with torch.no_grad():
        layer.base_layer.weight[1, 2] = torch.nan
        with pytest.raises(ValueError, match=rf"Linear\({IN}, {OUT}\): 1 of {OUT} rows"):
            layer(x)
        layer.base_layer.weight[1, 2] = value
    assert torch.equal(layer(x), expected)


def test_constants_made_in_parts_equal_those_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = linear(IN, OUT).weight.detach()
    whole = AdaptedWeight(weight, RANK, shared=SHARED).C
    monkeypatch.setattr(norm, "_CHUNK_VALUES", 2 * IN)
    parts = AdaptedWeight(weight, RANK, shared=SHARED).C
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_and_constants_are_never_below_float32(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    layer = trained_layer(IN, OUT, RANK, dtype=dtype)
    assert {vector.dtype for vector in layer.vectors} == {expected}
    assert {layer.adapted.w.dtype, layer.adapted.C.dtype} == {expected}


def test_the_starting_vectors_make_the_layer_its_base() -> None:
    weight = linear(IN, OUT).weight.detach()
    magnitude, lambda_b, lambda_d = AdaptedWeight(weight, RANK, shared=SHARED).initial_vectors(0.25)
    torch.testing.assert_close(magnitude, weight.norm(dim=1))
    assert lambda_b.tolist() == [0] * OUT
    assert lambda_d.tolist() == [0.25] * RANK


def test_the_printed_form_names_the_sizes_and_hyperparameters() -> None:
    adapted = AdaptedWeight(linear(IN, OUT).weight.detach(), RANK, shared=SHARED, alpha=2.5, direction="weight")
    expected = "in_features=6, out_features=5, rank=3, alpha=2.5, direction='weight', detach_norm=False"
    assert adapted.extra_repr() == expected


def test_a_weight_stored_otherwise_has_the_same_constants_and_updates() -> None:
    weight = randn(OUT, IN, seed=1, dtype=torch.float64)
    plain = AdaptedWeight(weight, RANK, shared=SHARED)
    turned = AdaptedWeight(weight.T.contiguous(), RANK, shared=SHARED, layout=COLUMNS)
    vectors = plain.initial_vectors(0.1)._replace(lambda_b=randn(OUT, seed=2, dtype=torch.float64))
    assert torch.equal(turned.delta(vectors, weight.T), plain.delta(vectors, weight))
    assert torch.equal(turned.w, plain.w)
    assert torch.equal(turned.C, plain.C)


def test_a_padding_column_is_neither_updated_nor_in_the_norm_of_an_update() -> None:
    weight = randn(OUT, IN, seed=1, dtype=torch.float64)
    adapted = AdaptedWeight(weight, RANK, shared=SHARED, padding_column=2)
    lambda_b = randn(OUT, seed=2, dtype=torch.float64)
    vectors = adapted.initial_vectors(0.1)._replace(lambda_b=lambda_b)
    A = SHARED.A(RANK, IN, torch.float64)
    A[:, 2] = 0
    dense = DenseDVoRA(weight, None, A, SHARED.B(RANK, OUT, torch.float64), *vectors)
    assert worst_error(weight + adapted.delta(vectors, weight), dense.merged_weight()) < 1e-12
    ratio = (weight + adapted.delta(vectors, weight))[:, 2] / weight[:, 2]
    assert torch.allclose(ratio, dense.gain())


def test_the_magnitude_alone_rescales_rows() -> None:
    weight = randn(OUT, IN, seed=1)
    adapted = AdaptedWeight(weight, MAGNITUDE_ONLY, shared=SHARED)
    magnitude, lambda_b, lambda_d = adapted.initial_vectors(0.1)
    assert lambda_d.numel() == 0
    found = adapted.delta(Vectors(2 * magnitude, lambda_b, lambda_d), weight)
    assert torch.allclose(found, weight, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.3, -1.0])
def test_strength_scales_update_and_gain(strength: float) -> None:
    weight = randn(OUT, IN, seed=1)
    adapted = AdaptedWeight(weight, RANK, shared=SHARED)
    vectors = adapted.initial_vectors(0.1)._replace(lambda_b=randn(OUT, seed=2))
    full, scaled = (factors_of(adapted, vectors, weight, torch.tensor(s)).packed.rows for s in (1.0, strength))
    assert torch.allclose(scaled.gain_minus_one, strength * full.gain_minus_one, atol=1e-7)
    assert torch.allclose(scaled.scale, strength * full.scale, atol=1e-7)


@pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_of_vectors_in_half_precision_are_not(distribution: str, dtype: torch.dtype) -> None:
    layer = trained_layer(IN, OUT, RANK, shared=SharedProjections(3, distribution))
    x = randn(4, IN, seed=0)
    for vector in layer.vectors:
        vector.data = vector.data.to(dtype).float()
    expected = torch.autograd.grad(layer(x).square().sum(), layer.vectors)
    outputs = layer(x)
    for vector in layer.vectors:
        vector.data = vector.data.to(dtype)
    assert torch.equal(layer(x), outputs)
    found = torch.autograd.grad(layer(x).square().sum(), layer.vectors)
    # What reaches a vector by two ways is rounded twice.
    for ours, whole in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert worst_error(ours, whole) < 2 * torch.finfo(dtype).eps
