"""The row factors of several layers made at once: those of each layer, and of the dense float64 method."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvora.matrices import dense
from dvora.matrices.interface import DISTRIBUTIONS
from dvora.method.norm import _joined_C, joined
from tests.cases import DIRECTIONS, TOLERANCE, randn
from tests.method.frozen_weight import (
    NAMES,
    F,
    FrozenNorm,
    Layers,
    both_directions,
    both_dtypes,
    every_distribution,
    row_factors,
)
from tests.reference import worst_error

IN, OUT, RANK = 6, 9, 4
one_two_and_five = pytest.mark.parametrize("count", [1, 2, 5], ids=lambda count: f"{count} layers")
detached_or_not = pytest.mark.parametrize("detach_norm", [False, True], ids=["through the norm", "detach_norm"])
CONSTANTS = ["kept", "joined", "made again"]


def norms_of(layers: Layers, constants: str) -> list[FrozenNorm]:
    if constants == "joined":
        return layers.joined() if len(layers.problems) > 1 else layers.norms()
    return layers.norms(keep_C=constants == "kept")


def assert_equal_to_the_dense_method(layers: Layers, tolerance: float, norms: list[FrozenNorm] | None = None) -> None:
    packed, gradients = layers.stacked(norms).packed, layers.gradients(norms)
    for p, of_layer, found in zip(layers.problems, packed, gradients, strict=True):
        factors, reference = of_layer.rows, p.dense()
        assert worst_error(factors.gain_minus_one, reference.gain() - 1) < tolerance
        assert worst_error(factors.gain, reference.gain()) < tolerance
        assert worst_error(factors.scale, reference.scale()) < tolerance
        assert torch.equal(of_layer.lambda_d, p.vectors.lambda_d)
        for name, expected in p.dense_gradients().items():
            assert worst_error(found[name], expected) < tolerance, name


def assert_equal_to_each_layer(layers: Layers, tolerance: float, norms: list[FrozenNorm] | None = None) -> None:
    """Other products are made for several, so that only the last digits may differ."""
    norms = norms or layers.norms()
    packed, gradients = layers.stacked(norms).packed, layers.gradients(norms)
    for p, norm, of_layer, found in zip(layers.problems, norms, packed, gradients, strict=True):
        for value, expected in zip(of_layer, p.packed(norm), strict=True):
            assert worst_error(value, expected.double()) < tolerance
        for name, expected in p.gradients(norm).items():
            assert worst_error(found[name], expected.double()) < tolerance, name


@both_dtypes
@both_directions
@every_distribution
@detached_or_not
@one_two_and_five
@pytest.mark.parametrize("constants", CONSTANTS)
def test_factors_and_gradients_equal_the_dense_method_and_those_of_each_layer(
    constants: str, count: int, detach_norm: bool, distribution: str, direction: str, dtype: torch.dtype
) -> None:
    options = {"scaling": 0.25, "direction": direction, "detach_norm": detach_norm}
    layers = Layers(count, IN, OUT, RANK, dtype, distribution, **options)
    norms = norms_of(layers, constants)
    assert_equal_to_the_dense_method(layers, TOLERANCE[dtype], norms)
    assert_equal_to_each_layer(layers, TOLERANCE[dtype] / 10, norms)


@both_dtypes
@every_distribution
@pytest.mark.parametrize(("in_features", "out_features", "rank"), [(300, 500, 16), (40, 60, 300)])
def test_large_layers_equal_the_dense_method(
    in_features: int, out_features: int, rank: int, distribution: str, dtype: torch.dtype
) -> None:
    layers = Layers(3, in_features, out_features, rank, dtype, distribution)
    assert_equal_to_the_dense_method(layers, TOLERANCE[dtype], layers.joined())


@given(
    count=st.integers(1, 5),
    shape=st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(2, 12)),
    distribution=st.sampled_from(DISTRIBUTIONS),
    scaling=st.floats(0.01, 10),
    direction=st.sampled_from(DIRECTIONS),
    detach_norm=st.booleans(),
    skipped=st.booleans(),
    constants=st.sampled_from(CONSTANTS),
)
def test_any_number_of_layers_of_any_shape_equals_the_dense_method(
    count: int, shape: tuple[int, int, int], skipped: bool, constants: str, **options: object
) -> None:
    layers = Layers(count, *shape, padding_column=1 if skipped else None, **options)
    assert_equal_to_the_dense_method(layers, 1e-12, norms_of(layers, constants))


@both_dtypes
@one_two_and_five
def test_where_the_operations_are_the_same_the_bits_are(count: int, dtype: torch.dtype) -> None:
    # Without an update there is no product of matrices.
    layers = Layers(count, IN, OUT, RANK, dtype)
    for p in layers.problems:
        p.vectors.lambda_b.zero_()
        p.vectors = p.vectors._replace(lambda_d=p.vectors.lambda_d[:0])
        p.lambda_gradient = p.vectors.lambda_d
    sizes = layers.problems[0].shared.impl, IN, 0, None
    norms = [FrozenNorm(F.row_norm(p.weight), False, None, p.weight, *sizes) for p in layers.problems]
    packed, gradients = layers.stacked(norms).packed, layers.gradients(norms)
    for p, norm, of_layer, found in zip(layers.problems, norms, packed, gradients, strict=True):
        assert all(torch.equal(value, expected) for value, expected in zip(of_layer, p.packed(norm), strict=True))
        expected = p.gradients(norm)
        assert all(torch.equal(found[name], expected[name]) for name in NAMES)
        assert worst_error(of_layer.rows.gain_minus_one, p.vectors.magnitude.double() / norm.w - 1) < 1e-6


@both_dtypes
@both_directions
@every_distribution
@pytest.mark.parametrize("constants", CONSTANTS)
def test_without_training_every_gain_is_exactly_one(
    constants: str, distribution: str, direction: str, dtype: torch.dtype
) -> None:
    layers = Layers(3, IN, OUT, RANK, dtype, distribution, direction=direction)
    for p in layers.problems:
        p.vectors = p.vectors._replace(magnitude=F.row_norm(p.weight), lambda_b=torch.zeros(OUT, dtype=dtype))
    for of_layer in layers.stacked(norms_of(layers, constants)).packed:
        assert not of_layer.trained.any()
        gain, opposite = of_layer.constant
        assert torch.equal(gain, torch.ones(OUT, dtype=dtype))
        assert not opposite.any()


@both_directions
@every_distribution
@detached_or_not
def test_zero_rows_of_one_layer_leave_the_others_alone(detach_norm: bool, distribution: str, direction: str) -> None:
    layers = Layers(3, IN, OUT, RANK, distribution=distribution, direction=direction, detach_norm=detach_norm)
    before = layers.stacked().packed
    layers.problems[1].weight[[0, 3]] = 0
    assert [norm.zero_rows for norm in layers.norms()] == [False, True, False]
    assert_equal_to_the_dense_method(layers, 1e-12)
    after = layers.stacked().packed
    for index in (0, 2):
        assert all(torch.equal(now, then) for now, then in zip(after[index], before[index], strict=True))
    factors, gradients = after[1].rows, layers.gradients()[1]
    assert not factors.gain_minus_one[[0, 3]].any()
    assert (factors.gain[[0, 3]] == 1).all()
    assert torch.equal(factors.scale[[0, 3]], layers.problems[1].beta()[[0, 3]])
    assert not gradients["magnitude"][[0, 3]].any()


@both_dtypes
@both_directions
@every_distribution
@detached_or_not
def test_rows_that_nearly_cancel_in_one_layer_are_exact_and_leave_the_others_alone(
    detach_norm: bool, distribution: str, direction: str, dtype: torch.dtype
) -> None:
    layers = Layers(3, 16, 6, 4, dtype, distribution, direction=direction, detach_norm=detach_norm)
    assert not layers.stacked().measured
    before = layers.stacked().packed
    layers.problems[1].cancel(1e-2, [0, 2, 5])
    assert layers.problems[1].dense().norm_ratio()[[0, 2, 5]].max() < 3e-2
    for constants in CONSTANTS:
        norms = norms_of(layers, constants)
        assert layers.stacked(norms).measured
        assert_equal_to_the_dense_method(layers, 40 * torch.finfo(dtype).eps / 1e-2, norms)
    after = layers.stacked().packed
    for index in (0, 2):
        assert all(torch.equal(now, then) for now, then in zip(after[index], before[index], strict=True))


def test_where_the_weight_is_not_in_memory_no_row_is_measured() -> None:
    layers = Layers(2, 16, 6, 4)
    layers.problems[1].cancel(1e-1, [1])
    norms = layers.norms(keep_weight=False)
    assert not layers.stacked(norms).measured
    assert_equal_to_the_dense_method(layers, 1e-10, norms)


@pytest.mark.parametrize("size", [1e4, 1e12, 1e20])
@both_directions
def test_updates_far_larger_than_the_rows_of_one_layer_leave_the_others_alone(direction: str, size: float) -> None:
    layers = Layers(3, IN, OUT, RANK, torch.float32, direction=direction)
    before = layers.stacked().packed
    layers.problems[1].vectors.lambda_b.mul_(size)
    after = layers.stacked().packed
    for index in (0, 2):
        assert all(torch.equal(now, then) for now, then in zip(after[index], before[index], strict=True))
    factors, reference = after[1].rows, layers.problems[1].dense()
    assert worst_error(factors.gain, reference.gain()) < 1e-5
    assert worst_error(factors.scale, reference.scale()) < 1e-5
    assert all(gradient.isfinite().all() for of_layer in layers.gradients() for gradient in of_layer.values())


@both_dtypes
@one_two_and_five
def test_a_C_in_bfloat16_is_widened_before_anything_is_summed(count: int, dtype: torch.dtype) -> None:
    layers = Layers(count, IN, OUT, RANK, dtype)
    rounded = [norm._replace(C=norm.C.bfloat16()) for norm in layers.norms()]
    widened = [norm._replace(C=norm.C.to(dtype)) for norm in rounded]
    for found, expected in zip(layers.stacked(rounded).packed, layers.stacked(widened).packed, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    for found, expected in zip(layers.gradients(rounded), layers.gradients(widened), strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@both_dtypes
@pytest.mark.parametrize("count", [2, 5], ids=lambda count: f"{count} layers")
def test_constants_that_are_joined_give_what_separate_ones_do(count: int, dtype: torch.dtype) -> None:
    layers = Layers(count, IN, OUT, RANK, dtype)
    separate, together = layers.norms(), layers.joined()
    assert _joined_C(separate) is None
    assert _joined_C(together).shape == (count, OUT, RANK)
    for ours, theirs in zip(together, separate, strict=True):
        assert torch.equal(ours.C, theirs.C)
    tolerance = 10 * torch.finfo(dtype).eps
    for found, expected in zip(layers.stacked(together).packed, layers.stacked(separate).packed, strict=True):
        assert worst_error(found.trained, expected.trained.double()) < tolerance
    for found, expected in zip(layers.gradients(together), layers.gradients(separate), strict=True):
        assert all(worst_error(found[name], expected[name].double()) < 5 * tolerance for name in NAMES)


def test_parts_in_another_order_or_of_fewer_layers_are_not_taken_for_the_whole() -> None:
    layers = Layers(3, IN, OUT, RANK)
    norms = layers.joined()
    for order in ([1, 0, 2], [0, 1], [1, 2], [0], [0, 0, 2]):
        chosen = [norms[index] for index in order]
        assert _joined_C(chosen) is None, order
        found = row_factors([layers.problems[index].vectors for index in order], chosen, layers.problems[0].settings)
        for index, of_layer in zip(order, found.packed, strict=True):
            expected = layers.problems[index].dense()
            assert worst_error(of_layer.rows.gain, expected.gain()) < 1e-12
    others = [norms[0], norms[1]._replace(C=norms[1].C.clone()), norms[2]]
    assert _joined_C(others) is None


def test_what_cannot_be_joined_is_left_as_it_is() -> None:
    C = [randn(5, 3, seed=seed) for seed in range(3)]
    assert joined(C[:1]) is None
    assert joined([C[0], None]) is None
    assert joined([None, C[0]]) is None
    assert joined([each.bfloat16() for each in C]) is None
    assert joined([each[:, :0] for each in C]) is None
    assert joined([C[0], C[1].double()]) is None
    assert joined([C[0], randn(4, 3, seed=0)]) is None
    parts = joined(C)
    assert all(torch.equal(part, each) for part, each in zip(parts, C, strict=True))
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert joined(parts) is None, "they are parts already"
    assert joined([*parts, randn(5, 3, seed=4)]) is None


@every_distribution
@both_dtypes
@pytest.mark.parametrize("padding_column", [None, 2])
def test_a_half_dq_that_is_not_kept_changes_nothing(
    padding_column: int | None, distribution: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = Layers(3, IN, OUT, RANK, dtype, distribution, padding_column=padding_column)
    norms = layers.joined()
    expected = layers.gradients(norms)
    monkeypatch.setattr(dense, "_KEPT_BYTES_OF_ALL", 3)
    assert norms[0].half_dq(torch.stack([p.vectors.lambda_d for p in layers.problems])) is None
    assert_equal_to_the_dense_method(layers, TOLERANCE[dtype], norms)
    for found, kept in zip(layers.gradients(norms), expected, strict=True):
        assert all(worst_error(found[name], kept[name].double()) < TOLERANCE[dtype] for name in NAMES)
