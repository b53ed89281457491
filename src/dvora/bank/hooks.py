"""What a bank does in a pass of its model: hooks that give a layer's outputs, and a head's, to each row's adapter."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..peft.layer_types import ActiveAdapter, adapted_outputs, check_gradient
from .factors import LayerPlace
from .rows import CurrentRows
from .served import ServedHead, ServedLayer


class LayerHook:
    """The forward hook of a layer: from the base's outputs to those of each row's adapter.

    Args:
        layer: the layer.
        place: in a factor row.
        current: tells the batch that a thread is in.
    """

    def __init__(self, layer: ServedLayer, place: LayerPlace, current: CurrentRows) -> None:
        self.layer, self.place, self.current = layer, place, current

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], base_output: Tensor) -> Tensor:
        layer, rows = self.layer, self.current.known()
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        check_gradient(module, layer.layer_type, x, base_output, layer.name)
        factors = rows.factors(layer, self.place, x.shape[0], base_output.dim())
        adapter = ActiveAdapter(layer.adapted, factors, rows.dropout)
        return adapted_outputs(module, layer.layer_type, x, base_output, [adapter], layer.bias())


class _Skeleton(threading.local):
    """A copy of a head for each thread: `functional_call` puts the parameters of its call into the module."""

    def __init__(self, head: nn.Module) -> None:
        self.module = copy.deepcopy(head)


class HeadHook:
    """The forward hook of a head: the outputs of each row by the head of its adapter, as if it was alone.

    Args:
        head: the head.
        current: tells the batch that a thread is in.
    """

    def __init__(self, head: ServedHead, current: CurrentRows) -> None:
        self.head, self.current = head, current
        self._own = _Skeleton(head.skeleton)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], base_output: Any) -> Tensor:
        head, rows = self.head, self.current.known()
        if kwargs or not all(isinstance(each, Tensor) for each in (*args, base_output)):
            got = [type(each).__name__ for each in (*args, *kwargs.values())]
            raise TypeError(
                f"{head.name}: a head of a bank takes tensors, without keywords, and returns one; it got {got} and "
                f"returned {type(base_output).__name__}"
            )
        self._own.module.train(module.training)
        count = len(args[0])
        outputs: Tensor = torch.vmap(self._alone, randomness="different")(rows.head(head, count), *args)
        of_base = rows.of_base(count, head.name)
        if of_base is None:
            return outputs
        # To the bits, which batched products need not have.
        return torch.where(of_base.view(-1, *(1,) * (outputs.dim() - 1)), base_output, outputs)

    def _alone(self, parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        inputs = tuple(each.unsqueeze(0) for each in inputs)
        output: Tensor = functional_call(self._own.module, parameters, inputs)
        return output.squeeze(0)


def check_without_bank(model: nn.Module) -> None:
    """Refuse a model that a bank serves already.

    Raises:
        ValueError: it does.
    """
    for name, module in model.named_modules():
        if any(isinstance(hook, LayerHook | HeadHook) for hook in module._forward_hooks.values()):
            raise ValueError(f"model: {name} is served by another bank; close that one first")
