"""Rows of factors: equal to the dense float64 method, exactly balanced, within bounds in half precision."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dvora.bank.adapters import AdapterValues, FolderSource
from dvora.bank.factor_rows import DTYPES, AdapterRow, FactorRows, balanced
from dvora.bank.served import ServedModel
from tests.bank.tenants import HEADED, MLP, Tenants, tenants
from tests.peft.dense import dense_layer
from tests.peft.kinds import Kind, saved
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, mlp
from tests.reference import worst_error

SCALED = {"alpha": 3.5, "direction": "weight"}


def values_of(folder: Path) -> AdapterValues:
    return FolderSource(folder).read()


def rows_for(base: nn.Module, values: AdapterValues, dtype: torch.dtype = torch.float32) -> FactorRows:
    return FactorRows(ServedModel(base, values.config, values.content), dtype)


def row_of(rows: FactorRows, values: AdapterValues) -> AdapterRow:
    return rows.row(values, rows.of([values])[0])


def parts(rows: FactorRows, row: AdapterRow) -> dict[str, tuple[Tensor, ...]]:
    """`g - 1`, scale and lambda_d of each layer, in float64."""
    split = row.factors.double().split([length for place in rows.places for length in place.lengths])
    layers = [layer.name for layer in rows.served.content.layers]
    return dict(zip(layers, zip(split[::3], split[1::3], split[2::3], strict=True), strict=True))


@pytest.mark.parametrize(
    "settings", [{}, SCALED, {"projection_init": "structured"}], ids=["plain", "scaled", "structured"]
)
@pytest.mark.parametrize("name", ["mlp", "bert", "gpt2"])
def test_rows_are_those_of_the_dense_method(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    kind = Kind(MODELS[name], {"r": 6, "target_modules": LAYERS[name], **settings})
    model = kind.trained()
    values = values_of(saved(model, tmp_path))
    rows = rows_for(kind.base(), values)
    found, layers = parts(rows, row_of(rows, values)), dict(dvora_layers(model))
    assert found.keys() == layers.keys()
    for layer, (gain_minus_one, scale, lambda_d) in found.items():
        dense = dense_layer(layers[layer], model, "default")
        assert worst_error(gain_minus_one, dense.gain() - 1) < 1e-5
        assert worst_error(scale, dense.scale()) < 1e-5
        assert torch.equal(lambda_d, dense.lambda_d)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_roundings_of_a_dtype_are_those_of_its_format(dtype: torch.dtype, tmp_path: Path) -> None:
    values = values_of(saved(MLP.trained(), tmp_path))
    wide, narrow = rows_for(mlp(), values), rows_for(mlp(), values, dtype)
    exact, found = parts(wide, row_of(wide, values)), row_of(narrow, values)
    assert found.factors.dtype == dtype
    # Half a unit in the last place; what is too small for the format is off by half of its smallest number.
    half, tiny = 0.5 * torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for layer, (own_g, own_scale, own_lambda) in parts(narrow, found).items():
        g, scale, lambda_d = exact[layer]
        assert bool(((own_g - g).abs() <= half * g.abs() + tiny).all())
        products, own = scale[:, None] * lambda_d, own_scale[:, None] * own_lambda
        bound = 2.001 * half * products.abs() + 1e-5 * products.abs().max() * half
        assert bool(((own - products).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-9, 1e-4, 1e4, 1e9])
def test_scales_and_lambda_d_of_any_size_survive_half_precision(
    size: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    values = values_of(saved(MLP.trained(), tmp_path))
    rows, narrow = rows_for(mlp(), values), rows_for(mlp(), values, dtype)
    pieces = list(values.vector.split([length for layer in values.content.layers for length in layer.lengths]))
    # The same update, written with a small lambda_d and a large lambda_b, or the other way round.
    pieces[1::3], pieces[2::3] = [piece / size for piece in pieces[1::3]], [piece * size for piece in pieces[2::3]]
    found = parts(narrow, row_of(narrow, replace(values, vector=torch.cat(pieces))))
    for layer, (_, scale, lambda_d) in parts(rows, row_of(rows, values)).items():
        _, own_scale, own_lambda = found[layer]
        assert worst_error(own_scale[:, None] * own_lambda, scale[:, None] * lambda_d) < 2 * torch.finfo(dtype).eps


@given(
    scale=st.floats(1e-12, 1e12),
    lambda_d=st.floats(1e-12, 1e12),
    zero=st.sampled_from(["", "scale", "lambda_d"]),
    rank=st.integers(0, 3),
)
def test_balancing_is_exact_and_its_own_inverse(scale: float, lambda_d: float, zero: str, rank: int) -> None:
    row = torch.cat([scale * torch.linspace(-1, 0.3, 5), lambda_d * torch.linspace(-0.2, 1, 3)[:rank]])
    if zero:
        row[slice(5) if zero == "scale" else slice(5, None)] = 0
    before = row
    # A magnitude, which stays, in front; and another layer behind.
    gains, other = torch.tensor([0.3, -2.0]), torch.tensor([0.5, 3.0, 0.0, 0.0])
    (found,) = balanced(torch.cat([gains, row, other])[None], torch.tensor([2, 5, rank, 1, 2, 1]))
    assert torch.equal(found[:2], gains)
    assert torch.equal(found[-4:], other)
    row = found[2:-4]
    assert torch.equal(row[:5, None].double() * row[5:].double(), before[:5, None].double() * before[5:].double())
    if not zero and rank and bool(before[5:].any()):
        assert 0.5 <= float(row[:5].abs().max() / row[5:].abs().max()) <= 2
        assert torch.equal(torch.frexp(row).mantissa, torch.frexp(before).mantissa)
    else:
        assert torch.equal(row, before)


def test_the_base_s_rows_are_zeros_and_its_heads(tmp_path: Path) -> None:
    values = values_of(saved(HEADED.trained(), tmp_path))
    rows = rows_for(MODELS["mlp"](), values, torch.float16)
    base = rows.base()
    assert not base.factors.any()
    assert torch.equal(base.heads["lin2.weight"], MODELS["mlp"]().lin2.weight.detach())
    assert rows.is_of_base(base)
    assert not rows.is_of_base(row_of(rows, values))
    assert not rows.is_of_base(base._replace(heads={"lin2.weight": base.heads["lin2.weight"] + 1}))


@pytest.mark.parametrize("change", ["magnitude", "update", "no direction", "no size"])
def test_whether_an_adapter_changes_anything(change: str, tmp_path: Path) -> None:
    rows = rows_for(mlp(), values_of(saved(MLP.trained(), tmp_path)))
    row = rows.base()
    g, scale, lambda_d = row.factors[: rows.places[0].stop].split([24, 24, 4])
    g[3] = 1e-6 if change == "magnitude" else 0
    scale[3] = change in ("update", "no direction")
    lambda_d[1] = change in ("update", "no size")
    assert rows.is_of_base(row) == (change in ("no direction", "no size"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return tenants(HEADED, tmp_path_factory.mktemp("two"), 2)


def test_rows_do_not_depend_on_other_adapters_or_the_way_they_are_made(two: Tenants) -> None:
    a, b = (values_of(two.path(name)) for name in two.names)
    rows = rows_for(two.base(), a)
    (first,) = rows.of([a])
    assert torch.equal(rows.of([b, a])[1], first)
    with torch.inference_mode():
        assert torch.equal(rows.of([a])[0], first)
    assert torch.equal(rows_for(two.base(), b).of([a])[0], first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_keeps_no_memory_of_those_it_was_made_with(dtype: torch.dtype, two: Tenants) -> None:
    a, b = (values_of(two.path(name)) for name in two.names)
    rows = rows_for(two.base(), a, dtype)
    row = rows.row(a, rows.of([a, b])[0])
    assert row.factors.untyped_storage().nbytes() == row.factors.nbytes


def test_what_names_an_adapter_is_base_content_and_values(two: Tenants, tmp_path: Path) -> None:
    values = values_of(two.path("a"))
    name = rows_for(two.base(), values).identity(values)
    nudged = two.base()
    nudged.lin1.weight[3, 4].mul_(1.01)
    assert rows_for(two.base(), values_of(two.path("b")), torch.float16).identity(values) == name
    others = [rows_for(nudged, values).identity(values)]
    for number, settings in enumerate(({"projection_seed": 1}, {"alpha": 2.0}, {"direction": "weight"})):
        folder = saved(HEADED.trained(**settings), tmp_path / str(number))
        values = values_of(folder)
        others.append(rows_for(two.base(), values).identity(values))
    assert len({name, *others}) == 5


def test_bytes_are_those_of_the_rows(two: Tenants) -> None:
    values = values_of(two.path("a"))
    for dtype in DTYPES:
        rows = rows_for(two.base(), values, dtype)
        assert rows.width == 2 * (2 * 24 + 4)
        assert row_of(rows, values).nbytes == rows.width * dtype.itemsize + 4 * 6 * 24
