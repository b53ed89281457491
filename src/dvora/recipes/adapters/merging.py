"""A base model with an adapter merged into its weights, verified against the adapted model before it is kept."""

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import constants
from peft import PeftModel
from transformers.utils.hub import cached_file

from ...peft.merging import merge_model
from ...peft.model import DVoRAModel
from ...weight import MergePrecisionWarning
from ...whole_files import check_new_folder, new_folder
from ..models.adapter_folder import Adapter, read_adapter
from ..models.adapters import base_class, load_adapted, of_base
from ..models.architectures import config_of, load_base, quietly
from ..models.hub import offline
from ..models.inputs import difference, example_output
from ..settings import NOTHING, Trust
from . import DTYPES

COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
    "spiece*", "sentencepiece*", "preprocessor_config.json", "processor_config.json", "generation_config.json",
)  # fmt: skip
"""Files that a model's folder has beside configuration and weights."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Of the difference of outputs, by the dtype of the weights: beyond it the merged folder is not kept."""


@dataclass(frozen=True)
class Merge:
    """A merged model.

    Args:
        adapter, base_model, output: where they are.
        method: of the adapter.
        dtype: of the merged weights.
        bytes: of the weights' files.
        files: in the folder.
        difference: largest difference of the outputs of the merged model, loaded again, and of the adapted one, on a
            fixed input, relative to the largest output; None for models whose inputs are not known here.
        lost_worst, lost_layer: the largest share of an update that rounding changed, and where; None for methods
            other than DVoRA.
        warning: a large loss in words.
    """

    adapter: str
    base_model: str
    output: str
    method: str
    dtype: str
    bytes: int
    files: list[str]
    difference: float | None
    lost_worst: float | None
    lost_layer: str | None
    warning: str | None


def merge(folder: Path, output: Path, model: str | None = None, dtype: str = "auto", shard_size: str = "5GB") -> Merge:
    """Merge an adapter into its base model and write the result into a new folder, with the tokenizer beside it.

    The folder is loaded again and its outputs compared with the adapted model's before it takes its name.

    Args:
        folder: of the adapter, or of a run of `dvora train`.
        output: that must not exist, or be empty.
        model: the base, a folder or a name on the hub; None takes the one that the adapter names.
        dtype: of the merged weights: "float32", "bfloat16", "float16", or "auto" for the base's own.
        shard_size: largest size of one file of weights.

    Raises:
        FileExistsError: there is something in the output folder.
        TypeError, ValueError: the base is quantised, or something cannot be read or merged.
        RuntimeError: the merged model gives other outputs; nothing is kept.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    adapter = read_adapter(folder)
    base, trust = adapter.base(model), of_base(model, NOTHING)
    _check_unquantised(base, trust)
    # Before hours of work.
    check_new_folder(output)
    adapted = load_adapted(adapter, model, dtype="auto" if dtype == "auto" else getattr(torch, dtype))
    expected = example_output(adapted)
    losses, warning = _merge_into(adapted)
    merged = cast(Any, adapted).unload() if losses is not None else cast(Any, adapted).merge_and_unload()
    worst = max(losses, key=lambda name: losses[name]) if losses else None
    with new_folder(output) as filling:
        with quietly(), offline():
            merged.save_pretrained(filling, max_shard_size=shard_size, safe_serialization=True)
        _copy_companions(adapter, base, filling)
        kept_dtype = merged.dtype
        del merged, adapted
        found = _verified(filling, adapter, base, kept_dtype, expected)
        files = sorted(path.name for path in filling.iterdir())
        size = sum(path.stat().st_size for path in filling.glob("*.safetensors"))
    return Merge(
        str(adapter.folder), base, str(output), adapter.method, str(kept_dtype).removeprefix("torch."), size, files,
        found, losses[worst] if losses and worst else None, worst, warning,
    )  # fmt: skip


def _check_unquantised(base: str, trust: Trust) -> None:
    if getattr(config_of(base, trust), "quantization_config", None) is not None:
        raise ValueError(
            f"{base} is quantised: its steps are larger than most updates, so merging would lose the adapter. Merge "
            "into the unquantised model (--model), or keep the adapter unmerged"
        )


def _merge_into(adapted: PeftModel) -> tuple[dict[str, float] | None, str | None]:
    """Merge DVoRA's layers in place.

    Returns:
        The share of the update lost by layer name, and a warning of large ones; None for other methods.
    """
    if not isinstance(adapted.base_model, DVoRAModel):
        return None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MergePrecisionWarning)
        losses = merge_model(adapted.base_model.model, None, keep_original=False, safe_merge=True)
    messages = [str(entry.message) for entry in caught if issubclass(entry.category, MergePrecisionWarning)]
    return losses, messages[0] if messages else None


def _verified(
    folder: Path, adapter: Adapter, base: str, dtype: torch.dtype, expected: torch.Tensor | None
) -> float | None:
    """The difference of the outputs of a merged folder, loaded again, and of the adapted model.

    Raises:
        RuntimeError: it is too large for rounding.
    """
    # The base has been loaded, so it is here.
    loaded = load_base(str(folder), base_class(adapter, base, NOTHING)[0], config_of(str(folder)))
    found = difference(example_output(loaded), expected)
    if found is not None and not found <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"the merged model, loaded again, differs from the adapted one by {found:.2g} of its largest output, "
            f"more than rounding to {dtype} explains; nothing was kept. Merge with another dtype, or keep the adapter"
        )
    return found


def _copy_companions(adapter: Adapter, base: str, output: Path) -> None:
    """Copy the tokenizer's files: those beside the adapter, which may have more tokens, or else the base's.

    Raises:
        ValueError: one is a link to something else on this machine.
    """
    run = [adapter.folder.parent] if (adapter.folder.parent / "run.json").exists() else []
    for folder in (adapter.folder, *run, _folder_of(base)):
        found = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
        if any(path.name.startswith(("tokenizer", "vocab", "spiece", "preprocessor")) for path in found):
            for path in found:
                _check_own(path, folder)
                if not (output / path.name).exists():
                    shutil.copyfile(path, output / path.name)
            return


def _check_own(path: Path, folder: Path) -> None:
    """Refuse a link out of a folder; in the hub's cache files are links to others there."""
    real, cache = path.resolve(), Path(constants.HF_HUB_CACHE).resolve()
    if not real.is_relative_to(folder.resolve()) and not (
        real.is_relative_to(cache) and folder.resolve().is_relative_to(cache)
    ):
        raise ValueError(f"{path} is a link out of its folder; what it leads to is not copied beside the merged model")


def _folder_of(base: str) -> Path:
    """The folder that a model's files are in, in the cache for one of the hub."""
    if Path(base).is_dir():
        return Path(base)
    file = cached_file(base, "config.json", local_files_only=True)
    assert file is not None
    return Path(file).parent
