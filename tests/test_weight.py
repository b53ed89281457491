"""The frozen side of a weight: its constants follow it; and merging into a weight of any dtype."""

import pytest
import torch
from torch import Tensor, nn

from dvora import SharedProjections
from dvora import weight as weights
from dvora.factors import factors_of
from dvora.weight import (
    COLUMNS,
    EXPERTS,
    EXPERTS_TRANSPOSED,
    KERNELS,
    ROWS,
    AdaptedWeight,
    MergePrecisionWarning,
    WeightLayout,
    check_finite,
    merge,
    merged_copy,
)
from tests.cases import DTYPES, SHARED, linear, randn, trained_layer
from tests.reference import DenseDVoRA, worst_error

IN, OUT, RANK = 6, 5, 3


def adapted_weight(weight: Tensor, rank: int = RANK, **options: object) -> AdaptedWeight:
    return AdaptedWeight(weight, rank, **{"shared": SHARED, **options})


def assert_constants_of(adapted: AdaptedWeight, matrix: Tensor, tolerance: float = 1e-6) -> None:
    """`w` and `C` as defined, from the dense matrix (O, I)."""
    wide, rank = matrix.detach().double(), adapted.rank
    w = wide.norm(dim=1)
    unit = wide / torch.where(w > 0, w, 1.0)[:, None]
    A, B = adapted.A(wide), adapted.B(wide)
    columns, groups = A.shape[1], adapted.groups
    of_group = [[i for i in range(columns) if i * groups // columns == group] for group in range(groups)]
    assert worst_error(adapted.w, w) < tolerance
    assert worst_error(adapted.C, torch.cat([B * (unit[:, of] @ A[:, of].T) for of in of_group], 1)) < tolerance
    assert adapted.C.shape == (len(matrix), groups * rank)


LAYOUTS = {
    "rows": (ROWS, (5, 3), (5, 3)),
    "columns": (COLUMNS, (3, 5), (5, 3)),
    "1-d kernels": (KERNELS, (5, 2, 3), (5, 6)),
    "3-d kernels": (KERNELS, (5, 2, 3, 4, 1), (5, 24)),
    "experts": (EXPERTS, (2, 5, 3), (10, 3)),
    "experts, transposed": (EXPERTS_TRANSPOSED, (2, 3, 5), (10, 3)),
}


@pytest.mark.parametrize(("layout", "stored", "matrix"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_leads_to_the_matrix_and_back(
    layout: WeightLayout, stored: tuple[int, ...], matrix: tuple[int, int]
) -> None:
    weight = randn(*stored, seed=0)
    assert layout.matrix(weight).shape == matrix
    assert torch.equal(layout.stored(layout.matrix(weight), weight.shape), weight)
    assert_constants_of(adapted_weight(weight, layout=layout), layout.matrix(weight))


def test_rows_of_experts_and_strides_of_kernels_are_those_of_the_stored_weight() -> None:
    weight = randn(2, 5, 3, seed=0)
    assert torch.equal(EXPERTS.matrix(weight)[5 + 2], weight[1, 2])
    assert torch.equal(EXPERTS_TRANSPOSED.matrix(weight.mT)[5 + 2], weight[1, 2])
    kernels = randn(4, 3, 2, 2, seed=0)
    assert torch.equal(KERNELS.matrix(kernels.to(memory_format=torch.channels_last)), KERNELS.matrix(kernels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants_are_those_of_the_definition_and_never_below_float32(dtype: torch.dtype) -> None:
    weight = linear(IN, OUT, dtype=dtype).weight.detach()
    adapted = adapted_weight(weight, shared=SharedProjections(3))
    assert_constants_of(adapted, weight, 1e-12 if dtype == torch.float64 else 1e-6)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {adapted.w.dtype, adapted.C.dtype, *(v.dtype for v in adapted.initial_vectors(0.1))} == {wide}


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, True), ({"groups": 2}, False), ({"groups": 2, "readable": False}, True), ({"groups": 1, "rank": 1}, True)],
    ids=str,
)
@pytest.mark.parametrize("padding_column", [None, 2])
def test_by_groups_a_constant_is_kept_where_it_is_small_or_the_weight_cannot_be_read(
    padding_column: int | None, options: dict[str, object], kept: bool
) -> None:
    for columns, is_kept in ((40, kept), (48 * int(options.get("groups", 1)), True)):
        weight = nn.Parameter(randn(OUT, columns, seed=1, dtype=torch.float64), requires_grad=False)
        adapted = adapted_weight(weight, **{"rank": RANK, "padding_column": padding_column, **options})
        # What is no parameter may have been computed, and be gone in the next pass.
        assert adapted_weight(weight.detach(), **{"rank": RANK, **options}).C.numel()
        if is_kept:
            assert_constants_of(adapted, weight, 1e-12)
        else:
            assert adapted.C.numel() == 0
        lambda_d = randn(adapted.lambda_d_size, seed=2, dtype=torch.float64).requires_grad_()
        _, cross, q = adapted.terms(lambda_d)
        update = adapted.update(lambda_d)
        assert worst_error(cross, (weight * update).sum(1) / weight.norm(dim=1)) < 1e-12
        assert worst_error(q, update.square().sum(1)) < 1e-12
        gradients = randn(2, OUT, seed=3, dtype=torch.float64)
        (expected,) = torch.autograd.grad([cross, q / 2], lambda_d, [*gradients])
        assert worst_error(adapted.terms_gradient(*gradients, lambda_d.detach()), expected) < 1e-12


def test_a_norm_that_needs_a_weight_which_is_gone_says_so() -> None:
    adapted = adapted_weight(nn.Parameter(randn(OUT, 40, seed=1), requires_grad=False), groups=4)
    with pytest.raises(RuntimeError, match="the norm with lambda_d_groups=4 needs the base's weight, which is not in"):
        adapted.terms(torch.ones(4 * RANK))


@pytest.mark.parametrize("padding_column", [None, 2])
def test_constants_made_in_chunks_equal_those_made_at_once(
    padding_column: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = randn(OUT, IN, seed=1)
    whole = adapted_weight(weight, padding_column=padding_column).C
    monkeypatch.setattr(weights, "_CHUNK_VALUES", 2 * IN)
    torch.testing.assert_close(adapted_weight(weight, padding_column=padding_column).C, whole, rtol=1e-6, atol=1e-6)


def test_constants_made_under_autocast_are_not_rounded() -> None:
    weight = randn(OUT, IN, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        adapted = adapted_weight(weight)
    assert_constants_of(adapted, weight)


@pytest.mark.parametrize("norm", [1e-12, 1e-30])
def test_norms_whose_squares_underflow_are_measured(norm: float) -> None:
    weight = randn(OUT, IN, seed=1)
    weight[2] *= norm / weight[2].norm()
    adapted = adapted_weight(weight)
    assert float(adapted.w[2]) == pytest.approx(norm, rel=1e-5)
    assert_constants_of(adapted, weight)


@pytest.mark.parametrize(("dtype", "readable"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_large_C_beside_a_weight_in_half_precision_is_kept_in_bfloat16(dtype: torch.dtype, readable: bool) -> None:
    weight = randn(2100, 40, seed=1, dtype=dtype)
    large = adapted_weight(weight, 128, readable=readable)
    assert large.C.dtype == torch.bfloat16
    assert large.w.dtype == torch.float32
    assert_constants_of(large, weight, 4e-3)
    assert adapted_weight(weight, 16, readable=readable).C.dtype == torch.float32
    assert adapted_weight(weight.float(), 128).C.dtype == torch.float32


def test_a_padding_column_is_neither_updated_nor_in_the_norm_of_an_update() -> None:
    weight = randn(OUT, IN, seed=1, dtype=torch.float64)
    adapted = adapted_weight(weight, shared=SharedProjections(3), padding_column=2)
    vectors = adapted.initial_vectors(0.1)._replace(lambda_b=randn(OUT, seed=2, dtype=torch.float64))
    A = adapted.shared.A(RANK, IN, torch.float64)
    A[:, 2] = 0
    B = adapted.B(weight)
    dense, update = DenseDVoRA(weight, None, A, B, *vectors), (B * vectors.lambda_d) @ A
    factors = factors_of(adapted, vectors, weight)
    assert torch.equal(adapted.A(weight), A)
    assert worst_error(factors.gain, dense.gain()) < 1e-12
    assert worst_error(factors.scale, dense.scale()) < 1e-12
    lambda_d, d_half_q = vectors.lambda_d.clone().requires_grad_(), randn(OUT, seed=3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(adapted.squares(lambda_d) / 2, lambda_d, d_half_q)
    assert worst_error(adapted.squares_gradient(d_half_q, lambda_d.detach()), expected) < 1e-12
    assert worst_error(adapted.update(vectors.lambda_d, factors.scale), dense.scale()[:, None] * update) < 1e-12


def test_constants_are_made_once_for_a_weight_that_does_not_change() -> None:
    layer = trained_layer(IN, OUT, RANK)
    w = layer.adapted.w
    for _ in range(3):
        layer(randn(2, IN, seed=0)).sum().backward()
    layer.eval()(randn(2, IN, seed=0))
    assert layer.adapted.w is w


def test_a_cast_changes_the_dtype_of_norms_upwards_only_and_never_that_of_C() -> None:
    adapted = adapted_weight(randn(OUT, IN, seed=1))
    C = adapted.C
    assert adapted.half().w.dtype == torch.float32
    assert adapted.double().w.dtype == torch.float64
    assert adapted.C.dtype == torch.float32
    assert torch.equal(adapted.C, C)
    assert adapted.to("meta").C.is_meta


def test_a_weight_that_became_nan_is_refused_by_name_until_it_is_repaired() -> None:
    layer, x = trained_layer(IN, OUT, RANK), randn(4, IN, seed=8)
    expected, value = layer(x), float(layer.base_layer.weight[1, 2])
    with torch.no_grad():
        layer.base_layer.weight[1, 2] = torch.nan
        with pytest.raises(ValueError, match=rf"Linear\({IN}, {OUT}\): 1 of {OUT} rows"):
            layer(x)
        layer.base_layer.weight[1, 2] = value
    assert torch.equal(layer(x), expected)


REFUSED = {
    "meta": (lambda: torch.empty(OUT, IN, device="meta"), ValueError, "meta device; load the base"),
    "integers": (lambda: torch.ones(OUT, IN, dtype=torch.int8), TypeError, r"has dtype torch\.int8"),
    "eight bits": (lambda: torch.ones(OUT, IN).to(torch.float8_e4m3fn), TypeError, r"float8_e4m3fn.*16 bits"),
    "complex": (lambda: torch.ones(OUT, IN, dtype=torch.complex64), TypeError, "has dtype"),
    "one dimension": (lambda: torch.ones(IN), TypeError, r"shape \(6,\); DVoRA adapts matrices"),
    "empty": (lambda: torch.ones(0, IN), ValueError, "nothing to adapt; leave the layer out"),
    "NaN": (lambda: torch.full((OUT, IN), torch.nan), ValueError, "5 of 5 rows .* no finite norm"),
    "overflow": (lambda: torch.full((OUT, IN), 3e38), ValueError, "repair the base"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_weight_that_cannot_be_adapted_is_refused_by_name(case: str) -> None:
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=f"^here: .*{message}"):
        adapted_weight(make(), name="here")


# Merging.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_is_the_share_of_the_delta_that_the_merged_weight_lacks(dtype: torch.dtype) -> None:
    weight, delta = randn(50, 60, seed=0, dtype=dtype), 1e-3 * randn(50, 60, seed=1)
    merged = merge(weight, delta)
    arrived = merged.weight.double() - weight.double()
    expected = float((arrived - delta.double()).norm() / delta.double().norm())
    assert merged.weight.dtype == dtype
    assert merged.lost == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert torch.equal(weight, randn(50, 60, seed=0, dtype=dtype))


def test_a_delta_below_the_rounding_of_the_weight_is_lost_whole_and_none_not_at_all() -> None:
    ones = torch.ones(4, 4, dtype=torch.bfloat16)
    swallowed, nothing = merge(ones, torch.full((4, 4), 1e-4)), merge(ones, torch.zeros(4, 4))
    assert torch.equal(swallowed.weight, ones)
    assert torch.equal(nothing.weight, ones)
    assert swallowed.lost == pytest.approx(1, rel=1e-3)
    assert nothing.lost == 0


def test_a_merged_copy_has_the_bases_class_and_warns_by_name() -> None:
    base = linear(IN, OUT, dtype=torch.bfloat16)
    base.calls = 7
    with pytest.warns(MergePrecisionWarning, match=r"most in here: \d+\.\d%"):
        merged = merged_copy(base, torch.full((OUT, IN), 1e-5), "here")
    assert type(merged) is nn.Linear
    assert merged.calls == 7
    assert merged.weight.data_ptr() != base.weight.data_ptr()
    assert not merge(base.weight, torch.zeros(OUT, IN)).weight.requires_grad


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, torch.nan), (torch.float16, 1e6)], ids=str)
def test_a_merge_that_is_not_finite_in_the_weights_dtype_is_refused(dtype: torch.dtype, value: float) -> None:
    base, delta = linear(IN, OUT, dtype=dtype), torch.zeros(OUT, IN)
    delta[1, 2] = value
    with pytest.raises(ValueError, match=rf"here: merging gives .* too large for {dtype}; nothing was merged"):
        merged_copy(base, delta, "here")
    check_finite(torch.ones(3).to(torch.float8_e4m3fn), "a merge")
