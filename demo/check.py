"""Load the saved adapter in a process that knows nothing of the training: `python -m demo.check FOLDER`.

The folder holds `adapter` and `check.json`, the sentences to classify; `check.pt` will hold their logits.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

from demo.model import load_adapter, load_classifier
from demo.train import encode
from materials.batches import unlabelled
from materials.models import minilm

ROOT = Path(__file__).parent.parent
# Sums over several threads depend on their number, so both processes use this one.
THREADS = 2


def logits_in_a_fresh_process(folder: Path, texts: Sequence[str]) -> Tensor:
    """(N, classes) logits of the texts by the adapter saved in `folder/adapter`, computed by another Python process."""
    (folder / "check.json").write_text(json.dumps(list(texts)), encoding="utf-8")
    command = [sys.executable, "-m", "demo.check", str(folder.resolve())]
    # What other packages print while they are imported is of interest only if something fails.
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"the saved adapter cannot be loaded in a fresh process:\n{ended.stderr}")
    logits: Tensor = torch.load(folder / "check.pt", weights_only=True)
    return logits


def main(folder: Path) -> None:
    """Write the logits that the saved adapter gives."""
    torch.set_num_threads(THREADS)
    quiet()
    texts = json.loads((folder / "check.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    model = load_adapter(load_classifier(minilm()), folder / "adapter")
    torch.save(encode(model, unlabelled(texts, tokenizer)), folder / "check.pt")


def quiet() -> None:
    """Keep transformers from reporting the weights of the pooling layer, which this model leaves out on purpose."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
