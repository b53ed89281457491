"""What the matrices do to outputs: the prepared update, and its gradients, against the naive formulas."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from dvora.ops.dtypes import norm_dtype
from tests.cases import DTYPES, randn
from tests.checked import checked
from tests.matrices import naive

SEED = 11
KINDS = ["dense", "structured"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of structured products, beside the largest sum of the absolute values that they add up."""
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def matrices_of(kind: str) -> object:
    if kind == "dense":
        return checked("matrices.dense").DenseMatrices(SEED)
    return checked("matrices.structured").StructuredMatrices(SEED)


@contextmanager
def in_chunks_of(values: int) -> Iterator[None]:
    """With less than the usual memory for what lies between two structured products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checked("matrices.kronecker"), "_CHUNK_VALUES", values)
        patch.setattr(checked("matrices.kronecker"), "_FEW_VALUES", min(values, 2**17))
        yield


class Case:
    """The operands of an update, and what the formulas give in float64."""

    def __init__(self, kind: str, tokens: int, rank: int, out: int, dtype: torch.dtype, onto: bool = False) -> None:
        self.kind, self.dtype, self.wide = kind, dtype, norm_dtype(dtype)
        self.matrices = matrices_of(kind)
        _, self.B = getattr(naive, kind)(SEED, rank, 1, out)
        self.z, self.d = randn(tokens, rank, seed=0, dtype=dtype), randn(tokens, out, seed=1, dtype=dtype)
        self.lambda_d, self.scale = randn(rank, seed=2, dtype=self.wide), randn(out, seed=3, dtype=self.wide)
        self.onto = randn(tokens, out, seed=4, dtype=dtype) if onto else None

    def update(self) -> Tensor:
        add = self.matrices.prepared_update(self.lambda_d, self.scale, self.dtype)
        outputs = [None if self.onto is None else self.onto.clone() for _ in range(2)]
        found, again = (add(self.z, onto) for onto in outputs)
        assert torch.equal(found, again), "what is kept must serve many passes"
        assert self.onto is None or found is outputs[0], "outputs are written to"
        return found

    def gradients(self) -> dict[str, Tensor]:
        both = torch.full((2, len(self.scale)), 7.0, dtype=self.wide)
        d_z, d_lambda_d = self.matrices.update_gradients(self.d, self.z, self.lambda_d, self.scale, both[1])
        assert (both[0] == 7).all(), "only the gradient of the scale is written"
        h = self.matrices.expand_transpose(self.d, len(self.lambda_d), self.scale)
        return {"z": d_z, "lambda_d": d_lambda_d, "scale": both[1], "h": h}

    def expected_update(self, sizes: bool = False) -> Tensor:
        z, B, lambda_d, scale, onto = self._operands(sizes)
        return ((z * lambda_d) @ B.T) * scale + onto

    def expected_gradients(self, sizes: bool = False) -> dict[str, Tensor]:
        """By the definition; with `sizes` the sums of the absolute values of all that is added up."""
        z, B, lambda_d, scale, onto = (t.clone().requires_grad_() for t in self._operands(sizes))
        d = self.d.double().abs() if sizes else self.d.double()
        loss = (d * (((z * lambda_d) @ B.T) * scale + onto)).sum()
        found = torch.autograd.grad(loss, (z, lambda_d, scale))
        return dict(zip(("z", "lambda_d", "scale"), found, strict=True)) | {"h": ((d * scale) @ B).detach()}

    def _operands(self, sizes: bool) -> tuple[Tensor, ...]:
        onto = torch.zeros_like(self.d) if self.onto is None else self.onto
        operands = tuple(t.double() for t in (self.z, self.B, self.lambda_d, self.scale, onto))
        return tuple(t.abs() for t in operands) if sizes else operands

    def assert_close(self, found: Tensor, expected: Tensor, sizes: Tensor, dtype: torch.dtype) -> None:
        assert found.dtype == dtype
        assert found.shape == expected.shape
        if not found.numel():
            return
        # Dense: every entry but for a few roundings of what is added up. They grow with the root of the number of terms
        # if a processor's BLAS adds one after another: 5.6 were seen at rank 70. Half precision is added in float32.
        roundings = max(5.0, math.sqrt(len(self.lambda_d))) if self.dtype == self.wide else 5.0
        dense = self.kind == "dense"
        bound = roundings * torch.finfo(self.dtype).eps * sizes if dense else TOLERANCE[self.dtype] * sizes.max()
        subnormal = 1e-5 if self.dtype == torch.float16 else 0.0
        assert ((found.double() - expected).abs() <= bound + subnormal).all()

    def assert_all(self) -> None:
        self.assert_close(self.update(), self.expected_update(), self.expected_update(sizes=True), self.dtype)
        found, expected, sizes = self.gradients(), self.expected_gradients(), self.expected_gradients(sizes=True)
        for name, dtype in (("z", self.dtype), ("lambda_d", self.wide), ("scale", self.wide), ("h", self.dtype)):
            self.assert_close(found[name], expected[name], sizes[name], dtype)


@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(0, 12),
    rank=st.integers(1, 9),
    out=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    onto=st.booleans(),
)
def test_update_and_gradients_of_any_shape_and_dtype_are_the_naive_ones(
    kind: str, tokens: int, rank: int, out: int, dtype: torch.dtype, onto: bool
) -> None:
    # Updates in half precision are added elsewhere, in float32.
    Case(kind, tokens, rank, out, dtype, onto and dtype.itemsize >= 4).assert_all()


@given(
    kind=st.sampled_from(KINDS),
    leading=st.lists(st.integers(1, 4), max_size=3),
    rank=st.integers(1, 24),
    out=st.integers(1, 24),
    dtype=st.sampled_from(DTYPES),
    onto=st.booleans(),
)
@example("dense", [2, 3], 1, 5, torch.float32, True)  # many tokens
@example("structured", [1], 9, 4, torch.float32, True)  # one token, several blocks
@example("structured", [1, 1], 7, 12, torch.float64, True)  # one token, and a rank that fills no r1 r2
@example("structured", [2, 3], 23, 24, torch.bfloat16, False)
def test_an_update_of_batches_is_that_of_all_their_tokens(
    kind: str, leading: list[int], rank: int, out: int, dtype: torch.dtype, onto: bool
) -> None:
    case = Case(kind, math.prod(leading), rank, out, dtype, onto and dtype.itemsize >= 4)
    expected, sizes = case.expected_update(), case.expected_update(sizes=True)
    # Outputs of a vector are no row that one could be added to.
    shape = leading if leading or case.onto is None else [1]
    case.z = case.z.view(*shape, rank)
    case.onto = None if case.onto is None else case.onto.view(*shape, out)
    found = case.update()
    assert found.shape == (*shape, out)
    case.assert_close(found.reshape(expected.shape), expected, sizes, dtype)


@every_dtype
@every_kind
@pytest.mark.parametrize("chunk", [2**20, 2**12], ids=["one piece", "chunks"])
@pytest.mark.parametrize("rank", [5, 24, 70], ids=lambda rank: f"rank {rank}")
@pytest.mark.parametrize("tokens", [1, 24, 25, 48, 49, 600])
def test_update_and_gradients_of_larger_layers_are_the_naive_ones(
    tokens: int, rank: int, chunk: int, kind: str, dtype: torch.dtype
) -> None:
    # At rank 24 tokens are on both sides of where the matrix is scaled: 24 and 25 for h, 48 and 49 for the update.
    # Rank 70 is above the outputs.
    with in_chunks_of(chunk):
        Case(kind, tokens, rank, 48, dtype, onto=dtype.itemsize >= 4).assert_all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_tokens_of_structured_half_precision_are_made_in_float32(kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, 500, 6, 10, dtype)
    found, expected = case.gradients(), case.expected_gradients()
    sizes = case.expected_gradients(sizes=True)
    bound = 1e-5 if kind == "structured" else 5 * torch.finfo(dtype).eps
    for name in ("lambda_d", "scale"):
        assert ((found[name] - expected[name]).abs() <= bound * sizes[name].max()).all(), name


@every_kind
def test_over_no_tokens_the_gradients_are_zero(kind: str) -> None:
    case = Case(kind, 0, 10, 7, torch.float32)
    gradients = case.gradients()
    assert torch.equal(gradients["scale"], torch.zeros(7))
    assert torch.equal(gradients["lambda_d"], torch.zeros(10))
    assert gradients["z"].shape == (0, 10)
    assert case.update().shape == (0, 7)


@every_dtype
@every_kind
@pytest.mark.parametrize("tokens", [2, 9], ids=["few tokens", "many tokens"])
def test_a_scale_of_zeros_gives_exact_zeros(tokens: int, kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, tokens, 4, 7, dtype)
    case.scale.zero_()
    assert not case.update().any()
    gradients = case.gradients()
    assert not gradients["z"].any()
    assert not gradients["lambda_d"].any()
    assert gradients["scale"].any()


@every_dtype
@every_kind
@pytest.mark.parametrize("tokens", [2, 9], ids=["few tokens", "many tokens"])
def test_no_operand_is_written_to_and_no_result_is_shared(tokens: int, kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, tokens, 4, 7, dtype, onto=dtype.itemsize >= 4)
    operands = [case.z, case.d, case.lambda_d, case.scale, *([] if case.onto is None else [case.onto])]
    before = [operand.clone() for operand in operands]
    add = case.matrices.prepared_update(case.lambda_d, case.scale, dtype)
    first, gradients = add(case.z, None), case.gradients()
    added = case.update()
    made = [first, added, *gradients.values()]
    kept = [tensor.clone() for tensor in made]
    other = Case(kind, tokens, 4, 7, dtype)
    other.z.mul_(-3)
    other.scale.mul_(2)
    other.update()
    other.gradients()
    add(other.z, None)
    assert all(torch.equal(now, then) for now, then in zip(operands, before, strict=True))
    assert all(torch.equal(now, then) for now, then in zip(made, kept, strict=True))


@every_kind
@pytest.mark.parametrize("tokens", [1, 2050], ids=["few tokens", "many tokens"])
def test_wide_float16_updates_do_not_overflow(tokens: int, kind: str) -> None:
    # The unscaled sums are beyond float16, about 100 n / 2.
    n, half = 1024, torch.float16
    matrices, (_, B) = matrices_of(kind), getattr(naive, kind)(SEED, n, 1, n)
    ones, few = torch.ones(n), torch.ones(4)
    z = (100 * B[0].sign().to(half)).expand(tokens, n).contiguous()
    outputs = matrices.prepared_update(ones, ones, half)(z, None)
    assert float(outputs[0, 0]) == pytest.approx(100 * float(B[0].abs().sum()), rel=3e-3)
    _, B = getattr(naive, kind)(SEED, 4, 1, n)
    d = (100 * B[:, 0].sign().to(half)).expand(tokens, n).contiguous()
    d_z, _ = matrices.update_gradients(d, torch.zeros(tokens, 4, dtype=half), few, ones, torch.empty(n))
    assert float(d_z[0, 0]) == pytest.approx(100 * float(B[:, 0].abs().sum()), rel=3e-3)


@every_kind
@pytest.mark.parametrize("rank", [1, 1024], ids=["many tokens", "few tokens"])
def test_sums_over_many_float16_tokens_do_not_overflow(rank: int, kind: str) -> None:
    tokens = 1024
    matrices, (_, B) = matrices_of(kind), getattr(naive, kind)(SEED, rank, 1, 1)
    d, z = torch.full((tokens, 1), 10.0, dtype=torch.float16), torch.zeros(tokens, rank, dtype=torch.float16)
    z[:, 0] = 10
    d_scale = torch.empty(1)
    _, d_lambda_d = matrices.update_gradients(d, z, torch.ones(rank), torch.ones(1), d_scale)
    for found in (d_scale[0], d_lambda_d[0]):
        assert float(found) == pytest.approx(100 * tokens * float(B[0, 0]), rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(tokens=st.integers(0, 9), rank=st.integers(1, 9), out=st.integers(1, 9), size=st.integers(1, 9))
def test_the_updated_weight_and_its_gradients_are_the_naive_ones(
    dtype: torch.dtype, tokens: int, rank: int, out: int, size: int
) -> None:
    case = Case("dense", tokens, rank, out, dtype)
    A, B = naive.dense(SEED, rank, size, out)
    weight = randn(out, size, seed=5, dtype=dtype)
    updated = case.matrices.updated(weight, case.lambda_d, case.scale)
    rows = case.scale.double()[:, None] * B * case.lambda_d.double()
    sizes = weight.double().abs() + rows.abs() @ A.abs()
    case.assert_close(updated, weight.double() + rows @ A, sizes, dtype)
    found = case.matrices.update_products(case.d, case.z, case.lambda_d, case.scale)
    expected, sizes = case.expected_gradients(), case.expected_gradients(sizes=True)
    for name, value in zip(("lambda_d", "scale"), found, strict=True):
        case.assert_close(value, expected[name], sizes[name], dtype)


@pytest.mark.parametrize(("tokens", "rank"), [(7, 3), (2, 5)], ids=["many tokens", "few tokens"])
def test_first_and_second_derivatives_of_the_updated_weight_are_those_of_the_values(tokens: int, rank: int) -> None:
    matrices, shapes = matrices_of("dense"), [(tokens, 4), (tokens, rank), (rank,), (4,), (4, 6)]
    d, z, lambda_d, scale, weight = (
        randn(*shape, seed=seed, dtype=torch.float64).requires_grad_() for seed, shape in enumerate(shapes)
    )
    for function, inputs in [
        (matrices.update_products, (d, z, lambda_d, scale)),
        (matrices.updated, (weight, lambda_d, scale)),
    ]:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
