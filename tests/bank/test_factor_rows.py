"""Rows of factors: equal to the dense float64 method, within bounds in half precision, named by what they are of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dvora.bank.adapters import AdapterValues, FolderSource
from dvora.bank.factor_rows import DTYPES, AdapterRow, FactorRows
from dvora.bank.served import ServedModel
from tests.bank.tenants import HEADED, MLP, Tenants, tenants
from tests.peft.dense import dense_layer
from tests.peft.kinds import Kind, saved
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, mlp
from tests.reference import worst_error


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
    ("name", "settings"),
    [("mlp", {}), ("bert", {"alpha": 3.5, "direction": "weight"}), ("gpt2", {"projection_init": "structured"})],
)
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
@pytest.mark.parametrize("size", [1, 1e-9, 1e9])
def test_the_only_rounding_is_that_of_the_dtype_however_an_update_is_written(
    size: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    values = values_of(saved(MLP.trained(), tmp_path))
    wide, narrow = rows_for(mlp(), values), rows_for(mlp(), values, dtype)
    pieces = list(values.vector.split([length for layer in values.content.layers for length in layer.lengths]))
    # The same update, with a small lambda_d and a large lambda_b, or the other way round.
    pieces[1::3], pieces[2::3] = [piece / size for piece in pieces[1::3]], [piece * size for piece in pieces[2::3]]
    exact, found = parts(wide, row_of(wide, values)), row_of(narrow, replace(values, vector=torch.cat(pieces)))
    assert found.factors.dtype == dtype
    # Half a unit in the last place, of each factor, and what float32 takes.
    half = 0.5 * torch.finfo(dtype).eps + 1e-6
    for layer, (own_g, own_scale, own_lambda) in parts(narrow, found).items():
        g, scale, lambda_d = exact[layer]
        assert bool(((own_g - g).abs() <= half * g.abs() + 1e-7).all())
        products, own = scale[:, None] * lambda_d, own_scale[:, None] * own_lambda
        assert bool(
            ((own - products).abs() <= 2.001 * half * products.abs() + 1e-4 * half * products.abs().max()).all()
        )


CHANGES = {"nothing": False, "magnitude": True, "update": True, "no direction": False, "no size": False, "head": True}


@pytest.mark.parametrize("change", CHANGES)
def test_whether_an_adapter_changes_anything(change: str, two: Tenants) -> None:
    rows = rows_for(two.base(), values_of(two.path("a")))
    row = rows.base()
    g, scale, lambda_d = row.factors[: rows.places[0].stop].split([24, 24, 4])
    g[3] = 1e-6 if change == "magnitude" else 0
    scale[3] = change in ("update", "no direction")
    lambda_d[1] = change in ("update", "no size")
    if change == "head":
        row = row._replace(heads={name: values + 1 for name, values in row.heads.items()})
    assert rows.is_of_base(row) != CHANGES[change]


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


def test_what_names_an_adapter_is_base_content_and_values(two: Tenants, tmp_path: Path) -> None:
    values = values_of(two.path("a"))
    name = rows_for(two.base(), values).identity(values)
    assert rows_for(two.base(), values_of(two.path("b")), torch.float16).identity(values) == name
    nudged = two.base()
    nudged.lin1.weight[3, 4].mul_(1.01)
    others = [rows_for(nudged, values).identity(values)]
    for number, settings in enumerate(({"projection_seed": 1}, {"alpha": 2.0}, {"direction": "weight"})):
        values = values_of(saved(HEADED.trained(**settings), tmp_path / str(number)))
        others.append(rows_for(two.base(), values).identity(values))
    assert len({name, *others}) == 5
