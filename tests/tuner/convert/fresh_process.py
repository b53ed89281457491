"""Run in a process of its own: load adapters onto tiny models and write what they give.

python -m tests.tuner.convert.fresh_process MODEL FOLDER OUTPUTS [MODEL FOLDER OUTPUTS ...]
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

import dvora
from tests.tuner.tiny import MODELS, outputs

ROOT = Path(__file__).parents[3]


def run_fresh(adapters: dict[str, Path], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Outputs of tiny models with an adapter each, unmerged and merged, from one process with another hash seed."""
    files = {name: folder / f"{name}.safetensors" for name in adapters}
    triples = [part for name in adapters for part in (name, str(adapters[name]), str(files[name]))]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-m", __spec__.name, *triples],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    return {name: load_file(file) for name, file in files.items()}


if __name__ == "__main__":
    assert dvora.__version__
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    arguments = iter(sys.argv[1:])
    for name, adapter, file in zip(arguments, arguments, arguments, strict=True):
        loaded = PeftModel.from_pretrained(MODELS[name](), adapter)
        save_file({"outputs": outputs(loaded), "merged": outputs(loaded.merge_and_unload())}, Path(file))
