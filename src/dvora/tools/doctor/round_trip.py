"""Saving the adapter, and loading it in a fresh process."""

import copy
import pickle
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from .findings import Finding, within_limit
from .layer_checks import TOLERANCES
from .watched import Inputs, called, distance, tensor_of

_NAME = "save and load"
_START = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
"""As new as a spawned process; who examines many adapters can have imports made once (`set_forkserver_preload`)."""


def round_trip(model: PeftModel, inputs: Inputs, adapted: Tensor) -> Finding:
    """The outputs of the adapter, saved and loaded by another process onto a copy of the base."""
    active = list(model.active_adapters)
    if len(active) != 1:
        return Finding(_NAME, "skip", "several adapters are active at once")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(str(folder / "saved"), selected_adapters=active)
        own = folder / "saved" / active[0]
        saved = own if own.is_dir() else folder / "saved"
        try:
            _write_base(model, folder / "base.pt")
        except (pickle.PicklingError, AttributeError, TypeError, ValueError, NotImplementedError) as problem:
            return Finding(_NAME, "skip", f"the base cannot be handed to another process: {problem}")
        torch.save(inputs, folder / "inputs.pt")
        with ProcessPoolExecutor(1, get_context(_START)) as fresh:
            outputs = fresh.submit(_loaded_outputs, folder, saved, torch.get_num_threads()).result()
    return within_limit(
        _NAME,
        distance(outputs, adapted.cpu()),
        TOLERANCES[adapted.dtype],
        "outputs after saving and loading in a fresh process differ by",
        "the file is not the adapter: look which of its values differ (dvora inspect), and in which dtype they are",
    )


def _write_base(model: PeftModel, file: Path) -> None:
    """The base without its adapters."""
    torch.save(copy.deepcopy(model).unload(), file)


def _loaded_outputs(folder: Path, saved: Path, threads: int) -> Tensor:
    import dvora

    assert dvora.__version__  # importing it makes the method known to PEFT
    torch.set_num_threads(threads)
    base = torch.load(folder / "base.pt", weights_only=False)
    inputs = torch.load(folder / "inputs.pt", weights_only=False)
    model = PeftModel.from_pretrained(base, str(saved)).eval()
    with torch.no_grad():
        return tensor_of(called(model, inputs)).cpu()
