"""What is timed: one training step, one decoded token, one prompt."""

from itertools import chain

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from benchmarks.speed.timing import Step
from benchmarks.speed.workloads import Workload

CACHED_TOKENS = 128
"""Length of the prompt that was read before the decoded token."""


def training_step(workload: Workload, model: nn.Module, x: Tensor) -> Step:
    """Forward pass, then the gradients of all trained parameters and of the input; no optimizer.

    Args:
        workload: whose model it is.
        model: adapted, in training mode.
        x: embedded inputs, (batch, tokens, hidden).
    """
    model.train()
    x = x.detach().requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # With gradients: a compiled model would be compiled once more without them.
    output_gradient = torch.ones_like(workload.output(model, x)).detach()

    def step() -> None:
        for tensor in chain([x], trained):
            tensor.grad = None
        # As an optimizer's step does: a method may keep what it made until something is written.
        torch.autograd.graph.increment_version(trained)
        torch.autograd.backward(workload.output(model, x), output_gradient)

    return step


def prefill_step(workload: Workload, model: nn.Module, x: Tensor) -> Step:
    """A forward pass without gradients."""
    model.eval()

    @torch.no_grad()
    def step() -> None:
        workload.output(model, x)

    return step


def decode_step(model: nn.Module, x: Tensor) -> Step:
    """One token after a prompt whose keys and values are cached, always at the same place.

    Args:
        model: a transformers model without a head, or one adapted by PEFT.
        x: embedded inputs, (batch, `CACHED_TOKENS` + 1, hidden).
    """
    model.eval()
    prompt, token = x.split([CACHED_TOKENS, 1], dim=1)
    return token_step(model, token, filled_cache(model, prompt))


@torch.no_grad()
def filled_cache(model: nn.Module, prompt: Tensor) -> DynamicCache:
    """The keys and values of a prompt, (batch, tokens, hidden)."""
    cache = DynamicCache()
    model(inputs_embeds=prompt, past_key_values=cache, use_cache=True)
    return cache


def token_step(model: nn.Module, token: Tensor, cache: DynamicCache) -> Step:
    """One token, (batch, 1, hidden), after which the cache is as it was."""

    @torch.no_grad()
    def step() -> None:
        model(inputs_embeds=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step
