"""Nothing that the gain is made of drops below float32."""

import pytest
import torch

from dvora.ops.dtypes import at_least_float32, full_precision, norm_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_norms_are_kept_in_float32(dtype: torch.dtype) -> None:
    assert norm_dtype(dtype) == torch.float32


def test_norms_of_float64_weights_are_kept_in_float64() -> None:
    assert norm_dtype(torch.float64) == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_to_half_precision_keeps_the_values(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0001, 3e38])
    assert torch.equal(at_least_float32(lambda t: t.to(dtype))(values), values)


def test_a_cast_to_float64_is_followed() -> None:
    assert at_least_float32(torch.Tensor.double)(torch.ones(2)).dtype == torch.float64


def test_a_move_is_followed_even_when_the_dtype_is_not() -> None:
    moved = at_least_float32(lambda t: t.to("meta", torch.bfloat16))(torch.ones(2))
    assert (moved.device.type, moved.dtype) == ("meta", torch.float32)


def test_integers_are_left_to_the_function() -> None:
    assert at_least_float32(torch.Tensor.short)(torch.ones(2, dtype=torch.int64)).dtype == torch.int16


def test_autocast_is_off_where_full_precision_is_asked_for() -> None:
    a = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with full_precision(torch.device("cpu")):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
