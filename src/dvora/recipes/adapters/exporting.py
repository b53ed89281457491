"""Adapters exported with their base model, for runtimes without PyTorch."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from ...adapter_file.packs import check_folder_names
from ...adapter_file.values import adapters_in, folder_of
from ...adapter_file.values_file import SETTINGS
from ...whole_files import check_new_folder, new_folder
from ..data.tables import Note
from ..models.adapters import base_class, of_base, read_adapter
from ..models.bases import NO_LIMIT, heads_of, load_model, load_tokenizer, longest_text, quiet_transformers
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
        runtime: onnx; or web: the same with a page.
        model: the base, a folder or a name on the hub; None takes the one that the first adapter names.
        texts: with which graphs are compared with PyTorch, beside two sentences.
        int8: write a graph with int8 weights of the base too, for onnxruntime.
        note: called with what is done next.

    Returns:
        Where it is, how many `adapters`, their and the weights' bytes, and the largest of each graph's `differences`
        from PyTorch's outputs.

    Raises:
        FileExistsError: there is something in the output folder.
        TypeError, ValueError: something cannot be read or exported, or a graph gives other outputs.
    """
    if runtime not in get_args(Runtime):
        raise ValueError(f"unknown runtime {runtime!r}, expected one of {', '.join(get_args(Runtime))}")
    from ...export.packed import read_layout
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
    # Of the model, since encoders alone share the configuration of both.
    if loaded.config.is_encoder_decoder:
        raise ValueError(
            f"{base} is an encoder-decoder model ({type(loaded).__name__}), and graphs have one pass of an encoder or "
            "a decoder; merge the adapter (dvora merge), and export the merged model with a tool for such models"
        )
    # What is exported is for others, who need no folders of this machine.
    loaded.config.name_or_path = Path(base).resolve().name if Path(base).is_dir() else base
    labels = {name: adapter.labels for name, adapter in adapters.items()}
    with new_folder(output) as folder, quiet_transformers():
        from ...export.onnx import to_onnx

        sample = _sample(loaded, base, texts, folder, trust)
        compared = to_onnx(loaded, folders, sample, folder, labels=labels, int8=int8, note=note)
        if runtime == "web":
            _write_page(folder, loaded)
        graph = read_layout(folder)["graphs"]["one"]
        values = {
            "base_model": loaded.config.name_or_path,
            "adapters": len(adapters),
            "bytes": graph["weights"]["bytes"],
            "bytes_an_adapter": (folder / ADAPTERS / f"{NULL}.safetensors").stat().st_size,
            "differences": {
                graph: max(row.difference for row in compared if row.graph == graph)
                for graph in dict.fromkeys(row.graph for row in compared)
            },
        }
        (folder / REPORT).write_text(json.dumps(values, indent=1))
        return {**values, "base_model": base, "output": str(output)}


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
    if generates:
        tokenizer.padding_side = "left"
    longest = longest_text(tokenizer, model.config.get_text_config())
    described = _write_tokenizer(tokenizer, longest if longest < NO_LIMIT else None, folder)
    inputs = _tokens(tokenizer, texts, longest)
    if generates:
        sample = sample_of_decoder(model, inputs["input_ids"], inputs["attention_mask"])
    else:
        sample = sample_of_encoder(dict(inputs), output)
    return replace(sample, tokenizer=described)


def _tokens(tokenizer: Any, texts: Sequence[str], longest: int) -> Any:
    """Texts as a model reads them, and two of different lengths: a graph keeps no mask without zeros."""
    for text in texts:
        count = len(tokenizer(text, verbose=False)["input_ids"])
        if not 0 < count <= longest:
            raise ValueError(f"the text {text[:40]!r} has {count or 'no'} tokens, expected 1 to {longest:,}")
    cut = {"truncation": True, "max_length": longest} if longest < NO_LIMIT else {}
    return tokenizer([*texts, *TEXTS], padding=True, return_tensors="pt", **cut)


def _write_tokenizer(tokenizer: Any, longest: int | None, folder: Path) -> dict[str, Any]:
    """Write a tokenizer that cuts texts at what the model reads and pads a batch to its longest one; what that is."""
    padding = {"direction": tokenizer.padding_side, "pad_id": tokenizer.pad_token_id, "pad_token": tokenizer.pad_token}
    if longest is not None:
        tokenizer.model_max_length = longest
    # transformers is told in each call; all others read this file.
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        if longest is not None:
            tokenizer.backend_tokenizer.enable_truncation(longest, direction=tokenizer.truncation_side)
        tokenizer.backend_tokenizer.enable_padding(**padding, pad_type_id=tokenizer.pad_token_type_id)
    # With its chat template, which transformers.js does not look for in a file of its own.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    return {"longest": longest, "truncation": {"direction": tokenizer.truncation_side}, "padding": padding}


def _write_page(folder: Path, model: Any) -> None:
    """The page, and what transformers.js reads of a model."""
    for file in WEB.iterdir():
        shutil.copy(file, folder / file.name)
    model.config.architectures = [type(model).__name__]
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    if model.can_generate():
        (folder / "generation_config.json").write_text(model.generation_config.to_json_string())
