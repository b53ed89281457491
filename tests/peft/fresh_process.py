"""What an adapter gives in an interpreter of its own, which loads it onto a tiny model.

python -m tests.peft.fresh_process MODEL FOLDER OUTPUTS
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.peft.tiny import MODELS, outputs


def run_alone(name: str, adapter: Path, folder: Path) -> dict[str, Tensor]:
    """Outputs of a tiny model with an adapter, unmerged and merged, from a process with another hash seed."""
    file = folder / "outputs.safetensors"
    command = [sys.executable, "-m", __spec__.name, name, adapter, file]
    environment = {**os.environ, "PYTHONHASHSEED": "2", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
    return load_file(file)


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    loaded = PeftModel.from_pretrained(MODELS[sys.argv[1]](), sys.argv[2])
    save_file({"outputs": outputs(loaded), "merged": outputs(loaded.merge_and_unload())}, sys.argv[3])
