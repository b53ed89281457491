"""Run in a process of its own: load an adapter onto a tiny model and write what it gives.

python -m tests.tuner.convert.fresh_process MODEL FOLDER OUTPUTS
"""

import subprocess
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import dvora
from tests.tuner.tiny import MODELS, outputs

ROOT = Path(__file__).parents[3]


def run_fresh(name: str, adapter: Path, folder: Path) -> dict[str, Tensor]:
    """Outputs of a tiny model with an adapter, unmerged and merged, from a process of its own."""
    file = folder / "outputs.safetensors"
    command = [sys.executable, "-m", __spec__.name, name, str(adapter), str(file)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    return load_file(file)


if __name__ == "__main__":
    name, folder, file = sys.argv[1:]
    assert dvora.__version__
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    loaded = PeftModel.from_pretrained(MODELS[name](), folder)
    save_file({"outputs": outputs(loaded), "merged": outputs(loaded.merge_and_unload())}, Path(file))
