"""Every row of a batch with factors of its own: outputs and gradients of each row alone, and of the dense formula."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dvora.ops.dtypes import norm_dtype
from tests.cases import DTYPES, randn
from tests.checked import checked
from tests.reference import worst_error
from tests.weight.thin_products import KINDS, PackedFactors, Update, adapted_linear, adapted_weight

SmallRows = checked("method.small_rows").SmallRows
constant_factors = checked("method.packed_factors").constant_factors

RANK, OUT = 4, 7
INDEX = [2, 0, 2, 1, 2]
"""The adapter of each row, of three."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS)
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
every_shape = pytest.mark.parametrize("tokens", [(), (1,), (3,), (50,), (2, 3)], ids=str)


class Batch(NamedTuple):
    """Rows of tokens, and the adapters that they name."""

    base_output: Tensor
    z: Tensor
    trained: Tensor
    """(2, adapters, out)."""
    lambda_d: Tensor
    bias: Tensor | None
    index: Tensor

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self[:5] if tensor is not None]

    def asking(self) -> "Batch":
        """The same with gradients of everything."""
        new = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in self[:5]]
        return Batch(*new, self.index)

    def wide(self) -> "Batch":
        return Batch(*(None if tensor is None else tensor.double() for tensor in self[:5]), self.index)

    def update(self, kind: str) -> Update:
        adapted = adapted_weight(kind, self.trained.shape[2], self.lambda_d.shape[1], self.trained.dtype)
        packed = PackedFactors(self.trained, None, self.lambda_d)
        return Update.by_row(adapted, packed.gathered(self.index, self.base_output.dim()))

    def outputs(self, kind: str, small: object = None) -> Tensor:
        return adapted_linear(self.update(kind), self.base_output, self.z, self.bias, small)

    def row(self, row: int) -> "Batch":
        """One row with its adapter alone, as one adapter for a whole batch."""
        own = self.index[row : row + 1]
        tokens = self.base_output[row : row + 1], self.z[row : row + 1]
        return Batch(*tokens, self.trained[:, own], self.lambda_d[own], self.bias, torch.zeros(1, dtype=torch.int64))

    def alone(self, kind: str, small: object = None) -> Tensor:
        """The outputs of a batch for one adapter, by the code for one."""
        trained, lambda_d = self.trained[:, 0], self.lambda_d[0]
        packed = PackedFactors(trained, constant_factors(1 + trained[0], trained[0]), lambda_d)
        update = Update.by_row(adapted_weight(kind, self.trained.shape[2], len(lambda_d), trained.dtype), packed)
        return adapted_linear(update, self.base_output, self.z, self.bias, small)

    def dense(self, kind: str) -> Tensor:
        """By the definition."""
        B = KINDS[kind].B(self.lambda_d.shape[1], self.trained.shape[2], torch.float64)
        ones = (1,) * (self.base_output.dim() - 2)
        gain_minus_one, scale = self.trained[:, self.index].unflatten(1, (-1, *ones))
        update = scale * ((self.z * self.lambda_d[self.index].unflatten(0, (-1, *ones))) @ B.T)
        return self.base_output + gain_minus_one * (self.base_output - (0 if self.bias is None else self.bias)) + update


def batch(
    tokens: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    rank: int = RANK,
    out: int = OUT,
    index: list[int] | None = None,
) -> Batch:
    index, wide = INDEX if index is None else index, norm_dtype(dtype)
    return Batch(
        randn(len(index), *tokens, out, seed=0, dtype=dtype),
        randn(len(index), *tokens, rank, seed=1, dtype=dtype),
        torch.stack([0.3 * randn(3, out, seed=2, dtype=wide), randn(3, out, seed=3, dtype=wide)]),
        0.3 * randn(3, rank, seed=4, dtype=wide),
        randn(out, seed=5, dtype=dtype) if bias else None,
        torch.tensor(index, dtype=torch.int64),
    )


def in_small_chunks(patch: pytest.MonkeyPatch, values: int) -> None:
    patch.setattr(checked("ops.chunked"), "CHUNK_VALUES", values)
    patch.setattr(checked("matrices.kronecker"), "_FEW_VALUES", 0)
    patch.setattr(checked("matrices.kronecker"), "_CHUNK_VALUES", values)


def check_gradients(made: Batch, kind: str, tolerance: float, grad_output: Tensor) -> None:
    asking, dense = made.asking(), made.wide().asking()
    found = torch.autograd.grad(asking.outputs(kind), asking.leaves(), grad_output)
    expected = torch.autograd.grad(dense.dense(kind), dense.leaves(), grad_output.double())
    for own, other, leaf in zip(found, expected, asking.leaves(), strict=True):
        assert own.dtype == leaf.dtype
        assert worst_error(own, other) < tolerance


@every_dtype
@every_kind
@with_and_without_bias
@every_shape
def test_outputs_and_gradients_are_those_of_the_dense_formula(
    tokens: tuple[int, ...], bias: bool, kind: str, dtype: torch.dtype
) -> None:
    made = batch(tokens, dtype, bias)
    with torch.no_grad():
        y = made.outputs(kind)
    assert y.dtype == dtype
    assert worst_error(y, made.wide().dense(kind)) < TOLERANCE[dtype]
    assert worst_error(made.asking().outputs(kind), made.wide().dense(kind)) < TOLERANCE[dtype]
    check_gradients(made, kind, TOLERANCE[dtype], randn(*y.shape, seed=9, dtype=dtype))


@every_dtype
@every_kind
@every_shape
def test_outputs_and_gradients_are_those_of_each_row_alone(
    tokens: tuple[int, ...], kind: str, dtype: torch.dtype
) -> None:
    made = batch(tokens, dtype).asking()
    y = made.outputs(kind)
    grad_output = randn(*y.shape, seed=9, dtype=dtype)
    alone = torch.cat([made.row(row).alone(kind) for row in range(len(INDEX))])
    assert worst_error(y, alone.double()) < TOLERANCE[dtype] / 2
    found = torch.autograd.grad(y, made.leaves(), grad_output)
    expected = torch.autograd.grad(alone, made.leaves(), grad_output)
    for own, other in zip(found, expected, strict=True):
        assert worst_error(own, other.double()) < TOLERANCE[dtype]


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@given(
    rows=st.lists(st.integers(0, 2), max_size=6),
    tokens=st.sampled_from([(), (1,), (3,), (2, 2)]),
    values=st.integers(1, 90),
    bias=st.booleans(),
)
def test_any_chunks_give_the_same(
    kind: str, dtype: torch.dtype, rows: list[int], tokens: tuple[int, ...], values: int, bias: bool
) -> None:
    made = batch(tokens, dtype, bias, index=rows)
    grad_output = randn(*made.base_output.shape, seed=9, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        in_small_chunks(patch, values)
        y = made.outputs(kind)
        assert worst_error(y, made.wide().dense(kind)) < TOLERANCE[dtype]
        with torch.enable_grad():
            check_gradients(made, kind, TOLERANCE[dtype], grad_output)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [(), (90,)], ids=["one token a row", "many tokens"])
def test_large_batches_cross_real_chunks(tokens: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    rows = [number % 3 for number in range(7 if tokens else 600)]
    made = batch(tokens, dtype, rank=24, out=300, index=rows)
    assert made.base_output.numel() > 2**17
    with torch.no_grad():
        assert worst_error(made.outputs(kind), made.wide().dense(kind)) < TOLERANCE[dtype]
    check_gradients(made, kind, TOLERANCE[dtype], randn(*made.base_output.shape, seed=9, dtype=dtype))


@every_kind
@with_and_without_bias
@pytest.mark.parametrize("tokens", [(), (3,)], ids=str)
def test_second_derivatives_are_those_of_the_dense_formula(tokens: tuple[int, ...], bias: bool, kind: str) -> None:
    made, dense = batch(tokens, bias=bias).asking(), batch(tokens, bias=bias).asking()
    grad_output = randn(*made.base_output.shape, seed=9, dtype=torch.float64)
    found = []
    for each, y in ((made, made.outputs(kind)), (dense, dense.dense(kind))):
        # Not linear in the outputs, so that all second derivatives count.
        first = torch.autograd.grad((y.square() * grad_output).sum(), each.leaves(), create_graph=True)
        total = sum((grad * randn(*grad.shape, seed=20 + i, dtype=torch.float64)).sum() for i, grad in enumerate(first))
        found.append([*first, *torch.autograd.grad(total, each.leaves())])
    for own, other in zip(*found, strict=True):
        assert worst_error(own, other) < 1e-11


@every_kind
def test_batches_of_gradients_are_those_of_one_after_the_other(kind: str) -> None:
    made = batch((3,)).asking()
    several = randn(4, *made.base_output.shape, seed=9, dtype=torch.float64)
    y = made.outputs(kind)
    found = torch.autograd.grad(y, made.leaves(), several, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, made.leaves(), one, retain_graph=True) for one in several]
    for own, others in zip(found, zip(*each, strict=True), strict=True):
        assert worst_error(own, torch.stack(others)) < 1e-12


@every_kind
@pytest.mark.parametrize("tokens", [(), (3,)], ids=str)
def test_under_transforms_the_formula_is_traced(tokens: tuple[int, ...], kind: str) -> None:
    made = batch(tokens)

    def loss(*leaves: Tensor) -> Tensor:
        return Batch(*leaves, made.index).outputs(kind).square().sum()

    def dense_loss(*leaves: Tensor) -> Tensor:
        return Batch(*leaves, made.index).dense(kind).square().sum()

    numbers = tuple(range(5))
    for own, other in zip(
        torch.func.grad(loss, numbers)(*made.leaves()),
        torch.func.grad(dense_loss, numbers)(*made.leaves()),
        strict=True,
    ):
        assert worst_error(own, other) < 1e-12


@every_kind
@pytest.mark.parametrize("needed", range(5))
def test_gradients_of_one_operand_alone(needed: int, kind: str) -> None:
    made, dense = batch((3,)), batch((3,)).asking()
    leaves = [tensor.requires_grad_(number == needed) for number, tensor in enumerate(made.leaves())]
    grad_output = randn(*made.base_output.shape, seed=9, dtype=torch.float64)
    (found,) = torch.autograd.grad(made.outputs(kind), leaves[needed], grad_output)
    (expected,) = torch.autograd.grad(dense.dense(kind), dense.leaves()[needed], grad_output)
    assert worst_error(found, expected) < 1e-12


@every_kind
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_tokens_in_half_precision_with_a_gain_near_one(half: torch.dtype, kind: str) -> None:
    made = batch((3,), half)
    made.trained.mul_(1e-3)
    with torch.no_grad():
        y = made.outputs(kind)
    error = (y.double() - made.wide().dense(kind)).abs()
    assert bool((error <= 0.51 * torch.finfo(half).eps * y.double().abs() + 1e-5).all())


@every_kind
def test_outputs_of_another_dtype_than_inputs(kind: str) -> None:
    made = batch((3,), torch.float32)
    for of_base, of_z in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        other = made._replace(base_output=made.base_output.to(of_base), z=made.z.to(of_z))
        with torch.no_grad():
            y = other.outputs(kind)
        assert y.dtype == of_base
        assert worst_error(y, other.wide().dense(kind)) < TOLERANCE[torch.bfloat16]


@every_kind
def test_tokens_in_any_layout(kind: str) -> None:
    made = batch((3,))
    turned = made._replace(base_output=made.base_output.mT.contiguous().mT, z=made.z.mT.contiguous().mT)
    with torch.no_grad():
        assert torch.equal(turned.outputs(kind), made.outputs(kind))
    check_gradients(turned, kind, 1e-12, randn(5, OUT, 3, seed=9, dtype=torch.float64).mT)


@every_kind
@every_dtype
def test_rows_of_zeros_are_the_base_to_the_last_bit(dtype: torch.dtype, kind: str) -> None:
    made = batch((3,), dtype)
    made.trained[:, 1] = 0
    made.lambda_d[1] = 0
    with torch.no_grad():
        y = made.outputs(kind)
    assert torch.equal(y[3], made.base_output[3])
    assert torch.equal(made.asking().outputs(kind)[3], made.base_output[3])


@every_kind
def test_operands_are_left_alone(kind: str) -> None:
    made = batch((3,))
    before = made.asking()
    with torch.no_grad():
        made.outputs(kind)
    check_gradients(made, kind, 1e-12, randn(*made.base_output.shape, seed=9, dtype=torch.float64))
    assert all(map(torch.equal, made.leaves(), before.leaves()))


@every_kind
@every_dtype
@pytest.mark.parametrize("in_memory", [True, False], ids=["weight in memory", "not in memory"])
@pytest.mark.parametrize("tokens", [(), (3,), (2, 2)], ids=str)
def test_small_rows_are_those_of_each_row_alone(
    tokens: tuple[int, ...], in_memory: bool, dtype: torch.dtype, kind: str
) -> None:
    made, rows = batch(tokens, dtype).asking(), torch.tensor([1, 4])
    products = randn(len(INDEX), *tokens, 2, seed=7, dtype=dtype) if in_memory else None
    y = made.outputs(kind, SmallRows(rows, products))
    alone = torch.cat(
        [
            made.row(row).alone(kind, SmallRows(rows, None if products is None else products[row : row + 1]))
            for row in range(len(INDEX))
        ]
    )
    assert worst_error(y, alone.double()) < TOLERANCE[dtype]
    grad_output = randn(*y.shape, seed=9, dtype=dtype)
    found = torch.autograd.grad(y, made.leaves(), grad_output)
    for own, other in zip(found, torch.autograd.grad(alone, made.leaves(), grad_output), strict=True):
        assert worst_error(own, other.double()) < TOLERANCE[dtype]
    if not in_memory:
        assert torch.equal(y[..., rows], made.base_output[..., rows])


@every_kind
@with_and_without_bias
def test_layers_that_have_the_magnitude_only(bias: bool, kind: str) -> None:
    made = batch((3,), bias=bias, rank=0)
    made = made._replace(trained=torch.stack([made.trained[0], torch.zeros_like(made.trained[1])]))
    y = made.asking().outputs(kind)
    expected = made.base_output + made.trained[0, made.index][:, None] * (made.base_output - (made.bias if bias else 0))
    assert worst_error(y, expected) < 1e-12
