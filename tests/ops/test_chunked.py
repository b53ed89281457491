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
@given(shape=st.sampled_from([(5,), (0, 5), (1, 5), (7, 5), (2, 3, 5)]), chunk=st.integers(1, 40))
def test_it_is_rounded_once(
    dtype: torch.dtype, with_update: bool, with_offset: bool, shape: tuple[int, ...], chunk: int
) -> None:
    tokens, update = (randn(*shape, seed=seed).to(dtype) for seed in (0, 1))
    gain, offset = 1 + 0.01 * randn(5, seed=2), randn(5, seed=3)
    expected = tokens.double() * gain.double()
    expected += update.double() if with_update else 0
    expected -= offset.double() if with_offset else 0
    found = rescaled(tokens, gain, offset if with_offset else None, update if with_update else None, chunk=chunk)
    assert found.dtype == dtype
    assert found.shape == tokens.shape
    assert (found is update) == with_update
    # Half a unit in the last place of the result, and what float32 adds to it.
    torch.testing.assert_close(found.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


@both_halves
def test_tokens_in_any_layout_are_left_alone(dtype: torch.dtype) -> None:
    tokens, gain = randn(4, 6, 5, seed=0).to(dtype).transpose(0, 1), randn(5, seed=1)
    before = tokens.clone()
    found = rescaled(tokens, gain)
    assert found.is_contiguous()
    torch.testing.assert_close(found, (tokens * gain).to(dtype), rtol=0, atol=0)
    assert torch.equal(tokens, before)


def test_results_are_not_the_memory_that_is_used_again() -> None:
    tokens, gain = randn(4, 5, seed=0).bfloat16(), randn(5, seed=1)
    first = rescaled(tokens, gain)
    before = first.clone()
    rescaled(2 * tokens, gain)
    assert torch.equal(first, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_that_are_wide_already_keep_their_memory(dtype: torch.dtype) -> None:
    tokens = randn(3, 4, seed=0, dtype=dtype)
    assert checked("ops.chunked").widened("any", tokens) is tokens
    with pytest.raises(AssertionError):
        rescaled(tokens, randn(4, seed=1))
