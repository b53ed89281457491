"""A prepared update gives what `adapted_linear` gives without gradients: for a whole batch, and by row."""

import pytest
import torch
from torch import Tensor

from dvora.matrices.interface import DISTRIBUTIONS
from dvora.ops.dtypes import norm_dtype
from tests.cases import DTYPES, randn
from tests.checked import checked

AdaptedWeight = checked("weight.adapted_weight").AdaptedWeight
PackedFactors = checked("method.packed_factors").PackedFactors
PassFactors = checked("weight.factors").PassFactors
Update, adapted_linear = (getattr(checked("weight.linear"), name) for name in ("Update", "adapted_linear"))
PreparedUpdate = checked("weight.prepared").PreparedUpdate
Pass = checked("ops.passes").Pass

IN, OUT, RANK, ROWS = 6, 10, 4, 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}
every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
by_row_or_not = pytest.mark.parametrize("by_row", [True, False], ids=["by row", "whole batch"])
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
every_shape = pytest.mark.parametrize("tokens", [(ROWS,), (ROWS, 1), (ROWS, 5), (ROWS, 2, 3), (1, 1)], ids=str)


def update_of(tokens: tuple[int, ...], dtype: torch.dtype, distribution: str, by_row: bool) -> Update:
    wide = norm_dtype(dtype)
    weight = randn(OUT, IN, seed=3, dtype=wide)
    adapted = AdaptedWeight(weight, RANK, shared=checked("matrices.interface").SharedProjections(5, distribution))
    rows = torch.cat([0.3 * randn(tokens[0], OUT, seed=0), randn(tokens[0], OUT, seed=1)], 1)
    rows = torch.cat([rows, randn(tokens[0], RANK, seed=2)], 1).to(wide)
    packed = PackedFactors.of_rows(rows, RANK, len(tokens) + 1)
    if by_row:
        return Update.by_row(adapted, packed)
    gain_minus_one, scale = rows[0, :OUT], rows[0, OUT : 2 * OUT]
    of_all = PackedFactors.of(
        checked("method.functional").RowFactors(gain_minus_one, scale, 1 + gain_minus_one), rows[0, 2 * OUT :]
    )
    return Update(adapted, None, PassFactors(of_all, {}), adapted.matrices)


def inputs(tokens: tuple[int, ...], dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    base_output = randn(*tokens, OUT, seed=6, dtype=dtype)
    return randn(*tokens, IN, seed=5, dtype=dtype), base_output, randn(OUT, seed=7, dtype=dtype) if bias else None


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_shape
@with_and_without_bias
@by_row_or_not
@every_distribution
def test_prepared_outputs_are_those_of_the_update(
    distribution: str, by_row: bool, bias: bool, tokens: tuple[int, ...], dtype: torch.dtype
) -> None:
    update = update_of(tokens, dtype, distribution, by_row)
    x, base_output, own_bias = inputs(tokens, dtype, bias)
    expected, before = adapted_linear(update, base_output, x, own_bias), base_output.clone()
    running = Pass()
    found = PreparedUpdate(update, x).outputs(x, base_output, own_bias, running)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    assert torch.equal(base_output, before)
    assert running.projected is not None


@torch.no_grad()
@by_row_or_not
@every_distribution
def test_outputs_of_a_base_in_another_layout_or_dtype_are_taken(distribution: str, by_row: bool) -> None:
    update = update_of((ROWS, 2), torch.float32, distribution, by_row)
    x, base_output, bias = inputs((ROWS, 2), torch.float32, bias=True)
    prepared, expected = PreparedUpdate(update, x), adapted_linear(update, base_output, x, bias)
    turned = base_output.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(prepared.outputs(x, turned, bias, Pass()), expected)
    rounded = prepared.outputs(x, base_output.bfloat16(), bias, Pass())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), expected, rtol=0.03, atol=0.03)


@torch.no_grad()
def test_without_sharing_every_reader_projects() -> None:
    update = update_of((ROWS,), torch.float32, "structured", by_row=True)
    x, base_output, _ = inputs((ROWS,), torch.float32, bias=False)
    update.adapted.shared.share_inputs = False
    running = Pass()
    found = PreparedUpdate(update, x).outputs(x, base_output, None, running)
    torch.testing.assert_close(found, adapted_linear(update, base_output, x, None))
    assert running.projected is None
