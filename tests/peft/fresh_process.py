"""What an adapter gives in a process of its own, which loads it onto a tiny model.

python -m tests.peft.fresh_process MODEL FOLDER OUTPUTS
"""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.fresh import FRESH
from tests.peft.tiny import MODELS, outputs


def run_fresh(name: str, adapter: Path, folder: Path) -> dict[str, Tensor]:
    """Outputs of a tiny model with an adapter, unmerged and merged, from a process of its own."""
    file = folder / "outputs.safetensors"
    with ProcessPoolExecutor(1, mp_context=FRESH) as process:
        process.submit(write_outputs, name, adapter, file).result()
    return load_file(file)


def run_alone(name: str, adapter: Path, folder: Path) -> dict[str, Tensor]:
    """The same from an interpreter of its own, which shares nothing with this one and has another hash seed."""
    file = folder / "outputs.safetensors"
    command = [sys.executable, "-m", __spec__.name, name, adapter, file]
    environment = {**os.environ, "PYTHONHASHSEED": "2", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
    return load_file(file)


def write_outputs(name: str, adapter: Path, file: Path) -> None:
    """Load, and write both outputs to a file."""
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    loaded = PeftModel.from_pretrained(MODELS[name](), adapter)
    save_file({"outputs": outputs(loaded), "merged": outputs(loaded.merge_and_unload())}, file)


if __name__ == "__main__":
    write_outputs(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
