"""What layers of a graph compute."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

from dvora.export.graph import with_lora


@given(st.data())
def test_lora_of_each_row_or_of_all(data: st.DataObject) -> None:
    """Of inputs with any number of dimensions, as PEFT multiplies."""
    rows, *between = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    in_features, out_features, rank = (data.draw(st.integers(1, 5)) for _ in range(3))
    adapters = data.draw(st.sampled_from([1, rows]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, outputs = normal(rows, *between, in_features), normal(rows, *between, out_features)
    A, B = normal(adapters, rank, in_features), normal(adapters, out_features, rank)
    values = torch.cat([A.mT.flatten(1), B.mT.flatten(1)], 1)
    expected = [outputs[row] + linear(linear(x[row], A[row % adapters]), B[row % adapters]) for row in range(rows)]
    torch.testing.assert_close(with_lora(x, outputs, values), torch.stack(expected))
