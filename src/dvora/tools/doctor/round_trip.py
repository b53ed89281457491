"""Saving an adapter, and the outputs that it gives in a fresh process."""

import copy
import pickle
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from .examined import CannotCheckError, Examined, called, tensors_of

_START = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
"""As new as a spawned process; who examines many adapters can have imports made once (`set_forkserver_preload`)."""


def outputs_of_the_file(examined: Examined) -> Tensor:
    """The outputs of the adapter, saved and loaded by another process onto a copy of the base.

    Raises:
        CannotCheckError: several adapters are active, or the base cannot be copied.
    """
    adapter = examined.adapter
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        examined.model.save_pretrained(str(folder / "saved"), selected_adapters=[adapter])
        own = folder / "saved" / adapter
        try:
            torch.save(copy.deepcopy(examined.model).unload(), folder / "base.pt")
        except (pickle.PicklingError, AttributeError, TypeError, ValueError, NotImplementedError) as problem:
            raise CannotCheckError(f"the base cannot be handed to another process: {problem}") from problem
        torch.save(examined.inputs, folder / "inputs.pt")
        saved = own if own.is_dir() else folder / "saved"
        with ProcessPoolExecutor(1, get_context(_START)) as fresh:
            return fresh.submit(_loaded_outputs, folder, saved, torch.get_num_threads()).result()


def _loaded_outputs(folder: Path, saved: Path, threads: int) -> Tensor:
    import dvora

    assert dvora.__version__  # importing it makes the method known to PEFT
    torch.set_num_threads(threads)
    base = torch.load(folder / "base.pt", weights_only=False)
    inputs = torch.load(folder / "inputs.pt", weights_only=False)
    model = PeftModel.from_pretrained(base, str(saved)).eval()
    with torch.no_grad():
        return tensors_of(called(model, inputs))[0].cpu()
