"""The matrices of stored weights, and the way back."""

import pytest
import torch

from dvora.weight.layouts import COLUMNS, EXPERTS, EXPERTS_TRANSPOSED, KERNELS, ROWS, Layout

CASES = {
    "rows": (ROWS, (5, 3), (5, 3)),
    "columns": (COLUMNS, (3, 5), (5, 3)),
    "1-d kernels": (KERNELS, (5, 2, 3), (5, 6)),
    "2-d kernels": (KERNELS, (5, 2, 3, 4), (5, 24)),
    "3-d kernels": (KERNELS, (5, 2, 3, 4, 1), (5, 24)),
    "experts": (EXPERTS, (2, 5, 3), (10, 3)),
    "experts, transposed": (EXPERTS_TRANSPOSED, (2, 3, 5), (10, 3)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Layout, tuple[int, ...], tuple[int, int]]:
    return CASES[request.param]


def test_the_matrix_has_a_row_for_every_output(case: tuple[Layout, tuple[int, ...], tuple[int, int]]) -> None:
    layout, stored, matrix = case
    assert layout.matrix(torch.empty(stored)).shape == matrix


def test_the_way_back_leads_to_the_same_values(case: tuple[Layout, tuple[int, ...], tuple[int, int]]) -> None:
    layout, stored, _ = case
    weight = torch.arange(torch.Size(stored).numel()).view(stored)
    assert torch.equal(layout.stored(layout.matrix(weight), weight.shape), weight)


def test_strides_do_not_matter() -> None:
    weight = torch.randn(4, 3, 2, 2)
    channels_last = weight.to(memory_format=torch.channels_last)
    assert torch.equal(KERNELS.matrix(channels_last), KERNELS.matrix(weight))


def test_a_row_of_experts_belongs_to_one_expert_and_output() -> None:
    weight = torch.randn(2, 5, 3)
    assert torch.equal(EXPERTS.matrix(weight)[5 + 2], weight[1, 2])
    assert torch.equal(EXPERTS_TRANSPOSED.matrix(weight.mT)[5 + 2], weight[1, 2])
