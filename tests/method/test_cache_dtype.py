"""Which constants of the norm are kept, and in which dtype."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from dvora import DVoRAAdapter, DVoRAConfig
from dvora.method.norm import SMALL_CACHE, cache_dtype
from tests.cases import fresh_copy, randn, trained_layer

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


LARGE = (SMALL_CACHE // 2 // 64, 16, 64)
"""Outputs, inputs and rank of a layer whose constants fill the small cache in bfloat16."""


def large_layer() -> DVoRAAdapter:
    out_features, in_features, rank = LARGE
    return trained_layer(in_features, out_features, rank, dtype=BF16)


MOVES = {
    "to the device it is on": lambda layer: layer.to("cpu"),
    "cast": lambda layer: layer.to(torch.float16).to(BF16),
    "a whole round of casts": lambda layer: layer.double().float().bfloat16(),
    "a copy": copy.deepcopy,
    "pickled": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_layer_keeps_the_dtype_that_was_chosen(move: str) -> None:
    layer = large_layer().eval()
    assert layer.adapted.C.dtype == BF16
    moved = MOVES[move](layer)
    y = moved(randn(3, LARGE[1], seed=0, dtype=BF16))
    assert moved.adapted.C.dtype == BF16
    assert torch.equal(y, fresh_copy(moved).eval()(randn(3, LARGE[1], seed=0, dtype=BF16)))


def test_a_layer_comes_back_from_the_meta_device() -> None:
    layer, x = large_layer().eval(), randn(3, LARGE[1], seed=0, dtype=BF16)
    expected, values = layer(x), {name: value.clone() for name, value in layer.state_dict().items()}
    layer.to("meta").to_empty(device="cpu").load_state_dict(values)
    assert torch.equal(layer(x), expected)
    assert layer.adapted.C.dtype == BF16


def test_an_injected_layer_has_the_dtype_that_was_chosen() -> None:
    out_features, in_features, rank = LARGE
    base = nn.Sequential(nn.Linear(in_features, out_features, dtype=BF16))
    model = get_peft_model(base, DVoRAConfig(r=rank, target_modules=["0"]))
    assert model.base_model.model[0].adapted("default").C.dtype == BF16
