"""A base model with an adapter merged into its weights, verified against the adapted model before it is kept."""

import shutil
import warnings
from pathlib import Path
from typing import Any, cast, get_args

import torch
from huggingface_hub import constants, snapshot_download
from peft import PeftModel

from ...peft.merging import merge_model
from ...peft.model import DVoRAModel
from ...weight import MergePrecisionWarning
from ...whole_files import check_new_folder, new_folder
from ..models.adapters import Adapter, base_class, load_adapted, of_base, read_adapter
from ..models.bases import config_of, load_model, quiet_transformers
from ..models.hub import offline
from ..models.inputs import difference, example_output
from ..run_folder import RECORD
from ..settings import NOTHING
from . import Dtype

COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
    "spiece*", "sentencepiece*", "preprocessor_config.json", "processor_config.json", "generation_config.json",
)  # fmt: skip
"""Files that a model's folder has beside configuration and weights."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Of the difference of outputs, by the dtype of the weights: beyond it the merged folder is not written."""


def merge(
    folder: Path, output: Path, model: str | None = None, dtype: Dtype = "auto", shard_size: str = "5GB"
) -> dict[str, Any]:
    """Merge an adapter into its base model and write the result into a new folder, with the tokenizer beside it.

    The folder is loaded again and its outputs compared with the adapted model's before it takes its name.

    Args:
        folder: of the adapter, or of a run of `dvora train`.
        output: that must not exist, or be empty.
        model: the base, a folder or a name on the hub; None takes the one that the adapter names.
        dtype: of the merged weights: "float32", "bfloat16", "float16", or "auto" for the base's own.
        shard_size: largest size of one file of weights.

    Returns:
        What was merged, and `difference`: the largest one of outputs on a fixed input, relative to the largest output;
        None for models whose inputs are not known here. Of DVoRA also `lost_worst`, the largest share of an update that
        rounding changed, its `lost_layer`, and a `warning` of a large loss.

    Raises:
        FileExistsError: there is something in the output folder.
        TypeError, ValueError: the base is quantised, or something cannot be read or merged.
        RuntimeError: the merged model gives other outputs; nothing is kept.
    """
    if dtype not in get_args(Dtype):
        raise ValueError(f"unknown dtype {dtype!r}, expected one of {', '.join(get_args(Dtype))}")
    adapter = read_adapter(folder)
    base = adapter.base(model)
    if getattr(config_of(base, of_base(model, NOTHING)), "quantization_config", None) is not None:
        raise ValueError(
            f"{base} is quantised: its steps are larger than most updates, so merging would lose the adapter. Merge "
            "into the unquantised model (--model), or keep the adapter unmerged"
        )
    # Before hours of work.
    check_new_folder(output)
    adapted = load_adapted(adapter, model, dtype="auto" if dtype == "auto" else getattr(torch, dtype))
    expected = example_output(adapted)
    merged, losses, warning = _merged(adapted)
    del adapted
    worst = max(losses, key=lambda name: losses[name]) if losses else None
    with new_folder(output) as filling:
        with quiet_transformers(), offline():
            merged.save_pretrained(filling, max_shard_size=shard_size, safe_serialization=True)
        _copy_companions(adapter, base, filling)
        merged_dtype = merged.dtype
        del merged
        return {
            "adapter": str(adapter.folder),
            "base_model": base,
            "output": str(output),
            "method": adapter.method,
            "dtype": str(merged_dtype).removeprefix("torch."),
            "bytes": sum(path.stat().st_size for path in filling.glob("*.safetensors")),
            "files": sorted(path.name for path in filling.iterdir()),
            "difference": _checked_difference(filling, adapter, base, merged_dtype, expected),
            "lost_worst": losses[worst] if worst else None,
            "lost_layer": worst,
            "warning": warning,
        }


def _merged(adapted: PeftModel) -> tuple[Any, dict[str, float], str | None]:
    """The plain model; of DVoRA also the share of the update lost by layer name, and a warning of large losses."""
    if not isinstance(adapted.base_model, DVoRAModel):
        return cast(Any, adapted).merge_and_unload(), {}, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MergePrecisionWarning)
        losses = merge_model(adapted.base_model.model, None, keep_original=False, safe_merge=True)
    messages = [str(entry.message) for entry in caught if issubclass(entry.category, MergePrecisionWarning)]
    return cast(Any, adapted).unload(), losses, messages[0] if messages else None


def _checked_difference(
    folder: Path, adapter: Adapter, base: str, dtype: torch.dtype, expected: torch.Tensor | None
) -> float | None:
    """The difference of the outputs of a merged folder, loaded again, and of the adapted model.

    Raises:
        RuntimeError: it is too large for rounding.
    """
    # The base has been loaded, so it is here.
    make, _ = base_class(adapter, base, NOTHING)
    loaded, _ = load_model(str(folder), make, config_of(str(folder)))
    changed = difference(example_output(loaded), expected)
    if changed is not None and not changed <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"the merged model, loaded again, differs from the adapted one by {changed:.2g} of its largest output, "
            f"more than rounding to {dtype} explains; nothing was kept. Merge with another dtype, or keep the adapter"
        )
    return changed


def _copy_companions(adapter: Adapter, base: str, output: Path) -> None:
    """Copy the tokenizer's files: those beside the adapter, which may have more tokens, or else the base's.

    Raises:
        ValueError: one is a link to something else on this machine.
    """
    run = [adapter.folder.parent] if (adapter.folder.parent / RECORD).exists() else []
    base_folder = base if Path(base).is_dir() else snapshot_download(base, local_files_only=True)
    # In the hub's cache files are links to others there.
    cache = Path(constants.HF_HUB_CACHE).resolve()
    for folder in (adapter.folder, *run, Path(base_folder)):
        files = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
        if not any(path.name.startswith(("tokenizer", "vocab", "spiece", "preprocessor")) for path in files):
            continue
        inside = cache if folder.resolve().is_relative_to(cache) else folder.resolve()
        for path in files:
            if not path.resolve().is_relative_to(inside):
                raise ValueError(
                    f"{path} is a link out of its folder; what it leads to is not copied beside the merged model"
                )
            if not (output / path.name).exists():
                shutil.copyfile(path, output / path.name)
        return
