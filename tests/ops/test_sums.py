import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checked import checked

sum_of_products = checked("ops.sums").sum_of_products


def values(tokens: int, size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(tokens=st.integers(0, 40), size=st.integers(1, 9), chunk=st.integers(1, 60))
def test_it_is_the_sum_of_the_products(dtype: torch.dtype, tokens: int, size: int, chunk: int) -> None:
    a, b = (values(tokens, size, dtype, seed) for seed in (0, 1))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(checked("ops.sums"), "CHUNK_VALUES", chunk)
        found = sum_of_products(a, b)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scale = (a.double() * b.double()).abs().sum(0) + 1
    # The products and the sums are those of float32 whatever the inputs are.
    assert (((found - (a.double() * b.double()).sum(0)) / scale).abs() < 8 * torch.finfo(found.dtype).eps).all()


def test_products_beyond_half_precision_are_finite() -> None:
    a = torch.full((2**17, 2), 60000.0, dtype=torch.float16)
    with torch.no_grad():
        torch.testing.assert_close(sum_of_products(a, a), torch.full((2,), 2.0**17 * float(a[0, 0]) ** 2))


def test_results_are_not_the_memory_of_the_sums() -> None:
    a, b = values(2**15, 8, torch.float32, 0), values(2**15, 8, torch.float32, 1)
    with torch.no_grad():
        first = sum_of_products(a, b)
        before = first.clone()
        sum_of_products(b, b)
    assert torch.equal(first, before)


def test_its_derivatives_are_those_of_the_product() -> None:
    a, b = (values(5, 3, torch.float64, seed).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(sum_of_products, [a, b])
    assert torch.autograd.gradgradcheck(sum_of_products, [a, b])
