"""Products in bfloat16 by way of float32."""

import torch
from torch.nn.functional import linear

from benchmarks.bfloat16 import multiply_in_float32


def test_products_are_those_of_the_values_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, batch = (
        torch.randn(*size, generator=generator).bfloat16() for size in ((5, 40), (7, 40), (7,), (3, 40, 4))
    )
    kept = multiply_in_float32()
    made = (
        linear(x, weight),
        linear(x, weight, bias),
        x @ batch,
        torch.baddbmm(x.new_ones(3, 5, 4), x.expand(3, 5, 40), batch),
    )
    wide = linear(x.float(), weight.float())
    del kept
    exact = (
        *(linear(x.double(), weight.double()), linear(x.double(), weight.double(), bias.double())),
        *(x.double() @ batch.double(), 1 + x.double() @ batch.double()),
    )
    for ours, theirs in zip(made, exact, strict=True):
        # Half a unit in the last of 8 bits, and float32's own rounding.
        torch.testing.assert_close(ours.double(), theirs, rtol=1.01 * 2**-8, atol=1e-5)
        assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(wide.double(), exact[0], rtol=1e-5, atol=1e-5)
