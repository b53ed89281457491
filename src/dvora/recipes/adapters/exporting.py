"""Adapters exported with their base model, for runtimes without PyTorch."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from ...bank.adapters import adapters_in, folder_of
from ...bank.packs import check_folder_names
from ...whole_files import check_new_folder, new_folder
from ..data.tables import Note
from ..models.adapter_folder import SETTINGS, Adapter, read_adapter
from ..models.adapters import base_class, of_base
from ..models.bases import heads_of, load_model, load_tokenizer, quiet_transformers
from ..models.inputs import example_inputs
from ..settings import NOTHING, Trust
from . import Runtime

if TYPE_CHECKING:
    from ...export.verified import Sample

TEXTS = ("It is a fine day.", "Nobody had expected that the second part of it would be so much better than the first.")
WEB = Path(__file__).parents[2] / "export" / "web"
REPORT = "export.json"


def export(
    source: Path,
    output: Path,
    runtime: Runtime,
    model: str | None = None,
    texts: Sequence[str] = (),
    int8: bool = False,
    note: Note = lambda _: None,
) -> dict[str, Any]:
    """Write a base model once with any number of adapters, which a runtime switches, into a new folder.

    Args:
        source: an adapter, a run of `dvora train`, or a folder of them.
        output: that must not exist, or be empty.
        runtime: onnx; web: the same with a page; or executorch.
        model: the base, a folder or a name on the hub; None takes the one that the first adapter names.
        texts: with which graphs are compared with PyTorch, two or more of different lengths.
        int8: write a graph with int8 weights of the base too, for onnxruntime.
        note: called with what is done next.

    Returns:
        base_model, output: where they are.
        adapters: how many.
        bytes: of the weights; bytes_an_adapter: of a packed one.
        differences: the largest difference of each graph's outputs from PyTorch's, by the graph's name.

    Raises:
        FileExistsError: there is something in the output folder.
        TypeError, ValueError: something cannot be read or exported, or a graph gives other outputs.
    """
    if runtime not in get_args(Runtime):
        raise ValueError(f"unknown runtime {runtime!r}, expected one of {', '.join(get_args(Runtime))}")
    if int8 and runtime == "executorch":
        raise ValueError("int8=True: only onnxruntime's graphs have int8 weights; leave it out, or take runtime='onnx'")
    from ...export.verified import ADAPTERS, NULL

    check_new_folder(output)
    folders = _adapters(source)
    adapters = {name: read_adapter(folder) for name, folder in folders.items()}
    first = next(iter(adapters.values()))
    base = first.base(model)
    trust = of_base(model, NOTHING)
    note(f"{base} and {len(adapters)} adapters are read")
    kind, config = base_class(first, base, trust)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{base} is quantised, and graphs have its weights in float32. Export with the unquantised model "
            "(--model); an adapter that was trained on a quantised one fits it, with a warning that says how closely"
        )
    loaded, _ = load_model(base, kind, config, torch.float32, trust=trust)
    labels = {name: adapter.labels for name, adapter in adapters.items()}
    with new_folder(output) as folder, quiet_transformers():
        sample = _sample(loaded, base, texts, folder, trust)
        if runtime == "executorch":
            from ...export.executorch import PROGRAM as WEIGHTS
            from ...export.executorch import to_executorch

            note("the program is traced, lowered and compared with PyTorch")
            compared = to_executorch(loaded, folders, sample, folder, labels=labels)
        else:
            from ...export.onnx import WEIGHTS, to_onnx

            compared = to_onnx(loaded, folders, sample, folder, labels=labels, int8=int8, note=note)
        if runtime == "web":
            _write_page(folder, loaded, adapters)
        values = {
            "base_model": base,
            "output": str(output),
            "adapters": len(adapters),
            "bytes": (folder / WEIGHTS).stat().st_size,
            "bytes_an_adapter": (folder / ADAPTERS / f"{NULL}.safetensors").stat().st_size,
            "differences": {
                graph: max(row.difference for row in compared if row.graph == graph)
                for graph in dict.fromkeys(row.graph for row in compared)
            },
        }
        (folder / REPORT).write_text(json.dumps(values, indent=1))
        return values


def _adapters(source: Path) -> dict[str, Path]:
    """Folders of adapters by name."""
    one = folder_of(source)
    folders = {source.resolve().name: one} if (one / SETTINGS).is_file() else adapters_in(source)
    check_folder_names(folders)
    return folders


def _sample(model: Any, base: str, texts: Sequence[str], folder: Path, trust: Trust) -> "Sample":
    """Real inputs; the tokenizer is written beside the graphs."""
    from ...export.verified import sample_of_decoder, sample_of_encoder

    output = "logits" if heads_of(model) else "last_hidden_state"
    if model.main_input_name != "input_ids":
        return sample_of_encoder(example_inputs(model, rows=2, tokens=0), output)
    tokenizer = load_tokenizer(base, trust)
    generates = model.can_generate() and model.get_output_embeddings() is not None
    # With its chat template, which transformers.js does not look for in a file of its own.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    # Of different lengths: a mask without zeros would be left out of the graph.
    inputs = tokenizer(
        [*(texts or TEXTS)], padding=True, padding_side="left" if generates else None, return_tensors="pt"
    )
    if generates:
        return sample_of_decoder(model, inputs["input_ids"], inputs["attention_mask"])
    return sample_of_encoder(dict(inputs), output)


def _write_page(folder: Path, model: Any, adapters: Mapping[str, Adapter]) -> None:
    """The page, the list of adapters, and what transformers.js reads of a model."""
    from ...export.verified import ADAPTERS

    for file in WEB.iterdir():
        shutil.copy(file, folder / file.name)
    model.config.architectures = [type(model).__name__]
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    if model.can_generate():
        (folder / "generation_config.json").write_text(model.generation_config.to_json_string())
    listed = [{"name": name, "labels": adapter.labels} for name, adapter in adapters.items()]
    (folder / ADAPTERS / "index.json").write_text(json.dumps(listed))
