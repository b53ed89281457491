"""LoRA in DVoRA's place is the best that there is: no update of its rank has outputs nearer to the adapter's."""

import pytest
import torch
from torch import nn

from benchmarks.lora_approximation import cholesky, low_rank, second_moments


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_outputs_on_the_given_rows_are_as_near_as_a_rank_allows(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    update = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    # Inputs of very different sizes, some of them together.
    mixing = torch.randn(16, 16, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 16)
    x = torch.randn(3, 40, 16, generator=generator, dtype=torch.float64) @ mixing
    layer = nn.Linear(16, 12, dtype=torch.float64)
    moment = second_moments({"layer": layer}, lambda: [layer(row) for row in x])["layer"]
    wanted = x.reshape(-1, 16) @ update.T

    def missed(root: torch.Tensor | None) -> float:
        return float((wanted - x.reshape(-1, 16) @ low_rank(update, root, 12).cut(rank).T).norm())

    best = float(torch.linalg.svdvals(wanted)[rank:].norm())  # Eckart and Young
    assert missed(cholesky(moment)) == pytest.approx(best, rel=1e-3)
    assert missed(None) > 1.05 * best
