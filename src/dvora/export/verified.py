"""Real inputs, and whether a graph's outputs with them are those of the adapted PyTorch model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn

from ..adapter_file.values import FolderSource
from .graph import Call, once, with_cache
from .packed import LAYOUT, SUFFIX, Packing, described

ADAPTERS, LISTED = "adapters", "index.json"
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
        dynamic: which dimensions of an input may have another size, and what they count.
        outputs: names of what `call` gives, and what that is in the model.
        call: how the model is called with the inputs, in their order.
        others: more inputs, which are compared too.
        tokenizer: how texts become its inputs, for `layout.json`.
    """

    inputs: Mapping[str, Tensor]
    dynamic: Mapping[str, Mapping[int, str]]
    outputs: Mapping[str, str]
    call: Call
    others: Sequence[Mapping[str, Tensor]] = ()
    tokenizer: Mapping[str, Any] = field(default_factory=dict)


def sample_of_encoder(inputs: Mapping[str, Tensor], output: str) -> Sample:
    """A pass of a model without a cache.

    Args:
        inputs: by the model's names: of two texts of different lengths or more, padded, or of images.
        output: name of what of its outputs the graph gives.
    """
    texts = {0: "rows", 1: "tokens"}
    dynamic = {name: texts if tensor.dim() == 2 else {0: "rows"} for name, tensor in inputs.items()}
    return Sample(inputs, dynamic, {OUTPUT: output}, once([*inputs], output))


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
    dynamic = {name: {0: "rows", 2: "past"} if name in past else {0: "rows", 1: "tokens"} for name in then}
    dynamic["attention_mask"] = {0: "rows", 1: "past + tokens"}
    outputs = {
        OUTPUT: "logits of the last token",
        **{new: f"the next {old}" for new, old in zip(present, past, strict=True)},
    }
    return Sample(then, dynamic, outputs, with_cache, [first])


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
    """Outputs of some of them in PyTorch: the first output, for each of the sample's inputs."""


def prepared(model: nn.Module, adapters: Mapping[str, Path], sample: Sample) -> Prepared:
    """Adapters packed, and what the model answers with the base and two of them of each method.

    Args:
        model: the base, without adapters, in float32 on the CPU.
        adapters: folders by name; all have the same sizes of heads, and those of DVoRA the same layers and matrices.
        sample: real inputs.

    Raises:
        TypeError, ValueError: an adapter does not fit.
    """
    if taken := next((name for name in adapters if name.casefold() == NULL), None):
        raise ValueError(f"adapter {taken!r}: {NULL!r} is the base, in files of that name; rename the adapter")
    model.eval()
    contents = {}
    for name, folder in adapters.items():
        with _naming(name):
            contents[name] = FolderSource(folder).content
    of_dvora = [name for name, content in contents.items() if content.layers]
    of_lora = [name for name in contents if name not in of_dvora]
    with _naming(first := [*of_dvora, *of_lora][0]):
        packing = Packing(model, adapters[first], [*contents.values()])
    vectors = {NULL: packing.null()}
    for name, folder in adapters.items():
        with _naming(name):
            vectors[name] = packing.pack(folder)
    compared = (NULL, *of_dvora[:2], *of_lora[:2])
    return Prepared(packing, vectors, {name: _of_pytorch(model, adapters.get(name), sample) for name in compared})


@contextmanager
def _naming(adapter: str) -> Iterator[None]:
    """Say of errors which adapter they are of."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"adapter {adapter!r}: {error}") from error


def write_adapters(
    output: Path,
    ready: Prepared,
    sample: Sample,
    graphs: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, Sequence[str]],
) -> None:
    """Write the layout with what a runtime has to know, and each adapter packed, with a list of them.

    Args:
        output: a folder.
        ready: of `prepared`.
        sample: of which the graphs were traced.
        graphs: by name, what they take of an adapter and their files: `described`.
        labels: names of the classes of adapters.
    """
    layout = {
        **ready.packing.layout,
        "model": type(ready.packing.served.model).__name__,
        "graphs": graphs,
        "inputs": [
            tensor_like(
                name, tensor.dtype, (sample.dynamic[name].get(place, size) for place, size in enumerate(tensor.shape))
            )
            for name, tensor in sample.inputs.items()
        ],
        "outputs": [{"name": name, "dtype": "float32", "is": what} for name, what in sample.outputs.items()],
        "tokenizer": sample.tokenizer,
    }
    (output / LAYOUT).write_text(json.dumps(layout, indent=1))
    (output / ADAPTERS).mkdir()
    listed = [
        ready.packing.write(output / ADAPTERS / f"{name}{SUFFIX}", vector, labels.get(name, ()))
        for name, vector in ready.vectors.items()
    ]
    (output / ADAPTERS / LISTED).write_text(json.dumps(listed, indent=1))


def tensor_like(name: str, dtype: torch.dtype, dimensions: Iterable[int | str]) -> dict[str, Any]:
    """An input as `layout.json` has it; a dimension that may have any size has a name."""
    return {"name": name, "dtype": str(dtype).removeprefix("torch."), "dimensions": [*dimensions]}


def named_by_content(file: Path) -> dict[str, Any]:
    """Put a file's digest into its name, so that a cache never gives another one for it; `described`."""
    about = described(file)
    moved = file.rename(file.with_stem(f"{file.stem}-{about['sha256'][:16]}"))
    return {**about, "file": moved.name}


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
