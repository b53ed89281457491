"""Parts of A and B: products with the parts, put together, are products with the whole."""

import pytest
import torch
from torch import Tensor

from dvora.matrices.interface import SharedProjections
from dvora.matrices.shard import Shard

KINDS = ["kaiming_uniform", "structured"]
# Out, in, rank, parts: even and uneven ones, a rank above both sizes, parts that split the structured blocks.
SIZES = [(24, 20, 6, 2), (24, 20, 30, 4), (48, 36, 16, 4), (14, 10, 5, 3)]


def spans(total: int, parts: int) -> list[Shard]:
    size = -(-total // parts)
    return [Shard(start, min(start + size, total), total) for start in range(0, total, size)]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize(("out_features", "in_features", "rank", "parts"), SIZES)
@pytest.mark.parametrize("distribution", KINDS)
@pytest.mark.parametrize("tokens", [5, 40])
def test_parts_of_the_outputs_are_the_whole(
    tokens: int, distribution: str, out_features: int, in_features: int, rank: int, parts: int
) -> None:
    whole = SharedProjections(3, distribution).impl
    weight, lambda_d, v = randn(out_features, in_features), randn(rank), randn(out_features)
    d, z, x = randn(tokens, out_features), randn(tokens, rank), randn(4, in_features)
    onto = randn(tokens, out_features) + 1
    put_together: dict[str, list[Tensor]] = {}
    summed: dict[str, Tensor] = {}
    for shard in spans(out_features, parts):
        part, size = whole.of_shard(None, shard), shard.stop - shard.start
        rows = slice(shard.start, shard.stop)
        d_scale = torch.empty(size, dtype=torch.float64)
        d_z, d_lambda_d = part.update_gradients(d[:, rows], z, lambda_d, v[rows], d_scale)
        found = {
            "B": part.B(rank, size, torch.float64).T,
            "expand": part.expand(z, size),
            "update": part.prepared_update(lambda_d, v[rows], z.dtype)(z, None),
            "added update": part.prepared_update(lambda_d, v[rows], z.dtype)(z, onto[:, rows].clone()),
            "gradient of the scale": d_scale,
            "row squares": part.row_squares(lambda_d, in_features, size),
            "row dots": part.row_dots(weight[rows], lambda_d),
        }
        sums = {
            "expand_transpose": part.expand_transpose(d[:, rows], rank),
            "scaled expand_transpose": part.expand_transpose(d[:, rows], rank, v[rows]),
            "gradient of z": d_z,
            "gradient of lambda_d": d_lambda_d,
            "row squares' gradient": part.row_squares_half_gradient(v[rows], lambda_d, in_features),
            "row dots' gradient": part.row_dots_gradient(weight[rows], v[rows], rank),
        }
        for name, value in found.items():
            put_together.setdefault(name, []).append(value)
        summed = {name: summed.get(name, 0) + value for name, value in sums.items()}
        torch.testing.assert_close(part.project(x, rank), whole.project(x, rank))
    d_scale = torch.empty(out_features, dtype=torch.float64)
    d_z, d_lambda_d = whole.update_gradients(d, z, lambda_d, v, d_scale)
    expected = {
        "B": whole.B(rank, out_features, torch.float64).T,
        "expand": whole.expand(z, out_features),
        "update": whole.prepared_update(lambda_d, v, z.dtype)(z, None),
        "added update": whole.prepared_update(lambda_d, v, z.dtype)(z, onto.clone()),
        "gradient of the scale": d_scale,
        "row squares": whole.row_squares(lambda_d, in_features, out_features),
        "row dots": whole.row_dots(weight, lambda_d),
        "expand_transpose": whole.expand_transpose(d, rank),
        "scaled expand_transpose": whole.expand_transpose(d, rank, v),
        "gradient of z": d_z,
        "gradient of lambda_d": d_lambda_d,
        "row squares' gradient": whole.row_squares_half_gradient(v, lambda_d, in_features),
        "row dots' gradient": whole.row_dots_gradient(weight, v, rank),
    }
    for name, value in ({name: torch.cat(values, -1) for name, values in put_together.items()} | summed).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize(("out_features", "in_features", "rank", "parts"), SIZES)
@pytest.mark.parametrize("distribution", KINDS)
def test_parts_of_the_inputs_add_up(
    distribution: str, out_features: int, in_features: int, rank: int, parts: int
) -> None:
    whole = SharedProjections(3, distribution).impl
    x, h = randn(5, in_features), randn(5, rank)
    z, back = torch.zeros(5, rank, dtype=torch.float64), []
    for shard in spans(in_features, parts):
        part, size = whole.of_shard(shard, None), shard.stop - shard.start
        z += part.project(shard.of(x), rank)
        back.append(part.project_transpose(h, size))
        columns = shard.of(whole.A(rank, in_features, torch.float64))
        torch.testing.assert_close(part.A(rank, size, torch.float64), columns)
        torch.testing.assert_close(part.select(torch.arange(size), rank, size, torch.float64), columns.T)
    torch.testing.assert_close(z, whole.project(x, rank))
    torch.testing.assert_close(torch.cat(back, -1), whole.project_transpose(h, in_features))


@pytest.mark.parametrize("distribution", KINDS)
def test_a_part_follows_the_whole_to_another_device_and_back(distribution: str) -> None:
    shared = SharedProjections(3, distribution)
    part = shared.impl.of_shard(None, Shard(6, 12, 12))
    before = part.B(4, 6, torch.float32)
    shared.to("meta")
    assert part.B(4, 6, torch.float32).is_meta
    shared.to_empty(device="cpu")
    assert torch.equal(part.B(4, 6, torch.float32), before)
