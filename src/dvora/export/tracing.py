"""An adapted model traced as an ONNX graph: linear layers of one shape are traced once.

PyTorch and its exporter go through all operations five times, 7 milliseconds each time, and an adapted layer has up to
thirty. So in the model's trace it is one operation, which calls a function; then the function's operations take its
place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import onnx
import onnx_ir
import torch
from onnx_ir.passes import Sequential, common
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter.rules.common import materialize_reshape_shape_rule
from torch import Tensor, nn

from ..bank.hooks import ServedLayer
from ..peft.layer_types import linear
from ..tensors import Float
from .graph import AdaptedGraph, adapted, with_lora
from .packed import Packing
from .verified import NULL, Sample

ROWS = "rows"
_DOMAIN = "dvora"
"""Of the functions."""


def traced(packing: Packing, vectors: Mapping[str, Tensor], sample: Sample) -> onnx.ModelProto:
    """The graph as ONNX; its first input are the adapters of the rows."""
    functions = _Functions()
    graph = AdaptedGraph(packing, sample.call, functions.adapted, functions.with_lora)
    dynamic = [sample.dynamic[name] for name in sample.inputs]
    rows = vectors[NULL].repeat(len(next(iter(sample.inputs.values()))), 1)
    try:
        with graph.hooked(), torch.no_grad(), quiet():
            inputs = {ROWS: rows, **sample.inputs}
            model = _exported(graph, inputs, [*sample.outputs], [(0,), *dynamic])
            functions.put_into(model)
    except torch.onnx.OnnxExporterError as error:
        # The exporter's own message is a page with its advice to authors of models.
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(
            f"model: PyTorch cannot write {type(packing.served.model).__name__} as ONNX: {reason}. Try another version "
            "of PyTorch, or merge the adapter and export the merged model"
        ) from error
    _simplify(model)
    adapted_weights = [layer.adapted for layer in packing.served.layers]
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        # Every layer brings its function's constants, A and B among them.
        common.DeduplicateInitializersPass(
            size_limit=max((of.rank * max(of.in_features, of.out_features) for of in adapted_weights), default=0)
        ),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    for node in model.graph:
        # Where in PyTorch's sources it came from: megabytes.
        node.metadata_props.clear()
        for value in node.outputs:
            if not value.is_graph_output():
                # No input's name.
                value.name = f"{value.name}_"
    written: onnx.ModelProto = onnx_ir.to_proto(model)
    written.graph.ClearField("value_info")
    return written


class _Body(NamedTuple):
    """What a function computes of inputs, outputs, values of adapters and a bias."""

    compute: Callable[..., Tensor]
    shapes: Mapping[str, Sequence[int]]
    """Of these, with sizes that differ, so that none is taken for another."""


class _Functions:
    """The linear layers of a graph as calls of functions."""

    def __init__(self) -> None:
        self._bodies: dict[str, _Body] = {}
        """By the function's name."""

    def adapted(
        self, layer: ServedLayer, x: Tensor, base_output: Tensor, values: Float[Tensor, "B F"], bias: Tensor | None
    ) -> Tensor:
        """`graph.adapted`, or a call of it."""
        if layer.layer_type.low_rank is not linear:
            return adapted(layer, x, base_output, values, bias)
        weight = layer.adapted
        name = "_".join(map(str, ("layer", *weight.update_key)))
        return self._call(name, partial(adapted, layer), x, base_output, values, bias)

    def with_lora(self, x: Tensor, outputs: Tensor, values: Float[Tensor, "B F"]) -> Tensor:
        """A call of `graph.with_lora`."""
        return self._call("lora", with_lora, x, outputs, values)

    def _call(
        self,
        name: str,
        compute: Callable[..., Tensor],
        x: Tensor,
        outputs: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        rows, *tokens = range(2, 1 + x.dim())
        shapes = {
            "x": (rows, *tokens, x.shape[-1]),
            "outputs": (rows, *tokens, outputs.shape[-1]),
            # One row, so that no size is taken of it.
            "values": (1, values.shape[1]),
            **({} if bias is None else {"bias": bias.shape}),
        }
        name = "_".join(map(str, (name, *(size for shape in shapes.values() for size in shape))))
        self._bodies.setdefault(name, _Body(compute, shapes))
        called: Tensor = torch.onnx.ops.symbolic(
            f"{_DOMAIN}::{name}",
            (x, outputs, values) if bias is None else (x, outputs, values, bias),
            dtype=outputs.dtype,
            shape=outputs.shape,
            version=1,
        )
        return called

    def put_into(self, model: onnx_ir.Model) -> None:
        """Replace the calls by the functions' operations."""
        for name, body in self._bodies.items():
            function = onnx_ir.Function(_DOMAIN, name, graph=_traced_body(body), attributes=())
            model.functions[function.identifier()] = function
        first: dict[str, onnx_ir.Value] = {}
        for node in model.graph:
            if node.domain == _DOMAIN:
                x = node.inputs[0]
                assert x is not None
                assert x.shape is not None
                # Sizes are computed once for all layers with the same.
                node.resize_inputs(len(node.inputs) + 1)
                node.replace_input_with(len(node.inputs) - 1, first.setdefault(str(x.shape[:-1]), x))
        common.InlinePass()(model)


class _Layer(nn.Module):
    def __init__(self, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.eval()

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.compute(*tensors)


def _traced_body(body: _Body) -> onnx_ir.Graph:
    """The operations of a layer; a last input is a tensor with as many rows and tokens."""
    inputs = {name: torch.zeros(*shape) for name, shape in body.shapes.items()}
    leading = range(inputs["x"].dim() - 1)
    model = _exported(_Layer(body.compute), inputs, ["y"], [leading, leading, (), ()][: len(inputs)])
    _simplify(model)
    graph = model.graph
    graph.inputs.append(sizes := onnx_ir.Value(name="sizes"))
    for node in graph:
        if node.op_type == "Shape" and "end" in node.attributes and node.inputs[0] in graph.inputs:
            node.replace_input_with(0, sizes)
        for value in node.outputs:
            # Its symbols may have the names of other sizes of the model.
            value.shape = None
    for initializer in [*graph.initializers.values()]:
        # A function has none.
        constant = onnx_ir.node("Constant", [], {"value": initializer.const_value})
        onnx_ir.convenience.replace_all_uses_with(initializer, constant.outputs[0])
        graph.insert_before(graph[0], constant)
    graph.initializers.clear()
    return graph


def _exported(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], dynamic: Iterable[Iterable[int]]
) -> onnx_ir.Model:
    """A module that takes any number of tensors; `dynamic` are the dimensions of each that may have other sizes."""
    program = torch.onnx.export(
        module,
        tuple(inputs.values()),
        dynamo=True,
        input_names=[*inputs],
        output_names=[*outputs],
        dynamic_shapes=(tuple(dict.fromkeys(dimensions, torch.export.Dim.DYNAMIC) for dimensions in dynamic),),
        verbose=False,
        # `_simplify` does it: the exporter looks at every pair of slices, half an hour for 210 adapted layers.
        optimize=False,
    )
    assert program is not None
    return program.model


def _simplify(model: onnx_ir.Model) -> None:
    """Compute what is constant, and name no batch in shapes: one row is broadcast where one for each was traced."""
    fold_constants(model, onnx_shape_inference=True)
    rewriter.rewrite(model, [materialize_reshape_shape_rule])


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' warnings: of packages that are not needed, and of a step that changes nothing here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
