"""ONNX graphs whose adapter is an input: one a call, one a row out of a table, or one of onnxruntime's adapter files.

The three graphs share one file of weights.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from .graph import AdaptedGraph
from .packed import TENSOR, Packing
from .verified import ADAPTERS, NULL, OUTPUT, Compared, Sample, check, prepared, write_adapters

ONE, TABLE, FILES, INT8 = "one.onnx", "table.onnx", "files.onnx", "one-int8.onnx"
WEIGHTS, INDEX = "weights.bin", "index"
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
) -> list[Compared]:
    """Write the graphs, the adapters packed, and how far each graph is from PyTorch.

    Args:
        model: the base, without adapters, in float32 on the CPU.
        adapters: folders by name; all have the same layers, matrices and sizes of heads.
        sample: real inputs.
        output: an empty folder; after an error it is not as it was.
        labels: names of the classes of adapters.
        int8: write a graph with int8 weights of the base too; adapters stay in float32.

    Raises:
        TypeError, ValueError: an adapter does not fit, the model cannot be exported, or a graph gives other outputs
            than PyTorch.
    """
    packing, vectors, expected = ready = prepared(model, adapters, sample)
    one = _traced(AdaptedGraph(packing, sample.call, is_table=False), vectors, sample)
    table = _traced(AdaptedGraph(packing, sample.call, is_table=True), vectors, sample)
    if int8:
        _quantise(one, output / INT8, packing)
    with_default = onnx.ModelProto()
    with_default.CopyFrom(one)
    with_default.graph.initializer.append(onnx.numpy_helper.from_array(vectors[NULL].numpy(), TENSOR))
    with (output / WEIGHTS).open("wb") as file:
        weights = _Weights(file)
        for name, graph in ((ONE, one), (TABLE, table), (FILES, with_default)):
            weights.take(graph)
            onnx.save(graph, output / name)
    write_adapters(output, ready, labels)
    for name, vector in vectors.items():
        _write_adapter_file(output / ADAPTERS / f"{name}.onnx_adapter", vector)
    compared = [*_compared(output, vectors, expected, sample, int8)]
    check(row for row in compared if row.graph != INT8)
    return compared


def _traced(graph: AdaptedGraph, vectors: Mapping[str, Tensor], sample: Sample) -> onnx.ModelProto:
    """The graph as ONNX."""
    shapes: list[Any] = [dict.fromkeys(sample.dynamic[name], torch.export.Dim.DYNAMIC) for name in sample.inputs]
    if graph.is_table:
        index = torch.arange(len(next(iter(sample.inputs.values())))) % len(vectors)
        given, names = [torch.stack([*vectors.values()]), index], [f"{TENSOR}s", INDEX]
        shapes = [{0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC}, *shapes]
    else:
        given, names, shapes = [next(iter(vectors.values()))], [TENSOR], [None, *shapes]
    try:
        with graph.hooked(), torch.no_grad(), _quiet():
            program = torch.onnx.export(
                graph,
                (*given, *sample.inputs.values()),
                dynamo=True,
                input_names=[*names, *sample.inputs],
                output_names=[*sample.outputs],
                dynamic_shapes=(tuple(shapes),),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"model: PyTorch cannot write it as ONNX: {error}. Try attn_implementation='eager', another version of "
            "PyTorch, or merge the adapter and export the merged model"
        ) from error
    assert program is not None
    written: onnx.ModelProto = program.model_proto
    for node in written.graph.node:
        # Where in PyTorch's sources it came from: megabytes.
        node.ClearField("metadata_props")
    written.graph.ClearField("value_info")
    return written


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings: of packages that are not needed, and of a step that changes nothing here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Weights:
    """The file of what graphs have in common: a tensor that several have stands there once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[bytes, int] = {}

    def take(self, graph: onnx.ModelProto) -> None:
        """Move the large tensors of a graph into the file."""
        for tensor in graph.graph.initializer:
            data = tensor.raw_data
            if len(data) < SMALLEST_OUTSIDE or tensor.name == TENSOR:
                continue
            if (digest := _digest(data)) not in self._places:
                self._file.write(bytes(-self._file.tell() % ALIGNMENT))
                self._places[digest] = self._file.tell()
                self._file.write(data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            place = {"location": WEIGHTS, "offset": str(self._places[digest]), "length": str(len(data))}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _quantise(graph: onnx.ModelProto, file: Path, packing: Packing) -> None:
    """Write a graph whose base has int8 weights; products with A, B and heads stay as they are."""
    weights = [layer.module.get_parameter("weight") for layer in packing.served.layers]
    of_base = {
        _digest(part.detach().contiguous().numpy().tobytes()) for weight in weights for part in (weight, weight.T)
    }
    in_base = {tensor.name for tensor in graph.graph.initializer if _digest(tensor.raw_data) in of_base}
    others = [node.name for node in graph.graph.node if node.op_type == "MatMul" and not in_base & {*node.input}]
    with _quiet():
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
    folder: Path,
    vectors: Mapping[str, Tensor],
    expected: Mapping[str, list[NDArray[np.float32]]],
    sample: Sample,
    int8: bool,
) -> Iterator[Compared]:
    """Every graph with every adapter whose outputs are known."""
    names = [*vectors]
    table = np.stack([vector.numpy() for vector in vectors.values()])
    for graph in (ONE, TABLE, FILES, *((INT8,) if int8 else ())):
        options = onnxruntime.SessionOptions()
        # That a default adapter can be replaced is what it is for.
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(folder / graph, options, providers=["CPUExecutionProvider"])
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
                    adapter.Load(str(folder / ADAPTERS / f"{name}.onnx_adapter"))
                    running.add_active_adapter(adapter)
                output = session.run([OUTPUT], {**given, **inputs}, running)[0]
                differences.append(float(np.abs(output - wanted).max()))
                largest.append(float(np.abs(wanted).max()))
            yield Compared(graph, name, max(differences), max(largest))
