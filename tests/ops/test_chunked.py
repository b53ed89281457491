import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checked import checked
from tests.method.problem import randn

HALVES = [torch.bfloat16, torch.float16]
both_halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def rescaled(*arguments: torch.Tensor | None, chunk: int = 2**17) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(checked("ops.chunked"), "CHUNK_VALUES", chunk)
        found: torch.Tensor = checked("ops.chunked").rescaled(*arguments)
    return found


@both_halves
@pytest.mark.parametrize("with_update", [True, False], ids=["update", "no update"])
@pytest.mark.parametrize("with_offset", [True, False], ids=["offset", "no offset"])
@given(shape=st.sampled_from([(0, 5), (1, 5), (7, 5), (6, 5)]), chunk=st.integers(1, 40))
def test_it_is_rounded_once(
    dtype: torch.dtype, with_update: bool, with_offset: bool, shape: tuple[int, ...], chunk: int
) -> None:
    tokens, update = (randn(*shape, seed=seed).to(dtype) for seed in (0, 1))
    gain, offset = 1 + 0.01 * randn(5, seed=2), randn(5, seed=3)
    expected = tokens.double() * gain.double()
    expected += update.double() if with_update else 0
    expected += offset.double() if with_offset else 0
    before = tokens.clone()
    found = rescaled(tokens, gain, offset if with_offset else None, update if with_update else None, chunk=chunk)
    assert torch.equal(tokens, before)
    assert found.dtype == dtype
    assert found.shape == tokens.shape
    # Few values with an offset are added in float32 first.
    assert (found is update) == (with_update and (tokens.numel() > chunk or not with_offset))
    # Half a unit in the last place of the result, and what float32 adds to it.
    torch.testing.assert_close(found.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


@both_halves
@pytest.mark.parametrize("chunk", [7, 2**17], ids=["chunks", "at once"])
def test_tokens_in_any_layout_are_left_alone(chunk: int, dtype: torch.dtype) -> None:
    tokens, gain = randn(5, 24, seed=0).to(dtype).T, randn(5, seed=1)
    before = tokens.clone()
    found = rescaled(tokens, gain, chunk=chunk)
    assert found.is_contiguous() or chunk == 2**17
    torch.testing.assert_close(found, (tokens * gain).to(dtype), rtol=0, atol=0)
    assert torch.equal(tokens, before)


@pytest.mark.parametrize("chunk", [7, 2**17], ids=["chunks", "at once"])
def test_results_are_not_the_memory_that_is_used_again(chunk: int) -> None:
    tokens, gain = randn(4, 5, seed=0).bfloat16(), randn(5, seed=1)
    first = rescaled(tokens, gain, chunk=chunk)
    before = first.clone()
    rescaled(2 * tokens, gain, chunk=chunk)
    assert torch.equal(first, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [7, 2**17], ids=["chunks", "at once"])
@pytest.mark.parametrize("with_update", [True, False], ids=["update", "no update"])
@pytest.mark.parametrize("with_offset", [True, False], ids=["offset", "no offset"])
def test_tokens_that_are_wide_already_keep_their_memory(
    with_offset: bool, with_update: bool, chunk: int, dtype: torch.dtype
) -> None:
    tokens, update = (randn(3, 4, seed=seed, dtype=dtype) for seed in (0, 1))
    assert checked("ops.chunked").widened("any", tokens) is tokens
    gain, offset = (randn(4, seed=seed, dtype=dtype) for seed in (2, 3))
    expected = tokens * gain + (update if with_update else 0) + (offset if with_offset else 0)
    before = tokens.clone()
    found = rescaled(tokens, gain, offset if with_offset else None, update if with_update else None, chunk=chunk)
    torch.testing.assert_close(found, expected)
    assert torch.equal(tokens, before)


sum_of_products = checked("ops.chunked").sum_of_products


def values(tokens: int, size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(tokens=st.integers(0, 40), size=st.integers(1, 9), chunk=st.integers(1, 60))
def test_a_sum_of_products_is_rounded_in_float32(dtype: torch.dtype, tokens: int, size: int, chunk: int) -> None:
    a, b = (values(tokens, size, dtype, seed) for seed in (0, 1))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(checked("ops.chunked"), "CHUNK_VALUES", chunk)
        found = sum_of_products(a, b)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scale = (a.double() * b.double()).abs().sum(0) + 1
    # The products and the sums are those of float32 whatever the inputs are.
    assert (((found - (a.double() * b.double()).sum(0)) / scale).abs() < 8 * torch.finfo(found.dtype).eps).all()


def test_sums_of_products_beyond_half_precision_are_finite() -> None:
    a = torch.full((2**17, 2), 60000.0, dtype=torch.float16)
    with torch.no_grad():
        torch.testing.assert_close(sum_of_products(a, a), torch.full((2,), 2.0**17 * float(a[0, 0]) ** 2))


def test_sums_are_not_the_memory_that_is_used_again() -> None:
    a, b = values(2**15, 8, torch.float32, 0), values(2**15, 8, torch.float32, 1)
    with torch.no_grad():
        first = sum_of_products(a, b)
        before = first.clone()
        sum_of_products(b, b)
    assert torch.equal(first, before)


def test_the_derivatives_of_a_sum_of_products_are_right() -> None:
    a, b = (values(5, 3, torch.float64, seed).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(sum_of_products, [a, b])
    assert torch.autograd.gradgradcheck(sum_of_products, [a, b])
