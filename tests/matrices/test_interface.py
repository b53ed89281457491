"""The shared projections: values, growth, products, statistics, bad input."""

import hashlib
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from dvora import SharedProjections
from dvora.matrices.interface import DISTRIBUTIONS, FORMAT_VERSION
from dvora.matrices.shard import Shard
from dvora.ops.dtypes import norm_dtype
from tests.cases import DTYPES, randn

# sha256 of A (24 x 40) and B (33 x 24) for seed 7, the first values of row 1 of A, of column 1 of B, the fingerprint.
# A change of any of them is a new format: raise FORMAT_VERSION.
PINNED = {
    "kaiming_uniform": (
        "dfd38ab3e47f5df6b9795b5bd01fdf4127b7f085d4dd504031011f1ac4dd608a",
        "9db07be690e850c234ad0aef23d1533bf354277019c63bb3138a34529b076066",
        [0.28927338123321533, 0.26693156361579895, -0.30250629782676697],
        [0.005861788988113403, 0.42715975642204285, -0.3227138817310333],
        "c2c23e1275dc0fb8",
    ),
    "structured": (
        "550bfadae3bd363bd8616661b27fdb48feb16a8f182abee9eeae85c4196b3e4b",
        "0a6d7ba0d0d77419aa62010dec8310ecccedcaef91c7117dbaab34ab17e34426",
        [-0.09771975129842758, 0.09771975129842758, -0.09771975129842758],
        [0.058099787682294846, 0.1695924699306488, 0.26734575629234314],
        "15feef9c84d4dab5",
    ),
}

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


def sha256(matrix: Tensor) -> str:
    return hashlib.sha256(matrix.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


@every_distribution
def test_values_are_pinned(distribution: str) -> None:
    A_digest, B_digest, row_of_A, column_of_B, fingerprint = PINNED[distribution]
    shared = SharedProjections(7, distribution)
    A, B = shared.A(24, 40), shared.B(24, 33)
    assert FORMAT_VERSION == 1
    assert A[1, :3].tolist() == row_of_A
    assert B[:3, 1].tolist() == column_of_B
    assert (sha256(A), sha256(B)) == (A_digest, B_digest)
    assert shared.fingerprint() == fingerprint


@every_distribution
def test_values_do_not_depend_on_what_was_made_before(distribution: str) -> None:
    shared = SharedProjections(7, distribution)
    for rank, size in [(2, 100), (50, 3), (24, 39), (25, 60)]:
        shared.reserve(rank, size, size)
    assert sha256(shared.A(24, 40)) == PINNED[distribution][0]
    assert sha256(shared.B(24, 33)) == PINNED[distribution][1]


@every_distribution
def test_growth_leaves_matrices_already_in_use_unchanged(distribution: str) -> None:
    shared = SharedProjections(7, distribution)
    A, B = shared.A(4, 10), shared.B(4, 10)
    in_use = list(shared.buffers())
    before = [buffer.clone() for buffer in in_use]
    shared.reserve(40, 100, 100)
    assert in_use
    assert all(torch.equal(now, then) for now, then in zip(in_use, before, strict=True))
    assert torch.equal(shared.A(4, 10), A)
    assert torch.equal(shared.B(4, 10), B)


def test_layers_of_all_sizes_are_cut_from_the_same_values() -> None:
    shared = SharedProjections(7)
    small, large = shared.A(3, 8).double(), shared.A(5, 32).double()
    torch.testing.assert_close(small, 2 * large[:3, :8], rtol=1e-6, atol=0)
    small, large = shared.B(4, 8).double(), shared.B(16, 20).double()
    torch.testing.assert_close(small, 2 * large[:8, :4], rtol=1e-6, atol=0)


@every_distribution
@pytest.mark.parametrize("size", [1, 6, 300])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_products_equal_those_with_the_dense_matrices(distribution: str, rank: int, size: int) -> None:
    shared = SharedProjections(5, distribution)
    A, B = shared.A(rank, size, torch.float64), shared.B(rank, size, torch.float64)
    wide, narrow = randn(2, 3, size, seed=0, dtype=torch.float64), randn(2, 3, rank, seed=1, dtype=torch.float64)
    torch.testing.assert_close(shared.impl.project(wide, rank), wide @ A.T)
    torch.testing.assert_close(shared.impl.project_transpose(narrow, size), narrow @ A)
    torch.testing.assert_close(shared.impl.expand(narrow, size), narrow @ B.T)
    torch.testing.assert_close(shared.impl.expand_transpose(wide, rank), wide @ B)
    torch.testing.assert_close(shared.impl.gram(rank, size, torch.float64), A @ A.T)
    scale, lambda_d = randn(size, seed=2, dtype=torch.float64), randn(rank, seed=3, dtype=torch.float64)
    z, d, d_scale = narrow.flatten(0, 1), wide.flatten(0, 1), torch.empty_like(scale)
    add, onto = shared.impl.prepared_update(lambda_d, scale, torch.float64), (scale + 1).repeat(len(z), 1)
    torch.testing.assert_close(add(z, None), ((z * lambda_d) @ B.T) * scale)
    torch.testing.assert_close(add(z, onto), ((z * lambda_d) @ B.T) * scale + (scale + 1))
    torch.testing.assert_close(shared.impl.expand_transpose(d, rank, scale), (d * scale) @ B)
    d_z, d_lambda_d = shared.impl.update_gradients(d, z, lambda_d, scale, d_scale)
    torch.testing.assert_close(d_z, ((d * scale) @ B) * lambda_d)
    torch.testing.assert_close(d_lambda_d, (((d * scale) @ B) * z).sum(0))
    torch.testing.assert_close(d_scale, (d * ((z * lambda_d) @ B.T)).sum(0))


KINDS = [*DISTRIBUTIONS, "peft_vera(r=40, in=48, out=48)"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Beside the largest sum of the absolute values that are added up."""


def tokens_of(leading: list[int], size: int, dtype: torch.dtype, contiguous: bool) -> Tensor:
    """Some tokens, perhaps every second value of each."""
    if contiguous:
        return randn(*leading, size, seed=0, dtype=dtype)
    return randn(*leading, 2 * size, seed=0, dtype=dtype)[..., ::2]


@given(
    kind=st.sampled_from(KINDS),
    leading=st.lists(st.integers(0, 3), max_size=3),
    rank=st.integers(1, 40),
    size=st.integers(1, 14) | st.sampled_from([36, 48]),
    dtype=st.sampled_from(DTYPES),
    contiguous=st.booleans(),
    parts=st.sampled_from([1, 2]),
)
@example("structured", [], 9, 4, torch.float32, True, 1)
@example("structured", [1, 1], 9, 4, torch.bfloat16, False, 1)
@example("structured", [1, 1], 7, 48, torch.float16, True, 1)
@example("structured", [2], 17, 36, torch.float32, True, 2)
def test_a_prepared_projection_is_the_projection(
    kind: str, leading: list[int], rank: int, size: int, dtype: torch.dtype, contiguous: bool, parts: int
) -> None:
    impl, x = SharedProjections(5, kind).impl, tokens_of(leading, size, dtype, contiguous)
    A = impl.A(rank, size, torch.float64)
    if parts > 1:
        half = Shard(size // 2, size, size)
        impl, x, A = impl.of_shard(half, None), x[..., size // 2 :], A[:, size // 2 :]
    project, before = impl.prepared_projection(rank, x.shape[-1], dtype, x.device), x.clone()
    found, expected = project(x), impl.project(x, rank)
    assert found.dtype == dtype
    assert found.shape == ((1, rank) if x.numel() == x.shape[-1] else expected.shape)
    assert torch.equal(project(x), found), "it serves many passes"
    assert torch.equal(x, before)
    for reference in (expected.double(), x.double() @ A.T):
        difference, sizes = (found.double() - reference.reshape(found.shape)).abs(), x.double().abs() @ A.T.abs()
        assert not found.numel() or difference.max() <= TOLERANCE[dtype] * sizes.max()


@every_distribution
def test_a_prepared_projection_does_not_write_to_what_it_gave(distribution: str) -> None:
    project = SharedProjections(5, distribution).impl.prepared_projection(3, 6, torch.float32, torch.device("cpu"))
    for tokens in (1, 4):
        x = randn(tokens, 6, seed=0)
        first = project(x)
        kept = first.clone()
        project(2 * x)
        assert torch.equal(first, kept)


@given(
    kind=st.sampled_from(KINDS),
    leading=st.lists(st.integers(1, 1), min_size=1, max_size=3),
    rank=st.integers(1, 40),
    out=st.integers(1, 48),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@example("structured", [1, 1], 9, 4, torch.float32)
def test_one_token_in_a_row_is_added_to_outputs_of_any_shape(
    kind: str, leading: list[int], rank: int, out: int, dtype: torch.dtype
) -> None:
    impl = SharedProjections(5, kind).impl
    z, onto = randn(1, rank, seed=0, dtype=dtype), randn(*leading, out, seed=1, dtype=dtype)
    lambda_d, scale = randn(rank, seed=2, dtype=dtype), randn(out, seed=3, dtype=dtype)
    expected = (((z * lambda_d).double() @ impl.B(rank, out, torch.float64).T) * scale)[0] + onto.double()
    found = impl.prepared_update(lambda_d, scale, dtype)(z, onto)
    assert found is onto
    assert (found.double() - expected).abs().max() <= 10 * TOLERANCE[dtype] * expected.abs().max().clamp(min=1)


@every_distribution
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_come_in_the_dtype_of_their_input(dtype: torch.dtype, distribution: str) -> None:
    shared = SharedProjections(0, distribution)
    wide, narrow = randn(2, 6, seed=0, dtype=dtype), randn(2, 3, seed=1, dtype=dtype)
    scale, lambda_d = randn(6, seed=2, dtype=norm_dtype(dtype)), randn(3, seed=3, dtype=norm_dtype(dtype))
    assert shared.impl.prepared_update(lambda_d, scale, dtype)(narrow, None).dtype == dtype
    d_z, d_lambda_d = shared.impl.update_gradients(wide, narrow, lambda_d, scale, torch.empty_like(scale))
    assert d_z.dtype == dtype
    assert d_lambda_d.dtype == scale.dtype
    assert shared.impl.project(wide, 3).dtype == dtype
    assert shared.impl.project_transpose(narrow, 6).dtype == dtype
    assert shared.impl.expand(narrow, 6).dtype == dtype
    assert shared.impl.expand_transpose(wide, 3).dtype == dtype
    assert shared.impl.expand_transpose(wide, 3, scale).dtype == dtype


@every_distribution
def test_entries_have_mean_zero_and_the_variance_of_kaiming_uniform(distribution: str) -> None:
    shared = SharedProjections(0, distribution)
    for matrix, fan_in in [(shared.A(64, 900), 900), (shared.B(64, 900), 64)]:
        assert abs(float(matrix.mean())) < 0.02 * (2 / fan_in) ** 0.5
        assert float(matrix.var()) == pytest.approx(2 / fan_in, rel=0.02)


def test_uniform_entries_lie_within_the_bound_of_kaiming_uniform() -> None:
    A, B = SharedProjections().A(64, 900), SharedProjections().B(64, 900)
    for matrix, fan_in in [(A, 900), (B, 64)]:
        bound = (6 / fan_in) ** 0.5
        assert 0.999 * bound < float(matrix.abs().max()) <= bound


@pytest.mark.parametrize("rank", [3, 8, 19])
def test_structured_rows_are_orthogonal_within_blocks_of_the_size(rank: int) -> None:
    shared = SharedProjections(0, "structured")
    for rows in (shared.A(rank, 8, torch.float64), shared.B(rank, 8, torch.float64).T):
        for block in rows.split(8):
            gram = block @ block.T
            torch.testing.assert_close(gram, gram[0, 0] * torch.eye(len(block)).double(), atol=1e-6, rtol=1e-6)


def test_structured_blocks_are_independent() -> None:
    blocks = SharedProjections(0, "structured").A(16, 8).split(8)
    assert not torch.equal(*blocks)


def test_A_and_B_share_no_values() -> None:
    assert not torch.isin(SharedProjections(0).A(8, 8), SharedProjections(0).B(8, 8)).any()


@every_distribution
def test_A_and_B_are_uncorrelated_and_so_are_those_of_two_seeds(distribution: str) -> None:
    shared, other = SharedProjections(0, distribution), SharedProjections(1, distribution)
    A, B = shared.A(64, 64), shared.B(64, 64)
    for first, second in [(A, B), (A, B.T), (A, other.A(64, 64)), (B, other.B(64, 64))]:
        assert abs(float((first * second).mean())) < 0.06 * (2 / 64), "four standard errors"


def test_fingerprints_tell_seeds_and_distributions_apart() -> None:
    prints = {SharedProjections(seed, name).fingerprint() for seed in (0, 1, 2**64 - 1) for name in DISTRIBUTIONS}
    assert len(prints) == 3 * len(DISTRIBUTIONS)


@every_distribution
def test_a_fingerprint_does_not_depend_on_what_was_made(distribution: str) -> None:
    used = SharedProjections(3, distribution)
    used.reserve(8, 100, 50)
    assert used.fingerprint() == SharedProjections(3, distribution).fingerprint()


@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
def test_a_seed_of_another_type_is_refused(seed: object) -> None:
    with pytest.raises(TypeError, match=re.escape(f"seed must be an integer, got {seed!r}")):
        SharedProjections(seed)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed must lie in .*, got {seed}"):
        SharedProjections(seed)


def test_an_unknown_distribution_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'normal'.* kaiming_uniform, structured$"):
        SharedProjections(0, "normal")


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "orthogonal"])
def test_a_kind_that_was_removed_is_refused_with_what_to_do(distribution: str) -> None:
    with pytest.raises(ValueError, match=f"'{distribution}' was removed .* take 'kaiming_uniform', .* merged into"):
        SharedProjections(0, distribution)


def test_matrices_of_a_file_are_those_of_the_seed() -> None:
    shared = SharedProjections(5)
    shared.reserve(3, 8, 4)
    saved = {name: matrix.clone() for name, matrix in shared.saved_tensors().items()}
    assert [matrix.shape for matrix in saved.values()] == [(3, 8), (3, 4)]
    SharedProjections(5).check_saved_tensors(saved)
    with pytest.raises(ValueError, match=r"stream_0.* seed 6"):
        SharedProjections(6).check_saved_tensors(saved)


def test_a_file_holds_nothing_of_structured_matrices() -> None:
    shared = SharedProjections(5, "structured")
    shared.reserve(3, 8, 4)
    assert shared.saved_tensors() == {}
    shared.check_saved_tensors({})
    with pytest.raises(ValueError, match=r"stream_0 differs.* seed 5 .*'structured'"):
        shared.check_saved_tensors({"stream_0": torch.zeros(3, 8)})


@every_distribution
@pytest.mark.parametrize("name", ["stream_2", "stream", "weight", "gram_3x8_float32", ""])
def test_a_matrix_of_a_file_with_an_unknown_name_is_refused(name: str, distribution: str) -> None:
    with pytest.raises(ValueError, match=f"matrix {name} differs"):
        SharedProjections(0, distribution).check_saved_tensors({name: torch.zeros(2, 3)})


def test_a_matrix_of_a_file_with_one_value_changed_is_refused() -> None:
    shared = SharedProjections()
    shared.reserve(3, 8, 4)
    saved = {name: matrix.clone() for name, matrix in shared.saved_tensors().items()}
    saved["stream_1"][2, 3] += 1e-6
    with pytest.raises(ValueError, match="matrix stream_1 differs"):
        shared.check_saved_tensors(saved)


def test_the_printed_form_names_seed_and_distribution() -> None:
    for distribution in DISTRIBUTIONS:
        shared = SharedProjections(5, distribution)
        assert repr(shared) == f"SharedProjections(seed=5, distribution={distribution!r})"


@every_distribution
def test_columns_are_selected_as_a_product_with_unit_vectors_would(distribution: str) -> None:
    shared = SharedProjections(0, distribution)
    index = torch.tensor([[0, 3, 3], [8, 1, 0]])
    expected = shared.impl.project(torch.eye(9, dtype=torch.float64)[index], 4)
    assert torch.allclose(shared.impl.select(index, 4, 9, torch.float64), expected, atol=1e-15)
