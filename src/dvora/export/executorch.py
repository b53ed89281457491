"""A program of ExecuTorch whose adapter is an input, for its CPU backend XNNPACK."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from transformers import PreTrainedModel

from .execution import INSTEAD, execute
from .graph import AdaptedGraph, with_cache
from .packed import TENSOR, described
from .verified import Compared, Prepared, Sample, check, prepared, tensor_like, write_adapters

PROGRAM = "one.pte"
ROWS, TOKENS = 8, 128
"""At most, of a call: ExecuTorch plans its memory for them."""
DTYPES = {"attention_mask": torch.bool, "token_type_ids": torch.int32}
"""Of inputs that are all int64 in PyTorch."""


def to_executorch(
    model: PreTrainedModel,
    adapters: Mapping[str, Path],
    sample: Sample,
    output: Path,
    *,
    labels: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[Compared]:
    """Write the program, the adapters packed, and give how far the program is from PyTorch.

    Args:
        model: the base, without adapters, in float32 on the CPU; its attention is transformers' eager one afterwards.
        adapters: folders by name; all have the same layers, matrices and sizes of heads.
        sample: real inputs, at most ROWS of TOKENS.
        output: an empty folder; after an error it is not as it was.
        labels: names of the classes of adapters.

    Raises:
        TypeError, ValueError: an adapter does not fit, the model cannot be exported, or the program crashes the runtime
            or gives other outputs than PyTorch.
    """
    if sample.call is with_cache:
        raise ValueError("model: language models are exported for ExecuTorch without a cache only; use --to onnx")
    sizes, sample = _sizes(model, sample), _told_apart(sample)
    ready = prepared(model, adapters, sample)
    # Taken apart, fused attention gives its output with other strides than those that the graph was traced with; then
    # the structured matrices' view of it fails.
    model.set_attn_implementation("eager")
    (output / PROGRAM).write_bytes(_lowered(ready, sample, sizes))
    graph = {
        "adapter_inputs": [tensor_like(TENSOR, torch.float32, [ready.packing.size])],
        "at_most": {size.__name__: size.max for size in sizes},
        **described(output / PROGRAM),
    }
    write_adapters(output, ready, sample, {Path(PROGRAM).stem: graph}, labels)
    compared = _compared(output / PROGRAM, ready, sample)
    check(compared)
    return compared


def _told_apart(sample: Sample) -> Sample:
    """The sample with inputs of different dtypes, so that the runtime refuses them in another order."""

    def call(model: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        of_model = (tensor.dtype for tensor in sample.inputs.values())
        return sample.call(model, [tensor.to(dtype) for tensor, dtype in zip(tensors, of_model, strict=True)])

    inputs = {name: tensor.to(DTYPES.get(name, tensor.dtype)) for name, tensor in sample.inputs.items()}
    return replace(sample, inputs=inputs, call=call)


def _lowered(ready: Prepared, sample: Sample, sizes: Sequence[Any]) -> bytes:
    graph = AdaptedGraph(ready.packing, sample.call, by_row=False)
    shapes = tuple({place: sizes[place] for place in sample.dynamic[name]} for name in sample.inputs)
    inputs = (next(iter(ready.vectors.values())), *sample.inputs.values())
    try:
        with graph.hooked(), torch.no_grad(), warnings.catch_warnings():
            # Of PyTorch's and ExecuTorch's own deprecations.
            warnings.simplefilter("ignore")
            program = torch.export.export(graph, inputs, dynamic_shapes=((None, *shapes),))
            for node in program.graph.nodes:
                # XNNPACK takes all that happens in a linear layer, and so also in its hook, for one product.
                node.meta.pop("nn_module_stack", None)
            for spec in program.graph_signature.input_specs:
                # A constant of several delegates is lost; a buffer is not.
                if spec.kind is InputKind.CONSTANT_TENSOR:
                    spec.kind, spec.persistent = InputKind.BUFFER, False
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as error:  # Both raise Exception itself too.
        raise ValueError(f"model: ExecuTorch cannot lower it: {error}. {INSTEAD}") from error
    return bytes(lowered.buffer)


def _sizes(model: Any, sample: Sample) -> list[Any]:
    """Of rows and of tokens: at least one."""
    tokens = min(TOKENS, getattr(model.config, "max_position_embeddings", TOKENS))
    rows, *rest = next(iter(sample.inputs.values())).shape
    if rows > ROWS or (len(rest) == 1 and rest[0] > tokens):
        raise ValueError(f"texts: {rows} of {rest[0]} tokens; for ExecuTorch at most {ROWS} of {tokens}")
    return [torch.export.Dim("rows", min=1, max=ROWS), torch.export.Dim("tokens", min=1, max=tokens)]


def _compared(program: Path, ready: Prepared, sample: Sample) -> list[Compared]:
    outputs = execute(program, [(ready.vectors[name], *sample.inputs.values()) for name in ready.expected])
    return [
        Compared(PROGRAM, name, float(abs(output.numpy() - expected).max()), float(abs(expected).max()))
        for output, (name, (expected,)) in zip(outputs, ready.expected.items(), strict=True)
    ]
