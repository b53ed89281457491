"""Factor rows: equal to the dense float64 method, exactly balanced, within bounds in half precision, named by a key."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dvora.bank.adapters import AdapterValues, FolderSource
from dvora.bank.factor_rows import DTYPES, FactorRows, Factors, LayerPlace, _balance
from tests.bank.tenants import HEADED, MLP, Tenants, tenants
from tests.peft.dense import dense_layer
from tests.peft.kinds import Kind, saved
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, mlp
from tests.reference import worst_error

SCALED = {"alpha": 3.5, "direction": "weight"}
MAGNITUDES = {"target_modules": ["lin1"], "magnitude_modules": ["lin0", "lin2"]}


def values_of(folder: Path) -> AdapterValues:
    return FolderSource(folder).read()


def rows_for(base: nn.Module, values: AdapterValues, dtype: torch.dtype = torch.float32) -> FactorRows:
    return FactorRows.of_model(base, values.config, values.content, dtype)


def parts(rows: FactorRows, factors: Factors) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """`g - 1`, scale and lambda_d of each layer, in float64."""
    return {
        layer.name: factors.row[place.start : place.stop].double().split([place.out_features] * 2 + [place.rank])
        for layer, place in zip(rows.served.content.layers, rows.places, strict=True)
    }


@pytest.mark.parametrize(
    "settings", [{}, SCALED, {"projection_init": "structured"}], ids=["plain", "scaled", "structured"]
)
@pytest.mark.parametrize("name", ["mlp", "bert", "gpt2"])
def test_rows_are_those_of_the_dense_method(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    kind = Kind(MODELS[name], {"r": 6, "target_modules": LAYERS[name], **settings})
    model = kind.trained()
    values = values_of(saved(model, tmp_path))
    rows = rows_for(kind.base(), values)
    found = parts(rows, rows.of(values))
    layers = dict(dvora_layers(model))
    assert found.keys() == layers.keys()
    for layer, (gain_minus_one, scale, lambda_d) in found.items():
        dense = dense_layer(layers[layer], model, "default")
        assert worst_error(gain_minus_one, dense.gain() - 1) < 1e-5
        assert worst_error(scale, dense.scale()) < 1e-5
        assert torch.equal(lambda_d, dense.lambda_d)


@pytest.mark.parametrize("strength", [0.25, {"lin1": 0.5}], ids=str)
def test_strengths_weaken_what_changes(strength: Any, tmp_path: Path) -> None:
    whole, weak = (values_of(saved(MLP.trained(strength=s), tmp_path / str(i))) for i, s in enumerate((1.0, strength)))
    rows = rows_for(mlp(), whole)
    for (layer, (g, scale, lambda_d)), weaker in zip(
        parts(rows, rows.of(whole)).items(), parts(rows, rows.of(weak)).values(), strict=True
    ):
        own = strength if isinstance(strength, float) else strength.get(layer, 1.0)
        torch.testing.assert_close(weaker[0], own * g)
        torch.testing.assert_close(weaker[1], own * scale)
        assert torch.equal(weaker[2], lambda_d)


def test_magnitudes_only_have_no_lambda_d(tmp_path: Path) -> None:
    values = values_of(saved(MLP.trained(**MAGNITUDES), tmp_path))
    rows = rows_for(mlp(), values)
    found = parts(rows, rows.of(values))
    assert [len(each[2]) for each in found.values()] == [0, 4, 0]
    assert rows.width == 2 * (24 + 24 + 6) + 4
    for layer in ("lin0", "lin2"):
        assert found[layer][0].any()
        assert not found[layer][1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_roundings_of_a_dtype_are_those_of_its_format(dtype: torch.dtype, tmp_path: Path) -> None:
    values = values_of(saved(MLP.trained(), tmp_path))
    wide, narrow = rows_for(mlp(), values), rows_for(mlp(), values, dtype)
    exact, found = wide.of(values), narrow.of(values)
    assert found.row.dtype == dtype
    for (g, scale, lambda_d), (own_g, own_scale, own_lambda) in zip(
        parts(wide, exact).values(), parts(narrow, found).values(), strict=True
    ):
        # Half a unit in the last place; what is too small for the format is off by half of its smallest number.
        half, tiny = 0.5 * torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert bool(((own_g - g).abs() <= half * g.abs() + tiny).all())
        products, own = scale[:, None] * lambda_d, own_scale[:, None] * own_lambda
        assert bool(
            ((own - products).abs() <= 2.001 * half * products.abs() + 1e-5 * products.abs().max() * half).all()
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-9, 1e-4, 1e4, 1e9])
def test_scales_and_lambda_d_of_any_size_survive_half_precision(
    size: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    values = values_of(saved(MLP.trained(), tmp_path))
    rows, narrow = rows_for(mlp(), values), rows_for(mlp(), values, dtype)
    lengths = [length for layer in values.content.layers for length in layer.lengths]
    pieces = list(values.vector.split(lengths))
    for layer in range(3):
        # The same update, written with a small lambda_d and a large lambda_b, or the other way round.
        pieces[3 * layer + 1] = pieces[3 * layer + 1] / size
        pieces[3 * layer + 2] = pieces[3 * layer + 2] * size
    moved = values._replace(vector=torch.cat(pieces))
    for (_, scale, lambda_d), (_, own_scale, own_lambda) in zip(
        parts(rows, rows.of(values)).values(), parts(narrow, narrow.of(moved)).values(), strict=True
    ):
        assert worst_error(own_scale[:, None] * own_lambda, scale[:, None] * lambda_d) < 2 * torch.finfo(dtype).eps


@given(
    scale=st.floats(1e-12, 1e12),
    lambda_d=st.floats(1e-12, 1e12),
    zero=st.sampled_from(["", "scale", "lambda_d"]),
    rank=st.integers(0, 3),
)
def test_balancing_is_exact_and_its_own_inverse(scale: float, lambda_d: float, zero: str, rank: int) -> None:
    row = torch.cat([scale * torch.linspace(-1, 0.3, 5), lambda_d * torch.linspace(-0.2, 1, 3)[:rank]])
    if zero == "scale":
        row[:5] = 0
    if zero == "lambda_d":
        row[5:] = 0
    before = row.clone()
    _balance(row, LayerPlace(0, 5, rank))
    products = before[:5, None].double() * before[5:].double()
    assert torch.equal(row[:5, None].double() * row[5:].double(), products)
    if not zero and rank and bool(before[5:].any()):
        ratio = float(row[:5].abs().max() / row[5:].abs().max())
        assert 0.5 <= ratio <= 2
        mantissas = [torch.frexp(each).mantissa for each in (row, before)]
        assert torch.equal(*mantissas)
    else:
        assert torch.equal(row, before)


def test_the_base_s_rows_are_zeros_and_its_heads(tmp_path: Path) -> None:
    values = values_of(saved(HEADED.trained(), tmp_path))
    rows = rows_for(MODELS["mlp"](), values, torch.float16)
    base = rows.base()
    assert not base.row.any()
    assert torch.equal(base.heads, MODELS["mlp"]().lin2.weight.detach().flatten())
    assert rows.is_of_base(base)
    assert not rows.is_of_base(rows.of(values))
    assert not rows.is_of_base(base._replace(heads=base.heads + 1))


@pytest.mark.parametrize("change", ["magnitude", "update", "no direction", "no size"])
def test_whether_an_adapter_changes_anything(change: str, tmp_path: Path) -> None:
    values = values_of(saved(MLP.trained(), tmp_path))
    rows = rows_for(mlp(), values)
    row = torch.zeros(rows.width)
    g, scale, lambda_d = row[: rows.places[0].stop].split([24, 24, 4])
    if change == "magnitude":
        g[3] = 1e-6
    if change in ("update", "no direction"):
        scale[3] = 1
    if change in ("update", "no size"):
        lambda_d[1] = 1
    assert rows.is_of_base(Factors(row, rows.base_heads)) == (change in ("no direction", "no size"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return tenants(HEADED, tmp_path_factory.mktemp("two"), 2)


def test_rows_do_not_depend_on_other_adapters_or_the_way_they_are_made(two: Tenants) -> None:
    a, b = (values_of(two.path(name)) for name in two.names)
    rows = rows_for(two.base(), a)
    first = rows.of(a)
    rows.of(b)
    assert all(map(torch.equal, rows.of(a), first))
    with torch.inference_mode():
        assert all(map(torch.equal, rows.of(a), first))
    assert all(map(torch.equal, rows_for(two.base(), b).of(a), first))


def test_a_layer_that_an_adapter_lacks_is_the_base_s(two: Tenants, tmp_path: Path) -> None:
    whole = values_of(two.path("a"))
    rows = rows_for(two.base(), whole)
    part = values_of(saved(Kind(MODELS["mlp"], {"r": 4, "target_modules": ["lin1"]}).trained(), tmp_path))
    with pytest.raises(ValueError, match="lacks lin0"):
        rows.check(part.content)
    rows.check(part.content, allow_partial=True)
    made = rows.of(part)
    found = parts(rows, made)
    assert not any(each.any() for each in found["lin0"])
    assert all(each.any() for each in found["lin1"])
    assert torch.equal(made.heads, rows.base_heads)


def test_the_key_names_base_content_and_dtypes(two: Tenants, tmp_path: Path) -> None:
    values = values_of(two.path("a"))
    key = rows_for(two.base(), values).key
    assert key == rows_for(two.base(), values_of(two.path("b"))).key
    assert len(key) == 32
    nudged = two.base()
    nudged.lin1.weight[3, 4].mul_(1.01)
    others = [
        rows_for(nudged, values).key,
        rows_for(two.base(), values, torch.float16).key,
        rows_for(two.base(), values, torch.bfloat16).key,
        *(
            rows_for(two.base(), values_of(saved(HEADED.trained(**settings), tmp_path / str(number)))).key
            for number, settings in enumerate(
                ({"r": 5}, {"projection_seed": 1}, {"alpha": 2.0}, {"direction": "weight"})
            )
        ),
        rows_for(MODELS["mlp"]().double(), values).key,
    ]
    assert len({key, *others}) == 1 + len(others)


def test_bytes_are_those_of_the_rows(two: Tenants) -> None:
    values = values_of(two.path("a"))
    for dtype in DTYPES:
        rows = rows_for(two.base(), values, dtype)
        made = rows.of(values)
        assert (len(made.row), len(made.heads)) == (rows.width, rows.head_width) == (2 * (2 * 24 + 4), 6 * 24)
        assert made.nbytes == rows.width * dtype.itemsize + 4 * rows.head_width


def test_heads_of_several_dtypes_are_refused(tmp_path: Path) -> None:
    kind = Kind(MODELS["mlp"], {"r": 3, "target_modules": ["lin1"], "modules_to_save": ["lin2", "lin0"]})
    values = values_of(saved(kind.trained(), tmp_path))
    base = kind.base()
    base.lin2.double()
    with pytest.raises(ValueError, match="model: its heads have several dtypes; cast them to one"):
        rows_for(base, values)
