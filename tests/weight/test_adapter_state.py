"""Saving and loading one layer, and merging it into a new one."""

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from dvora import DVoRAAdapter, SharedProjections
from dvora.weight.merge import MergePrecisionWarning
from tests.cases import DIRECTIONS, DTYPES, SHARED, fresh_copy, linear, randn, train, trained_layer
from tests.reference import DenseDVoRA, worst_error

IN, OUT, RANK = 6, 5, 3


def copied(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_the_state_dict_has_stable_names() -> None:
    names = ["magnitude", "lambda_b", "lambda_d", "base_layer.weight", "base_layer.bias"]
    assert sorted(trained_layer(IN, OUT, RANK).state_dict()) == sorted(names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_saved_layer_gives_the_same_outputs_after_loading(dtype: torch.dtype) -> None:
    layer = trained_layer(IN, OUT, RANK, dtype=dtype)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = DVoRAAdapter(nn.Linear(IN, OUT, dtype=dtype), RANK, shared=SharedProjections(SHARED.seed))
    other.load_state_dict(torch.load(file))
    x = randn(4, IN, seed=0, dtype=dtype)
    assert torch.equal(other(x), layer(x))


def test_the_vectors_alone_can_be_loaded() -> None:
    layer = trained_layer(IN, OUT, RANK)
    vectors = {name: value.detach() for name, value in layer.vectors._asdict().items()}
    other = DVoRAAdapter(linear(IN, OUT), RANK, shared=SHARED)
    missing, unexpected = other.load_state_dict(vectors, strict=False)
    assert (missing, unexpected) == (["base_layer.weight", "base_layer.bias"], [])
    assert torch.equal(other(torch.ones(IN)), layer(torch.ones(IN)))


@pytest.mark.parametrize(("name", "size"), [("magnitude", OUT + 1), ("lambda_b", OUT + 1), ("lambda_d", RANK + 1)])
def test_a_vector_of_another_size_is_refused_by_name_and_changes_nothing(name: str, size: int) -> None:
    model = nn.Sequential(trained_layer(IN, OUT, RANK))
    before = copied(model.state_dict())
    loaded = {**{key: value + 1 for key, value in before.items()}, f"0.{name}": torch.ones(size)}
    with pytest.raises(ValueError, match=rf"0\.{name} has shape \({size},\) in the state dict, .*rank=3"):
        model.load_state_dict(loaded)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["base_layer.weight", "base_layer.bias"])
def test_a_base_of_another_size_is_refused_by_name_and_changes_nothing(name: str) -> None:
    layer = trained_layer(IN, OUT, RANK)
    before = copied(layer.state_dict())
    loaded = {key: value + 1 for key, value in before.items()}
    loaded[name] = torch.cat([loaded[name], loaded[name]])
    with pytest.raises((RuntimeError, ValueError), match=name):
        layer.load_state_dict(loaded)
    assert_unchanged(layer, before)


def test_the_rank_of_a_model_cannot_be_changed_by_loading() -> None:
    model = nn.ModuleDict({"first": trained_layer(IN, OUT, RANK), "second": trained_layer(IN, OUT, RANK)})
    before = copied(model.state_dict())
    loaded = {**{key: value + 1 for key, value in before.items()}, "second.lambda_d": torch.ones(RANK + 1)}
    with pytest.raises(ValueError, match=r"second\.lambda_d .* rank cannot be changed by loading"):
        model.load_state_dict(loaded)
    assert_unchanged(model["second"], {k.removeprefix("second."): v for k, v in before.items() if "second." in k})


@pytest.mark.parametrize("name", ["magnitude", "lambda_b", "lambda_d"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_is_refused_by_name_and_changes_nothing(value: float, name: str) -> None:
    layer = trained_layer(IN, OUT, RANK)
    before = copied(layer.state_dict())
    loaded = {key: tensor + 1 for key, tensor in before.items()}
    loaded[name][0] = value
    with pytest.raises(ValueError, match=f"{name} has values that are not finite"):
        layer.load_state_dict(loaded)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("name", ["magnitude", "lambda_b", "lambda_d"])
def test_a_vector_that_is_finite_in_a_wider_dtype_only_is_refused(name: str) -> None:
    layer = trained_layer(IN, OUT, RANK)
    before = copied(layer.state_dict())
    loaded = {key: tensor.double() for key, tensor in before.items()}
    loaded[name][0] = 1e39
    with pytest.raises(ValueError, match=rf"{name} has values that are not finite in torch\.float32"):
        layer.load_state_dict(loaded)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_base_without_finite_norms_is_refused_and_changes_nothing(value: float) -> None:
    layer = trained_layer(IN, OUT, RANK)
    before, expected = copied(layer.state_dict()), layer(torch.ones(IN))
    loaded = {key: tensor + 1 for key, tensor in before.items()}
    loaded["base_layer.weight"][1] = value
    with pytest.raises(ValueError, match=r"base_layer\.weight: 1 of 5 rows .* no finite norm"):
        layer.load_state_dict(loaded)
    assert_unchanged(layer, before)
    assert torch.equal(layer(torch.ones(IN)), expected)


def test_a_value_that_is_no_tensor_is_refused_and_changes_nothing() -> None:
    layer = trained_layer(IN, OUT, RANK)
    before = copied(layer.state_dict())
    loaded = {**{key: tensor + 1 for key, tensor in before.items()}, "lambda_d": [1.0, 2.0, 3.0]}
    with pytest.raises(TypeError, match="lambda_d is a list in the state dict, expected a tensor"):
        layer.load_state_dict(loaded)
    assert_unchanged(layer, before)


def test_a_load_changes_nothing_of_the_callers_state_dict() -> None:
    layer = trained_layer(IN, OUT, RANK)
    loaded = {key: tensor.double() for key, tensor in layer.state_dict().items()}
    layer.load_state_dict(loaded)
    assert all(value.dtype == torch.float64 for value in loaded.values())


def test_a_missing_vector_is_refused() -> None:
    layer = trained_layer(IN, OUT, RANK)
    values = layer.state_dict()
    del values["lambda_d"]
    with pytest.raises(RuntimeError, match=r"Missing key.*lambda_d"):
        layer.load_state_dict(values)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_merged_layer_gives_the_outputs_of_the_adapter(bias: bool, direction: str) -> None:
    layer = trained_layer(IN, OUT, RANK, bias=bias, direction=direction)
    merged, x = layer.merge_to_original_layer(), randn(4, IN, seed=0)
    torch.testing.assert_close(merged(x), layer(x))
    assert worst_error(merged.weight, DenseDVoRA.of(layer).merged_weight()) < 1e-6


class CountingLinear(nn.Linear):
    """A subclass with state of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.calls = 7


def test_a_merged_layer_is_of_the_bases_own_class() -> None:
    base = CountingLinear(IN, OUT)
    merged = train(DVoRAAdapter(base, RANK, shared=SHARED)).merge_to_original_layer()
    assert type(merged) is CountingLinear
    assert merged.calls == 7


def test_a_merged_layer_shares_nothing_with_the_adapter() -> None:
    layer = trained_layer(IN, OUT, RANK)
    x, before = randn(4, IN, seed=0), copied(layer.state_dict())
    expected = layer(x)
    merged = layer.merge_to_original_layer()
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert_unchanged(layer, before)
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert layer.lambda_b.grad.any()


def test_a_merged_layer_carries_no_gradients_and_no_graph() -> None:
    layer = trained_layer(IN, OUT, RANK, freeze_base_layer=False)
    layer(randn(4, IN, seed=0)).sum().backward()
    merged = layer.merge_to_original_layer()
    assert merged.weight.is_leaf
    assert merged.weight.grad is None
    assert merged.weight.requires_grad


def test_a_parametrized_base_cannot_be_merged_and_stays_as_it_is() -> None:
    base = parametrizations.weight_norm(linear(IN, OUT))
    layer = train(DVoRAAdapter(base, RANK, shared=SHARED))
    before = copied(layer.state_dict())
    with pytest.raises(TypeError, match=r"parametrized.*remove_parametrizations"):
        layer.merge_to_original_layer()
    assert_unchanged(layer, before)


def test_a_parametrized_base_can_be_merged_once_the_parametrization_is_removed() -> None:
    base = parametrizations.weight_norm(linear(IN, OUT))
    layer = train(DVoRAAdapter(base, RANK, shared=SHARED))
    x = randn(4, IN, seed=0)
    expected = layer(x)
    parametrize.remove_parametrizations(base, "weight")  # what the refusal above says to do
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.merge_to_original_layer()(x), expected)


def test_a_merge_into_bfloat16_warns_with_the_share_that_is_lost() -> None:
    layer = trained_layer(IN, OUT, RANK, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.magnitude.copy_(layer.base_layer.weight.float().norm(dim=1) * 1.001)
        layer.lambda_b.zero_()
    with pytest.warns(MergePrecisionWarning, match=r"torch\.bfloat16 .*Linear\(6, 5\): \d+\.\d%") as caught:
        merged = layer.merge_to_original_layer()
    exact = 0.001 * layer.base_layer.weight.double()
    change = merged.weight.double() - layer.base_layer.weight.double()
    lost = float((change - exact).norm() / exact.norm())
    figure = float(str(caught[0].message).split("): ")[1].split("%")[0])
    assert figure == pytest.approx(100 * lost, rel=0.01)


@pytest.mark.parametrize("name", ["magnitude", "lambda_b", "lambda_d"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_not_merged(value: float, name: str) -> None:
    layer = trained_layer(IN, OUT, RANK)
    with torch.no_grad():
        layer.get_parameter(name)[0] = value
    with pytest.raises(ValueError, match=r"Linear\(6, 5\): .*not finite.*nothing was merged"):
        layer.merge_to_original_layer()


def test_a_merge_beyond_the_range_of_the_weights_dtype_is_refused() -> None:
    layer = trained_layer(IN, OUT, RANK, dtype=torch.float16)
    with torch.no_grad():
        layer.magnitude[0] = 1e6
    with pytest.raises(ValueError, match=r"too large for torch\.float16; nothing was merged"):
        layer.merge_to_original_layer()


def test_a_base_that_is_loaded_after_a_merge_is_the_adapters_and_not_the_merged_layers() -> None:
    layer = trained_layer(IN, OUT, RANK)
    merged, x = layer.merge_to_original_layer(), randn(4, IN, seed=0)
    before = copied(merged.state_dict())
    layer.load_state_dict({**layer.state_dict(), "base_layer.weight": randn(OUT, IN, seed=12)})
    assert_unchanged(merged, before)
    torch.testing.assert_close(layer(x), fresh_copy(layer)(x))
    torch.testing.assert_close(layer.merge_to_original_layer()(x), layer(x))


def test_a_merge_into_float32_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained_layer(IN, OUT, RANK).merge_to_original_layer()


def test_a_copy_trains_on_its_own() -> None:
    layer = trained_layer(IN, OUT, RANK)
    before = copied(layer.state_dict())
    other = copy.deepcopy(layer)
    other(randn(4, IN, seed=0)).sum().backward()
    other.update_parameters(0.1)
    assert_unchanged(layer, before)
    assert not torch.equal(other.get_parameters(), layer.get_parameters())
