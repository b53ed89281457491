"""Real inputs, and whether a graph's outputs with them are those of the adapted PyTorch model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn

from .graph import Call, once, with_cache
from .packed import Packing

LAYOUT, ADAPTERS = "layout.json", "adapters"
OUTPUT = "output"
NULL = "null"
"""The base itself, among the names of adapters."""
TOLERANCE = 1e-4
"""Of the outputs' largest value, or of one."""


@dataclass(frozen=True)
class Sample:
    """Real inputs, with which a graph is traced and compared.

    Args:
        inputs: by name.
        dynamic: which dimensions of an input may have another size.
        outputs: names of what `call` gives.
        call: how the model is called with the inputs, in their order.
        others: more inputs, which are compared too.
    """

    inputs: Mapping[str, Tensor]
    dynamic: Mapping[str, Sequence[int]]
    outputs: Sequence[str]
    call: Call
    others: Sequence[Mapping[str, Tensor]] = ()


def sample_of_encoder(inputs: Mapping[str, Tensor], output: str) -> Sample:
    """A pass of a model without a cache.

    Args:
        inputs: by the model's names: of two texts of different lengths or more, padded, or of images.
        output: name of what of its outputs the graph gives.
    """
    dynamic = {name: (0, 1) if tensor.dim() == 2 else (0,) for name, tensor in inputs.items()}
    return Sample(inputs, dynamic, (OUTPUT,), once([*inputs], output))


@torch.no_grad()
def sample_of_decoder(model: nn.Module, ids: Tensor, mask: Tensor) -> Sample:
    """A step of a language model that reads keys and values, and gives them with the new ones; also the first step.

    Args:
        model: the base.
        ids: tokens of two texts or more, padded on the left, (rows, tokens).
        mask: 1 for their tokens.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # Keys and values of one token say what the cache of this model is like.
    empty = [states[:, :, :0] for states in with_cache(model, [ids[:, :1], mask[:, :1], positions[:, :1]])[1:]]
    names = [f"{layer}.{part}" for layer in range(len(empty) // 2) for part in ("key", "value")]
    past, present = [f"past_key_values.{name}" for name in names], [f"present.{name}" for name in names]

    def inputs(start: int, stop: int, cache: Sequence[Tensor]) -> dict[str, Tensor]:
        tokens = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        return {**tokens, "position_ids": positions[:, start:stop], **dict(zip(past, cache, strict=True))}

    first = inputs(0, ids.shape[1] - 2, empty)
    _, *cache = with_cache(model, [*first.values()])
    then = inputs(ids.shape[1] - 2, ids.shape[1], cache)
    return Sample(then, {name: (0, 2 if name in past else 1) for name in then}, (OUTPUT, *present), with_cache, [first])


class Compared(NamedTuple):
    """How far a graph is from the adapted PyTorch model."""

    graph: str
    adapter: str
    difference: float
    """The largest one."""
    largest: float
    """Of PyTorch's outputs."""


class Prepared(NamedTuple):
    """What graphs are given and have to answer."""

    packing: Packing
    vectors: dict[str, Tensor]
    """Adapters packed, by name, the base first."""
    expected: dict[str, list[NDArray[np.float32]]]
    """Outputs of the first of them in PyTorch: the first output, for each of the sample's inputs."""


def prepared(model: nn.Module, adapters: Mapping[str, Path], sample: Sample) -> Prepared:
    """Adapters packed, and what the model answers with the base and two of them.

    Args:
        model: the base, without adapters, in float32 on the CPU.
        adapters: folders by name; all have the same layers, matrices and sizes of heads.
        sample: real inputs.

    Raises:
        TypeError, ValueError: an adapter does not fit.
    """
    if taken := next((name for name in adapters if name.casefold() == NULL), None):
        raise ValueError(f"adapter {taken!r}: {NULL!r} is the base, in files of that name; rename the adapter")
    model.eval()
    with _naming(first := next(iter(adapters))):
        packing = Packing(model, adapters[first])
    vectors = {NULL: packing.null()}
    for name, folder in adapters.items():
        with _naming(name):
            vectors[name] = packing.pack(folder)
    return Prepared(packing, vectors, {n: _of_pytorch(model, adapters.get(n), sample) for n in [*vectors][:3]})


@contextmanager
def _naming(adapter: str) -> Iterator[None]:
    """Say of errors which adapter they are of."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"adapter {adapter!r}: {error}") from error


def write_adapters(output: Path, ready: Prepared, labels: Mapping[str, Sequence[str]]) -> None:
    """Write the layout, and each adapter packed.

    Args:
        output: a folder.
        ready: of `prepared`.
        labels: names of the classes of adapters.
    """
    (output / LAYOUT).write_text(json.dumps(ready.packing.layout(), indent=1))
    (output / ADAPTERS).mkdir()
    for name, vector in ready.vectors.items():
        ready.packing.write(output / ADAPTERS / f"{name}.safetensors", vector, labels.get(name, ()))


def check(compared: Iterable[Compared]) -> None:
    """Refuse graphs with other outputs than PyTorch's.

    Raises:
        ValueError: there is one.
    """
    for row in compared:
        if not row.difference <= TOLERANCE * max(1.0, row.largest):
            raise ValueError(f"{row.graph} differs from PyTorch by {row.difference:.2g} with adapter {row.adapter}")


@torch.no_grad()
def _of_pytorch(model: Any, adapter: Path | None, sample: Sample) -> list[NDArray[np.float32]]:
    """The first output of the adapted model, or of the base, for all inputs."""
    if adapter is not None:
        model = cast(Any, PeftModel.from_pretrained(copy.deepcopy(model), adapter)).eval().get_base_model()
    return [sample.call(model, [*inputs.values()])[0].numpy() for inputs in (sample.inputs, *sample.others)]
