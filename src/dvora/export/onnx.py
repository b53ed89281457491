"""ONNX graphs whose adapter is an input: one a call, one a row out of a table, or one of onnxruntime's adapter files.

The three are one graph behind different first nodes, and share one file of weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from .packed import TENSOR, Packing
from .tracing import quiet, traced
from .verified import (
    ADAPTERS,
    NULL,
    OUTPUT,
    Compared,
    Sample,
    check,
    named_by_content,
    prepared,
    tensor_like,
    write_adapters,
)

ONE, TABLE, FILES, INT8 = "one.onnx", "table.onnx", "files.onnx", "one-int8.onnx"
"""To which names the digest of the content is added."""
WEIGHTS, INDEX = "weights.bin", "index"
_FROM_ONE = "g (float[P] adapter) => (float[1, P] rows) <int64[1] axis = {0}> { rows = Unsqueeze (adapter, axis) }"
_FROM_TABLE = """g (float[N, P] adapters, int64[B] index) => (float[B, P] rows)
<int64 zero = {0}, int64[1] axis = {1}> {
    end = Shape <end = 1> (adapters) counted_from_the_end = Less (index, zero)
    row = Where (counted_from_the_end, end, index) row_column = Unsqueeze (row, axis)
    batch = Shape <end = 1> (X) zeros = Expand (zero, batch) zero_column = Unsqueeze (zeros, axis)
    columns = Concat <axis = 1> (row_column, zero_column) row_of_batch = ReduceSum <keepdims = 0> (columns, axis)
    rows = Gather (adapters, row_of_batch)
}"""
"""What makes of an input the first one of the traced graph, the adapters of rows: one row is broadcast to all. An index
of one row would be, too, but stands beside no column of the batch; onnxruntime optimises a Reshape to its rows away."""
SMALLEST_OUTSIDE, ALIGNMENT = 1024, 4096
"""Bytes of a tensor that stands in the file of weights, and to a multiple of which each begins there."""


def to_onnx(
    model: nn.Module,
    adapters: Mapping[str, Path],
    sample: Sample,
    output: Path,
    *,
    labels: Mapping[str, Sequence[str]] = MappingProxyType({}),
    int8: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> list[Compared]:
    """Write the graphs, the adapters packed, and how far each graph is from PyTorch.

    Args:
        model: the base, without adapters, in float32 on the CPU.
        adapters: folders by name; all have the same sizes of heads, and those of DVoRA the same layers and matrices.
        sample: real inputs.
        output: an empty folder; after an error it is not as it was.
        labels: names of the classes of adapters.
        int8: write a graph with int8 weights of the base too; adapters stay in float32.
        note: called with what is done next.

    Raises:
        TypeError, ValueError: an adapter does not fit, the model cannot be exported, or a graph gives other outputs
            than PyTorch.
    """
    packing, vectors, expected = ready = prepared(model, adapters, sample)
    note(f"PyTorch traces the model and {len(packing.modules)} adapted layers; nothing takes longer")
    graph = traced(packing, vectors, sample)
    note(f"the graph of {len(graph.graph.node):,} operations and its weights are written")
    graphs = _write_graphs(output, graph, packing, vectors[NULL], int8)
    write_adapters(output, ready, sample, {Path(name).stem: about for name, about in graphs.items()}, labels)
    for name, vector in vectors.items():
        _write_adapter_file(output / ADAPTERS / f"{name}.onnx_adapter", vector)
    note("onnxruntime runs the graphs, whose outputs are compared with PyTorch's")
    files = {name: output / about["file"] for name, about in graphs.items()}
    compared = [*_compared(files, vectors, expected, sample)]
    check(row for row in compared if row.graph != INT8)
    return compared


def _write_graphs(
    output: Path, graph: onnx.ModelProto, packing: Packing, null: Tensor, int8: bool
) -> dict[str, dict[str, Any]]:
    """The graphs and their weights; what `layout.json` says of each."""
    vector = tensor_like(TENSOR, torch.float32, [packing.size])
    vectors = tensor_like(f"{TENSOR}s", torch.float32, [f"{TENSOR}s", packing.size])
    takes = {ONE: [vector], TABLE: [vectors, tensor_like(INDEX, torch.int64, ["rows"])], FILES: [], INT8: [vector]}
    if int8:
        _quantise(_behind(_FROM_ONE, graph), output / INT8, packing)
    weights = {"weights": _move_weights(graph, output / WEIGHTS)}
    onnx.save(one := _behind(_FROM_ONE, graph), output / ONE)
    one.graph.initializer.append(onnx.numpy_helper.from_array(null.numpy(), TENSOR))
    onnx.save(one, output / FILES)
    onnx.save(_behind(_FROM_TABLE, graph), output / TABLE)
    return {
        name: {"adapter_inputs": inputs, **named_by_content(output / name), **(weights if name != INT8 else {})}
        for name, inputs in takes.items()
        if int8 or name != INT8
    }


def _behind(first: str, graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph behind what gives the rows their adapters: of P values, for B rows, as many as the input X has."""
    batch, size = graph.graph.input[0].type.tensor_type.shape.dim
    first = (
        first.replace("P", str(size.dim_value)).replace("B", batch.dim_param).replace("X", graph.graph.input[1].name)
    )
    source = onnx.parser.parse_graph(first)
    joined = onnx.ModelProto()
    joined.CopyFrom(graph)
    del joined.graph.input[:], joined.graph.node[:]
    joined.graph.input.extend([*source.input, *graph.graph.input[1:]])
    joined.graph.node.extend([*source.node, *graph.graph.node])
    joined.graph.initializer.extend(source.initializer)
    return joined


def _move_weights(graph: onnx.ModelProto, path: Path) -> dict[str, Any]:
    """Write the large tensors of a graph into the file of weights, which is named by its content then."""
    moved = [tensor for tensor in graph.graph.initializer if len(tensor.raw_data) >= SMALLEST_OUTSIDE]
    with path.open("wb") as file:
        for tensor in moved:
            file.write(bytes(-file.tell() % ALIGNMENT))
            tensor.external_data.add(key="offset", value=str(file.tell()))
            tensor.external_data.add(key="length", value=str(file.write(tensor.raw_data)))
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    about = named_by_content(path)
    for tensor in moved:
        tensor.external_data.add(key="location", value=about["file"])
    return about


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _quantise(graph: onnx.ModelProto, file: Path, packing: Packing) -> None:
    """Write a graph whose base has int8 weights; products with A, B and heads stay as they are."""
    weights = [module.get_parameter("weight") for module in packing.modules.values()]
    of_base = {
        _digest(part.detach().contiguous().numpy().tobytes()) for weight in weights for part in (weight, weight.T)
    }
    in_base = {tensor.name for tensor in graph.graph.initializer if _digest(tensor.raw_data) in of_base}
    others = [node.name for node in graph.graph.node if node.op_type == "MatMul" and not in_base & {*node.input}]
    with quiet():
        quantize_dynamic(
            graph,
            file,
            per_channel=True,
            # Products of unsigned and signed bytes overflow on processors without VNNI.
            weight_type=QuantType.QUInt8,
            nodes_to_exclude=others,
            op_types_to_quantize=["MatMul"],
        )


def _write_adapter_file(file: Path, vector: Tensor) -> None:
    written = onnxruntime.AdapterFormat()
    written.set_adapter_version(1)
    written.set_model_version(1)
    written.set_parameters({TENSOR: onnxruntime.OrtValue.ortvalue_from_numpy(vector.numpy())})
    written.export_adapter(str(file))


def _compared(
    files: Mapping[str, Path],
    vectors: Mapping[str, Tensor],
    expected: Mapping[str, list[NDArray[np.float32]]],
    sample: Sample,
) -> Iterator[Compared]:
    """Every graph with every adapter whose outputs are known."""
    names = [*vectors]
    table = np.stack([vector.numpy() for vector in vectors.values()])
    for graph, file in files.items():
        options = onnxruntime.SessionOptions()
        # That a default adapter can be replaced is what it is for.
        options.log_severity_level = 3
        with _running(graph):
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        for name, of_inputs in expected.items():
            differences, largest = [0.0], [0.0]
            for tensors, wanted in zip([sample.inputs, *sample.others], of_inputs, strict=True):
                inputs = {key: tensor.numpy() for key, tensor in tensors.items()}
                given: dict[str, Any] = {TENSOR: vectors[name].numpy()}
                running = onnxruntime.RunOptions()
                if graph == TABLE:
                    rows = len(next(iter(inputs.values())))
                    given = {f"{TENSOR}s": table, INDEX: np.full(rows, names.index(name))}
                elif graph == FILES:
                    given, adapter = {}, onnxruntime.LoraAdapter()
                    adapter.Load(str(file.parent / ADAPTERS / f"{name}.onnx_adapter"))
                    running.add_active_adapter(adapter)
                with _running(graph):
                    output = session.run([OUTPUT], {**given, **inputs}, running)[0]
                differences.append(float(np.abs(output - wanted).max()))
                largest.append(float(np.abs(wanted).max()))
            yield Compared(graph, name, max(differences), max(largest))


@contextmanager
def _running(graph: str) -> Iterator[None]:
    """Say of onnxruntime's errors of which graph they are."""
    try:
        yield
    except Exception as error:  # Its own have no class in common.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"model: onnxruntime cannot run the graph {graph}: {reason}") from error
