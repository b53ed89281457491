"""A model hub's cache on disk with the tiny models, so that `from_pretrained("owner/name")` works without a network."""

import json
import shutil
from pathlib import Path

from peft import LoraConfig
from transformers.utils import logging

from conformance.tiny_models import MODELS, tiny_model

_COMMIT = "0" * 40
_LORA_ADAPTER, _LORA_REVISION = "peft-internal-testing/tiny-opt-lora-revision", "test"
_PICTURES = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}}


def build_hub(home: Path) -> None:
    """Write the cache under `home`, which is what HF_HOME has to name; an older one is replaced."""
    shutil.rmtree(home, ignore_errors=True)
    logging.disable_progress_bar()
    for hub_id in MODELS:
        model, folder = tiny_model(hub_id), _snapshot(home, hub_id, "main")
        model.save_pretrained(folder)
        if model.main_input_name == "pixel_values":
            (folder / "preprocessor_config.json").write_text(json.dumps(_PICTURES), encoding="utf-8")
    LoraConfig(r=8, target_modules=["q_proj"]).save_pretrained(str(_snapshot(home, _LORA_ADAPTER, _LORA_REVISION)))


def _snapshot(home: Path, hub_id: str, revision: str) -> Path:
    """The folder of a repository's files, with the reference that leads there."""
    repository = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    reference = repository / "refs" / revision
    reference.parent.mkdir(parents=True)
    reference.write_text(_COMMIT, encoding="utf-8")
    snapshot = repository / "snapshots" / _COMMIT
    snapshot.mkdir(parents=True)
    return snapshot
