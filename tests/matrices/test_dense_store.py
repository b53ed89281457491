"""What is stored of the dense kinds, and where."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from dvora import DVoRAAdapter, SharedProjections
from dvora.matrices import dense
from dvora.matrices.dense import DenseMatrices
from dvora.matrices.interface import DISTRIBUTIONS
from tests.cases import randn

META = torch.device("meta")


def stored(matrices: DenseMatrices) -> dict[str, tuple[int, ...]]:
    return {name: tuple(buffer.shape) for name, buffer in matrices.named_buffers()}


def count(matrices: DenseMatrices) -> int:
    return sum(buffer.numel() for buffer in matrices.buffers())


def test_a_low_rank_of_many_inputs_and_a_high_rank_of_few_need_no_matrix_for_both() -> None:
    matrices = DenseMatrices(0)
    matrices.reserve(4, 20_000, 8, torch.float32)
    matrices.reserve(256, 8, 8, torch.float32)
    needed = 4 * 20_000 + 256 * 8 + 256 * 8
    small = 4 * 8 + 4 * 4  # B of the first layer, where it is not a part of the second's, and its gram
    # Every matrix as values, and once more with the scale of its layer.
    assert count(matrices) <= 2 * needed + 2 * small


def test_what_is_part_of_something_larger_is_stored_once() -> None:
    matrices = DenseMatrices(0)
    for rank, size in ((3, 8), (5, 6), (5, 8), (2, 2), (4, 9)):
        matrices.project(randn(2, size, seed=0), rank)
    # Rank 5 by 8 and rank 4 by 9 hold more values than one matrix for both.
    assert {name: shape for name, shape in stored(matrices).items() if "stream" in name} == {
        "store.stream_0_5x9": (5, 9)
    }


def test_what_is_scaled_for_a_layer_is_made_once_for_every_size_and_dtype() -> None:
    matrices = DenseMatrices(0)
    for dtype in (torch.float32, torch.bfloat16):
        for rank, size in ((3, 8), (3, 6)):
            matrices.project(randn(2, size, seed=0, dtype=dtype), rank)
    before = {name: buffer.data_ptr() for name, buffer in matrices.named_buffers()}
    assert len([name for name in before if "scaled_0" in name]) == 4
    for dtype in (torch.float32, torch.bfloat16):
        matrices.project(randn(5, 8, seed=0, dtype=dtype), 3)
        matrices.project_transpose(randn(5, 3, seed=0, dtype=dtype), 6)
    assert {name: buffer.data_ptr() for name, buffer in matrices.named_buffers()} == before


def test_an_A_as_wide_as_an_embedding_is_not_scaled_ahead_and_columns_of_it_never() -> None:
    matrices = DenseMatrices(0)
    matrices.reserve(2, dense._WIDEST + 1, 5, torch.float32)
    matrices.select(torch.tensor([3, 70]), 2, dense._WIDEST + 1, torch.float32)
    matrices.row_squares(torch.ones(2), dense._WIDEST + 1, 5)
    matrices.row_squares_half_gradient(torch.ones(5), torch.ones(2), dense._WIDEST + 1)
    assert [name for name in stored(matrices) if "_0_" in name] == [f"store.stream_0_2x{dense._WIDEST + 1}"]


def test_what_a_caller_writes_into_a_matrix_stays_there() -> None:
    matrices, others = DenseMatrices(0), DenseMatrices(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        matrices.A(3, 8, dtype).zero_()
        matrices.B(3, 8, dtype).zero_()
        assert torch.equal(matrices.A(3, 8, dtype), others.A(3, 8, dtype))
        assert torch.equal(matrices.B(3, 8, dtype), others.B(3, 8, dtype))


def test_the_values_of_a_layer_do_not_depend_on_others() -> None:
    alone, beside = DenseMatrices(3), DenseMatrices(3)
    for sizes in ((4, 900, 30), (70, 6, 5), (9, 40, 800), (70, 900, 2)):
        beside.reserve(*sizes, torch.float32)
    for rank, in_features, out_features in ((4, 900, 30), (9, 40, 800), (1, 3, 2)):
        for side, size in (("A", in_features), ("B", out_features)):
            values = [getattr(matrices, side)(rank, size, torch.float32) for matrices in (alone, beside)]
            assert torch.equal(*values)


def test_a_rank_above_the_width_has_no_gram() -> None:
    matrices = DenseMatrices(0)
    matrices.reserve(300, 8, 40, torch.float32)
    assert not [name for name in stored(matrices) if "gram" in name]
    layer = DVoRAAdapter(nn.Linear(8, 40), 300, shared=SharedProjections(0))
    layer(randn(5, 8, seed=0)).sum().backward()
    assert not [name for name in stored(layer.shared.impl) if "gram" in name]


def there(shared: SharedProjections) -> list[Tensor]:
    """What a layer on a second device reads; the meta device stands for it."""
    kind = shared.impl
    if isinstance(kind, DenseMatrices):
        scaled = [kind._scaled(stream, 3, size, torch.float32, META) for stream, size in ((0, 6), (1, 5))]
        return [kind._whole(0, 3, 6, META), *scaled, kind.gram(3, 6, torch.float32, META)]
    stacks = [kind._stack(side, 3, size, torch.float32, META) for side, size in (("A", 6), ("B", 5))]
    return [tensor for stack in stacks for block in stack for tensor in block[:3]]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_layers_on_a_second_device_share_one_copy(distribution: str) -> None:
    shared = SharedProjections(0, distribution)
    shared.reserve(3, 6, 5)
    first, second = there(shared), there(shared)
    assert all(tensor.is_meta for tensor in first)
    assert all(a is b or a._base is b._base is not None for a, b in zip(first, second, strict=True))
    assert not any(buffer.is_meta for buffer in shared.buffers())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda shared: pickle.loads(pickle.dumps(shared))])
def test_copies_for_other_devices_stay_behind(copied: object, distribution: str) -> None:
    shared = SharedProjections(0, distribution)
    shared.reserve(3, 6, 5)
    there(shared)
    x = randn(4, 6, seed=0)
    assert torch.equal(copied(shared).impl.project(x, 3), shared.impl.project(x, 3))
    shared.to(META).to_empty(device="cpu")
    assert torch.equal(shared.impl.project(x, 3), SharedProjections(0, distribution).impl.project(x, 3))
