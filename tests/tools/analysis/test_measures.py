"""How far weights were moved: against naive computations, and cases of known outcome."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvora.tools.analysis import measures
from dvora.tools.analysis.measures import change, cosines, products, spectrum


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 0.1, 3])
)
def test_changes_are_those_of_the_definition(rows: int, columns: int, seed: int, scale: float) -> None:
    weight = random(rows, columns, seed)
    moved = weight + scale * random(rows, columns, seed + 1)
    found = change(weight, moved)
    ratios = [float(b.norm() / a.norm()) for a, b in zip(weight, moved, strict=True)]
    turns = [float(1 - a @ b / (a.norm() * b.norm())) for a, b in zip(weight, moved, strict=True)]
    assert found.magnitude == pytest.approx(sum(abs(ratio - 1) for ratio in ratios) / rows, abs=1e-12)
    assert found.growth == pytest.approx(sum(ratio - 1 for ratio in ratios) / rows, abs=1e-12)
    assert found.direction == pytest.approx(sum(turns) / rows, abs=1e-12)
    assert found.degrees == pytest.approx(
        sum(math.degrees(math.acos(min(1.0, 1 - turn))) for turn in turns) / rows, abs=2e-4
    )
    assert found.size == pytest.approx(float((moved - weight).norm() / weight.norm()))


def test_small_angles_keep_their_digits() -> None:
    weight = torch.eye(3, dtype=torch.float64)
    moved = weight.clone()
    moved[:, 0] += torch.tensor([0, 1e-9, 1e-9], dtype=torch.float64)
    assert change(weight, moved).direction == pytest.approx(2 / 3 * 0.5e-18, rel=1e-6)


def test_rows_of_zeros_are_unmoved() -> None:
    found = change(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64))
    assert found == (0, 0, 0, 0, 0)


def test_a_spectrum_is_that_of_numpy_in_units_of_the_weight_s_largest_value() -> None:
    weight, update = random(20, 30), random(20, 30, 1)
    found = spectrum(weight, update)
    expected = torch.linalg.svdvals(update) / torch.linalg.svdvals(weight)[0]
    assert found.values == pytest.approx(expected.tolist(), rel=1e-4)
    assert found.complete


@pytest.mark.parametrize("rank", [1, 5])
def test_equal_singular_values_have_the_effective_rank_of_their_number(rank: int) -> None:
    left, right = torch.linalg.qr(random(30, rank)).Q, torch.linalg.qr(random(20, rank, 1)).Q
    assert spectrum(random(30, 20), left @ right.T).effective_rank == pytest.approx(rank)


def test_nothing_has_no_rank() -> None:
    found = spectrum(random(4, 3), torch.zeros(4, 3, dtype=torch.float64))
    assert (found.effective_rank, found.values) == (0, (0, 0, 0))


def test_the_largest_values_of_a_large_matrix_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.linalg.qr(random(300, 100)).Q, torch.linalg.qr(random(200, 100, 1)).Q
    update = left @ torch.diag(0.9 ** torch.arange(100, dtype=torch.float64)) @ right.T
    exact = spectrum(random(300, 200), update)
    monkeypatch.setattr(measures, "LARGEST", 50)
    state = torch.random.get_rng_state()
    found = spectrum(random(300, 200), update)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not found.complete
    assert found.values[:30] == pytest.approx(exact.values[:30], rel=1e-3)
    assert found.effective_rank == pytest.approx(exact.effective_rank, rel=1e-2)


def test_cosines_of_updates() -> None:
    first = random(3, 4)
    found = cosines(products([first, -2 * first, torch.zeros_like(first)]))
    expected = torch.tensor([[1, -1, 0], [-1, 1, 0], [0, 0, 0]], dtype=torch.float64)
    assert torch.allclose(found, expected)
