"""Which constants of the norm are kept, and in which dtype."""

import pytest
import torch
from torch import Tensor

from dvora.norms import SMALL_CACHE, cache_dtype

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A weight of which only size and dtype are asked."""
    return torch.empty(rows, columns, dtype=dtype, device="meta")


SMALL_ROWS = SMALL_CACHE // 4 // 64
"""So many rows at rank 64 fill the small cache in float32."""

CHOICES = [
    # rows, columns, dtype, rank, norm_cache, readable, expected
    (SMALL_ROWS, 1, F32, 64, "auto", True, F32),
    (SMALL_ROWS + 1, 1, F32, 64, "auto", True, None),
    (SMALL_ROWS // 2, 1, F64, 64, "auto", True, F64),
    (SMALL_ROWS // 2 + 1, 1, F64, 64, "auto", True, None),
    (SMALL_ROWS, 1, BF16, 64, "auto", True, F32),
    (SMALL_ROWS + 1, 1, BF16, 64, "auto", True, BF16),
    (SMALL_ROWS + 1, 1, F16, 64, "auto", True, BF16),
    (2 * SMALL_ROWS, 1, BF16, 64, "auto", True, BF16),
    (2 * SMALL_ROWS + 1, 1, BF16, 64, "auto", True, None),
    # A quarter of the weight's bytes: a quarter of its columns, or an eighth in float32 of a weight of half precision.
    (8192, 4096, F32, 1024, "auto", True, F32),
    (8192, 4096, F32, 1025, "auto", True, None),
    (8192, 4096, F64, 1024, "auto", True, F64),
    (8192, 4096, BF16, 512, "auto", True, F32),
    (8192, 4096, BF16, 513, "auto", True, BF16),
    (8192, 4096, F16, 1024, "auto", True, BF16),
    (8192, 4096, BF16, 1025, "auto", True, None),
    # A weight that cannot be read again is always kept.
    (SMALL_ROWS, 1, F32, 64, "auto", False, F32),
    (SMALL_ROWS + 1, 1, F32, 64, "auto", False, BF16),
    (8192, 4096, F32, 1024, "auto", False, BF16),
    (SMALL_ROWS // 2 + 1, 1, F64, 64, "auto", False, BF16),
    # Whoever says so gets it.
    *((8192, 4096, dtype, 4000, True, True, F64 if dtype == F64 else F32) for dtype in (F64, F32, BF16, F16)),
    *((2, 3, dtype, 1, False, True, None) for dtype in (F64, F32, BF16, F16)),
]


@pytest.mark.parametrize(("rows", "columns", "dtype", "rank", "norm_cache", "readable", "expected"), CHOICES)
def test_the_constants_are_kept_while_they_are_small(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    rank: int,
    norm_cache: bool | str,
    readable: bool,
    expected: torch.dtype | None,
) -> None:
    assert cache_dtype(empty(rows, columns, dtype), rank, norm_cache, readable=readable) == expected


@pytest.mark.parametrize(("dtype", "expected"), [(F32, F32), (F64, F64), (BF16, BF16)], ids=str)
def test_what_could_not_be_made_again_cheaply_is_kept(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert cache_dtype(empty(8192, 4096, dtype), 4000, "auto", cheap=False) == expected
    assert cache_dtype(empty(8192, 4096, dtype), 4000, False, cheap=False) is None
