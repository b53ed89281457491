"""Run in a process of its own: load an adapter onto a tiny model and write what it gives.

python fresh_process.py MODEL FOLDER OUTPUTS
"""

import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from tiny import MODELS, outputs

import dvora

if __name__ == "__main__":
    name, folder, file = sys.argv[1:]
    assert dvora.__version__
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    loaded = PeftModel.from_pretrained(MODELS[name](), folder)
    save_file({"outputs": outputs(loaded), "merged": outputs(loaded.merge_and_unload())}, Path(file))
