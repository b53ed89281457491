"""All or nothing: what an error leaves of a model is the model as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def restored_on_error(*models: nn.Module) -> Iterator[ExitStack]:
    """If anything is raised in the block, restore attributes and children of all modules, and what is trained.

    Configurations of adapters are restored too. Values of tensors are not, unless their way back is pushed to what the
    block gets: `keep_values`, or a callback.
    """
    modules = [module for model in models for module in model.modules()]
    configs = {id(c): c for module in modules for c in vars(module).get("peft_config", {}).values()}
    attributes = [(vars(holder), dict(vars(holder))) for holder in (*modules, *configs.values())]
    values = [value for _, before in attributes for value in before.values()]
    # By their items: DeepSpeed's dictionaries gather a weight that is asked for by its key.
    containers: list[tuple[Any, Any]] = [(value, dict(value.items())) for value in values if isinstance(value, dict)]
    containers += [(value, value.copy()) for value in values if isinstance(value, list | set)]
    trained = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    undo = ExitStack()
    try:
        yield undo
    except BaseException:
        for now, before in [*attributes, *containers]:
            _put_back(now, before)
        for parameter, requires_grad in trained:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        undo.close()
        raise


def keep_values(undo: ExitStack, tensors: Sequence[Tensor]) -> None:
    """Push the way back to the values that tensors have now."""
    undo.callback(torch.no_grad()(torch._foreach_copy_), list(tensors), [tensor.detach().clone() for tensor in tensors])


def _put_back(now: Any, before: Any) -> None:
    """Restore the contents of a container; an unchanged one is not written, as other threads may be reading it."""
    if isinstance(now, list):
        if [id(value) for value in now] != [id(value) for value in before]:
            now[:] = before
    elif isinstance(now, dict):
        if [(key, id(value)) for key, value in now.items()] != [(key, id(value)) for key, value in before.items()]:
            now.clear()
            now.update(before)
    elif now != before:
        now.clear()
        now.update(before)
