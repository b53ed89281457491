"""How exact is the layer? Worst relative errors against the dense float64 method, written to results/exactness.json.

Run from the repository's root: python -m benchmarks.exactness
"""

from collections.abc import Iterator

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.results import Row, file_of, write
from dvora import DVoRAAdapter, SharedProjections
from tests.reference import DenseDVoRA, worst_error

SIZES = [(1, 1, 1), (5, 7, 3), (6, 9, 20), (384, 384, 256), (384, 1536, 256), (1536, 384, 256), (1000, 1000, 8)]
"""in_features, out_features, rank."""
SEEDS = range(3)
TOKENS = 64


def trained_layer(size: tuple[int, int, int], dtype: torch.dtype, direction: str, seed: int) -> DVoRAAdapter:
    """A layer whose vectors turn its rows by tens of degrees."""
    in_features, out_features, rank = size
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(in_features, out_features, dtype=dtype)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / in_features**0.5)
    layer = DVoRAAdapter(base, rank, shared=SharedProjections(seed), direction=direction)
    with torch.no_grad():
        layer.magnitude.mul_(1 + 0.2 * torch.randn(out_features, generator=generator))
        layer.lambda_b.copy_(torch.randn(out_features, generator=generator))
        layer.lambda_d.add_(0.1 * torch.randn(rank, generator=generator))
    return layer


def errors(size: tuple[int, int, int], dtype: torch.dtype, direction: str, seed: int) -> dict[str, float]:
    """Worst relative errors of one layer: outputs, every gradient, merged weight.

    A gradient is measured against the larger of itself and of the gradient without its norm term: in a 1 x 1 layer the
    two terms cancel altogether.
    """
    layer = trained_layer(size, dtype, direction, seed)
    reference = DenseDVoRA.of(layer)
    generator = torch.Generator().manual_seed(seed + 1000)
    x = torch.randn(TOKENS, size[0], generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    output_gradient = torch.randn(TOKENS, size[1], generator=generator, dtype=torch.float64).to(dtype)
    merged_error = worst_error(layer.merge_to_original_layer().weight, reference.merged_weight())
    y = layer(x)
    y.backward(output_gradient)
    dense = reference.gradients(x, output_gradient)
    output_error = worst_error(y, reference(x))
    reference.detach_norm = True
    without_norm = reference.gradients(x, output_gradient)
    found = {
        "x": x.grad,
        **{name: parameter.grad for name, parameter in zip(layer.vectors._fields, layer.vectors, strict=True)},
    }
    return {
        "outputs": output_error,
        **{f"gradient of {name}": deviation(found[name], dense[name], without_norm[name]) for name in found},
        "merged weight": merged_error,
    }


def deviation(value: Tensor, exact: Tensor, term: Tensor) -> float:
    """Largest deviation relative to the largest value of `exact` and `term`."""
    return float((value.double() - exact).abs().max() / torch.maximum(exact.abs().max(), term.abs().max()))


def rows() -> Iterator[Row]:
    """One row a dtype, direction and size: the worst of all seeds."""
    cases = [(d, r, s) for d in (torch.float64, torch.float32) for r in ("unit", "weight") for s in SIZES]
    for dtype, direction, size in track(cases, description="exactness"):
        measured = [errors(size, dtype, direction, seed) for seed in SEEDS]
        worst = {name: max(each[name] for each in measured) for name in measured[0]}
        sizes = dict(zip(("in_features", "out_features", "rank"), size, strict=True))
        yield {"dtype": str(dtype).removeprefix("torch."), "direction": direction, **sizes, "worst": worst}


def main() -> None:
    """Measure and write the result file."""
    torch.set_num_threads(2)
    write(file_of("exactness"), rows(), seeds=list(SEEDS), tokens=TOKENS)


if __name__ == "__main__":
    main()
