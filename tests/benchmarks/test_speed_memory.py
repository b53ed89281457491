"""What a step keeps is counted right on functions whose graph is known."""

import torch
from torch import Tensor, nn

from benchmarks.speed.arms import BASE, FULL, Arm, adapted, sharing_copy
from benchmarks.speed.memory import Constants, Live, Saved, constants, live_memory, saved_for_backward
from benchmarks.speed.workloads import linears, random

FLOAT = 4


def test_saved_tensors_are_counted_once() -> None:
    layer = nn.Linear(8, 6)
    x = random(10, 8).requires_grad_()
    # The input for the weight's gradient, and sigmoid's output; the weight is no value that is saved.
    assert saved_for_backward(layer, lambda x: layer(x).sigmoid(), x) == Saved(10 * 8 + 10 * 6, 140 * FLOAT, True)
    # Views of one tensor are one tensor.
    assert saved_for_backward(layer, lambda x: (2 * x).sin() * 3, x).values == 80


def test_a_frozen_layer_keeps_nothing() -> None:
    layer = nn.Linear(8, 6).requires_grad_(False)
    assert saved_for_backward(layer, layer, random(10, 8).requires_grad_()) == Saved(0, 0, False)


def test_a_graph_without_outputs_is_not_counted() -> None:
    layer = nn.Linear(8, 6).requires_grad_(False)

    def forward(x: Tensor) -> Tensor:
        (x.sin() * 2).sigmoid()
        y: Tensor = layer(x)
        return y

    assert saved_for_backward(layer, forward, random(10, 8).requires_grad_()).values == 0


def test_live_memory_sees_what_hooks_are_not_shown() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.kept = x + 1
            return 2 * x

        @staticmethod
        def backward(ctx, d: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            return 2 * d

    x = random(10, 8).requires_grad_()
    assert saved_for_backward(nn.Identity(), Hidden.apply, x).values == 0
    live = live_memory(nn.Identity(), Hidden.apply, x)
    assert live.after_forward == 80 * FLOAT
    # Kept, output, its gradient of ones, and the input's gradient.
    assert live.at_most == 4 * 80 * FLOAT


def test_what_is_freed_is_not_alive() -> None:
    x = random(10, 8).requires_grad_()
    # Sums keep nothing. At the end there are the output, its gradient and that of the input.
    assert live_memory(nn.Identity(), lambda x: x + 1 + 1 + 1, x) == Live(0, 3 * 80 * FLOAT)


def test_a_copy_has_the_base_s_own_tensors() -> None:
    base = linears(64, 176).frozen(torch.float32)
    copied = sharing_copy(base)
    assert copied is not base
    own = [parameter.data_ptr() for parameter in base.parameters()]
    assert [parameter.data_ptr() for parameter in copied.parameters()] == own
    trained = adapted(base, FULL, ["q_proj"])
    assert [parameter.data_ptr() for parameter in trained.parameters()] == own
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_constants_exclude_the_base_and_trained_parameters() -> None:
    workload = linears(64, 176)
    base = workload.frozen(torch.float32)
    assert constants(base, adapted(base, BASE, workload.targets), workload.targets) == Constants(0, 0, 0)
    # Both matrices of LoRA are trained, at rank 4 in four 64 x 64 layers and three of 64 and 176.
    lora = constants(base, adapted(base, Arm("LoRA", 4), workload.targets), workload.targets)
    assert lora == Constants(0, 0, 4 * (4 * 128 + 3 * 240) * FLOAT)
    # VeRA's two matrices are as wide as the widest layer, and shared.
    vera = constants(base, adapted(base, Arm("VeRA", 8), workload.targets), workload.targets)
    assert vera == Constants(0, 2 * 8 * 176 * FLOAT, (5 * 64 + 2 * 176 + 7 * 8) * FLOAT)


def test_constants_of_one_layer_are_its_own() -> None:
    workload = linears(64, 176)
    base = workload.frozen(torch.float32)
    small, large = (
        constants(base, adapted(base, Arm("dvora dense", rank), workload.targets), workload.targets) for rank in (4, 8)
    )
    # Three vectors, of which those of size out do not grow with the rank.
    assert large.trained - small.trained == 7 * 4 * FLOAT
    assert large.per_layer > small.per_layer > 0
    # At least A and B themselves.
    assert large.shared >= 2 * 8 * 176 * FLOAT
