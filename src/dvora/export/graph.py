"""A base model as a graph of tensors only, in which the adapter is an input: of the call, or of each row of a batch.

The layers compute what `dvora.functional` defines. A and B are constants of the graph, in the small factors that they
have there.

Dimensions: P values of a packed adapter, F of them of a layer, B rows of a batch, I in, O out, R rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from ..bank.hooks import ServedLayer
from ..factors import Factors
from ..peft.layer_types import ActiveAdapter, adapted_outputs
from ..rows.gathered import HeadByRow, LayerPlace, ServedHead
from ..tensors import Float, bias_of
from .packed import LORA_PARTS, Entry, Packing

Adapt = Callable[[ServedLayer, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Of a layer, its inputs, the base's outputs, values of the rows' adapters and the bias: the outputs."""
AddLoRA = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of a layer's inputs, its outputs and values of the rows' adapters: the outputs."""
Call = Callable[[nn.Module, Sequence[Tensor]], tuple[Tensor, ...]]
"""How a model is called with tensors: its outputs."""


def once(inputs: Sequence[str], output: str) -> Call:
    """A pass without a cache.

    Args:
        inputs: names of the model's inputs.
        output: name of what of its outputs is given.
    """

    def call(model: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (model(**dict(zip(inputs, tensors, strict=True)))[output],)

    return call


def cache_argument(model: Any) -> str:
    """The name of a language model's argument for keys and values, which transformers has changed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def with_cache(model: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A step of a language model: tokens, mask, positions, and keys and values of each layer, in turns.

    Gives the logits of the last token, and all keys and values.
    """
    ids, mask, positions, *past = tensors
    cache: Any = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
    inputs = {"attention_mask": mask, "position_ids": positions, cache_argument(model): cache}
    outputs = model(input_ids=ids, **inputs, use_cache=True, logits_to_keep=1)
    return outputs.logits[:, -1], *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def adapted(
    layer: ServedLayer, x: Tensor, base_output: Tensor, values: Float[Tensor, "B F"], bias: Tensor | None = None
) -> Tensor:
    """The outputs of a layer from those of the base, with the factors of each row's adapter, or of the one of all."""
    weight = layer.adapted
    factors = Factors.of_rows(values.to(weight.w.dtype), weight.lambda_d_size, base_output.dim())
    adapter = ActiveAdapter(weight, factors, None)
    return adapted_outputs(layer.module, layer.layer_type, x, base_output, [adapter], bias)


def with_lora(
    x: Float[Tensor, "B *T I"], outputs: Float[Tensor, "B *T O"], values: Float[Tensor, "N F"]
) -> Float[Tensor, "B *T O"]:
    """The outputs of a layer and `x A^T B^T` of each row's adapter of LoRA, or of the one of all (N = 1)."""
    (*_, in_features), (*_, out_features) = x.shape, outputs.shape
    rank = values.shape[1] // (in_features + out_features)
    between = (1,) * (x.dim() - 3)
    A, B = values.split([in_features * rank, rank * out_features], 1)
    A_T, B_T = A.view(-1, *between, in_features, rank), B.view(-1, *between, rank, out_features)
    update: Tensor = x @ A_T @ B_T if x.dim() > 2 else (x[:, None] @ A_T @ B_T)[:, 0]
    return outputs + update


class AdaptedGraph(nn.Module):
    """The base model; its forward takes an adapter for each row of the batch, and then the model's inputs.

    Args:
        packing: of the adapters, with the base model, to which hooks are added while `hooked`.
        call: how the model is called.
        adapt: `adapted`, or what stands for it.
        add_lora: `with_lora`, or what stands for it.
    """

    def __init__(self, packing: Packing, call: Call, adapt: Adapt, add_lora: AddLoRA) -> None:
        super().__init__()
        self.model = packing.served.model
        self.call, self.adapt, self.add_lora = call, adapt, add_lora
        self.packing, self._given = packing, _Given()
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs.

        Args:
            tensors: the adapters of all rows (B, P); then what `call` takes.
        """
        self._given.rows = tensors[0]
        return self.call(self.model, tensors[1:])

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The model with its layers and heads adapted."""
        packing = self.packing
        entries = {entry.name: entry for entry in packing.entries}
        handles = []
        for name in packing.lora:
            A, B = (entries[f"{name}.{part}"] for part in LORA_PARTS)
            hook = _LoRAHook(self, A.offset, B.stop)
            handles.append(packing.served.linears[name].register_forward_hook(hook, prepend=True, with_kwargs=True))
        handles += [
            layer.module.register_forward_hook(_LayerHook(self, layer, place), prepend=True, with_kwargs=True)
            for layer, place in zip(packing.served.layers, packing.rows.places, strict=True)
        ]
        handles += [
            head.module.register_forward_hook(_HeadHook(self, head, entries), prepend=True)
            for head in packing.served.heads
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def values(self, start: int, stop: int) -> Float[Tensor, "B n"]:
        """A part of the adapter of each row."""
        assert self._given.rows is not None
        return self._given.rows[:, start:stop]


class _Given:
    """What a pass was given; no attribute of the module itself, which an exporter would take for its state."""

    rows: Tensor | None = None


class _LayerHook:
    def __init__(self, graph: AdaptedGraph, layer: ServedLayer, place: LayerPlace) -> None:
        self.graph, self.layer, self.place = graph, layer, place
        self.bias = bias_of(layer.module, layer.measured_bias)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], base_output: Tensor) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        values = self.graph.values(self.place.start, self.place.stop)
        return self.graph.adapt(self.layer, x, base_output, values, self.bias)


class _LoRAHook:
    def __init__(self, graph: AdaptedGraph, start: int, stop: int) -> None:
        self.graph, self.start, self.stop = graph, start, stop

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Tensor) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        return self.graph.add_lora(x, outputs, self.graph.values(self.start, self.stop))


class _HeadHook:
    def __init__(self, graph: AdaptedGraph, head: ServedHead, entries: dict[str, Entry]) -> None:
        self.graph, self.head, self.entries = graph, head, entries
        self.by_row = HeadByRow(head)
        self.by_row.module.eval()

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], __: Any) -> Tensor:
        parameters = {}
        for part in self.head.parts:
            entry = self.entries[part.name]
            values = self.graph.values(entry.offset, entry.stop)
            parameters[part.name.removeprefix(f"{self.head.name}.")] = values.reshape(-1, *part.shape)
        return self.by_row.outputs(parameters, args)
