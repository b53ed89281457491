"""What training keeps for the backward pass: one tensor of outputs a layer, one z for siblings, never the inputs."""

from collections.abc import Callable, Iterable

import pytest
import torch
from cases import SHARED, linear, randn, train, trained_layer
from peft import get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dvora import DVoRAAdapter, DVoRAConfig, SharedProjections, dense

TOKENS, IN, OUT, RANK = 400, 72, 96, 8
OUTPUTS, Z = TOKENS * OUT, TOKENS * RANK
DTYPES = [torch.float32, torch.bfloat16]

both_kinds = pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
frozen_or_not = pytest.mark.parametrize("inputs_trained", [True, False], ids=["trained inputs", "frozen inputs"])


def plain_adapter(layer: nn.Linear, distribution: str) -> nn.Module:
    return train(DVoRAAdapter(layer, RANK, shared=SharedProjections(3, distribution)))


def peft_model(layer: nn.Linear, distribution: str) -> nn.Module:
    config = DVoRAConfig(r=RANK, target_modules=["0"], projection_init=distribution)
    model = get_peft_model(nn.Sequential(layer), config)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            change = 0.3 * randn(*parameter.shape, seed=index)
            parameter.data.add_(0.0 if "magnitude" in name else change)
    return model


both_layers = pytest.mark.parametrize("adapted", [plain_adapter, peft_model])


def saved_storages(forward: Callable[[], Tensor], held_anyway: Iterable[Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    """The output, and one tensor for every storage that autograd keeps and nothing else would."""
    held = {tensor.untyped_storage().data_ptr() for tensor in held_anyway}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    return y, kept


def saved_bytes(kept: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@both_layers
@both_kinds
@both_dtypes
@with_and_without_bias
@frozen_or_not
def test_a_layer_keeps_z_and_one_tensor_of_outputs(
    adapted: Callable[[nn.Linear, str], nn.Module],
    distribution: str,
    dtype: torch.dtype,
    bias: bool,
    inputs_trained: bool,
) -> None:
    model = adapted(linear(IN, OUT, bias=bias, dtype=dtype), distribution)
    x = randn(4, TOKENS // 4, IN, seed=0, dtype=dtype).requires_grad_(inputs_trained)
    y, kept = saved_storages(lambda: model(x), tensors_of(model))
    assert saved_bytes(kept) <= (1.1 * OUTPUTS + Z) * dtype.itemsize
    assert x.untyped_storage().data_ptr() not in kept
    assert y.untyped_storage().data_ptr() not in kept, "the caller may write into it"
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@both_kinds
@both_dtypes
def test_no_copy_of_the_frozen_matrices_is_kept(
    distribution: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_KEPT_BYTES", 0)  # the slopes of the norm are as large
    layer = trained_layer(IN, OUT, IN, dtype=dtype, shared=SharedProjections(3, distribution))
    x = randn(16, IN, seed=0, dtype=dtype).requires_grad_()
    _, kept = saved_storages(lambda: layer(x), [x, *tensors_of(layer)])
    assert max(tensor.numel() for tensor in kept.values()) <= 16 * OUT < IN * IN


@both_kinds
@both_dtypes
def test_siblings_share_one_z(distribution: str, dtype: torch.dtype) -> None:
    shared = SharedProjections(3, distribution)
    layers = nn.ModuleList(trained_layer(IN, OUT, RANK, dtype=dtype, shared=shared) for _ in range(3))
    x = randn(TOKENS, IN, seed=0, dtype=dtype).requires_grad_()
    _, kept = saved_storages(lambda: sum(layer(read) for read in [1 * x] for layer in layers), [x, *tensors_of(layers)])
    assert saved_bytes(kept) <= (3 * 1.1 * OUTPUTS + Z) * dtype.itemsize
    projections = [tensor for tensor in kept.values() if tensor.numel() == Z]
    assert len(projections) == 1


def test_layers_that_read_different_inputs_keep_a_z_each() -> None:
    layers = nn.ModuleList(trained_layer(IN, OUT, RANK) for _ in range(2))
    inputs = [randn(TOKENS, IN, seed=seed).requires_grad_() for seed in range(2)]
    _, kept = saved_storages(
        lambda: sum(layer(x) for layer, x in zip(layers, inputs, strict=True)), [*inputs, *tensors_of(layers)]
    )
    assert sum(tensor.numel() == Z for tensor in kept.values()) == 2


def test_a_layer_without_gradients_keeps_nothing() -> None:
    layer = trained_layer(IN, OUT, RANK)
    with torch.no_grad():
        _, kept = saved_storages(lambda: layer(randn(TOKENS, IN, seed=0)), [])
    assert kept == {}


def test_a_trained_base_is_seen_to_keep_the_inputs() -> None:
    base = linear(IN, OUT)
    layer = train(DVoRAAdapter(base, RANK, freeze_base_layer=False, shared=SHARED))
    x = randn(TOKENS, IN, seed=0)
    _, kept = saved_storages(lambda: layer(x), tensors_of(layer))
    assert x.untyped_storage().data_ptr() in kept
