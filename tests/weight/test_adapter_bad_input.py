"""Every refusal is a clear error and leaves the base layer as it was: bytes, gradients' flags, hooks."""

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import dvora
from dvora import DVoRAAdapter, SharedProjections
from tests.cases import SHARED, linear

QCONFIG = torch.ao.quantization.get_default_qat_qconfig()


def snapshot(module: nn.Module) -> list[tuple[str, torch.dtype, bool, bytes]]:
    """Names, dtypes, gradient flags and bytes of all parameters and buffers."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    content = [b"" if t.is_meta else t.detach().view(torch.uint8).numpy().tobytes() for _, t in tensors]
    return [(name, t.dtype, t.requires_grad, c) for (name, t), c in zip(tensors, content, strict=True)]


def assert_refused(base: nn.Module, error: type[Exception], message: str, rank: object = 3, **options: object) -> None:
    before, attributes = snapshot(base), set(vars(base))
    with pytest.raises(error, match=message):
        DVoRAAdapter(base, rank, **{"shared": SHARED, **options})
    assert snapshot(base) == before
    assert set(vars(base)) == attributes


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    assert_refused(linear(6, 5), ValueError, f"rank must be a positive integer, got {rank}", rank)


@pytest.mark.parametrize("rank", [2.0, "2", None, True])
def test_a_rank_that_is_no_integer_is_refused(rank: object) -> None:
    assert_refused(linear(6, 5), TypeError, re.escape(f"rank must be a positive integer, got {rank!r}"), rank)


@pytest.mark.parametrize("alpha", [0, 0.0, -1, float("nan"), float("inf"), -float("inf")])
def test_an_alpha_that_is_not_finite_and_positive_is_refused(alpha: float) -> None:
    assert_refused(linear(6, 5), ValueError, f"alpha must be finite and positive.* got {alpha}", alpha=alpha)


@pytest.mark.parametrize("alpha", ["1", True, torch.tensor(1.0)])
def test_an_alpha_that_is_no_number_is_refused(alpha: object) -> None:
    assert_refused(linear(6, 5), TypeError, "alpha must be a positive number or None", alpha=alpha)


@pytest.mark.parametrize("direction", ["column", "", None, "Unit"])
def test_an_unknown_direction_is_refused_with_the_known_ones(direction: object) -> None:
    message = f"unknown direction {direction!r}, expected one of unit, weight"
    assert_refused(linear(6, 5), ValueError, message, direction=direction)


@pytest.mark.parametrize(
    ("d_initial", "error"), [(float("nan"), ValueError), (float("inf"), ValueError), ("1", TypeError)]
)
def test_a_senseless_starting_value_is_refused(d_initial: object, error: type[Exception]) -> None:
    assert_refused(linear(6, 5), error, "d_initial must be", d_initial=d_initial)


@pytest.mark.parametrize(
    "make_base",
    [lambda: nn.Conv2d(3, 4, 2), lambda: nn.Embedding(4, 3), lambda: nn.Bilinear(2, 3, 4), lambda: nn.Identity()],
    ids=["Conv2d", "Embedding", "Bilinear", "Identity"],
)
def test_an_unsupported_layer_is_refused_with_the_supported_ones(make_base: Callable[[], nn.Module]) -> None:
    base = make_base()
    message = rf"type {type(base).__name__} is not supported; supported: torch\.nn\.Linear"
    assert_refused(base, TypeError, message)


class FakeQuantised(nn.Linear):
    """A linear layer that rounds its weight in its forward, as quantisation-aware training does."""

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.abs().max() / 7
        return nn.functional.linear(x, (self.weight / step).round() * step, self.bias)


def replaced_forward() -> nn.Linear:
    base = linear(6, 5)
    base.forward = lambda x: 2 * nn.functional.linear(x, base.weight, base.bias)
    return base


@pytest.mark.parametrize(
    "make_base",
    [lambda: FakeQuantised(6, 5), lambda: torch.ao.nn.qat.Linear(6, 5, qconfig=QCONFIG), replaced_forward],
    ids=["own forward", "torch.ao's", "replaced forward"],
)
def test_a_linear_layer_that_computes_something_else_is_refused(make_base: Callable[[], nn.Module]) -> None:
    base = make_base()
    message = (
        rf"type {type(base).__name__} is not supported: its forward is not that of torch\.nn\.Linear.*through PEFT"
    )
    assert_refused(base, TypeError, message)


def test_a_wrapper_that_says_what_it_wraps_is_no_other_forward() -> None:
    base = add_hook_to_module(linear(6, 5), ModelHook())
    layer, x = DVoRAAdapter(base, 3, shared=SHARED), torch.ones(6)
    assert torch.equal(layer(x), linear(6, 5)(x))


@pytest.mark.parametrize("sizes", [(0, 5), (6, 0), (0, 0)])
@pytest.mark.parametrize("shared", [SHARED, None], ids=["given", "default"])
def test_a_layer_without_values_is_refused(shared: SharedProjections | None, sizes: tuple[int, int]) -> None:
    dvora.initialize_shared_matrices(6, 5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of initializing nothing
        base = nn.Linear(*sizes)
    message = (
        rf"Linear\({sizes[0]}, {sizes[1]}\): the base weight has shape \({sizes[1]}, {sizes[0]}\): .*leave the layer"
    )
    assert_refused(base, ValueError, message, shared=shared)


def test_something_that_is_no_layer_is_refused() -> None:
    with pytest.raises(TypeError, match="type Tensor is not supported"):
        DVoRAAdapter(torch.zeros(3, 3), 2, shared=SHARED)


def test_a_layer_that_was_never_initialised_is_refused() -> None:
    with pytest.raises((TypeError, ValueError), match=r"LazyLinear|uninitialized"):
        DVoRAAdapter(nn.LazyLinear(5), 3, shared=SHARED)


def test_a_base_on_the_meta_device_is_refused_by_name() -> None:
    message = r"Linear\(6, 5\): the base weight is on the meta device"
    assert_refused(nn.Linear(6, 5, device="meta"), ValueError, message)


def test_a_base_that_carries_an_adapter_is_refused() -> None:
    adapter = DVoRAAdapter(linear(6, 5), 3, shared=SHARED)
    assert_refused(adapter, TypeError, "already carries a DVoRA adapter")


def test_a_base_that_carries_a_peft_adapter_is_refused() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]))
    assert_refused(model.base_model.model[0], TypeError, "is not supported; supported: torch.nn.Linear")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.complex64], ids=str)
def test_a_weight_that_is_not_floating_is_refused_with_its_dtype(dtype: torch.dtype) -> None:
    base = linear(6, 5)
    base.weight = nn.Parameter(torch.ones(5, 6, dtype=dtype), requires_grad=False)
    assert_refused(base, TypeError, rf"Linear\(6, 5\): the base weight has dtype {dtype}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_base_that_is_not_finite_is_refused_by_name_with_the_rows(dtype: torch.dtype, value: float) -> None:
    base = linear(6, 5, dtype=dtype)
    with torch.no_grad():
        base.weight[[1, 3], 2] = value
    assert_refused(base, ValueError, r"Linear\(6, 5\): 2 of 5 rows of the base weight have no finite norm")


def test_a_row_whose_norm_overflows_is_refused() -> None:
    base = linear(6, 5)
    with torch.no_grad():
        base.weight[0] = 3e38
    assert_refused(base, ValueError, r"1 of 5 rows .* overflow")


def test_missing_shared_matrices_are_refused_with_the_call_to_make() -> None:
    message = re.escape("dvora.initialize_shared_matrices(input_size=6, output_size=5, rank=3)")
    assert_refused(linear(6, 5), ValueError, message, shared=None)


def test_a_refusal_makes_no_default_projections_necessary_first() -> None:
    assert_refused(nn.Identity(), TypeError, "not supported", shared=None)


def test_a_base_with_trained_parameters_keeps_its_flags_when_refused() -> None:
    base = linear(6, 5)
    base.bias.requires_grad_(False)
    assert_refused(base, ValueError, "alpha", alpha=-1, freeze_base_layer=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bias_that_is_not_finite_is_refused(value: float) -> None:
    base = nn.Linear(4, 3)
    with torch.no_grad():
        base.bias[1] = value
    with pytest.raises(ValueError, match=r"Linear: 1 of 3 values of the bias are not finite"):
        DVoRAAdapter(base, 2, shared=SharedProjections(0))
